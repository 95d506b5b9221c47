"""A full-rank update from fixed random bases; only diagonals train.    W' = W + c Σ_j B_j Λ_j A Γ_j,   j = 1..n
Albert et al., RandLoRA, ICLR 2025. arXiv:2502.00987; constants after the authors' peft code. With d = min(d_out, d_in), D = max,
n = ⌈d/r⌉: B_j: (D, r) and A: (r, d) are random with unit standard deviation, shared by all sites of one shape;
Λ_j: (r,) = 0 and Γ_j: (d,) = 1/d train. Where d_out < d_in the sum is transposed, so that Γ is always the short side.

`ternary` draws the bases from {-1, 0, +1} with probabilities 1/6, 2/3, 1/6 (sparse bases); keep rank at 8 or more then, since a
column of A that is all zero is a feature that cannot change.
"""

from luthier.errors import DoesNotFit
from luthier.method import Method, method


def write(p, site, config):                # peft pairs column j r + i of B with row i n + j of A (fixed by its flattening)
    return dict(randlora_lambda=p.L.detach().T, randlora_gamma=p.G.detach())


def common(parts):
    (_, first, site), n = parts[0], {tuple(p.G.shape) for _, p, _ in parts}
    if len({tuple(sorted((s.d_out, s.d_in))) for _, _, s in parts}) > 1 or len(n) > 1:
        raise DoesNotFit("randlora has bases of their own for each shape of weight, peft one pair of which smaller shapes take a "
                         "corner. Export one shape at a time, as with randlora(at=\"attn.q\").")
    n, r = first.L.shape
    B = first.B.view(-1, n, r).mT.reshape(-1, n, r)
    return dict(randlora_A=first.A[:, None], randlora_B=B)


def read(t, site, config):
    d, D = sorted((site.d_out, site.d_in))
    r, n = t["randlora_lambda"].shape
    if r != config["r"] or r > d or n != -(-d // r):
        raise ValueError(f"rank {r} with {n} bases at a weight of {site.d_out} x {site.d_in}")
    if "randlora_A" not in t or "randlora_B" not in t:
        raise KeyError("the random bases are not in the file: save it again in peft with save_projection=True")
    B = t["randlora_B"][:D, :n].reshape(D, r, n).mT.reshape(D, n * r)
    state = dict(L=t["randlora_lambda"].T.contiguous(), G=t["randlora_gamma"], A=t["randlora_A"][:, 0, :d].contiguous(), B=B)
    return state, dict(rank=r, scale=config["randlora_alpha"] / r)


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

    def weight(self, W, p):                # (d_out, d_in); n r d multiply-adds a row: cheaper than x Aᵀ Bᵀ beyond d tokens
        A = (p.L[:, :, None] * p.A * p.G[:, None, :]).flatten(0, 1)                 # [Λ_j A Γ_j]: (n r, d)
        delta = p.B @ A
        return W + self.scale * (delta if delta.shape == W.shape else delta.T)

    def _base(self, site, rows, cols):
        base = site.random(rows, cols)
        if self.ternary:
            base = 3**0.5 * base.sign() * (base.abs() > 0.967422)                   # P(|N(0, 1)| > 0.967422) = 1/3
        return base if self.stored else site.fixed(base)
