"""Second-order rounding to a few bits, column by column: min over Q of ‖W X - Q X‖².
    H = 2 X Xᵀ + λ I,   H⁻¹ = Uᵀ U  (U upper)
    q_j = w_j rounded to its grid,   e_j = (w_j - q_j) / U_jj,   w_k ← w_k - e_j U_jk  for k > j
Frantar et al., GPTQ, 2022. arXiv:2210.17323 §3.3, Alg. 1; grouped grids §4; act_order after the authors' code.

Stored: codes packed into bytes, one scale and zero per row and group; the base weight is no longer needed. A lazy block
is as long as a group, so a grid is always laid over fully updated columns; with `act_order` the grids are laid over
the original weight, so that no order of columns has to be stored.
"""

import torch

from luthier.errors import DoesNotFit
from luthier.method import Method, method
from luthier.methods.quantize._pack import pack, unpack


def grid(W, bits):                         # (d_out, n) -> scale, zero: (d_out,); asymmetric, holds 0 exactly
    low, high = W.amin(1).clamp(max=0), W.amax(1).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def inverse_factor(H, damp):               # (d, d) -> U; a column that was never excited is rounded and passes nothing on
    L = torch.linalg.cholesky(H + torch.diag(damp * H.diag().mean() + (H.diag() == 0).to(H)))
    return torch.linalg.cholesky(torch.cholesky_inverse(L), upper=True)


def precise(t):                            # statistics and rounding are not left to autocast
    return torch.autocast("cpu" if t.is_meta else t.device.type, enabled=False)


@method
class gptq(Method):
    at: str = "linear"
    bits: int = 4                          # 2 to 8
    group: int = 0                         # columns that share one grid; 0: the whole row
    damp: float = 0.01                     # λ, in mean diagonals of H; towards infinity: plain round-to-nearest
    act_order: bool = False                # most excited columns first
    limits = {"bits": (2, 8)}
    example = {"bits": 2}                  # tiny models in half precision do not feel four bits
    exempt = {"identity_at_init": "rounds the weight"}

    def observe(self, x):                  # (N, d_in) -> 2 X Xᵀ: (d_in, d_in)
        with precise(x):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            return 2 * x.T @ x

    def init(self, site, seen):
        W, d = site.W, site.W.shape[1]
        try:
            with precise(W):
                codes, scale, zero = self.solve(W, seen)
        except torch.linalg.LinAlgError as e:
            raise DoesNotFit(f"gptq: the inputs of {site.name} leave H singular ({d} columns). Calibrate on more "
                             f"batches, or raise damp above {self.damp}.") from e
        return dict(codes=pack(codes, self.bits), scale=scale, zero=zero.byte(), d_in=d)

    def solve(self, W, H):                 # -> codes: (d_out, d_in), scale, zero: (d_out, groups)
        d, span, like = W.shape[1], self.group or W.shape[1], W
        if W.is_meta:                      # a model of shapes alone: what the state will weigh
            return W, *(W.new_empty(len(W), -(-d // span)) for _ in range(2))
        order = H.diag().argsort(descending=True).tolist() if self.act_order else list(range(d))
        W, U = W.to(H.dtype), inverse_factor(H[order][:, order], self.damp)
        scale, zero = (torch.stack(part, 1) for part in zip(*(grid(part, self.bits) for part in W.split(span, 1)), strict=True))
        scale, codes, W = scale.to(like.dtype), torch.empty_like(W), W[:, order]
        for lo in range(0, d, step := self.group or 128):
            hi = min(lo + step, d)
            errors = W.new_zeros(len(W), hi - lo)
            if self.group and not self.act_order:
                now, zero[:, lo // span] = grid(W[:, lo:hi], self.bits)
                scale[:, lo // span] = now
            for j in range(lo, hi):
                s, z = scale[:, order[j] // span], zero[:, order[j] // span]
                codes[:, order[j]] = q = ((W[:, j] / s).round() + z).clamp(0, 2**self.bits - 1)
                errors[:, j - lo] = e = (W[:, j] - s * (q - z)) / U[j, j]
                W[:, j + 1:hi] -= e[:, None] * U[j, j + 1:hi]
            W[:, hi:] -= errors @ U[lo:hi, hi:]
        return codes, scale, zero

    def weight(self, p):                   # -> (d_out, d_in)
        scale, zero = (t.repeat_interleave(self.group or p.d_in, 1)[:, :p.d_in] for t in (p.scale, p.zero.to(p.scale)))
        return scale * (unpack(p.codes, self.bits, p.d_in).to(scale) - zero)
