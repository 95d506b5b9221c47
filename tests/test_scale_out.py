"""Two gloo processes reproduce one: DDP and FSDP2. And transformers' Trainer, through one callback."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from luthier import attach, load, tiny

WORKER = '''
import copy, os, sys, torch, torch.distributed as dist
from luthier import attach, tiny
mode, chain = sys.argv[1:3]
torch.set_num_threads(1)
dist.init_process_group("gloo")
tuned = attach(tiny.build("llama"), chain)
ids = torch.randint(4, 64, (4, 12), generator=torch.Generator().manual_seed(5))

def losses(model, params, ids):
    opt, out = torch.optim.SGD(params, lr=0.5), []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward(); opt.step(); opt.zero_grad(); out.append(loss.detach())
    return torch.stack(out)

one = copy.deepcopy(tuned)
expect = losses(one, [p for _, p in one.trainable()], ids)
if mode == "ddp":
    model = torch.nn.parallel.DistributedDataParallel(tuned)
else:
    from torch.distributed.fsdp import fully_shard
    for block in tuned.model.model.layers:
        fully_shard(block)
    model = fully_shard(tuned)
rank = dist.get_rank()
got = losses(model, [p for p in model.parameters() if p.requires_grad], ids[2 * rank:2 * rank + 2])
dist.all_reduce(got)
assert (got / 2 - expect).abs().max() < 1e-5, (got / 2, expect)
assert expect[2] < expect[0]
print("same", flush=True)
dist.barrier()
os._exit(0)
'''


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
@pytest.mark.parametrize("chain", ["lora(at='linear')", "prompt(n=3) >> houlsby(width=8)"])
def test_two_processes_reproduce_one(mode, chain, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
                          "--rdzv-endpoint=127.0.0.1:0", str(worker), mode, chain], capture_output=True,
                         text=True, env=env, timeout=300)
    assert run.returncode == 0 and run.stdout.count("same") == 2, run.stderr[-3000:]


def test_as_the_model_inside_trainer():
    from transformers import Trainer, TrainingArguments

    from luthier.hf import LuthierCallback

    ids = torch.randint(4, 64, (32, 12), generator=torch.Generator().manual_seed(5))
    model = tiny.build("llama")
    tuned = attach(model, "adalora")
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
                                 save_steps=6,
                                 logging_steps=1, use_cpu=True, disable_tqdm=True, save_only_model=True)
        trainer = Trainer(model=tuned, args=args, train_dataset=[dict(input_ids=i, labels=i) for i in ids],
                          callbacks=[LuthierCallback()])
        trainer.train()
        losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
        assert float(losses[-1]) < float(losses[0]) and tuned.stepped == tuned.total_steps == 6
        batch = dict(input_ids=ids[:2])
        with torch.no_grad():
            expect = tuned.eval()(**batch).logits
            tuned.detach()
            again = load(model, Path(folder) / "checkpoint-6" / "luthier")
            assert torch.equal(again.eval()(**batch).logits, expect)
