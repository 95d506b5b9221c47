"""Adapters of a language model that several image-text tasks share.    h' = h + U gelu(D h + d) + u,    D: (w, D), U: (D, w)
Sung, Cho, Bansal, VL-Adapter, CVPR 2022. arXiv:2112.06825 §3.2, the authors' code: behind attention, cross attention and MLP of
encoder and decoder, w = D / reduce; the language model's norms train too (`norms`), W + δ and b + δ, the vision model's do not.
The visual projection trains by a method of its own: `full(at="connector") >> vl_adapter()`. Where D, d, U and u come from:

bottleneck     parameters
compacter      D = Σ_i A_i ⊗ S_i, A_i: (n, n), S_i: (w/n, D/n), U alike; each its own, not factored, as is best in §4
hyperformer    generated from embeddings of the task and the layer, see _hypernet.py; for each place of a block its own generator
hyperformer++  from those of the place too, by one generator

`share`: tasks have "all" in common, only the "up" half (U and u) or the "down" half, or "none". U = 0 and u = 0 at init (theirs:
drawn), the identity. Adam's momentum also moves a little what a batch of another task leaves out.
"""

from typing import Literal

import torch
from torch.nn.functional import gelu

from luthier.errors import BadChain, DoesNotFit
from luthier.method import Method, chosen, method
from luthier.methods.adapter import _hypernet


@method
class vl_adapter(Method):
    at: str = "*.out norm"
    weights: Literal["bottleneck", "compacter", "hyperformer", "hyperformer++"] = "bottleneck"
    share: Literal["all", "up", "down", "none"] = "all"
    reduce: int = 8
    n: int = 2                             # Kronecker products
    code: int = 8                          # of hypernetworks: width of z,
    hidden: int = 128                      # of the layer before,
    embed: int = 512                       # and of the embeddings
    norms: bool = True
    tasks: tuple = ()                      # their names; empty: those of the data
    example = {"reduce": 2}

    def __post_init__(self):
        super().__post_init__()
        if self.hyper and self.share != "all":
            raise BadChain(f"{self!r}: a hypernetwork is what tasks share. Leave share out, or use bottleneck or compacter.")

    @property
    def hyper(self):
        return self.weights.startswith("hyper")

    def init(self, site):                  # trains at one site, for each task that shares none: 2 w D + w + D
        if site.tower == "vision":
            return None
        if site.kind == "weight":
            bias = {} if site.b is None else dict(b=site.zeros(site.d_out))
            return dict(W=site.zeros(site.d_out, 1)) | bias if self.norms else None
        d, w, n, K = site.d_out, max(1, site.d_out // self.reduce), self.n, max(1, len(self.tasks))
        if self.hyper:
            return _hypernet.state(site, d, w, K, self.embed, self.hidden, self.code, self.weights.endswith("++"))
        down, up = K if self.share in ("up", "none") else 1, K if self.share in ("down", "none") else 1
        state = dict(d=site.zeros(down, w), u=site.zeros(up, d))
        if self.weights == "bottleneck":
            return state | dict(D=site.uniform(down, w, d, bound=d**-0.5), U=site.zeros(up, d, w))
        if d % n or w % n:
            raise DoesNotFit(f"{self!r} at {site.name}: n={n} must divide the widths {d} and {w}. Choose another n or reduce.")
        S = site.uniform(down, n, w // n, d // n, bound=(12 * n / (w + d))**0.5)           # Xavier with gain sqrt(2), as theirs
        A, B = site.normal(down, n, n, n, std=0.01), site.normal(up, n, n, n, std=0.01)
        return state | dict(A=A, S=S, B=B, R=site.zeros(up, n, d // n, w // n))

    def produce(self, ctx, p):             # D: (w, D), or (B, w, D) where each row has a task of its own; the others alike
        if hasattr(p, "W"):
            return {}
        k = chosen(ctx, "task", self.tasks)
        if self.hyper:
            return _hypernet.weights(p, k)
        own = {x: v[k if len(v) > 1 else 0] for x in "DdUuASBR" if (v := getattr(p, x, None)) is not None}
        if self.weights == "compacter":
            own |= dict(D=kron(own["A"], own["S"]), U=kron(own["B"], own["R"]))
        return own

    def stream(self, t, p):                # t.h: (B, T, D)
        return t.map_h(lambda h: h + gelu(h @ p.D.mT + p.d[..., None, :], approximate="tanh") @ p.U.mT + p.u[..., None, :])

    def weight(self, W, p, b):             # norms: (d, 1), (d,)
        return W + p.W, b + p.b if hasattr(p, "b") else b


def kron(A, S):                            # Σ_i A_i ⊗ S_i: (..., n, x, y), (..., n, a, b) -> (..., x a, y b)
    return torch.einsum("...ixy,...iab->...xayb", A, S).flatten(-4, -3).flatten(-2)
