"""Scenes for segmentation by text, 64 pixels a side: a picture of one to four shapes, a phrase, and the mask of all that it is
true of. One phrase in five names what is not there, and its mask is empty (as a fifth of CLIPSeg's training pairs are,
2112.10003 §3.4). Names of scenes.STYLES make shifted domains; -seen pictures never show a novel pair of colour and shape."""

from functools import partial

import numpy as np

from .. import scenes
from .read import Data, Table

SIDE, SIZES, ABSENT = 64, {"train": 1600, "val": 200, "test": 400}, 5


def row(index, seed, style="plain", split="all"):
    """(image, phrase, mask), the two pictures drawn when they are looked at."""
    s, draw = scenes.scene(index, seed, SIDE, 1, 4, split), scenes.Draw("segment", seed, index)
    said = draw.one(s.shapes)
    words = said.colour, said.shape
    if index % ABSENT == 0:
        while s.count(words[1], words[0]):
            words = draw.pair(split)[::-1]
    elif not draw.below(3):                          # by less than both: the mask of all that fit
        words = draw.one(((words[0], None), (None, words[1])))
    name = " ".join([words[0] or "", words[1] or "shape"]).strip()
    return partial(s.image, style), f"{'an' if name[0] in 'aeiou' else 'a'} {name}", partial(masked, s, *words)


def masked(s, colour, shape):
    fits = [colour in (None, x.colour) and shape in (None, x.shape) for x in s.shapes]
    return (s.masks() & np.array(fits)[:, None, None]).any(0).astype(np.uint8) * 255


def segmented(seed, style="plain", split="all"):
    found, start = {}, 0
    for part, n in SIZES.items():
        rows = zip(*(row(i, seed, style, split) for i in range(start, start + n)), strict=True)
        found[part] = Table(dict(zip(("image", "phrase", "mask"), map(list, rows), strict=True)), "scenes", None, f"{part} row")
        start += n
    return Data("scenes", found, [], None, {k: k for k in ("image", "phrase", "mask")}, "text-segmentation")


SETS = {"scenes:segment": segmented, "scenes:segment-seen": partial(segmented, split="seen")} | {
    f"scenes:segment-{style}": partial(segmented, style=style) for style in scenes.STYLES[1:]}
