"""A pretrained model made reversible by adapters.    y1 = λ x1 + F(x2),  y2 = β x2 + G(y1),    h' = (y1 + y2) / 2 behind the last
Liao et al., Make Pre-trained Model Reversible (MEFT), NeurIPS 2023. arXiv:2306.00477 §3, the authors' code. First x1 = x2 = h.
    variant 1   F = the frozen block, G = an adapter, streams swap: (x1, x2) = (y2, y1);   λ = 0.1, β = 1
    variant 2   F = an adapter, G = the frozen block, streams swap;   λ = 1, β = 0.1
    variant 3   F = the attention half, G = the MLP half of a pre-norm block, no swap;   λ = β = 0.1
In all of them an adapter U gelu(D x + d) + u, D and U ~ N(0, σ²), σ = 0.02, is beside the MLP, in 3 also behind the attention.
Near the base at init, not equal to it: λ and β are what makes it invertible. `plain` top blocks cache activations as ever.
"""

from dataclasses import replace

import torch
from torch.nn.functional import gelu

from luthier.errors import DoesNotFit
from luthier.method import Method, method
from luthier.methods.adapter import _reversible


@method
class meft(Method):
    at: str = "block.*.out attn.out mlp.in mlp.out"
    variant: int = 1
    width: int = 8
    lam: float = 0.1                       # λ
    beta: float = 1.0                      # β
    std: float = 0.02                      # σ
    plain: int = 0
    limits = {"variant": (1, 3), "lam": (1e-3, 1), "beta": (1e-3, 1)}
    exempt = {"identity_at_init": "two streams with λ, β > 0 start near the base model"}

    def init(self, site):                  # trains 2 width D + width + D per adapter
        if site.role == "mlp.in":
            return {}
        if site.role == "attn.out" and self.variant != 3:
            return None
        if site.role == "out" and self.variant == 3:
            if site.peers.get("mid", site).layout not in ("mid", "in"):
                raise DoesNotFit(f"meft(variant=3) runs a block's attention and MLP by themselves, and those of {site.name} are "
                                 "not two pre-norm halves. Use variant=1 or 2.")
            return dict(top=site.stack.n_blocks - 1 - site.block)
        D, U = site.normal(self.width, site.d_out, std=self.std), site.normal(site.d_out, self.width, std=self.std)
        own = dict(D=D, d=site.zeros(self.width), U=U, u=site.zeros(site.d_out))
        return own | (dict(top=site.stack.n_blocks - 1 - site.block) if site.role == "out" else {})

    def stream(self, t, p):                # before the MLP: remembered for the adapter beside it
        return t.lane(p.key + ":mlp", t.h)

    def around(self, f, t, p):             # t.h: (B, T, D) is x2, the lane x1
        if p.site_name.endswith("mlp.out"):
            if p.key + ":F" in t.lanes:
                return t.map_h(lambda h: h.new_zeros(*h.shape[:-1], len(p.u)))
            return f(t).map_h(lambda h: h + adapter(t.lanes[p.key + ":mlp"], p))
        if p.site_name.endswith("attn.out"):
            return f(t).map_h(lambda h: h * 0 if p.key + ":G" in t.lanes else h + adapter(h, p))
        x1, x2, swap, shape = t.lanes.get(p.key, t.h), t.h, self.variant < 3, t.h.shape
        t = replace(t, h=None, lanes={k: v for k, v in t.lanes.items() if k != p.key})     # what runs again keeps neither alive

        def part(name):
            def run(h):
                if self.variant == (2 if name == "F" else 1):
                    return adapter(h, p)
                inside = replace(t, h=h) if swap else replace(t, h=h).lane(f"{p.key}:{name}", h[..., :0])
                y = f(inside).h
                if y.shape != shape:
                    raise DoesNotFit(f"meft adds what goes into {p.site_name} {tuple(shape)} to what comes out {tuple(y.shape)}. "
                                     "Leave out what changes the stream's shape inside a block, and models whose blocks do.")
                return y
            return _reversible.again(run, x2.device, p.training) if torch.is_grad_enabled() else run
        args = part("F"), part("G"), self.lam, self.beta, x1, x2
        if torch.is_grad_enabled() and p.top >= self.plain:
            x1, x2 = _reversible.step(*args, f.trained(), p.top == self.plain, swap)
        else:
            x1, x2 = _reversible.plain(*args, swap)
        return replace(t, h=(x1 + x2) / 2) if p.top == 0 else replace(t, h=x2).lane(p.key, x1)


def adapter(x, p):
    return gelu(x @ p.D.T + p.d) @ p.U.T + p.u
