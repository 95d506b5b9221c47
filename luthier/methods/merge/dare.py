"""Merge tuned models after dropping most of what each changed: the expectation of a task vector stays.
    τ_t = W_t - W;   m ~ Bernoulli(1 - drop);   τ̂_t = m ⊙ τ_t / (1 - drop);   W' = W + scale · combine_t τ̂_t
Yu et al., DARE, 2023. arXiv:2311.03099 §3.1-3.2. combine: "mean" averages the models, "sum" is task arithmetic, "elect" takes
one sign per entry and the mean of those who have it. The mask is a function of (seed, expert's place, site) and nothing else.
"""

import hashlib
from typing import Literal

import numpy as np
import torch

from luthier.method import Method, method
from luthier.methods.merge import _experts
from luthier.methods.merge._experts import elect, located, merged, near, total

COMBINE = {"mean": lambda τ: total(τ) / len(τ), "sum": total, "elect": elect}


def draw(seed, number, what, shape, drop):
    """Which entries of an expert survive, some rows at a time: the same ones on every machine."""
    digest = hashlib.blake2b(f"{seed}/{number}/{what}".encode(), digest_size=7).digest()
    g, n = torch.Generator().manual_seed(int.from_bytes(digest, "little")), max(1, _experts.PART // max(shape[-1], 1))
    for k in range(0, shape[0], n):
        yield torch.rand((min(n, shape[0] - k), *shape[1:]), generator=g) >= drop


def mask(*what):
    return torch.cat(list(draw(*what)))


def bits(site, rows, *what):
    """The part of a matrix's mask that is at these stored rows: drawn once, kept as bits until the last part was taken."""
    if rows == slice(None):
        return mask(*what)
    packed = site.pool.pop(("mask", what), None)
    if packed is None:
        packed = np.concatenate([np.packbits(kept.numpy(), axis=1) for kept in draw(*what)])
    low, high, _ = rows.indices(len(site.parameter))
    if high < len(site.parameter):
        site.pool["mask", what] = packed
    if site.turned:
        return torch.from_numpy(np.unpackbits(packed[:, low // 8:-(-high // 8)], axis=1)[:, low % 8:low % 8 + high - low])
    return torch.from_numpy(np.unpackbits(packed[low:high], axis=1, count=what[3][1]))


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
            key = self.seed, number, f"{site.name}/{what}", (site.W if what == "tau" else site.b).shape, self.drop
            keep = bits(site, rows, *key) if what == "tau" else mask(*key)[rows]
            keep = keep.to(τ)
            return τ * keep / (1 - self.drop) if self.rescale and self.drop < 1 else τ * keep
        return merged(site, self, thin, COMBINE[self.combine], rows)

    def weight(self, W, p, b):             # (d_out, d_in)
        return W + self.scale * p.tau, b + self.scale * p.tau_b if hasattr(p, "tau_b") else None
