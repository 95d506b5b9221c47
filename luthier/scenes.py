"""Procedural scenes: coloured shapes on a canvas, with everything that can be asked of them. Scene i of a seed is the same on
every machine: randomness comes from `random.Random(text).random()`, whose values Python guarantees, and drawing is arithmetic.

    s = scene(7, seed=0, size=64)        s.image()      uint8 (64, 64, 3);  s.image("outline"): the same in another of STYLES
    s.caption()    "a small red circle and a large blue square"
    s.boxes()      int (n, 4), x0 y0 x1 y1, the last two exclusive; s.masks(): bool (n, 64, 64); s.labels(): int (n,), the shapes
    s.questions()  [Question("count", "How many red shapes are there?", "2"), ...]
    c = clip(7, seed=0, size=32, frames=8)
    c.video()      uint8 (8, 32, 32, 3);  c.caption(), c.directions, c.questions(): which way things move, and in which order

Compositional splits: a fifth of the (shape, colour) pairs are *novel*. Scenes with split="seen" never show one, those with
split="novel" show at least one, so that a test asks for known parts in unknown combinations; split="all" knows no such rule.
Shapes never overlap, so boxes and masks are whole."""

from dataclasses import dataclass, replace
from random import Random

import numpy as np

SHAPES = ("circle", "square", "triangle", "diamond", "cross")
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (240, 210, 40),
           "purple": (150, 60, 190), "orange": (245, 140, 30), "cyan": (50, 200, 210), "white": (245, 245, 245)}
SIZES = {"small": 0.09, "large": 0.16}               # half the width, as a share of the canvas
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUND = (24, 26, 34)
FINE = 3                                             # samples a pixel and side, for smooth edges
STYLES = ("plain", "pale", "light", "outline", "noise", "stripes", "grey")       # how a scene is drawn; see `paint`


@dataclass(frozen=True)
class Shape:
    shape: str
    colour: str
    size: str
    x: float                                         # centre, as a share of the canvas; y grows downwards
    y: float

    @property
    def name(self):
        return f"{self.size} {self.colour} {self.shape}"

    def covers(self, size, share=1.0):
        """float (size, size): the share of each pixel that the shape covers; share=0.6: of the shape shrunk to 0.6 of itself."""
        half, at = SIZES[self.size] * share, (np.arange(size * FINE) + 0.5) / (size * FINE)
        across, down = (slice(max(0, int((c - half) * size) - 1), max(0, int((c + half) * size) + 2)) for c in (self.x, self.y))
        u, v = ((at[w.start * FINE:w.stop * FINE] - c) / half for w, c in ((across, self.x), (down, self.y)))
        u, v = u[None, :], v[:, None]                # of the pixels around the shape: all others stay uncovered
        inside = {"circle": u * u + v * v <= 1, "square": np.maximum(abs(u), abs(v)) <= 0.9, "diamond": abs(u) + abs(v) <= 1,
                  "triangle": (v <= 0.8) & (2 * abs(u) <= v + 1), "cross": (np.minimum(abs(u), abs(v)) <= 0.3) &
                  (np.maximum(abs(u), abs(v)) <= 1)}[self.shape]
        found, (h, w) = np.zeros((size, size)), inside.shape
        found[down, across] = inside.reshape(h // FINE, FINE, w // FINE, FINE).mean((1, 3))
        return found


@dataclass(frozen=True)
class Question:
    kind: str                                        # count | exists | compare | attribute | relation | direction | order
    question: str
    answer: str


def novel(shape, colour):
    """Whether the pair is held out of split="seen": every shape and every colour is in one such pair at least, and in others."""
    return (SHAPES.index(shape) + 2 * list(COLOURS).index(colour)) % 5 == 0


def paint(shapes, size, style="plain", key=""):
    """uint8 (size, size, 3). Styles: colours half-way to grey (pale), a light or a striped background, rims only (outline),
    uniform noise of ±70 a channel, and the mean of the channels (grey), in which colours cannot be told."""
    if style not in STYLES:
        raise ValueError(f"There is no style {style!r}: {', '.join(STYLES)}")
    image, draw = np.empty((size, size, 3)), Draw(key, "style")
    image[:] = (228, 230, 235) if style == "light" else BACKGROUND
    if style == "stripes":
        y, x = np.indices((size, size))
        image[((x + y) * 10 // size + draw.below(2)) % 2 == 1] = (96, 98, 106)
    for s in shapes:
        cover = (s.covers(size) - s.covers(size, 0.65) if style == "outline" else s.covers(size))[..., None]
        colour = np.array(COLOURS[s.colour], float)
        image = image * (1 - cover) + cover * (0.4 * colour + 0.6 * 120 if style == "pale" else colour)
    if style == "noise":
        image += 140 * (np.array([draw.random() for _ in range(image.size)]).reshape(image.shape) - 0.5)
    if style == "grey":
        image[:] = image.mean(2, keepdims=True)
    return (image + 0.5).clip(0, 255).astype(np.uint8)


class Draw:
    """Choices from a text seed, by random() alone."""

    def __init__(self, *key):
        self.random = Random(":".join(map(str, key))).random

    def below(self, n):
        return int(self.random() * n)

    def one(self, options):
        return options[self.below(len(options))]

    def pair(self, split):
        """(shape, colour), by the rule of the split."""
        while True:
            pair = self.one(SHAPES), self.one(list(COLOURS))
            if split == "all" or novel(*pair) == (split == "novel"):
                return pair


@dataclass(frozen=True)
class Scene:
    shapes: tuple
    size: int = 64
    key: str = ""

    def image(self, style="plain"):
        return paint(self.shapes, self.size, style, self.key)

    def masks(self):
        return np.stack([s.covers(self.size) >= 0.5 for s in self.shapes])

    def boxes(self):
        found = []
        for m in self.masks():
            ys, xs = np.flatnonzero(m.any(1)), np.flatnonzero(m.any(0))
            found.append((xs[0], ys[0], xs[-1] + 1, ys[-1] + 1))
        return np.array(found)

    def labels(self):
        return np.array([SHAPES.index(s.shape) for s in self.shapes])

    def segmentation(self):
        """int (size, size): 0 for the background, 1 + number of the shape."""
        return sum((1 + k) * m for k, m in zip(self.labels(), self.masks(), strict=True))

    def caption(self):
        *rest, last = [f"a {s.name}" for s in sorted(self.shapes, key=lambda s: (s.x, s.y))]        # read from the left
        return f"{', '.join(rest)} and {last}" if rest else last

    def count(self, shape=None, colour=None):
        return sum(shape in (None, s.shape) and colour in (None, s.colour) for s in self.shapes)

    def questions(self):
        """One question of each kind that the scene allows; yes and no are equally likely where a choice is ours."""
        draw, found = Draw(self.key, "questions"), []
        some = draw.one(self.shapes)
        found.append(Question("count", f"How many {some.colour} shapes are there?", str(self.count(colour=some.colour))))
        asked = (some.shape, some.colour) if draw.below(2) else draw.pair("all")
        found.append(Question("exists", f"Is there a {asked[1]} {asked[0]}?", "yes" if self.count(*asked) else "no"))
        a, b = draw.one(SHAPES), draw.one(SHAPES)
        if a != b:
            found.append(Question("compare", f"Are there more {plural(a)} than {plural(b)}?",
                                  "yes" if self.count(a) > self.count(b) else "no"))
        if self.count(some.shape) == 1:
            found.append(Question("attribute", f"What colour is the {some.shape}?", some.colour))
        if self.count(colour=some.colour) == 1:
            found.append(Question("attribute", f"What shape is the {some.colour} thing?", some.shape))
        other = draw.one(self.shapes)
        if self.count(some.shape, some.colour) == self.count(other.shape, other.colour) == 1 and some != other:
            found.append(Question("relation", f"Is the {some.colour} {some.shape} left of the {other.colour} {other.shape}?",
                                  "yes" if some.x < other.x else "no"))
        return found


def plural(shape):
    return shape + ("es" if shape.endswith("s") else "s")


def scene(index, seed=0, size=64, least=1, most=4, split="all"):
    """Scene `index` of a seed, with `least` to `most` shapes (at most 9: a 3 x 3 grid keeps them apart)."""
    if split not in ("all", "seen", "novel") or not 1 <= least <= most <= 9 or size < 8:
        raise ValueError(f"scene(size={size}, least={least}, most={most}, split={split!r}): size is at least 8, 1 <= least <= "
                         "most <= 9, split is all, seen or novel")
    key = f"scene:{seed}:{index}:{split}"
    draw, cells, shapes = Draw(key), list(range(9)), []
    for k in range(least + draw.below(most - least + 1)):
        cell = cells.pop(draw.below(len(cells)))
        shape, colour = draw.pair(split if split != "novel" or k == 0 else "all")
        kind = draw.one(list(SIZES))
        slack = 1 / 3 - 2 * SIZES[kind]              # room inside the cell
        x, y = (c / 3 + SIZES[kind] + draw.random() * slack for c in (cell % 3, cell // 3))
        shapes.append(Shape(shape, colour, kind, x, y))
    return Scene(tuple(shapes), size, key)


@dataclass(frozen=True)
class Clip:
    """Two shapes: the first moves while the second waits, then the second. Played backwards, direction and order both change."""
    shapes: tuple
    directions: tuple
    size: int = 32
    frames: int = 8

    def scenes(self):
        half, found = self.frames / 2, []
        for t in range(self.frames):
            now = []
            for k, (s, d) in enumerate(zip(self.shapes, self.directions, strict=True)):
                moved = min(1.0, max(0.0, (t + 1 - k * half) / half)) * 0.25
                dx, dy = DIRECTIONS[d]
                now.append(replace(s, x=s.x + dx * moved, y=s.y + dy * moved))
            found.append(Scene(tuple(now), self.size))
        return found

    def video(self):
        return np.stack([s.image() for s in self.scenes()])

    def caption(self):
        (a, b), (p, q) = self.shapes, self.directions
        return f"the {a.colour} {a.shape} moves {p}, then the {b.colour} {b.shape} moves {q}"

    def questions(self):
        (a, b), (p, q) = self.shapes, self.directions
        return [Question("direction", f"Which way does the {a.colour} {a.shape} move?", p),
                Question("direction", f"Which way does the {b.colour} {b.shape} move?", q),
                Question("order", f"Does the {a.colour} {a.shape} move first?", "yes"),
                Question("order", f"Does the {b.colour} {b.shape} move first?", "no")]


def clip(index, seed=0, size=32, frames=8, split="all"):
    """Clip `index` of a seed. The two shapes keep to their halves of the canvas, so they never meet."""
    draw = Draw(f"clip:{seed}:{index}:{split}")
    first = draw.pair(split)
    second = first
    while second == first:
        second = draw.pair(split if split != "novel" else "all")
    shapes, directions, left = [], [], draw.below(2)
    for k, (shape, colour) in enumerate((first, second)):
        way = draw.one(list(DIRECTIONS))
        dx, dy = DIRECTIONS[way]
        middle = 0.25 if (k == 0) == bool(left) else 0.75
        # the path is 0.25 long and centred in the half, across or along it
        shapes.append(Shape(shape, colour, "small", middle - dx * 0.125, 0.3 + 0.4 * draw.random() - dy * 0.125))
        directions.append(way)
    return Clip(tuple(shapes), tuple(directions), size, frames)
