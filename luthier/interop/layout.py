"""The layout of one tensor here and there, as a line of text: `"P: r out -> out r"` is state P, (r, d_out), stored transposed.

Axes: `out` and `in` of the weight, `r` a rank that may be stacked, `1` an axis that comes and goes, any other word an axis that
stays. From them follows what a weight that is one part of a fused module needs: rows along `out`, blocks along `r`."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    name: str                              # of the tensor in the state
    here: tuple
    there: tuple

    def write(self, t):
        return turned(t, self.here, self.there)

    def read(self, t):
        return turned(t, self.there, self.here)

    def axis(self, word):
        return self.there.index(word) if word in self.there else None


def layouts(text):
    """"out: out -> out 1 | into: in -> 1 in" -> [Layout, Layout]: whichever the state has."""
    made = []
    for part in text.split("|"):
        name, _, axes = part.partition(":")
        here, _, there = axes.partition("->")
        made.append(Layout(name.strip(), tuple(here.split()), tuple((there or here).split())))
    return made


def turned(t, a, b):
    """A tensor with axes a, laid out with axes b. ValueError where it has not the axes a."""
    if t.dim() != len(a) or any(w == "1" and n != 1 for w, n in zip(a, t.shape, strict=True)):
        raise ValueError(f"shape {tuple(t.shape)}, not ({', '.join(a)})")
    t = t.reshape([n for w, n in zip(a, t.shape, strict=True) if w != "1"])
    kept = [w for w in a if w != "1"]
    t = t.permute([kept.index(w) for w in b if w != "1"])
    for i, w in enumerate(b):
        if w == "1":
            t = t.unsqueeze(i)
    return t.contiguous()


def rows_of(site, n):
    """The rows of a site in its module's n, as indices."""
    if site.rows is None:
        return torch.arange(n)
    return torch.arange(*site.rows) if isinstance(site.rows, tuple) else site.rows.cpu()
