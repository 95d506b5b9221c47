"""RandLoRA on a target of full rank, against LoRA and VeRA at matched parameters. Albert et al., ICLR 2025, arXiv:2502.00987.

A linear layer W must become W + Δ. Two targets: Δ orthogonal (all singular values equal: nothing for a low rank to prefer) and Δ
Gaussian (full rank, but its leading directions hold more). The figure is the share of Δ that is left, ‖W' - W - Δ‖² / ‖Δ‖².
MiniLM on TREC at matched parameters stands beside it, as a task whose needed rank nobody set.
"""

from dataclasses import dataclass

import torch
from torch import nn

from luthier.evidence import _bench, beats, fact, judge
from luthier.method import Method

SYSTEM, METHODS, SEEDS, MINUTES = "C025", ("randlora",), (0, 1, 2), 8
CLAIM = "Zero at init, full rank after training; n(r + d) numbers; beats LoRA and VeRA on a full-rank target; exact merge"
BASELINE = "lora and vera (arXiv:2310.11454) with at least as many trained numbers, each at its best learning rate"
MODEL, DATA = "one 128 x 128 layer; minilm beside it", "targets drawn from the seed; TREC, 400 train rows, beside it"
D, RANK, STEPS, RATES = 128, 16, 1500, (1e-3, 5e-3, 2e-2, 1e-1)


@dataclass(frozen=True, repr=False)
class vera(Method):
    """W' = W + diag(b) B diag(d) A: two vectors train, A and B are random, frozen and shared. arXiv:2310.11454 eq. 2"""
    at: str = "head"
    rank: int = 1024

    def init(self, site):
        d = site.zeros(self.rank)
        d.data += 0.1
        A, B = (site.random(*s, std=s[1]**-0.5) for s in ((self.rank, site.d_in), (site.d_out, self.rank)))
        return dict(d=d, b=site.zeros(site.d_out), A=site.fixed(A), B=site.fixed(B))

    def weight(self, W, p):
        return W + p.b[:, None] * (p.B * p.d @ p.A)


def arms():
    n = -(-D // RANK)
    return {"randlora": f"randlora(rank={RANK}, at='head')", "lora": f"lora(rank={-(-n * (RANK + D) // (2 * D))}, at='head')",
            "vera": vera(rank=n * (RANK + D) - D)}


def target(kind, seed):
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(D, D, generator=g)
    return (torch.linalg.qr(noise)[0] if kind == "orthogonal" else noise / D**0.5), torch.randn(D, D, generator=g) / D**0.5


def fit(chain, kind, seed, lr):
    """-> (share of Δ left, the attachment)"""
    delta, W = target(kind, seed)
    return _bench.approach(chain, W, delta, seed, lr, STEPS)


def run(seeds):
    per_seed, facts = {}, {"learning_rate": {}, "trained_parameters": {}}
    for name, chain in arms().items():
        for kind in ("orthogonal", "gaussian"):
            lr = min(RATES, key=lambda r: fit(chain, kind, _bench.TUNE, r)[0])       # noqa: B023
            facts["learning_rate"][f"{name}.{kind}"] = lr
            for seed in seeds:
                left, tuned = fit(chain, kind, seed, lr)
                per_seed.setdefault(f"{kind}.{name}", []).append(-left)
                facts["trained_parameters"][name] = sum(p.numel() for _, p in tuned.trainable())
                if name == "randlora":
                    update = tuned(torch.eye(D)).detach().T - tuned.model[0].weight
                    per_seed.setdefault(f"{kind}.rank", []).append(int(torch.linalg.matrix_rank(update.double(), rtol=1e-4)))
            _bench.say(f"{kind} {name}: {per_seed[f'{kind}.{name}']}")
    facts |= {"size": D, "terms": -(-D // RANK), "rank": RANK}
    facts["mechanics"] = _bench.mechanics(nn.Sequential(nn.Linear(D, D)), {"input": torch.randn(8, D)}, arms()["randlora"])
    task = _bench.task("trec", "minilm")
    n = -(-384 // 32)
    chains = {"randlora": "randlora(rank=32)", "lora": f"lora(rank={-(-n * 416 // 768)})"}
    scores, facts["trec"] = _bench.arms(task, chains, seeds, steps=75)
    return {"per_seed": per_seed | {f"trec.{k}": v for k, v in scores.items()}, "facts": facts}


def verdict(figures):
    f, kinds = figures["facts"], ("orthogonal", "gaussian")
    ranks = {k: min(figures["per_seed"][f"{k}.rank"]) for k in kinds}
    count = f["terms"] * (f["rank"] + f["size"])
    return judge(
        [beats(figures, f"{kind}.randlora", f"{kind}.{other}", f"{kind} target: less of Δ is left than with {other}")
         for kind in kinds for other in ("lora", "vera")],
        [fact(min(ranks.values()) == f["size"], f"numerical rank of the update after training: {ranks}, of {f['size']}"),
         fact(f["trained_parameters"]["randlora"] == count <= min(f["trained_parameters"].values()),
              f"n(r + d) = {count} numbers train, of all arms: {f['trained_parameters']}"),
         *_bench.exact(f["mechanics"], 1e-4)])
