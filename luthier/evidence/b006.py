"""Compacter beside an adapter of the same width, on MiniLM and TREC. Karimi Mahabadi et al., NeurIPS 2021, arXiv:2106.04647.
Width 24 as in the paper (768 / 32). Both sides train the layer norms too, as in their papers; parameters are counted without."""

import torch

from luthier.evidence import _bench, fact, judge, not_below
from luthier.methods.adapter.compacter import phm

SYSTEM, METHODS, SEEDS, MINUTES = "B006", ("compacter",), (0, 1, 2), 10
CLAIM = "The weight is a sum of Kronecker products; the count is the formula's, a tenth of an adapter's or less; accuracy near it"
BASELINE = "houlsby of the same width at the same places, norms trained as well"
MODEL, DATA = "minilm (22.7M)", "TREC question types: 400 train, 150 validation, 400 test rows"
WIDTH, N = 24, 4
CHAINS = {"compacter": f"compacter(reduce=16, n={N})", "houlsby": f"houlsby(width={WIDTH})"}


@torch.no_grad()
def kronecker_gap(tuned):
    """Largest entry of W - Σ_i A_i ⊗ s_i t_iᵀ over all down and up projections of a shaken model, W read off by unit inputs."""
    worst = 0.0
    for p in (p for p in tuned.states.values() if hasattr(p, "Ds")):
        for s, t in ((p.Ds, p.Dt), (p.Us, p.Ut)):
            W = phm(torch.eye(t.numel()), p.A, s, t, 0.0).T
            sums = sum(torch.kron(A, torch.outer(si, ti)) for A, si, ti in zip(p.A, s, t, strict=True))
            worst = max(worst, float((W - sums).abs().max()))
    return worst


def run(seeds):
    task = _bench.task("trec", "minilm")
    per_seed, facts = _bench.arms(task, CHAINS, seeds, steps=200)
    alone = {n: _bench.attach(task.build(0), chain.replace(")", ", norms=False)")) for n, chain in CHAINS.items()}
    spent, tuned = {n: _bench.body(t) for n, t in alone.items()}, alone["compacter"]
    d, places = task.build(0).config.hidden_size, len(tuned.states)
    facts |= {"method_parameters": spent, "formula": N**3 + places * (3 * (d + WIDTH)),
              "kronecker_gap": kronecker_gap(_bench.shake(tuned, by=0.5))}
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f = figures["facts"]
    ours, theirs = f["method_parameters"]["compacter"], f["method_parameters"]["houlsby"]
    return judge(
        [not_below(figures, "compacter", "houlsby", 0.02, "accuracy within 2 points of the adapter")],
        [fact(f["kronecker_gap"] < 1e-5, f"weight minus explicit Kronecker sum: {f['kronecker_gap']:.1e}, needed below 1e-5"),
         fact(ours == f["formula"], f"{ours} trained numbers, the formula gives {f['formula']}"),
         fact(theirs >= 10 * ours, f"an adapter of the same width has {theirs}: {theirs / ours:.1f} times as many, needed 10")])
