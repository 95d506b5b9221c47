"""The generator says the truth about what it draws, and draws the same everywhere."""

import hashlib

import numpy as np
import pytest

from luthier.scenes import BACKGROUND, COLOURS, SHAPES, STYLES, clip, novel, scene


def test_the_same_on_every_machine():
    """Hashes, written down once: any change of drawing or of the order of draws is a change of data, and must be seen here."""
    h = hashlib.sha256(b"".join(scene(i, seed=3).image().tobytes() for i in range(20))).hexdigest()
    c = hashlib.sha256(clip(5).video().tobytes()).hexdigest()
    assert (h[:16], c[:16]) == ("3722da45c0948e1e", "1c0fc261748e548d")
    assert scene(4).caption() == "a large blue cross"


def test_neighbours_differ():
    assert len({scene(i).image().tobytes() for i in range(100)}) == 100
    assert (scene(0, seed=1).image() != scene(0, seed=2).image()).any()


@pytest.mark.parametrize("size", [16, 64, 100])
def test_boxes_and_masks_fit_the_pixels(size):
    for i in range(30):
        s = scene(i, size=size, most=9)
        image, masks = s.image(), s.masks()
        assert image.shape == (size, size, 3) and masks.sum(0).max() == 1                 # nothing overlaps
        for shape, mask, (x0, y0, x1, y1) in zip(s.shapes, masks, s.boxes(), strict=True):
            assert mask[y0:y1, x0:x1].sum() == mask.sum() > 0
            assert all(edge.any() for edge in (mask[y0], mask[y1 - 1], mask[:, x0], mask[:, x1 - 1]))
            whole = shape.covers(size) == 1
            assert (image[whole] == COLOURS[shape.colour]).all()
        assert (image[sum(x.covers(size) for x in s.shapes) == 0] == BACKGROUND).all()
        assert set(np.unique(s.segmentation())) <= set(range(len(SHAPES) + 1))


def test_answers_are_true():
    kinds = set()
    for i in range(300):
        s = scene(i, most=6)
        for q in s.questions():
            kinds.add(q.kind)
            w = q.question.rstrip("?").split()
            if q.kind == "count":
                assert q.answer == str(sum(x.colour == w[2] for x in s.shapes))
            elif q.kind == "exists":
                assert q.answer == ("yes" if any((x.colour, x.shape) == (w[3], w[4]) for x in s.shapes) else "no")
            elif q.kind == "compare":
                a, b = (sum(x.shape == n[:len(x.shape)] for x in s.shapes) for n in (w[3], w[5]))
                assert q.answer == ("yes" if a > b else "no")
            elif q.kind == "attribute":
                x, = (x for x in s.shapes if w[4] == (x.shape if w[1] == "colour" else x.colour))
                assert q.answer == (x.colour if w[1] == "colour" else x.shape)
            else:
                a, = (x for x in s.shapes if (x.colour, x.shape) == (w[2], w[3]))
                b, = (x for x in s.shapes if (x.colour, x.shape) == (w[7], w[8]))
                assert q.answer == ("yes" if a.x < b.x else "no")
    assert kinds == {"count", "exists", "compare", "attribute", "relation"}


def test_yes_and_no_are_both_common():
    for kind in ("exists", "relation"):
        said = [q.answer for i in range(400) for q in scene(i).questions() if q.kind == kind]
        assert 0.35 < said.count("yes") / len(said) < 0.7


def test_compositional_splits():
    pairs = [(s, c) for s in SHAPES for c in COLOURS]
    assert sum(novel(*p) for p in pairs) == len(pairs) // 5
    assert {s for s, c in pairs if novel(s, c)} == set(SHAPES) and {c for s, c in pairs if novel(s, c)} == set(COLOURS)
    for i in range(100):
        assert not any(novel(x.shape, x.colour) for x in scene(i, split="seen").shapes)
        assert any(novel(x.shape, x.colour) for x in scene(i, split="novel").shapes)


def test_clips_move_as_they_say():
    for i in range(60):
        c = clip(i, size=32, frames=8)
        video, scenes = c.video(), c.scenes()
        assert video.shape == (8, 32, 32, 3) and all(s.masks().sum(0).max() == 1 for s in scenes)
        centre = np.array([[np.array(np.nonzero(m)[::-1]).mean(1) for m in s.masks()] for s in scenes])     # (T, 2, xy)
        assert 0 <= min(s.boxes().min() for s in scenes) and max(s.boxes().max() for s in scenes) <= 32
        for k, way in enumerate(c.directions):
            move = centre[-1, k] - centre[0, k] if k else centre[3, k] - centre[0, k]
            axis, sign = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}[way]
            assert move[axis] * sign > 3 and abs(move[1 - axis]) < 0.5
        assert np.allclose(centre[4:, 0], centre[4, 0]) and np.allclose(centre[:4, 1], centre[0, 1])       # one after the other
        assert {q.kind for q in c.questions()} == {"direction", "order"}


def test_bad_arguments_say_what_is_right():
    for bad in (dict(size=4), dict(most=10), dict(least=5, most=2), dict(split="train")):
        with pytest.raises(ValueError, match="size is at least 8"):
            scene(0, **bad)


def test_styles_move_nothing():
    """A style draws the same shapes elsewise, the same way each time, and the plain one is the picture without a word on
    style."""
    for style in STYLES:
        s = scene(6, seed=2, most=4)
        image = s.image(style)
        assert (image == scene(6, seed=2, most=4).image(style)).all() and image.shape == (64, 64, 3)
        assert (style == "plain") == (image == s.image()).all()
    grey, light, outline = (s.image(k).astype(int) for k in ("grey", "light", "outline"))
    assert (grey.max(2) == grey.min(2)).all() and (light[0, 0] == (228, 230, 235)).all()
    middle = [(int(64 * x.y), int(64 * x.x)) for x in s.shapes]
    assert all((outline[at] == BACKGROUND).all() and (s.image()[at] == COLOURS[x.colour]).all()
               for at, x in zip(middle, s.shapes, strict=True))
    with pytest.raises(ValueError, match="style 'neon'"):
        s.image("neon")
