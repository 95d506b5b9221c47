"""Intrinsic dimension d90 of a pretrained small Llama and of the same network with random weights, on TREC.
Aghajanyan et al., 2020, arXiv:2012.13255; the projection of `said` with layers=False (one d-vector for all D weights).

d90 of a seed is the smallest d of the grid whose accuracy reaches 90% of full tuning's from the same start; d = 0 is the head
alone (the head trains in every run). Every d has its own search for a learning rate, as full tuning has.
"""

import torch

from luthier import attach, zoo
from luthier.evidence import _bench, fact, judge

SYSTEM, METHODS, SEEDS, MINUTES = "B020", ("said",), (0, 1, 2), 12
CLAIM = "Rebuilt from a seed, nothing at init; 90% of full tuning at d under 5% of D; d90 smaller than for random weights"
BASELINE = "full fine-tuning from the same start; the same network with random weights"
MODEL, DATA = "stories260k (0.26M weights)", "TREC question types: 1500 train, 300 validation, 500 test rows"
GRID, STEPS, RATES = (150, 500, 1500, 5000, 11000), 150, (2e-4, 1e-3, 5e-3, 2e-2, 1e-1)


def chain(d):
    return "probe()" if d == 0 else f"said(dim={d}, layers=False) >> probe()"


def start(task, kind):
    """The task on pretrained or on freshly drawn weights (one draw, from a fixed seed)."""
    if kind == "random":
        torch.manual_seed(_bench.TUNE)
        task.model = zoo.load("stories260k", weights=False)
    return task


def projection(task):
    """Differences: of logits at init, and of the projections of two attachments with one seed and with two."""
    batch, model = _bench.first(task), task.build(0).eval()
    base = _bench.logits(model, batch)
    a, b, c = (attach(task.build(0).eval(), "said(dim=500, layers=False)", seed=s) for s in (3, 3, 4))
    found = {"init_gap": _bench.gap(_bench.logits(a, batch), base)}
    with torch.no_grad():
        for t in (a, b, c):
            for _, p in t.trainable():
                p.fill_(0.05)
    x, y, z = (_bench.logits(t, batch) for t in (a, b, c))
    return found | {"same_seed": _bench.gap(x, y), "other_seed": _bench.gap(x, z)}


def run(seeds):
    per_seed, facts = {}, {"grid": [0, *GRID]}
    for kind in ("pretrained", "random"):
        task = start(_bench.task("trec", "stories260k", train=1500, val=300, test=500), kind)
        if kind == "pretrained":
            facts["projection"] = projection(task)
            facts["D"] = sum(s.W.numel() for s in attach(task.build(0), "said(dim=500, layers=False)")._plan.steps[0].sites)
        arms = {"full": "full()"} | {f"d={d}": chain(d) for d in (0, *GRID)}
        scores, facts[kind] = _bench.arms(task, arms, seeds, STEPS, batch=32, rates=RATES)
        per_seed |= {f"{kind}.{k}": v for k, v in scores.items()}
        per_seed[f"{kind}.d90"] = [d90(scores, i) for i in range(len(seeds))]
    return {"per_seed": per_seed, "facts": facts}


def d90(scores, i):
    """The smallest d that reaches 90% of full tuning in run i; ten times the grid's end where none does."""
    return next((d for d in (0, *GRID) if scores[f"d={d}"][i] >= 0.9 * scores["full"][i]), 10 * GRID[-1])


def verdict(figures):
    f, per = figures["facts"], figures["per_seed"]
    D, p = f["D"], f["projection"]
    own, drawn = per["pretrained.d90"], per["random.d90"]
    return judge(
        [fact(max(own) < 0.05 * D, f"pretrained d90 by seed {own}, of D = {D}: at most {max(own) / D:.1%}, needed below 5%"),
         fact(all(a < b for a, b in zip(own, drawn, strict=True)), f"random weights' d90 by seed {drawn}: needed above each")],
        [fact(p["init_gap"] == 0, f"difference of logits at init: {p['init_gap']:.1e}"),
         fact(p["same_seed"] == 0 < p["other_seed"], f"two attachments with one seed differ by {p['same_seed']:.1e}, with two "
                                                     f"seeds by {p['other_seed']:.2g}")])
