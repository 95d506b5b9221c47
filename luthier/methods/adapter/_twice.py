"""The adapter of VLSM-Adapter: h + relu(W2 relu(W1 h + b1) + b2), both layers drawn as torch draws its linear layers."""

from torch.nn.functional import linear, relu


def drawn(site, d, width):                 # trains 2 width d + width + d
    W1, W2 = site.uniform(width, d, bound=d**-0.5), site.uniform(d, width, bound=width**-0.5)
    return dict(W1=W1, b1=site.uniform(width, bound=d**-0.5), W2=W2, b2=site.uniform(d, bound=width**-0.5))


def change(h, p):                          # (..., d) -> (..., d), none of it negative
    return relu(linear(relu(linear(h, p.W1, p.b1)), p.W2, p.b2))


def read(model):
    """The layers whose states a segmenter's decoder reads, or None."""
    return getattr(getattr(model, "config", None), "extract_layers", None)


STARTS = {"identity_at_init": "relu comes last, and at zero nothing behind it would ever learn"}
