"""A full-rank update from fixed random bases; only diagonals train.    W' = W + c Σ_j B_j Λ_j A Γ_j,   j = 1..n
Albert et al., RandLoRA, ICLR 2025. arXiv:2502.00987; constants after the authors' peft code. With d = min(d_out, d_in), D = max,
n = ⌈d/r⌉: B_j: (D, r) and A: (r, d) are random with unit standard deviation, shared by all sites of one shape;
Λ_j: (r,) = 0 and Γ_j: (d,) = 1/d train. Where d_out < d_in the sum is transposed, so that Γ is always the short side.

`ternary` draws the bases from {-1, 0, +1} with probabilities 1/6, 2/3, 1/6 (sparse bases); keep rank at 8 or more then, since a
column of A that is all zero is a feature that cannot change.
"""

from luthier.method import Method, method
from luthier.methods.lowrank._bases import common, read, write


@method
class randlora(Method):
    at: str = "attn.q attn.v"
    rank: int = 32
    scale: float = 20.0                    # c; peft calls it alpha / rank
    ternary: bool = False
    stored: bool = False                   # keep the bases in the file: those of another tool cannot be drawn again
    peft = dict(type="RANDLORA", layers="linear conv1d", names=("randlora_lambda", "randlora_gamma"), write=write, read=read,
                shared=("randlora_A", "randlora_B"), common=common, given=dict(stored=True), fields=dict(r="rank"),
                factor=("scale",), scale=("randlora_alpha", "r", 0), settings=dict(save_projection=True),
                rounds="to rounding: peft multiplies x by the two factors in turn, randlora builds the weight's change first")

    def init(self, site):                  # trains n * (rank + d)
        d, D = sorted((site.d_out, site.d_in))
        r = min(self.rank, d)
        n = -(-d // r)
        G = site.zeros(n, d)
        G.data += 1 / d
        A = site.shared("A", lambda: self._base(site, r, d), group=(D, d))
        B = site.shared("B", lambda: self._base(site, D, n * r), group=(D, d))      # [B_1 ... B_n]
        return dict(L=site.zeros(n, r), G=G, A=A, B=B)

    def weight(self, W, p):                # (d_out, d_in)
        delta = p.B @ self._short(p)
        return W + self.scale * (delta if delta.shape == W.shape else delta.T)

    def _short(self, p):                   # [Λ_j A Γ_j]: (n r, d)
        return (p.L[:, :, None] * p.A * p.G[:, None, :]).flatten(0, 1)

    def fast(self, x, y, p):               # x: (..., d_in) -> (..., d_out); z: (..., n, r)
        wide = y.shape[-1] >= x.shape[-1]
        if x.numel() // x.shape[-1] > self.rank:            # many tokens: one pass over the factor, not n over x or z
            A = self._short(p)
            return y + self.scale * (x @ A.T @ p.B.T if wide else x @ p.B @ A)
        if wide:
            z = (x[..., None, :] * p.G) @ p.A.T * p.L
            return y + self.scale * z.flatten(-2) @ p.B.T
        z = (x @ p.B).unflatten(-1, p.L.shape) * p.L
        return y + self.scale * (z @ p.A * p.G).sum(-2)

    def worth(self, n, d_in, d_out):       # d (d + D) multiply-adds a token, d d D for the weight
        return n * (d_in + d_out) < d_in * d_out

    def _base(self, site, rows, cols):
        base = site.random(rows, cols)
        if self.ternary:
            base = 3**0.5 * base.sign() * (base.abs() > 0.967422)                   # P(|N(0, 1)| > 0.967422) = 1/3
        return base if self.stored else site.fixed(base)
