"""Image data in arrays: .npz files, dicts, and the built-in sets, which need no file."""

import numpy as np

from .. import scenes
from ..errors import BadData, nearest
from . import pictures_masks, pictures_named
from .read import Data, Table


def npz(path):
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files}
    except Exception as error:                       # zipfile, zlib, numpy and struct each raise their own
        raise BadData(f"{path} cannot be read as .npz without pickles: {str(error).splitlines()[0][:200]} "
                      "Save plain arrays with numpy.savez.") from error
    return tables(arrays, str(path))


def tables(arrays, source):
    """Arrays named [SPLIT_]images (N, H, W[, C]) or [SPLIT_]bytes + [SPLIT_]offsets (encoded files), [SPLIT_]labels, classes."""
    splits = {}
    for split in ("train", "val", "test", ""):
        pre = split + "_" if split else ""
        get = {k: np.asarray(arrays[pre + k]) for k in ("images", "bytes", "offsets", "labels") if pre + k in arrays}
        if "images" in get:
            images = list(get["images"])
            if get["images"].ndim not in (3, 4):
                raise BadData(f"{source}: {pre}images has the shape {get['images'].shape}. Images are (N, H, W) or (N, H, W, C).")
        elif {"bytes", "offsets"} <= get.keys():
            offsets, raw = get["offsets"], get["bytes"]
            if (np.diff(offsets) < 0).any() or offsets[-1] > len(raw):
                raise BadData(f"{source}: {pre}offsets do not fit {pre}bytes ({len(raw)} bytes). Save the file again.")
            images = [raw[a:b].tobytes() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
        else:
            continue
        labels = get.get("labels")
        if labels is None or labels.reshape(-1).shape[0] != len(images):
            raise BadData(f"{source}: {len(images)} {pre}images, but {'no' if labels is None else labels.size} {pre}labels. "
                          f"Store one label an image under {pre}labels.")
        columns = {"image": images, "label": labels.reshape(-1).tolist()}
        if pre + "text" in arrays:
            columns["text"] = [str(t) for t in arrays[pre + "text"]]
        splits[split or "all"] = Table(columns, source, None, f"{split or 'row'}" if split else "row")
    if not splits:
        raise BadData(f"{source} holds the arrays {', '.join(arrays)}, and none is called images (or train_images, train_bytes). "
                      f"{nearest('images', arrays)} Save images (N, H, W, C) and labels (N,).")
    if "train" not in splits:
        splits = {"all": next(iter(splits.values()))}
    classes = [str(c) for c in arrays["classes"]] if "classes" in arrays else None
    notes = ["the column text is not used: images are classified alone"] if "text" in next(iter(splits.values())).columns else []
    return Data(source, splits, notes, classes, {"image": "image", "label": "label"}, "image-classification")


def digits(seed):
    """scikit-learn's 1797 handwritten digits, 8 x 8."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise BadData("The built-in data digits needs scikit-learn. pip install scikit-learn") from error
    d = load_digits()
    images = (d.images * (255 / 16)).round().astype(np.uint8)        # stored as 0..16
    return tables({"images": images, "labels": d.target, "classes": [str(n) for n in range(10)]}, "digits")


def drawn(ask, classes, test="all", most=1):
    """A set of procedural scenes: 1200, 200 and 400 images of 32 x 32, labelled by ask(scene) -> number."""
    def make(seed):
        arrays, start = {"classes": np.array(classes)}, 0
        for split, n in (("train", 1200), ("val", 200), ("test", 400)):
            rule = "all" if test == "all" else test if split == "test" else "seen"
            seen = [scenes.scene(start + i, seed, 32, 1, most, rule) for i in range(n)]
            arrays[f"{split}_images"] = np.stack([s.image() for s in seen])
            arrays[f"{split}_labels"] = np.array([ask(s) for s in seen])
            start += n
        return tables(arrays, "scenes")
    return make


BUILT_IN = {
    "digits": digits,
    "scenes": drawn(lambda s: int(s.labels()[0]), scenes.SHAPES),                         # which shape
    "scenes-novel": drawn(lambda s: int(s.labels()[0]), scenes.SHAPES, test="novel"),     # ... in colours never seen with it
    "scenes-count": drawn(lambda s: len(s.shapes) - 1, range(1, 7), most=6),              # how many shapes
} | pictures_named.SETS | pictures_masks.SETS
