"""Bottleneck adapters made of Kronecker products.    h' = h + U(gelu(D h)),   D, U: y = W x + c,   W = Σ_i A_i ⊗ s_i t_iᵀ
Karimi Mahabadi et al., Compacter, NeurIPS 2021. arXiv:2106.04647 §4; the PHM layer is Zhang et al.'s, arXiv:2102.08597. After
attention and after the FFN. n matrices A_i: (n, n) are shared by every D and U of the model; s_i: (d_out/n,) and t_i: (d_in/n,)
are one layer's own. The layer norms train too (`norms`), as W + δ and b + δ. Init as in the authors' code, s and t Glorot and
A_i ~ N(0, 0.01²), except that t of U is 0, so that nothing changes before training.

Parameters: n³ + Σ_adapters [2 (d + w) + w + d] + Σ_norms: against 2 d w + w + d for a full adapter of width w = d / reduce.
"""

import torch
from torch.nn.functional import gelu

from luthier.errors import DoesNotFit
from luthier.method import Method, method


def phm(x, A, s, t, c):                    # (..., d_in) -> (..., d_out); A: (i, a, b), s: (i, d_out/n), t: (i, d_in/n)
    x = x.unflatten(-1, (len(A), -1))                                               # (..., b, d_in/n)
    x = torch.einsum("...bi,iab->...ai", x @ t.T, A)
    return (x @ s).flatten(-2) + c


@method
class compacter(Method):
    at: str = "attn.out mlp.out norm"
    reduce: int = 32                       # width of the bottleneck: d / reduce, rounded up to a multiple of n
    n: int = 4
    norms: bool = True
    example = {"reduce": 2, "n": 2}

    def init(self, site):
        if site.kind == "weight":
            bias = {} if site.b is None else dict(b=site.zeros(site.d_out))
            return dict(W=site.zeros(site.d_out, 1)) | bias if self.norms else None
        d, n = site.d_out, self.n
        if d % n:
            raise DoesNotFit(f"compacter(n={n}): {site.name} is {d} wide, which {n} does not divide. "
                             f"Choose n among the divisors of {d}.")
        w = -(-d // (self.reduce * n)) * n
        A = site.shared("A", lambda: site.normal(n, n, n, std=0.01))

        def glorot(rows):                  # Xavier uniform with gain sqrt(2), as of a (rows, 1) matrix
            return site.uniform(n, rows // n, bound=(12 / (rows // n + 1))**0.5)
        down = dict(Ds=glorot(w), Dt=glorot(d), Dc=site.zeros(w))
        return dict(A=A, **down, Us=glorot(d), Ut=site.zeros(n, w // n), Uc=site.zeros(d))

    def stream(self, t, p):                # t.h: (B, T, d)
        return t.map_h(lambda h: h + phm(gelu(phm(h, p.A, p.Ds, p.Dt, p.Dc), approximate="tanh"), p.A, p.Us, p.Ut, p.Uc))

    def weight(self, W, p, b):             # norms: (d, 1), (d,)
        return W + p.W, b + p.b if hasattr(p, "b") else b
