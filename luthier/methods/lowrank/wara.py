"""A low rank in the wavelet domain.    W' = W + (α/r)·S_outᵀ diag(B A, B A) S_in,   A: (r, d_in/2),   B: (d_out/2, r) = 0
Heidari et al., WaRA, 2025. arXiv:2506.24092, fig. 1: a fixed DWT S splits the layer's input into subbands, one pair A, B for all
of them acts on the coefficients, the inverse DWT of the result is the update. The figure's transform is over features and tokens
(LL, LH, HL, HH); as A and B are shared and act on features alone, the one over tokens cancels, and the update is a weight.
Half of LoRA's numbers at equal rank. S is orthogonal (wavelets wrap around at the ends); an odd width is padded by a zero.
"""

import torch
from torch.nn.functional import pad

from luthier.errors import BadChain
from luthier.method import Method, method

FILTERS = {"haar": (0.5**0.5, 0.5**0.5), "db2": tuple((a + b * 3**0.5) / 32**0.5 for a, b in ((1, 1), (3, 1), (3, -1), (1, -1)))}


def bands(name):                           # the low-pass filter, and the high-pass one that belongs to it
    low = FILTERS[name]
    return low, tuple((-1) ** k * v for k, v in enumerate(reversed(low)))


def dwt(x, name):                          # (..., d) -> (..., 2, d/2): low band, high band
    x = pad(x, (0, x.shape[-1] % 2))
    return torch.stack([sum(v * x.roll(-k, -1)[..., ::2] for k, v in enumerate(f)) for f in bands(name)], -2)


def idwt(c, name, d):                      # (..., 2, d/2) -> (..., d): the transpose of dwt
    up = torch.stack([c, torch.zeros_like(c)], -1).flatten(-2)
    return sum(v * up[..., i, :].roll(k, -1) for i, f in enumerate(bands(name)) for k, v in enumerate(f))[..., :d]


@method
class wara(Method):
    at: str = "attn.q attn.v"
    rank: int = 8
    alpha: float = 16.0                    # the update is scaled by alpha / rank
    wavelet: str = "haar"                  # or db2

    def __post_init__(self):
        super().__post_init__()
        if self.wavelet not in FILTERS:
            raise BadChain(f"{self}: there is no wavelet {self.wavelet!r}. Choose one of {', '.join(FILTERS)}.")

    def init(self, site):                  # trains rank * (d_in + d_out) / 2, odd widths rounded up
        half_in, half_out = -(-site.d_in // 2), -(-site.d_out // 2)
        return dict(A=site.normal(self.rank, half_in, std=half_in**-0.5), B=site.zeros(half_out, self.rank))

    def weight(self, W, p):                # (d_out, d_in): rank 2r, r from each band
        B, A = (torch.stack([self.lift(M, d, band) for band in (0, 1)]) for M, d in zip((p.B.T, p.A), W.shape, strict=True))
        return W + self.alpha / self.rank * B.flatten(0, 1).T @ A.flatten(0, 1)

    def lift(self, M, d, band):            # (r, d/2) coefficients of one band -> (r, d)
        zero = torch.zeros_like(M)
        return idwt(torch.stack([zero, M] if band else [M, zero], -2), self.wavelet, d)

    def fast(self, x, y, p):               # (..., d_in) -> (..., d_out)
        return y + self.alpha / self.rank * idwt(dwt(x, self.wavelet) @ p.A.T @ p.B.T, self.wavelet, y.shape[-1])
