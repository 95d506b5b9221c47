"""Freezing the bottom layers of MiniLM, and what full tuning changes in each layer, on TREC. Shi et al., Telly, 2023,
arXiv:2304.05216.

The paper's encoders were pretrained on code, of which none is to be had here; MiniLM and question types stand in for them.
Costs are counted, not timed: trained numbers, and FLOPs of a training step (forward and backward).
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from luthier.evidence import _bench, fact, judge, not_below
from luthier.procedures import layers

SYSTEM, METHODS, SEEDS, MINUTES = "B051", ("telly", "full"), (0, 1, 2), 10
CLAIM = "Tuning changes the top layers most; freezing the bottom half costs at most 1 point while FLOPs and trained numbers fall"
BASELINE = "full fine-tuning at its own best learning rate"
MODEL, DATA = "minilm (22.7M, 6 layers)", "TREC question types: 300 train, 100 validation, 250 test rows"
STEPS, BATCH, ROWS, RATES = 60, 16, 96, (1e-4, 3e-4, 1e-3)
ARMS = {"full": "full()", "telly": "telly(freeze=3, at='all -head')"}


def flops(tuned, task):
    """Of the matrix products of one training step."""
    tuned.train()
    with FlopCounterMode(display=False) as counter:
        task.loss(tuned, _bench.first(task)).backward()
    tuned.zero_grad()
    tuned.eval()
    return counter.get_total_flops()


def run(seeds):
    task = _bench.task("trec", "minilm", 300, 100, 250)
    batches = [next(iter(task.batches("test", ROWS, shuffle=False)))]
    facts, base = {"flops": {}}, task.build(0)

    def after(name, seed, tuned):
        facts["flops"][name] = flops(tuned, task)
        rows = layers.profile(base, tuned, batches)
        _bench.say(layers.show(rows))
        return {f"{kind}.{k}": row[kind] for kind in ("cka", "rsa") for k, row in enumerate(rows.values())}

    per_seed, found = _bench.arms(task, ARMS, seeds, STEPS, BATCH, RATES, after)
    with torch.no_grad():
        facts["probes"] = layers.probes(base, task)
    return {"per_seed": per_seed, "facts": facts | found}


def mean(values):
    return sum(values) / len(values)


def verdict(figures):
    f, per = figures["facts"], figures["per_seed"]
    depth = len(f["probes"])
    change = {kind: [1 - mean(per[f"full.{kind}.{k}"]) for k in range(depth)] for kind in ("cka", "rsa")}
    frozen = max(1 - v for k in range(3) for v in per[f"telly.cka.{k}"])
    spent, work = f["trained_parameters"], f["flops"]
    return judge(
        [fact(min(v[-2:]) > max(v[:-2]), f"1 - {kind.upper()} after full tuning, upwards: {' '.join(f'{x:.3f}' for x in v)}; "
              "the top two needed above the rest") for kind, v in change.items()]
        + [not_below(figures, "telly", "full", 0.01, "accuracy with the bottom half frozen within 1 point of full tuning")],
        [fact(spent["telly"] < 0.6 * spent["full"], f"trained numbers: {spent}, needed below 60%"),
         fact(work["telly"] < 0.8 * work["full"], f"FLOPs of a training step: {work}, needed below 80%"),
         fact(frozen < 1e-6, f"frozen layers still compute the same: largest 1 - CKA {frozen:.1e}")])
