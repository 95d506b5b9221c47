"""Any change of a hidden state, by four choices.    h' = h ∘ Δh,   Δh = form(x; D, U),   x, h: (..., D), (..., D_out)
He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, 2021. arXiv:2110.04366 §3.3-3.4, table 1:

form         softmax(x Dᵀ) Uᵀ  |  relu(x Dᵀ) Uᵀ  |  "linear": x Dᵀ Uᵀ
position     `at`: weights ("attn.q attn.v"), sublayers ("attn.out", "mlp.in mlp.out") or heads ("attn": x is a head's query)
insertion    "parallel": x is the input of what h comes out of  |  "sequential": x = h
composition  "add": h + Δh  |  "scaled": h + s Δh  |  "gated": (1 - λ) h + λ Δh, λ the attention prefix D draws (heads only)

adapter  relu, attn.out mlp.out, sequential, add        parallel adapter  relu, mlp.in mlp.out, parallel, add (or scaled)
LoRA     linear, attn.q attn.v, parallel, scaled        prefix            softmax, attn, parallel, gated
"""

from typing import Literal

from torch.nn.functional import relu

from luthier.errors import DoesNotFit
from luthier.method import Method, method

FORM = {"softmax": lambda z: z.softmax(-1), "relu": relu, "linear": lambda z: z}


@method
class petl(Method):
    at: str = "mlp.in mlp.out"
    form: Literal["softmax", "relu", "linear"] = "relu"
    insertion: Literal["parallel", "sequential"] = "parallel"
    composition: Literal["add", "scaled", "gated"] = "scaled"
    width: int = 64
    scale: float = 4.0

    def init(self, site):                  # trains width (D + D_out), at heads 2 width Hkv Dh
        heads = site.kind == "attend"
        fits = {"weight": self.form == "linear" and self.insertion == "parallel" and self.composition != "gated",
                "stream": self.composition != "gated",
                "attend": self.insertion == "parallel" and (self.composition != "gated" or self.form == "softmax")}
        if not fits[site.kind]:
            raise DoesNotFit(f"{self!r} has no meaning at {site.name}: weights take linear parallel changes that are added, "
                             "streams no gate, heads parallel changes, gated ones with softmax.")
        if site.role.endswith("in") and not heads:
            return {} if self.insertion == "parallel" else None
        shape = (self.width, *site.heads[1:]) if heads else (self.width, site.d_in)
        D = site.normal(*shape, std=0.02 if heads else site.d_in**-0.5)
        return dict(D=D, U=site.normal(*shape, std=0.02) if heads else site.zeros(site.d_out, self.width))

    @property
    def s(self):
        return self.scale if self.composition == "scaled" else 1.0

    def weight(self, W, p):                # (d_out, d_in)
        return W + self.s * p.U @ p.D

    def fast(self, x, y, p):
        return y + self.s * x @ p.D.T @ p.U.T

    def stream(self, t, p):                # (B, T, D)
        if not hasattr(p, "D"):
            return t.lane(p.key, t.h)
        x = t.lanes[p.key] if self.insertion == "parallel" else t.h
        return t.map_h(lambda h: h + self.s * FORM[self.form](x @ p.D.T) @ p.U.T)

    def attend(self, a, p):                # per head; D, U: (width, Hkv, Dh)
        D, U = (w.transpose(0, 1).repeat_interleave(a.q.shape[1] // w.shape[1], 0) for w in (p.D, p.U))
        scale = (a.scale or a.q.shape[-1]**-0.5) if self.form == "softmax" else 1.0
        change = FORM[self.form](a.q @ D.mT * scale) @ U                                   # (B, H, T, Dh)
        if self.composition != "gated":
            return a.run() + self.s * change
        gate = a.prepend(p.D, p.U).weights()[..., :self.width].sum(-1, keepdim=True)       # λ: (B, H, T, 1)
        return (1 - gate) * a.run() + gate * change
