"""WaRA on a target of local patches at several scales, against LoRA at matched parameters. Heidari et al., arXiv:2506.24092.

A linear layer W must become W + Δ. Δ is a sum of Gaussian bumps on the (output, input) plane: centre, sign and one of three
widths drawn for each. The figure is the share of Δ that is left, ‖W' - W - Δ‖² / ‖Δ‖². MiniLM on TREC at matched parameters
stands beside it.
"""

import torch
from torch import nn

from luthier import attach
from luthier.evidence import _bench, beats, fact, judge
from luthier.methods.lowrank.wara import dwt, idwt

SYSTEM, METHODS, SEEDS, MINUTES = "C038", ("wara",), (0, 1, 2, 3, 4), 10
CLAIM = "The transform inverts, the start is zero, half of LoRA's numbers at equal rank; beats LoRA on a localised target"
BASELINE = "lora of half the rank: as many trained numbers, at its own best learning rate"
MODEL, DATA = "one 128 x 128 layer; minilm beside it", "targets drawn from the seed; TREC, 400 train rows, beside it"
D, RANK, STEPS, RATES, BUMPS, WIDTHS = 128, 16, 1000, (1e-3, 5e-3, 2e-2, 1e-1), 24, (2.0, 5.0, 12.0)
ARMS = {"wara": f"wara(rank={RANK}, at='head')", "wara_db2": f"wara(rank={RANK}, wavelet='db2', at='head')",
        "lora": f"lora(rank={RANK // 2}, at='head')"}


def target(seed):
    """(Δ, W), both (D, D)."""
    g = torch.Generator().manual_seed(seed)
    at, line = D * torch.rand(BUMPS, 2, generator=g), torch.arange(D, dtype=torch.float32)
    width = torch.tensor(WIDTHS)[torch.randint(len(WIDTHS), (BUMPS,), generator=g)]
    sign = 2.0 * torch.randint(2, (BUMPS,), generator=g) - 1
    rows, columns = (torch.exp(-((line - at[:, i:i + 1]) / width[:, None]).square() / 2) for i in (0, 1))    # (BUMPS, D)
    return (sign[:, None] * rows).T @ columns, torch.randn(D, D, generator=g) / D**0.5


def fit(chain, seed, lr):
    """-> (share of Δ left, the attachment)"""
    delta, W = target(seed)
    return _bench.approach(chain, W, delta, seed, lr, STEPS)


def round_trip():
    """Largest error of DWT and back, for both wavelets and an odd width, over the largest entry."""
    x = torch.randn(64, 385, generator=torch.Generator().manual_seed(0))
    return max(float((idwt(dwt(x, n), n, 385) - x).abs().max() / x.abs().max()) for n in ("haar", "db2"))


def run(seeds):
    per_seed, facts = {}, {"learning_rate": {}, "trained_parameters": {}, "round_trip": round_trip()}
    for name, chain in ARMS.items():
        facts["learning_rate"][name] = lr = min(RATES, key=lambda r: fit(chain, _bench.TUNE, r)[0])          # noqa: B023
        for seed in seeds:
            left, tuned = fit(chain, seed, lr)
            per_seed.setdefault(f"target.{name}", []).append(-left)
            facts["trained_parameters"][name] = sum(p.numel() for _, p in tuned.trainable())
        _bench.say(f"{name}: {per_seed[f'target.{name}']}")
    same = attach(nn.Sequential(nn.Linear(D, D)), f"lora(rank={RANK}, at='head')")
    facts["lora_of_equal_rank"] = sum(p.numel() for _, p in same.trainable())
    facts["mechanics"] = _bench.mechanics(nn.Sequential(nn.Linear(D, D)), {"input": torch.randn(8, D)}, ARMS["wara"])
    task = _bench.task("trec", "minilm")
    scores, facts["trec"] = _bench.arms(task, {"wara": "wara(rank=8)", "lora": "lora(rank=4)"}, seeds, steps=75)
    return {"per_seed": per_seed | {f"trec.{k}": v for k, v in scores.items()}, "facts": facts}


def verdict(figures):
    f = figures["facts"]
    sizes = f["trained_parameters"]
    return judge(
        [beats(figures, "target.wara", "target.lora", "localised target: less of Δ is left than with LoRA")],
        [fact(f["round_trip"] < 1e-6, f"DWT and back: off by {f['round_trip']:.1e} of the largest entry, needed below 1e-6"),
         fact(2 * sizes["wara"] == f["lora_of_equal_rank"] and sizes["wara"] == sizes["lora"],
              f"trained numbers: {sizes}; lora of equal rank has {f['lora_of_equal_rank']}"),
         *_bench.exact(f["mechanics"])])
