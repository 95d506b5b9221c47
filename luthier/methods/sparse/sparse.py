"""A change at a few fixed places.    θ' = θ + scatter(idx, v),   idx, v: K = density · |θ| entries over all sites together
Ansell et al., Composable Sparse Fine-Tuning (LT-SFT), 2022. arXiv:2110.07560 §3. The places are those that a full fine-tune
(`change`: what it saved) moved most, and v starts at 0 again: the winning ticket, rewound. Without `change` they are random.
The φ = (idx, v) of two tunings add up when they are chained, in any order. An entry costs 8 bytes in single precision.
"""

import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from luthier.method import Method, method
from luthier.methods.merge._experts import located, vectors


def flat(W, b):                            # (d_out, d_in), (d_out,) or None -> (d_out · d_in [+ d_out],)
    return W.reshape(-1) if b is None else torch.cat([W.reshape(-1), b])


@method
class sparse(Method):
    at: str = "all"
    density: float = 0.01
    change: str = ""                       # a folder or file of a fully tuned model; "": random places
    limits = {"density": (0, 1)}
    example = {"at": "linear", "density": 0.1}         # a few random places of a tiny embedding meet no token

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "change", "".join(located([self.change] if self.change else [])))

    def init(self, site):                  # trains density * (d_out * d_in + d_out)
        idx = site.shared("places", lambda: self.places(site))[site.name]
        return None if not len(idx) else dict(idx=idx, v=site.zeros(len(idx)), biased=site.b is not None)

    def places(self, site):                # site name -> its part of the K places, sorted
        sites = [s for s in site.pool["sites"] if s.parameter.is_floating_point()]
        sizes = [s.W.numel() + (0 if s.b is None else s.d_out) for s in sites]
        ends = torch.tensor(sizes).cumsum(0)
        if self.change:
            moved = torch.cat([flat(*vectors(s, self.change)).abs() for s in sites])
            at = moved.topk(round(self.density * len(moved))).indices.sort().values
            counts = torch.searchsorted(at, ends.to(at)).diff(prepend=ends[:1] * 0).tolist()
            parts = [part - end + n for part, end, n in zip(at.split(counts), ends.tolist(), sizes, strict=True)]
        else:
            counts = (ends.double() * self.density).round().long().diff(prepend=ends[:1] * 0).tolist()
            parts = [s.random(n).topk(k).indices.sort().values for s, n, k in zip(sites, sizes, counts, strict=True)]
        small = max(sizes) < 2**31
        return {s.name: part.to(torch.int32 if small else torch.int64) for s, part in zip(sites, parts, strict=True)}

    def weight(self, W, p, b):             # (d_out, d_in)
        new = flat(W, b if p.biased else None).index_add(0, p.idx, p.v)
        return new[:W.numel()].view(W.shape), new[W.numel():] if p.biased else None

    def fast(self, x, y, p):               # the dense change is made again in the backward pass instead of being kept
        def change(x):
            dW, db = self.weight(p.v.new_zeros(y.shape[-1], x.shape[-1]), p, p.v.new_zeros(y.shape[-1]))
            return linear(x, dW, db)
        return y + checkpoint(change, x, use_reentrant=False)
