"""What networks beside a model read: the stream at every block, detached, so that no graph is built in the backbone and none of
its activations is kept. Each tap leaves its reading in a lane; one site fuses them."""

import torch
from torch.nn.functional import layer_norm

from luthier.errors import DoesNotFit


def down(site, w):
    """State of one reading, LN(D h + d): (w, D) and three of (w,)."""
    return dict(D=site.normal(w, site.d_out, std=site.d_out**-0.5), d=site.zeros(w), g=site.ones(w), s=site.zeros(w))


def reading(h, p):                         # (B, T, D) -> (B, T, w)
    x = h.detach() @ p.D.T + p.d
    return layer_norm(x, x.shape[-1:], p.g, p.s)


def tap(t, p, x):
    return t.lane(f"{p.key}@{p.site_name}", x)


def tapped(t, p):
    """{name: (B, T, w)} of everything read so far; p.taps: how many there must be."""
    found = {k: v for k, v in t.lanes.items() if k.startswith(p.key + "@")}
    if len(found) != p.taps:
        raise DoesNotFit(f"{p.key.partition(':')[2]} fuses {p.taps} layers at {p.site_name}, and {len(found)} have come: blocks "
                         "of this model change the number of its tokens. Use it on a model whose stream keeps its length.")
    return found


def visible(x, see):
    """Mean over the tokens that each token may see: (B, S, w), (B or 1, 1 or T, S) or None -> (B, 1 or T, w)."""
    if see is None:
        return x.mean(1, keepdim=True)
    see = see.to(x.dtype)
    return see @ x / see.sum(-1, keepdim=True)


def weighted(weights, xs):                 # (B, 1 or T, L), L of (B, T, w) -> (B, T, w)
    return sum(c * x for c, x in zip(torch.unbind(weights[..., None], -2), xs, strict=True))
