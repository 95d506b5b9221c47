"""Built-in data of images and text: procedural scenes and clips with captions, questions, true or false sentences and places, and
NLVR's crowd-written sentences. A scene is drawn when it is looked at."""

import os
from functools import partial
from pathlib import Path

import numpy as np

from .. import scenes
from ..errors import BadData
from .read import Data, Table

SIDE, FRAMES = 32, 6
SIZES = dict(train=1200, val=200, test=300)


def caption(i, seed):
    s = scenes.scene(i, seed, SIDE)
    return dict(image=s.image, prompt="Describe the picture.", response=s.caption())


def vqa(i, seed):
    s = scenes.scene(i, seed, SIDE)
    asked = s.questions()
    q = asked[i % len(asked)]
    return dict(image=s.image, prompt=q.question, response=q.answer)


def ground(i, seed):
    """Where one shape is, as x0 y0 x1 y1 in 32 steps of the canvas."""
    s = scenes.scene(i, seed, SIDE)
    names = [x.name for x in s.shapes]
    alone = [k for k, name in enumerate(names) if names.count(name) == 1]
    if not alone:                                    # all shapes twice: another scene takes its place
        return ground(i + 10_000_019, seed)
    k = alone[i % len(alone)]
    return dict(image=s.image, prompt=f"Where is the {names[k]}?", response=" ".join(map(str, s.boxes()[k])))


def nlvr(i, seed):
    """Two or three panels and a sentence about them, as often true as false."""
    draw = scenes.Draw("nlvr", seed, i)
    n, wanted = 2 + draw.below(2), bool(draw.below(2))
    panels = [scenes.scene(i * 3 + k, seed, SIDE, most=3) for k in range(n)]
    while True:
        shape, colour = draw.one(scenes.SHAPES), draw.one(list(scenes.COLOURS))
        counts, total = [p.count(shape) for p in panels], sum(p.count(colour=colour) for p in panels)
        some = draw.below(3)
        sentence, true = draw.one((
            (f"Every picture has a {shape}.", all(counts)), (f"Exactly one picture has a {shape}.", sum(map(bool, counts)) == 1),
            (f"There is a {colour} shape.", total > 0), (f"There are exactly {some + 1} {colour} shapes.", total == some + 1),
            (f"The first picture has more {scenes.plural(shape)} than the last.", counts[0] > counts[-1])))
        if true == wanted:
            return dict(image=[p.image for p in panels], prompt=f"{sentence} True or false?", response=str(true).lower())


def clips(i, seed):
    c = scenes.clip(i, seed, SIDE, FRAMES)
    q = c.questions()[i % 4]
    return dict(image=[s.image for s in c.scenes()], prompt=q.question, response=q.answer)


def told(i, seed):
    c = scenes.clip(i, seed, SIDE, FRAMES)
    return dict(image=[s.image for s in c.scenes()], prompt="Describe the clip.", response=c.caption())


def asked(kind, i, seed):
    c = scenes.clip(i, seed, SIDE, FRAMES)
    q = [q for q in c.questions() if q.kind == kind][i % 2]
    return dict(image=[s.image for s in c.scenes()], prompt=q.question, response=q.answer)


def built(*makers, name, share=1.0):
    """Data of one kind of row, or of several with a column that says which."""
    def make(seed):
        splits, start = {}, 0
        for split, size in SIZES.items():
            rows = [fn(start + i, seed) | ({"task": kind} if len(makers) > 1 else {})
                    for kind, fn in makers for i in range(int(size * share))]
            names = [n for n in rows[0] if not (len(makers) == 1 and n == "prompt" and makers[0][1] is caption)]
            splits[split] = Table({n: [r[n] for r in rows] for n in names}, "scenes", None, f"{split} row")
            start += size
        roles = {r: r for r in splits["train"].columns}
        return Data(name, splits, columns=roles, task="image-to-text")
    return make


def crowd(seed):
    """NLVR (Suhr et al., 2017): three boxes of shapes, a crowd-written sentence; the two orders of an example stay together."""
    path = Path(os.environ.get("LUTHIER_DATA", "")) / "nlvr_subset" / "data.npz"
    if not path.is_file():
        raise BadData(f"The data nlvr is not at {path}. Set LUTHIER_DATA to a folder that holds nlvr_subset/data.npz.")
    with np.load(path, allow_pickle=False) as file:
        d = {k: file[k] for k in file.files}

    def rows(split, keep):
        cut, raw = d[f"{split}_offsets"], d[f"{split}_bytes"]
        boxes = [(x, 0, x + 100, 100) for x in (0, 150, 300)]
        return Table({"image": [[{"bytes": b, "box": box} for box in boxes]
                                for b in (raw[cut[i]:cut[i + 1]].tobytes() for i in keep)],
                      "prompt": [f"{d[f'{split}_text'][i]} True or false?" for i in keep],
                      "response": [str(d["classes"][d[f"{split}_labels"][i]]) for i in keep]}, f"nlvr ({split})", list(keep))

    groups = sorted(set(d["train_group"].tolist()))
    held = set(groups[k] for k in np.random.default_rng(seed).permutation(len(groups))[:len(groups) // 10])
    val = [g in held for g in d["train_group"].tolist()]
    splits = {"train": rows("train", [i for i, v in enumerate(val) if not v]),
              "val": rows("train", [i for i, v in enumerate(val) if v]), "test": rows("test", range(len(d["test_labels"])))}
    return Data("nlvr", splits, columns={r: r for r in ("image", "prompt", "response")}, task="image-to-text")


KINDS = (("caption", caption), ("vqa", vqa), ("nlvr", nlvr), ("ground", ground))
MOVING = (("caption", told), *((kind, partial(asked, kind)) for kind in ("direction", "order")))
SETS = {"scenes:clips": ([("clip", clips)], 1.0), "scenes:multitask": (KINDS, 0.5), "scenes:clips-multitask": (MOVING, 0.5)} | {
    f"scenes:{kind}": ([(kind, fn)], 1.0) for kind, fn in KINDS}
BUILT_IN = {name: built(*makers, name=name, share=share) for name, (makers, share) in SETS.items()} | {"nlvr": crowd}
