"""p-Adapter: p = 2 is plain attention propagation, the start is the base, and on questions about pictures it is no worse than
plain bottlenecks with at least as many numbers. Wu et al., AAAI 2024, arXiv:2312.10613."""

import torch

from luthier import attach
from luthier.evidence import _bench, fact, judge, not_below
from luthier.methods.adapter.p_adapter import propagate

SYSTEM, METHODS, SEEDS, MINUTES = "B110", ("p_adapter", "houlsby"), (0, 1, 2, 3, 4), 10
CLAIM = "p=2 is plain attention propagation; zero-init keeps the base; VQA no worse than vanilla adapters of equal size"
BASELINE = "houlsby (bottlenecks behind attention, cross attention and MLP), at least as many parameters"
MODEL, DATA = "tiny-vlt5", "scenes:vqa: 1000 train, 200 validation, 400 test rows"
PLACES = "encoder.attn.out encoder.mlp.out decoder.attn.out decoder.cross.out decoder.mlp.out"
STEPS = 200


def run(seeds):
    task = _bench.task("scenes:vqa", "tiny-vlt5", train=1000, val=200, test=400)
    model, ours = task.build(0).eval(), "p_adapter(reduce=4)"
    A, Q, V = torch.rand(4, 6, 9).softmax(-1), torch.randn(4, 6, 8), torch.randn(4, 9, 8)
    plain = _bench.gap(propagate(A, Q, V, 2.0, 0.3), (A @ V + 0.3 * Q) / 1.3)
    off = _bench.gap(propagate(A, Q, V, 1.25, 0.3), (A @ V + 0.3 * Q) / 1.3)
    batch = _bench.first(task)
    with torch.no_grad():
        base = task.loss(model, batch)
        tuned = attach(model, ours)
        start = _bench.gap(task.loss(tuned.eval(), batch), base)
        tuned.detach()
    chains = {"p_adapter": _bench.seeing(model, ours)}
    tuned = attach(model, chains["p_adapter"])
    budget = sum(p.numel() for _, p in tuned.trainable())
    tuned.detach()
    text = f"houlsby(at='{PLACES}', norms=False, width={{}})"
    wide = next(text.format(w) for w in range(1, 513) if _size(model, _bench.seeing(model, text.format(w))) >= budget)
    chains["vanilla"] = _bench.seeing(model, wide)
    per_seed, facts = _bench.arms(task, chains, seeds, STEPS, head=False)
    return {"per_seed": per_seed, "facts": facts | {"plain_gap": plain, "p_moves": off, "start_gap": start}}


def _size(model, chain):
    tuned = attach(model, chain)
    size = sum(p.numel() for _, p in tuned.trainable())
    tuned.detach()
    return size


def verdict(figures):
    f = figures["facts"]
    spent = f["trained_parameters"]
    return judge(
        [not_below(figures, "p_adapter", "vanilla", 0.0, f"p-Adapter ({spent['p_adapter']} numbers) no worse than plain "
                                                         f"bottlenecks ({spent['vanilla']})")],
        [fact(f["plain_gap"] < 1e-5 < f["p_moves"], f"p = 2 is plain propagation: off by {f['plain_gap']:.1e}, needed below 1e-5 "
                                                    f"(p = 1.25 differs by {f['p_moves']:.2g})"),
         fact(f["start_gap"] < 1e-5, f"the start is the base: loss off by {f['start_gap']:.1e}, needed below 1e-5")])
