"""Side-tuning on a laptop: a thin network beside a vision-language model learns, and no gradient enters the model.

    python examples/side_tuning_on_a_laptop.py                    # DINOv2 and SmolLM2, questions about coloured shapes
    python examples/side_tuning_on_a_laptop.py my-questions.jsonl # rows like {"image": "a.jpg", "question": ..., "answer": ...}

The bridge between the two models is trained first. Then the language model is fitted to the task in three ways, from the same
start: a ladder beside it, LoRA inside it, and all of its weights. What counts on a laptop is printed for each: the most memory
that a training step holds at once, measured.
"""

import sys

import torch

import luthier
from luthier import tasks
from luthier.cost import nbytes, peak
from luthier.train import train

WAYS = {"side network": "ladder(at='text.block.0.in text.block.*.out text.final', reduce=8)",
        "LoRA": "lora(rank=8, at='text.attn.q text.attn.v')",
        "full tuning": "full(at='text')"}


def memory(task, tuned, batch):
    """(bytes that a training step holds at most, those of them that are weights)"""
    tuned.train()
    optimizer = torch.optim.AdamW([p for _, p in tuned.trainable()], lr=0.0)

    def step():
        task.loss(tuned, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()                                           # from the second step on, the optimizer's averages are there
    weights = [*tuned.parameters(), *tuned.buffers()]
    averages = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    return peak(step, [*weights, *averages, *batch.values()]), nbytes(weights)


def main(data="scenes:vqa", model="dinov2-s+smollm2-135m:limber(tokens=4)", steps=150, limit=600, image_size=56):
    # 1. Questions about pictures, and the two models with an untrained bridge between them
    task = tasks.open(data, model=model, limit=int(limit), image_size=image_size)
    base = task.build(seed=0)
    print(f"{task.size()} rows to learn from; {sum(p.numel() for p in base.parameters()):,} numbers in the model")

    # 2. The bridge learns to show pictures to the language model; from here on it stays as it is
    bridge = luthier.attach(base, "full(at='connector')")
    train(bridge, task, steps=int(steps), lr=3e-3, batch_size=16)
    print(f"bridged: {task.evaluate(bridge)[task.metric]:.1%}")

    # 3. Three ways to fit the language model to the task, each from that start
    found = {}
    for name, chain in WAYS.items():
        tuned = luthier.attach(base, chain)
        with task.seeing(tuned):                     # frozen eyes look once at each picture
            held, weights = memory(task, tuned, next(iter(task.batches("train", 16))))
        train(tuned, task, steps=int(steps), lr=1e-4 if name == "full tuning" else 1e-3, batch_size=16)
        score = task.evaluate(tuned)[task.metric]
        trained = sum(p.numel() for _, p in tuned.trainable())
        found[name] = held, weights, score
        print(f"{name:13} {trained:13,} trained   {held / 1e6:8,.0f} MB at most, {(held - weights) / 1e6:8,.0f} MB beside the "
              f"weights   {score:.1%}")
        tuned.detach()                               # the model is what it was, to the bit
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
