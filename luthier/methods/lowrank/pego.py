"""A group of LoRAs, orthogonal to the weight and to each other.    W' = W + Σ_i B_i A_i,   A_i: (r, d_in),   B_i: (d_out, r) = 0
Hu et al., PEGO, ECCV 2024. arXiv:2407.15085 §3.2, i = 1 ... n. Two terms join the loss, summed over all sites:
    preserve · Σ_i ‖W (B_i A_i)ᵀ‖₁                  what pretraining learned stays
    diverse · Σ_{i<j} ‖B_i A_i (B_j A_j)ᵀ‖₁         each member learns something else
‖·‖₁ sums absolute entries; the paper has one λ for both. Merged, the group costs nothing.
"""

from luthier.method import Method, method


@method
class pego(Method):
    at: str = "attn.q attn.v"
    rank: int = 4                          # r, of each member
    n: int = 4
    preserve: float = 1e-3                 # λ of the first term; 0: without it
    diverse: float = 1e-3                  # λ of the second

    def init(self, site):                  # trains n * rank * (d_in + d_out)
        A = site.normal(self.n, self.rank, site.d_in, std=site.d_in**-0.5)
        return dict(A=A, B=site.zeros(self.n, self.rank, site.d_out))          # B_iᵀ, = 0: identity at init

    def weight(self, W, p):                # (d_out, d_in)
        return W + p.B.flatten(0, 1).T @ p.A.flatten(0, 1)

    def fast(self, x, y, p):               # (..., d_in) -> (..., d_out)
        return y + x @ p.A.flatten(0, 1).T @ p.B.flatten(0, 1)

    def loss(self, run):
        both = [self.terms(run.sites[name].W, p) for name, p in run.states.items()]
        return sum(self.preserve * keep + self.diverse * part for keep, part in both)

    def terms(self, W, p):                 # products of width r first: no (d_out, d_in) matrix is made
        keep = (W @ p.A.mT @ p.B).abs().sum() if self.preserve else 0.0
        pairs = [(p.B[i].T @ (p.A[i] @ p.A[j].T) @ p.B[j]).abs().sum()
                 for i in range(self.n) for j in range(i + 1, self.n)] if self.diverse else []
        return keep, sum(pairs)
