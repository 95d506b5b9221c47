"""Lean modules and 4-bit activations on MiniLM and TREC. S2A, 2025, arXiv:2503.08154.

The error of a quantised gradient is measured where it can be said what it should be: of each operation by itself on numbers from
a Gaussian, against its bound (a thirtieth of the derivative's range, times |dy|), and of the whole model against bits=0.
"""

import torch
import torch.nn.functional as F

from luthier import attach, cost
from luthier.evidence import _bench, fact, judge, not_below
from luthier.methods.activation._lean import Lean

SYSTEM, METHODS, SEEDS, MINUTES = "B077", ("s2a",), (0, 1, 2), 10
CLAIM = "Saved bytes at least 3 times below full tuning, gradient errors bounded, accuracy within 1 point of exact activations"
BASELINE = "the same modules with activations kept exactly; full tuning for the bytes"
MODEL, DATA = "minilm (22.7M)", "TREC question types: 300 train, 100 validation, 250 test rows"
STEPS, BATCH = 75, 16
ARMS = {"s2a": "s2a()", "exact": "s2a(bits=0)"}
PARTS = {"bias": "s2a(prompt=0, side=0)", "prompt": "s2a(bias=False, side=0)", "side": "s2a(bias=False, prompt=0)"}
SLOPES = {"gelu": (F.gelu, 1.26), "silu": (F.silu, 1.2), "relu": (F.relu, 1.0)}        # range of f'


def worst(f, reach):
    """Largest |error of dx| / (|dy| · range / 30); at most 1 but for the rounding of the ends to half precision."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    dy, found = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)), []
    for lean in (False, True):
        leaf = x.clone().requires_grad_()
        if lean:
            with Lean():
                y = f(leaf)
        else:
            y = f(leaf)
        y.backward(dy)
        found.append(leaf.grad)
    return float(((found[1] - found[0]).abs() / (dy.abs() * reach / 30)).max())


def gradient(task, chain):
    tuned = _bench.shake(attach(task.build(0), chain)).eval()          # eval: no dropout, gradients all the same
    task.loss(tuned, _bench.first(task, size=BATCH)).backward()
    return torch.cat([p.grad.flatten() for _, p in tuned.trainable()])


def saved(task, chain):
    tuned, batch = attach(task.build(0), chain).train(), _bench.first(task, size=BATCH)
    tuned.lean = False                                       # both as in plain PyTorch
    held = [*tuned.parameters(), *tuned.buffers(), *batch.values()]
    return cost.saved(lambda: task.loss(tuned, batch), held)


def run(seeds):
    task = _bench.task("trec", "minilm", 300, 100, 250)
    facts = {"worst": {n: worst(*s) for n, s in SLOPES.items()}, "saved": {}}
    for name, chain in {"full": "full()", **ARMS, **PARTS}.items():
        facts["saved"][name] = saved(task, chain)
    a, b = gradient(task, ARMS["s2a"]), gradient(task, ARMS["exact"])
    facts |= {"gradient_error": float((a - b).norm() / b.norm()), "cosine": float(F.cosine_similarity(a, b, 0))}
    per_seed, more = _bench.arms(task, ARMS, seeds, STEPS, BATCH)
    return {"per_seed": per_seed, "facts": facts | more}


def verdict(figures):
    f = figures["facts"]
    kept = f["saved"]
    ratio, parts = kept["full"] / kept["s2a"], {n: round(kept["full"] / kept[n], 1) for n in PARTS}
    return judge(
        [fact(ratio >= 3, f"saved bytes {ratio:.1f} times below full tuning, needed 3 (by itself: {parts}; exact activations "
              f"{kept['full'] / kept['exact']:.1f})"),
         not_below(figures, "s2a", "exact", 0.01, "accuracy within 1 point of exact activations")],
        [fact(max(f["worst"].values()) <= 1.05, "worst error of an operation's gradient over its bound: " + ", ".join(
            f"{n} {v:.2f}" for n, v in f["worst"].items()) + ", needed 1.05 or less"),
         fact(f["cosine"] > 0.9, f"the whole model's gradient and the exact one: cosine {f['cosine']:.3f}, needed above 0.9; "
              f"relative error {f['gradient_error']:.3f}")])
