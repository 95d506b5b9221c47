"""Gated adapters in the encoder, values alone adapted in the decoder.    h' = s (h + Δh) ⊙ G,    Δh = U gelu(D h + d) + u
Hu et al., VL-PET, ICCV 2023. arXiv:2308.09804 §3.2-3.4, the authors' code. x is what enters a sublayer's residual sum, h the
sublayer's output, y = h + Δh; σ the logistic function. G, the granularity, for B rows of N tokens:

large    σ(V gelu(A x + a) + v), A: (rank, D), V: (D, rank)    (B, N, D)    for everything its own
middleX  σ(A (x + y) + a), A: (1, D)                           (B, N, 1)    for each token
middleY  1 + g, g: (D,)                                        (1, 1, D)    for each channel
small    mean over the real tokens of σ(A [x; y] + a), A: (1, 2 D)          (B, 1, 1)

Decoder: V' z = V z + U gelu(D z + d) + u for the values of cross attention alone, z the encoder's states. D has `heads` heads,
each (width / heads, D), joined; with `paired` each has its own up-projection, to D / heads channels. The encoder's norms train.
U = 0 at init (theirs for T5; N(0, 0.02²) for BART), and V = 0: then G = 1/2 of large, and s = 2 starts it at the base.
"""

from typing import Literal

import torch
from torch.nn.functional import gelu

from luthier.errors import DoesNotFit
from luthier.method import Method, method


@method
class vl_pet(Method):
    at: str = "encoder.block.*.in encoder.mid encoder.attn.out encoder.mlp.out encoder.norm decoder.cross.v"
    gate: Literal["large", "middleX", "middleY", "small"] = "large"
    width: int = 96
    heads: int = 4
    paired: bool = False
    rank: int = 96                         # of the large gate
    values: int = 96                       # width of the decoder's adapters
    scale: float = 1.0                     # s
    norms: bool = True
    example = {"width": 8, "rank": 4, "values": 4}
    exempt = {"identity_at_init": "a gate of σ lies below 1"}

    def init(self, site):                  # trains per sublayer 2 width D + width + D and the gate's
        if site.role in ("in", "mid"):     # x is only remembered
            return {}
        d = site.d_out
        if site.kind == "weight" and site.layout == "norm":
            bias = {} if site.b is None else dict(b=site.zeros(d))
            return dict(W=site.zeros(d, 1)) | bias if self.norms else None
        if site.kind == "weight" and site.layout in ("linear", "conv1d"):
            return self.bottleneck(site, site.d_in, d, self.values, 1)
        if site.role not in ("attn.out", "cross.out", "mlp.out"):
            raise DoesNotFit(f"vl_pet adapts sublayers, linear layers and norms, and {site.name} is none of them. Leave it out.")
        if self.width % self.heads or self.paired and d % self.heads:
            raise DoesNotFit(f"{self!r} at {site.name}: heads={self.heads} must divide width={self.width}"
                             f"{f' and the {d} channels' if self.paired else ''}. Choose another number of heads.")
        n = dict(middleX=d, small=2 * d).get(self.gate)
        gate = dict(g=site.normal(d, std=0.02)) if self.gate == "middleY" else dict(
            A=site.normal(1, n, std=0.02), a=site.zeros(1)) if n else dict(
            A=site.normal(self.rank, d, std=0.02), a=site.zeros(self.rank), V=site.zeros(d, self.rank), v=site.zeros(d))
        return self.bottleneck(site, d, d, self.width, self.heads if self.paired else 1) | gate

    def bottleneck(self, site, d_in, d, width, pairs):
        D, U = site.normal(width, d_in, std=0.02), site.zeros(pairs, d // pairs, width // pairs)
        return dict(D=D, d=site.zeros(width), U=U, u=site.zeros(d))

    def delta(self, h, p):                 # (..., d_in) -> (..., d)
        z = gelu(h @ p.D.T + p.d, approximate="tanh").unflatten(-1, (len(p.U), -1))
        return torch.einsum("...hw,hdw->...hd", z, p.U).flatten(-2) + p.u

    def stream(self, t, p):                # t.h: (B, N, D)
        if not hasattr(p, "D"):
            return t.lane(p.key, t.h)
        x, y = t.lanes[p.key], t.h + self.delta(t.h, p)
        return t.map_h(lambda h: self.scale * y * self.granularity(x, y, p, t.mask))

    def granularity(self, x, y, p, mask=None):
        if self.gate == "large":
            return torch.sigmoid(gelu(x @ p.A.T + p.a, approximate="tanh") @ p.V.T + p.v)
        if self.gate == "middleX":
            return torch.sigmoid((x + y) @ p.A.T + p.a)
        if self.gate == "middleY":
            return 1 + p.g.expand(1, 1, -1)
        g = torch.sigmoid(torch.cat([x, y], -1) @ p.A.T + p.a)                             # (B, N, 1)
        real = torch.ones_like(g) if mask is None else mask[..., None].to(g)
        return (g * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)

    def output(self, x, y, p):             # (..., d_in), (..., d_out)
        return y + self.delta(x, p)

    def weight(self, W, p, b):             # norms: (d, 1), (d,)
        return W + p.W, b + p.b if hasattr(p, "b") else b
