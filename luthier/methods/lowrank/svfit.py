"""Only the leading singular values train.    W' = U diag(σ) Vᵀ + W_e,   σ: (r,)
Sun et al., SVFit, 2024. arXiv:2409.05926. W = W_r + W_e is split once: W_r = U diag(σ0) Vᵀ holds the r leading triplets,
and U: (d_out, r), V: (d_in, r) and the rest W_e stay as they are.

What is stored is s = σ - σ0, so that W' = W + U diag(s) Vᵀ: the same gradients, exactly W at init, and no copy of W_e.
"""

import torch

from luthier.method import Method, method


@method
class svfit(Method):
    at: str = "attn.q attn.v"
    rank: int = 768                        # at most min(d_out, d_in); at 768-wide layers 16 times below lora(rank=8)

    def init(self, site):                  # trains min(rank, d_out, d_in)
        W = site.W
        U, S, Vh = torch.linalg.svd(W.to(torch.promote_types(W.dtype, torch.float32)), full_matrices=False)
        r = min(self.rank, len(S))
        return dict(s=site.zeros(r), U=site.fixed(U[:, :r].to(W)), V=site.fixed(Vh[:r].T.to(W)))

    def weight(self, W, p):                # (d_out, d_in)
        return W + p.U * p.s @ p.V.T

    def fast(self, x, y, p):               # (..., d_in) -> (..., d_out)
        return y + (x @ p.V * p.s) @ p.U.T
