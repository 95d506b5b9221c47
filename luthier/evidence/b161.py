"""AdaLoRA on MiniLM and TREC: the schedule of the budget, the ranks it leaves, and uniform LoRA at the same low budget.
Zhang et al., ICLR 2023, arXiv:2303.10512."""

import math

import torch

from luthier.evidence import _bench, fact, judge, not_below

SYSTEM, METHODS, SEEDS, MINUTES = "B161", ("adalora",), (0, 1, 2, 3, 4), 15
CLAIM = "Active triplets follow a cubic schedule to the budget; ranks differ; P and Q stay orthogonal; no worse than uniform LoRA"
BASELINE = "lora of uniform rank 1 at the same matrices: the final budget"
MODEL, DATA = "minilm (22.7M)", "TREC question types: 400 train, 150 validation, 400 test rows"
STEPS, RANK, TARGET = 200, 4, 1
AT = "attn.q attn.k attn.v attn.o mlp.up mlp.down"


def active(tuned):
    return sum(int((p.lam != 0).sum()) for p in states(tuned))


def states(tuned):
    return [p for p in tuned.states.values() if hasattr(p, "lam")]


def cubic(k, sites, warmup=0.1, final=0.3):
    """Eq. 10 of the paper, written again here rather than taken from the method."""
    start, stop = int(warmup * STEPS), STEPS - int(final * STEPS)
    if k <= start:
        return RANK * sites
    if k >= stop:
        return TARGET * sites
    return int(TARGET * sites + (RANK - TARGET) * sites * (1 - (k - start) / (stop - start)) ** 3)


@torch.no_grad()
def orthogonality(tuned):
    """Mean absolute entry of P Pᵀ - I and Q Qᵀ - I over the triplets of all matrices, before any were dropped."""
    errors = [(M @ M.T - torch.eye(len(M))).abs() for p in states(tuned) for M in (p.P, p.Q) if len(M)]
    return float(torch.cat([e.flatten() for e in errors]).mean())


def run(seeds):
    task = _bench.task("trec", "minilm")
    chain = f"adalora(rank={RANK}, target={TARGET}, at={AT!r})"
    per_seed, facts = _bench.arms(task, {"lora": f"lora(rank={TARGET}, at={AT!r})", "adalora": chain}, seeds, STEPS)
    log, seen = [], {}

    def watch(k, total, loss):
        log.append((k, active(seen["tuned"]), cubic(k, len(states(seen["tuned"])))))
        if k == total - 1:
            seen["orthogonality"] = orthogonality(seen["tuned"])

    seen["tuned"] = tuned = _bench.attach(task.build(seeds[0]), f"{chain} >> probe()", seed=seeds[0])
    seen["before"] = orthogonality(tuned)
    lr = facts["learning_rate"]["adalora"]
    _bench.train(tuned, task, steps=STEPS, lr=lr, batch_size=16, seed=seeds[0], progress=watch, log=False)
    ranks = [len(p.lam) for p in states(tuned)]
    facts |= {"schedule": log[::5] + log[-1:], "off_schedule": max(abs(a - b) for _, a, b in log[math.ceil(0.1 * STEPS):]),
              "ranks": ranks, "orthogonality_before": seen["before"], "orthogonality": seen["orthogonality"]}
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f = figures["facts"]
    return judge(
        [not_below(figures, "adalora", "lora", what="accuracy no worse than uniform LoRA at the final budget")],
        [fact(f["off_schedule"] == 0, f"active triplets follow the cubic schedule: largest deviation {f['off_schedule']}"),
         fact(len(set(f["ranks"])) > 1, f"final ranks: {min(f['ranks'])} to {max(f['ranks'])}, {sum(f['ranks'])} in all"),
         fact(f["orthogonality"] < 1e-2, f"mean entry of |PPᵀ - I|: {f['orthogonality']:.2g}, needed below 0.01 "
                                         f"(at init {f['orthogonality_before']:.2g})")])
