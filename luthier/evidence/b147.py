"""IncreLoRA on MiniLM and TREC: the steps of its growth, the ranks it ends with, LoRA and AdaLoRA with as many components.
Zhang et al., 2023, arXiv:2308.12043."""

import torch

from luthier import attach
from luthier.evidence import _bench, fact, judge, not_below

SYSTEM, METHODS, SEEDS, MINUTES = "B147", ("increlora",), (0, 1, 2), 15
CLAIM = "Rank grows in steps to the budget; a new component hardly moves outputs; ranks differ; no worse than LoRA and AdaLoRA"
BASELINE = "lora of uniform rank 2, adalora from 3 to 2 a site, at the same matrices: as many components at the end"
MODEL, DATA = "minilm (22.7M)", "TREC question types: 400 train, 150 validation, 400 test rows"
STEPS, TARGET, AT = 150, 2, "attn.q attn.k attn.v attn.o mlp.up mlp.down"
TOP, WAIT, EVERY, RESTART = 6, 20, 10, 20
CHAINS = {"increlora": f"increlora(target={TARGET}, top={TOP}, wait={WAIT}, every={EVERY}, restart={RESTART}, at={AT!r})",
          "lora": f"lora(rank={TARGET}, at={AT!r})", "adalora": f"adalora(rank={TARGET + 1}, target={TARGET}, at={AT!r})"}


def states(tuned):
    return [p for p in tuned.states.values() if hasattr(p, "n")]


def due(k, sites):
    """Components after step k, written again here rather than taken from the method."""
    rounds = sum(1 for j in range(1, k + 1) if j > WAIT and j % EVERY == 0)
    return min(TARGET * sites, sites + TOP * rounds)


def growth(task, seed, lr):
    """[components, those due] after each step, and the ranks at the end."""
    tuned, log = attach(task.build(seed), f"{CHAINS['increlora']} >> probe()", seed=seed), []

    def watch(k, total, loss):
        log.append([sum(p.n for p in states(tuned)), due(k, len(states(tuned)))])

    _bench.train(tuned, task, steps=STEPS, lr=lr, batch_size=16, seed=seed, log=False, progress=watch)
    return log, [len(p.E) for p in states(tuned)]


@torch.no_grad()
def shift(task, batch):
    """Relative change of logits when every site of a shaken model gets one more component."""
    tuned = _bench.shake(attach(task.build(0).eval(), f"increlora(target=3, top=999, wait=0, every=1, at={AT!r})"))
    before, many, tuned.total_steps = _bench.logits(tuned, batch), sum(p.n for p in states(tuned)), 99
    tuned.step()
    added = sum(p.n for p in states(tuned)) - many
    return {"gap": _bench.gap(_bench.logits(tuned, batch), before) / float(before.abs().max()), "added": added}


def run(seeds):
    task = _bench.task("trec", "minilm")
    per_seed, facts = _bench.arms(task, CHAINS, seeds, STEPS)
    log, ranks = growth(task, seeds[0], facts["learning_rate"]["increlora"])
    facts |= {"growth": log[:: EVERY // 2] + log[-1:], "off": max(abs(a - b) for a, b in log), "ranks": ranks,
              "budget": TARGET * len(ranks), "shift": shift(task, _bench.first(task))}
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f = figures["facts"]
    spent, totals = f["trained_parameters"], [a for a, _ in f["growth"]]
    return judge(
        [not_below(figures, "increlora", other, what=f"accuracy no worse than {other} with {spent[other]} trained numbers "
                                                     f"(increlora {spent['increlora']})") for other in ("lora", "adalora")],
        [fact(f["off"] == 0 and totals == sorted(totals) and len(set(totals)) > 2 and totals[-1] == f["budget"],
              f"components grow in steps from {totals[0]} to {totals[-1]}: largest deviation from the schedule {f['off']}"),
         fact(f["shift"]["gap"] < 1e-4 and f["shift"]["added"] == len(f["ranks"]),
              f"one more component at each of {f['shift']['added']} sites moves logits by {f['shift']['gap']:.1e} of the "
              "largest, needed below 1e-4"),
         fact(len(set(f["ranks"])) > 1, f"final ranks: {min(f['ranks'])} to {max(f['ranks'])}, {sum(f['ranks'])} in all")])
