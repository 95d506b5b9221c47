"""The density loss beside LoRA on MiniLM with ReLU, on TREC. Runwal et al., DEFT, 2024, arXiv:2402.01911.

MiniLM's GELU is replaced by ReLU, so that neurons can be exactly off; LoRA on all linears adapts to it with and without the loss.
Density is the share of nonzeros among what the MLPs' last matrices read, on test rows without padding. ε is 0.01: at the 1e-7 of
the authors' long runs, values such as these get hardly any gradient. The last two arms stand on a base rounded to 8 bits.
"""

import torch
from torch import nn

from luthier import attach, zoo
from luthier.evidence import _bench, fact, judge, not_below
from luthier.procedures.density import density
from luthier.site import find
from luthier.train import train

SYSTEM, METHODS, SEEDS, MINUTES = "B065", ("deft", "lora"), (0, 1, 2), 10
CLAIM = "At most 1 point of accuracy for at least 30% lower held-out activation density; also on an 8-bit base; the loss as given"
BASELINE = "the same LoRA without the loss, at its own best learning rate"
MODEL, DATA = "minilm (22.7M) with ReLU in place of GELU", "TREC question types: 300 train, 100 validation, 250 test rows"
STEPS, BATCH, LORA, LOSS = 75, 16, "lora(at='linear', rank=8)", "deft(weight_l=1.0, eps=0.01)"
ARMS = {"lora": LORA, "deft": f"{LORA} >> {LOSS}"}


def with_relu(task):
    task.model = model = zoo.load("minilm")
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.ReLU()
    return task


@torch.no_grad()
def on_8_bits(task, chain, seed, lr):
    """The chain trained on a base whose linear weights are rounded to 255 levels a row."""
    model = task.build(seed)
    for site in find(model, "linear"):
        scale = site.W.abs().amax(1, keepdim=True) / 127
        site.parameter.copy_((site.W / scale).round() * scale)
    tuned = attach(model, _bench.with_head(chain), seed=seed)
    with torch.enable_grad():
        train(tuned, task, steps=STEPS, lr=lr, batch_size=BATCH, seed=seed, progress=False, log=False)
    return tuned.eval()


def fires(tuned, task):
    found = density(tuned, task.batches("test", 64, shuffle=False))
    return sum(found.values()) / len(found)


def formula_gap(task):
    """The penalty of a forward pass against the sum over hooks on the last matrices."""
    tuned, seen, batch = attach(task.build(0), f"{LORA} >> {LOSS}").train(), [], _bench.first(task)
    handles = [layer.output.dense.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
               for layer in tuned.model.backbone.encoder.layer]
    task.loss(tuned, batch)
    [h.remove() for h in handles]
    by_hand = torch.stack([(o**2 / (o**2 + 0.01)).mean() for o in seen]).mean()
    return abs(float((tuned.penalty() - by_hand).detach()))


def run(seeds):
    task = with_relu(_bench.task("trec", "minilm", train=300, val=100, test=250))
    per_seed, facts = _bench.arms(task, ARMS, seeds, STEPS, BATCH,
                                   after=lambda name, seed, tuned: {"density": fires(tuned, task)})
    for name, chain in ARMS.items():
        for seed in seeds:
            tuned = on_8_bits(task, chain, seed, facts["learning_rate"][name])
            per_seed.setdefault(f"8bit.{name}", []).append(_bench.score(tuned, task))
            per_seed.setdefault(f"8bit.{name}.density", []).append(fires(tuned, task))
            _bench.say(f"8bit.{name} seed {seed}: {per_seed[f'8bit.{name}'][-1]:.4f}")
    return {"per_seed": per_seed, "facts": facts | {"formula_gap": formula_gap(task)}}


def fall(per_seed, prefix):
    with_, without = (sum(per_seed[f"{prefix}{n}.density"]) / len(per_seed["lora"]) for n in ("deft", "lora"))
    return 1 - with_ / without, f"density {without:.3f} -> {with_:.3f}: {1 - with_ / without:.0%} less, needed 30%"


def verdict(figures):
    per, f = figures["per_seed"], figures["facts"]
    plain, rounded = fall(per, ""), fall(per, "8bit.")
    return judge(
        [fact(plain[0] >= 0.3, plain[1]), not_below(figures, "deft", "lora", 0.01, "accuracy within 1 point of plain LoRA"),
         fact(rounded[0] >= 0.3, "on the 8-bit base, " + rounded[1]),
         not_below(figures, "8bit.deft", "8bit.lora", 0.01, "on the 8-bit base, accuracy within 1 point")],
        [fact(f["formula_gap"] < 1e-5, f"penalty minus the sum by hooks: {f['formula_gap']:.1e}"),
         fact(f["trained_parameters"]["deft"] == f["trained_parameters"]["lora"], "the loss trains nothing of its own")])
