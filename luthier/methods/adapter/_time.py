"""What methods that see time share: rows of a clip, its grid of patches, convolutions over frames."""

import torch.nn.functional as F
from torch import nn

from luthier.errors import DoesNotFit


def looks(site):
    """Whether the tower of this site begins with pixels."""
    return any(isinstance(m, nn.Conv2d) for m in site.stack.module.modules())


def clips(t, x):                           # (B N, ...) -> (B, N, ...)
    return x.unflatten(0, (-1, t.frames))


def grid(t, name):
    """Rows and columns of the patches behind the special tokens."""
    pixels = t.given is None or t.given.dim() > 3           # a block that runs again is not told: its map is taken for a square
    n, H, W = t.h.shape[1] - t.fixed, *(t.given.shape[-2:] if t.given is not None and pixels else (1, 1))
    rows = round((n * H / W) ** 0.5)
    if not pixels or rows == 0 or n % rows:
        raise DoesNotFit(f"{name} reads patches as a map, and {n} tokens are no map of {H} by {W} pixels. Use a model whose "
                         "stream is the grid of patches, and nothing that merges or drops tokens.")
    return rows, n // rows


def over_time(x, K, b):
    """Convolution along N of (B, N, ..., C): K (k, C', C), or (k, C) where every channel has its own."""
    k, N = len(K), x.shape[1]
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (k // 2, k // 2))
    return sum(x[:, i:i + N] * K[i] if K.dim() == 2 else x[:, i:i + N] @ K[i].T for i in range(k)) + b


def over_space(x, K, b, size, groups=1):
    """Convolution of maps (B, h w, C) with K: (C', C / groups, 3, 3)."""
    return F.conv2d(x.mT.unflatten(-1, size), K, b, padding=1, groups=groups).flatten(2).mT
