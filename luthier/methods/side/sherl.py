"""Early layers fused from beside, late layers trained through.    x_i = LN(D_i h_i + d_i),  i = 0..n;   n = L - late
    r_i = Σ_{j<n} relu(cos(x_i, x_j))          how redundant early layer i is, itself included: twice as much when it comes twice
    w = L1norm_i(relu(c · (x_i ⊙ x_n) + c_0) / r_i),     g = Σ_{i<n} w_i x_i + x_n         guided by the last of them, x_n
    h'_n = h_n + U relu(g) + u,   which the `late` last blocks, frozen, then turn into the output
Diao et al., SHERL, 2024. arXiv:2407.07523 §3; formulas from the authors' code, VSE-infty/lib/adapter_for_transformer.py (each
token by itself; late = 1). h_i: the input of block i, detached: gradients pass through the late blocks alone, and before them
nothing is kept. `weigh="guided"` leaves r out, "uniform" takes w = 1/n; `late` sets how many blocks the late route has.

`residual=False` is the authors' start, h'_n = tanh(β / 0.1) h_n + U relu(g) + u with β = 0 and U ~ N(0, 1/w): the old features
come back as β grows; the default starts as the identity, U = 0. Their text encoder has an LN (BERT's post-norm) and dropout 0.1
behind U, their T5 has neither, and another D; neither is here. Beside an encoder-decoder it tunes the decoder.
"""

from typing import Literal

import torch
from torch.nn.functional import normalize

from luthier.errors import DoesNotFit
from luthier.method import Method, method
from luthier.methods.side._taps import down, reading, tap, tapped, weighted


@method
class sherl(Method):
    at: str = "block.*.in"
    reduce: int = 8
    late: int = 1
    weigh: Literal["diverse", "guided", "uniform"] = "diverse"
    residual: bool = True
    example = {"reduce": 2}

    def init(self, site):                  # trains w (D + 3) a layer, w (D + 1) + D + 1 where they are fused;  w = D / reduce
        d, w, end = site.d_out, max(1, site.stack.dim // self.reduce), site.stack.n_blocks - self.late
        if site.tower == "encoder" or site.block > end:
            return None
        if end < 1:
            raise DoesNotFit(f"sherl(late={self.late}) leaves no early layer of {end + self.late} blocks. Use a smaller late.")
        if site.block < end:
            return down(site, w)
        taps = sum(s.tower == site.tower and s.block < end for s in site.pool["sites"])
        more = dict(U=site.zeros(d, w)) if self.residual else dict(U=site.normal(d, w, std=w**-0.5), beta=site.zeros(1))
        more |= {} if self.weigh == "uniform" else dict(c=site.normal(w, std=w**-0.5), c0=site.zeros(1))
        return down(site, w) | more | dict(u=site.zeros(d), taps=taps)

    def stream(self, t, p):                # lane of each layer: (B, T, w)
        x = reading(t.h, p)
        if not hasattr(p, "U"):
            return tap(t, p, x)
        early = [*tapped(t, p).values()]
        new = torch.relu(weighted(self.weights(early, x, p), early) + x) @ p.U.T + p.u
        return t.map_h(lambda h: (h if self.residual else torch.tanh(p.beta / 0.1) * h) + new)

    def weights(self, early, guide, p):    # -> (B, T, n)
        x = torch.stack(early, -2)                                     # (B, T, n, w)
        if self.weigh == "uniform":
            return x.new_full(x.shape[:-1], 1 / len(early))
        w = torch.relu((x * guide[..., None, :]) @ p.c + p.c0)
        if self.weigh == "diverse":
            unit = normalize(x, dim=-1)
            w = w / torch.relu(unit @ unit.mT).sum(-1).clamp(min=1e-6)
        return w / w.sum(-1, keepdim=True).clamp(min=1e-6)
