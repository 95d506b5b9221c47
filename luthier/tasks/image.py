"""Image classification. Images are decoded once to uint8, no larger than the model's input; each batch is resized (to a square,
which stretches what is not square), scaled and normalised on the fly."""

import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ..errors import BadData
from .base import UNREADABLE
from .classify import Labelled

BUDGET = 2 << 30               # bytes of decoded images that are kept; beyond it they are decoded again each time
HUGE = 20_000_000              # pixels; Pillow itself refuses nine times as many
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.I)
TREATED = dict.fromkeys(("1", "L", "LA"), "grey: made RGB") | {"CMYK": "CMYK: made RGB"} | dict.fromkeys(
    ("RGBA", "PA"), "transparent: what lies below shows")


def decode(item, side, base=".", told=None):
    """A path, encoded bytes, PIL image or array -> uint8 (3, h, w), at most `side` a side; told: a Counter of what was done to
    images that are not plain."""
    from PIL import Image, ImageOps
    box, item = None, item() if callable(item) else item             # what is drawn when it is looked at
    if isinstance(item, dict):                       # how hub data sets store an image
        box, item = item.get("box"), item.get("bytes") or item.get("path")
    if item is None or isinstance(item, str) and not item.strip():
        raise ValueError("no image is named")
    if isinstance(item, str) and ADDRESS.match(item):
        raise ValueError("nothing is fetched from an address: download the image and give its path")
    if isinstance(item, list | tuple | bool | int | float):
        more = ", and one is wanted, not a list" if isinstance(item, list | tuple) else ""
        raise ValueError(f"{str(item)[:60]} is no image{more}")
    if isinstance(item, np.ndarray) or torch.is_tensor(item):
        array = np.asarray(item)
        if array.dtype != np.uint8:
            if not np.isfinite(array).all():
                raise ValueError("the array holds NaN or infinity")
            array = array * 255 if array.size and 0 <= array.min() and array.max() <= 1 else array
            array = array.clip(0, 255).astype(np.uint8)
        if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
            array = array.transpose(1, 2, 0)
        item = Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)
    elif isinstance(item, (bytes, bytearray)):
        item = Image.open(io.BytesIO(item))
    elif isinstance(item, (str, Path)):
        item = Image.open(Path(base) / item)
    frames, item = getattr(item, "n_frames", 1), ImageOps.exif_transpose(item)
    if item.mode == "P" and "transparency" in item.info:
        item = item.convert("RGBA")
    if item.mode[0] in "IF":                         # deep grey: of 16 bits, or of numbers from 0 to 1
        deep = np.asarray(item)
        if not np.isfinite(deep).all():
            raise ValueError("the image holds NaN or infinity")
        deep = deep // 256 if item.mode[0] == "I" and (deep.max() > 255 or item.mode != "I") else deep
        deep = deep * 255 if item.mode == "F" and 0 <= deep.min() and deep.max() <= 1 else deep
        item = Image.fromarray(deep.clip(0, 255).astype(np.uint8))
    if told is not None:
        odd = {TREATED.get(item.mode): item.mode in TREATED and not _opaque(item),
               "huge: made smaller": item.width * item.height > HUGE,
               "animated: the first frame is used": frames > 1}
        told.update(what for what, true in odd.items() if true)
    item = item.convert("RGB")
    item = item if box is None else item.crop(box)
    if item.width > side or item.height > side:
        item = item.resize((min(side, item.width), min(side, item.height)), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(item)).permute(2, 0, 1).contiguous()


def _opaque(image):
    return image.mode in ("RGBA", "PA") and image.getchannel("A").getextrema()[0] == 255


class Images:
    """Examples of one table: decoded at the first look, kept while the budget lasts."""

    def __init__(self, items, targets, side, base):
        self.items, self.targets, self.side, self.base = items, targets, side, base
        self.kept, self.bytes, self.split = {}, 0, None

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.look(i)

    def look(self, i, told=None):
        image = self.kept.get(i)
        if image is None:
            image = decode(self.items[i], self.side, self.base, told)
            if self.bytes + image.numel() <= BUDGET:
                self.kept[i], self.bytes = image, self.bytes + image.numel()
        known = {} if self.split is None else {"key": (self.split, i)}
        return {"image": image} | known | ({} if self.targets is None else {"labels": self.targets[i]})


class ImageClassification(Labelled):
    kind = "image-classification"
    reads = ("vision", "vision-language")

    def learn(self, data):
        super().learn(data)
        if not self.options.get("image_size") and self.origin:
            self.options["image_size"] = self.fitting_size()

    def limit(self, name, most, seed):
        super().limit(name, most, seed)
        self.tables[name] = self.readable(self.tables[name])

    @property
    def side(self):
        sizes = self.origin.image.get("sizes") if self.origin else None
        return int(self.options.get("image_size") or (sizes or (224,))[-1])

    def fitting_size(self):
        """Of the sizes that suit the model, the smallest at least 3.5 times the data's images: more adds cost, not detail."""
        sizes = self.origin.image.get("sizes") or (224,)
        table = self.tables["train"]
        try:
            seen = max(max(decode(x, 10**6, self.base(table)).shape[1:]) for x in self.column(table, "image")[:8])
        except Exception:                            # broken images are counted by readable()
            return sizes[-1]
        return next((s for s in sizes if s >= 3.5 * seen), sizes[-1])

    def base(self, table):
        """Paths in a table are relative to its file."""
        source = Path(table.source)
        return source.parent if source.is_file() else Path(".")

    def readable(self, table):
        """The table without images that cannot be decoded; refused when they are more than UNREADABLE of all."""
        images = Images(self.column(table, "image"), self.targets(table), self.side, self.base(table))
        bad, good, told = {}, [], Counter()
        for i, item in enumerate(images.items):
            try:                                         # of files, what is not plain is told
                images.look(i, told if isinstance(item, str | bytes) else None)
                good.append(i)
            except Exception as error:               # Pillow raises whatever its decoders do
                bad[i] = error
        self.notes += [f"{n:,} images are {what}" for what, n in told.items()]
        if bad and self.too_many(len(bad), table):
            i, error = next(iter(bad.items()))
            raise BadData(f"{table.where(i)}: the image cannot be read ({str(error)[:160] or type(error).__name__}); in all "
                          f"{len(bad)} of {len(images)}, and at most {UNREADABLE:.0%} may be broken. Mend or remove them.")
        if bad:
            self.notes.append(f"{len(bad)} unreadable images left out, first {table.where(next(iter(bad)))}")
            return table.take(good)
        self._encoded[next(s for s, t in self.tables.items() if t is table)] = images
        return table

    def encode(self, table):
        images = self.column(table, "image")
        return Images(images, self.targets(table), self.side, self.base(table))

    def collate(self, examples):
        side, images = self.side, [e["image"] for e in examples]
        if len({i.shape for i in images}) == 1:
            x = resize(torch.stack(images), side)
        else:
            x = torch.cat([resize(i[None], side) for i in images])
        facts = self.origin.image
        mean, std = (torch.tensor(facts.get(k, d)).view(1, 3, 1, 1) * 255 for k, d in (("mean", (0.5,) * 3), ("std", (0.5,) * 3)))
        batch = {"pixel_values": (x - mean) / std}
        if "labels" in examples[0]:
            batch["labels"] = torch.tensor([e["labels"] for e in examples])
        return batch

    def probe(self):
        return {"pixel_values": torch.zeros(1, 3, self.side, self.side)}

    def pool(self, backbone):
        if hasattr(backbone, "reset_classifier"):
            return "vector"
        asked = self.options.get("pool") or self.origin.pool
        if asked:
            return asked
        kind = getattr(getattr(backbone, "config", None), "model_type", "")
        if "dinov2" in kind:
            return "cls+mean"
        if hasattr(backbone, "post_layernorm"):      # CLIP, SigLIP: trained on their own pooled output
            return "own"
        special = ("cls_token", "class_embedding", "cls_embedding")
        return "cls" if any(n.endswith(special) for n, _ in backbone.named_parameters()) else "mean"

    def extra(self, backbone):
        """Vision transformers of transformers resize their positions only when told to."""
        import inspect
        own = getattr(getattr(backbone, "config", None), "image_size", self.side)
        able = "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters
        return {"interpolate_pos_encoding": True} if able and own != self.side else {}

    def rows(self, inputs):
        from .read import Table
        one = isinstance(inputs, (str, Path, bytes)) or hasattr(inputs, "convert") or getattr(inputs, "ndim", 4) < 4
        inputs = [inputs] if one and not isinstance(inputs, (list, tuple)) else list(inputs)
        if not inputs:
            raise BadData("There is no input to predict. Give at least one image.")
        key = self.roles["image"]
        return Table({key: [x.get(key, x.get("image")) if isinstance(x, dict) and "bytes" not in x else x for x in inputs]},
                     "input", None, "number")

    def predict(self, model, inputs, batch_size=64):
        table, told = self.rows(inputs), Counter()
        for i, item in enumerate(self.column(table, "image")):
            try:
                decode(item, self.side, told=told)
            except Exception as error:
                raise BadData(f"Input {i} ({str(item)[:80]}) is not an image that can be read: {str(error)[:160].rstrip('.')}. "
                              "Give a path to a PNG or JPEG, its bytes, or an array (H, W, 3).") from error
        self.notes += [f"{n:,} images are {what}" for what, n in told.items()]
        return super().predict(model, table.columns[self.roles["image"]], batch_size)

    def facts(self):
        return super().facts() | {"image_size": self.side}


def resize(x, side):
    """uint8 (B, 3, h, w) -> float (B, 3, side, side) in 0..255"""
    x = x.float()
    if x.shape[2:] != (side, side):
        x = F.interpolate(x, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
    return x
