"""A reversible MiniLM made by adapters, against the same adapters with cached activations, on TREC. Liao et al., 2023,
arXiv:2306.00477. MEFT 1 (F = block, G = adapter, λ = 0.1, β = 1) in the runs; the identities are checked for every variant.

The baseline adapters are the same number of bottlenecks of the same width at the unchanged model: beside and behind each MLP.
"""

import torch

from luthier import attach, cost, tiny, zoo
from luthier.check import jiggle, loss
from luthier.evidence import _bench, fact, judge, not_below
from luthier.methods.adapter import _reversible

SYSTEM, METHODS, SEEDS, MINUTES = "B095", ("meft", "adaptformer", "houlsby"), (0, 1, 2), 12
CLAIM = "Inputs made again below 1e-6; gradients those of autograd; saved bytes constant in depth; accuracy of plain adapters"
BASELINE = "adaptformer and houlsby bottlenecks of the same width; full tuning for the activation memory (84% less in the paper)"
MODEL, DATA = "minilm (22.7M); depths 2 to 6 of it", "TREC question types: 300 train, 100 validation, 250 test rows"
STEPS, BATCH, WIDTH, DEPTHS = 75, 16, 32, (2, 4, 6)
VARIANTS = {1: (0.1, 1.0), 2: (1.0, 0.1), 3: (0.1, 0.1)}
ARMS = {"meft": f"meft(width={WIDTH})",
        "adapters": f"adaptformer(width={WIDTH}, scale=1.0) >> houlsby(width={WIDTH}, at='mlp.out', norms=False)"}


def gradients(variant, plain):
    """Of every trained number of a tiny float64 model that is not at its start."""
    lam, beta = VARIANTS[variant]
    chain = f"meft(variant={variant}, lam={lam}, beta={beta}, plain={plain})"
    tuned = jiggle(attach(tiny.build("vit", torch.float64), chain)).train()
    loss(tuned, tiny.batch("vit", torch.float64)).backward()
    return torch.cat([p.grad.flatten() for _, p in tuned.trainable()])


def inversion():
    """Largest difference between what the parts of MiniLM-shaped steps read forward and backward, in float64, 4 deep."""
    g, seen, worst = torch.Generator().manual_seed(0), [], 0.0
    A, B = (torch.randn(384, 384, generator=g).double() / 384**0.5 for _ in range(2))

    def part(W):
        def run(h):
            seen.append(h.detach().clone())
            return torch.tanh(h @ W)
        return run
    for variant, (lam, beta) in VARIANTS.items():
        seen.clear()
        y = tuple(torch.randn(2, 8, 384, generator=g).double().requires_grad_() for _ in range(2))
        for k in range(4):                                  # a rounding error grows by 1 / λβ in each
            y = _reversible.step(part(A), part(B), lam, beta, *y, (), k == 3, variant < 3)
        forward, _ = list(seen), seen.clear()
        (y[0] * y[1]).sum().backward()
        worst = max(worst, max(float((a - b).abs().max()) for a, b in zip(forward, reversed(seen), strict=True)))
    return worst


def saved(chain, depth, batch):
    """Bytes that autograd keeps, and the most that live at once beside the weights, in one step of MiniLM's first layers."""
    model = zoo.load("minilm")
    model.encoder.layer = model.encoder.layer[:depth]
    tuned = attach(model, chain).train()
    tuned.lean = False                                       # all as in plain PyTorch
    held = [*tuned.parameters(), *tuned.buffers(), *batch.values()]
    kept = cost.saved(lambda: tuned(**batch).last_hidden_state, held)
    return kept, cost.peak(lambda: tuned(**batch).last_hidden_state.sum().backward(), held) - cost.nbytes(held)


def run(seeds):
    task = _bench.task("trec", "minilm", 300, 100, 250)
    facts = {"inversion": inversion(), "gradients": {}, "saved": {}, "peak": {}}
    for v in VARIANTS:
        ours, theirs = gradients(v, 0), gradients(v, 99)
        facts["gradients"][str(v)] = float((ours - theirs).norm() / theirs.norm())
    batch = {k: v for k, v in _bench.first(task, size=BATCH).items() if k != "labels"}
    for name, chain in {**ARMS, "full": "full(at='all -pool')"}.items():
        found = [saved(chain, d, batch) for d in DEPTHS]
        facts["saved"][name], facts["peak"][name] = ([f[i] for f in found] for i in (0, 1))
        _bench.say(f"{name}: {found}")
    per_seed, more = _bench.arms(task, ARMS, seeds, STEPS, BATCH)
    return {"per_seed": per_seed, "facts": facts | more}


def verdict(figures):
    f = figures["facts"]
    kept, peak = f["saved"], f["peak"]
    less = 1 - kept["meft"][-1] / kept["full"][-1]
    return judge(
        [not_below(figures, "meft", "adapters", 0.01, "accuracy within 1 point of the same adapters with cached activations"),
         fact(less >= 0.84, f"saved bytes at {DEPTHS[-1]} layers {less:.1%} below full tuning, 84% in the paper")],
        [fact(f["inversion"] < 1e-6, f"inputs of 4 blocks made again in float64: off by {f['inversion']:.1e}, needed below 1e-6"),
         fact(max(f["gradients"].values()) < 1e-6, f"gradients against autograd's: {f['gradients']}, needed below 1e-6"),
         fact(len(set(kept["meft"])) == 1, f"saved bytes at {DEPTHS} layers: {kept['meft']}; adapters {kept['adapters']}"),
         fact(peak["meft"][-1] < peak["adapters"][-1], f"most bytes alive beside the weights: {peak['meft']}; adapters "
              f"{peak['adapters']}; full {peak['full']}")])
