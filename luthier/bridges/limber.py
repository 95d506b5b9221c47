"""One linear map puts an image in front of the text.    h = [dropout(x W + b); E(text)],    x: (S, d), W: (d, D)
Merullo et al., Linearly Mapping from Image to Text Space (LiMBeR), 2023. arXiv:2209.15162 §3: x are the last states of a frozen
encoder's patches without its class token (BEIT: 196; CLIP's RN50x16: the 144 places of its last map), one prompt token each.
An encoder that gives a vector (NF-ResNet) is mapped to k tokens by one matrix, (d, k D); `tokens=k` does so with any encoder's
summary. Trained by the captioning loss alone. `grid=n`: the square of patches is pooled to n x n by maximum first, as the
code of VL-Adapter does with each image's CLIP map, 6 x 6 (arXiv:2112.06825; ylsung/VL_adapter, class Downsample in VL-T5/src/
modeling_bart.py: an adaptive maximum, then the linear map).
"""

from math import isqrt

from torch import nn
from torch.nn import functional as F

from ..errors import DoesNotFit
from .way import Way, way


class Linear(nn.Module):
    def __init__(self, d, D, k, p):
        super().__init__()
        self.map, self.dropout, self.k = nn.Linear(d, k * D), nn.Dropout(p), k

    def forward(self, x):                                   # (N, S, d) -> (N, S k, D)
        return self.dropout(self.map(x)).unflatten(-1, (self.k, -1)).flatten(1, 2)


def pooled(x, n):                                           # (N, S, d) -> (N, n n, d)
    side = isqrt(x.shape[1])
    if side * side != x.shape[1] or side < n:
        raise DoesNotFit(f"grid={n} pools a square of at least {n} x {n} patches, and this vision model gives {x.shape[1]}.")
    return F.adaptive_max_pool2d(x.mT.unflatten(-1, (side, side)), n).flatten(2).mT


@way
class limber(Way):
    tokens: int = 0                                         # 0: one a patch
    dropout: float = 0.1
    grid: int = 0                                           # 0: as many as there are
    limits = dict(dropout=(0, 0.9))

    def states(self, seen):
        if self.tokens:
            return seen.summary[:, None]
        return pooled(seen.tokens, self.grid) if self.grid else seen.tokens

    def connector(self, fit):
        return Linear(fit.states[-1], fit.width, max(1, self.tokens), self.dropout)
