"""Merge tuned models after dropping most of what each changed: the expectation of a task vector stays.
    τ_t = W_t - W;   m ~ Bernoulli(1 - drop);   τ̂_t = m ⊙ τ_t / (1 - drop);   W' = W + scale · combine_t τ̂_t
Yu et al., DARE, 2023. arXiv:2311.03099 §3.1-3.2. combine: "mean" averages the models, "sum" is task arithmetic, "elect" takes
one sign per entry and the mean of those who have it. The mask is a function of (seed, expert's place, site) and nothing else.
"""

import hashlib
from typing import Literal

import torch

from luthier.method import Method, method
from luthier.methods.merge._experts import elect, located, merged, near, total

COMBINE = {"mean": lambda τ: total(τ) / len(τ), "sum": total, "elect": elect}


def mask(seed, number, what, shape, drop, row=0, of=0, pool=None):
    """Which entries of an expert survive: the same ones on every machine. As many rows as `shape` says, from `row` on, `of` so
    many; pool: where the draw before this one left its generator."""
    key, pool = f"{seed}/{number}/{what}", {} if pool is None else pool
    at, g = pool.pop(("mask", key), (None, None))
    if at != row:
        g = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "little"))
        torch.rand(row, *shape[1:], generator=g)
    kept = torch.rand(shape, generator=g) >= drop
    if row + shape[0] < of:
        pool["mask", key] = row + shape[0], g
    return kept


@method
class dare(Method):
    at: str = "all"
    experts: tuple[str, ...] = ()          # folders or .safetensors files of models tuned from this base
    drop: float = 0.9
    rescale: bool = True
    combine: Literal["mean", "sum", "elect"] = "mean"
    scale: float = 1.0
    seed: int = 0
    limits = {"drop": (0, 1)}
    example = staticmethod(near)
    exempt = {"identity_at_init": "the experts act at once"}

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "experts", located(self.experts))

    def init(self, site, rows=slice(None)):
        def thin(number, expert, what, τ, rows):
            draw = dict(row=rows.start or 0, of=len(site.W), pool=site.pool)
            keep = mask(self.seed, number, f"{site.name}/{what}", τ.shape, self.drop, **draw).to(τ)
            return τ * keep / (1 - self.drop) if self.rescale and self.drop < 1 else τ * keep
        return merged(site, self, thin, COMBINE[self.combine], rows)

    def weight(self, W, p, b):             # (d_out, d_in)
        return W + self.scale * p.tau, b + self.scale * p.tau_b if hasattr(p, "tau_b") else None
