"""Scenes for dual encoders, 64 pixels a side, as tables: one shape and its name, or several and a caption. The names of
scenes.STYLES make shifted domains; every other pair of colour and shape is unseen where old and new ones are told apart."""

from functools import partial

from .. import scenes
from .read import Data, Table

SIDE = 64
SIZES = {"train": 1600, "val": 300, "test": 600}         # a part of many domains has a share of each


def named(seed, style="plain", what="pair", domains=(), new=(), parts=False, metric=None):
    """Pictures of one shape. domains: styles of the test part; new: names that only the test part shows; parts: whether
    colour and shape are told as attribute and object, too."""
    found, start = {}, 0
    for part, n in SIZES.items():
        rows, kinds = [], domains if domains and part == "test" else [style]
        for i in range(start, start + n):
            s, kind = scenes.scene(i, seed, SIDE, 1, 1), kinds[i % len(kinds)]
            shape, = s.shapes
            name = f"{shape.colour} {shape.shape}" if what == "pair" else getattr(shape, what)
            if part == "test" or name not in new:
                rows.append((s.image(kind), name, shape.colour, shape.shape, kind))
        start += n
        names = ("image", "label", *(("attribute", "object") if parts else (None, None)), "domain" if domains else None)
        columns = {k: list(v) for k, v in zip(names, zip(*rows, strict=True), strict=True) if k}
        found[part] = Table(columns, "scenes", None, part)
    return Data("scenes", found, [], None, {k: k for k in names if k}, "class-names", metric)


def told(seed, extra=False):
    """Pictures of one to four shapes and what they show; extra: told a second time, in words of the scene's other reading."""
    found, start = {}, 0
    for part, n in SIZES.items():
        seen = [scenes.scene(i, seed, SIDE, 1, 4) for i in range(start, start + n)]
        more = {"extra": [counted(s) for s in seen]} if extra else {}
        found[part] = Table({"image": [s.image() for s in seen], "caption": [s.caption() for s in seen]} | more, "scenes", None,
                            part)
        start += n
    return Data("scenes", found, [], None, {k: k for k in ("image", "caption", *more)}, "image-text-retrieval")


def counted(scene):
    """A scene from its top: "2 shapes: a red circle above a blue square"."""
    rows = [f"a {s.colour} {s.shape}" for s in sorted(scene.shapes, key=lambda s: (s.y, s.x))]
    return f"{len(rows)} shape{'s' * (len(rows) > 1)}: {' above '.join(rows)}"


PAIRS = [f"{c} {s}" for c in scenes.COLOURS for s in scenes.SHAPES]
SETS = {
    "scenes:classify": named,                                                             # forty pairs of colour and shape
    "scenes:classify-shape": partial(named, what="shape"),
    "scenes:classify-colour": partial(named, what="colour"),
    "scenes:classify-size": partial(named, what="size"),
    "scenes:classify-base-new": partial(named, new=PAIRS[1::2], metric="harmonic"),       # every other pair is only in the test
    "scenes:classify-base-new-outline": partial(named, style="outline", new=PAIRS[1::2], metric="harmonic"),
    "scenes:classify-shift": partial(named, domains=scenes.STYLES),   # trained on plain pictures
    "scenes:compose": partial(named, new=PAIRS[1::2], parts=True, metric="auc"),
    "scenes:compose-outline": partial(named, style="outline", new=PAIRS[1::2], parts=True, metric="auc"),
    "scenes:retrieval": told,
    "scenes:retrieval-extra": partial(told, extra=True),                                  # with a second caption
} | {f"scenes:classify-{k}": partial(named, style=k) for k in scenes.STYLES[1:]}
