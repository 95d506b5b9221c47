"""Segmentation by text: an image and a phrase in, the mask of what the phrase names out (CLIPSeg, 2112.10003). A row has an
image, a phrase and a mask, white or nonzero where the phrase is; an empty mask says that it is nowhere.

    L = 1.5 · mean over rows of (1 - (2 Σ p m + ε) / (Σ p + Σ m + ε)) + mean over pixels of BCE(p, m)

p: the model's probabilities, m: the mask, ε = 1e-5; the weights are VLSM-Adapter's (2405.06196). Scores are means over rows of
Dice = 2 |P ∩ M| / (|P| + |M|) and IoU = |P ∩ M| / |P ∪ M|, P: where p > 1/2, at the model's own size; 1 where both are empty.

Images are treated as in every task on images, each treatment counted in the notes. A row whose image or mask is missing or
broken, whose mask is not of its image's size, or whose phrase is empty is left out and counted, and the data is refused when
that is more than one row in a hundred."""

import json
from collections import Counter
from inspect import signature, unwrap
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from .. import zoo
from ..errors import BadData, DoesNotFit
from .image import BUDGET, ImageClassification, decode
from .read import Table

DICE, EPS = 1.5, 1e-5


def extent(item, base="."):
    """(width, height) as it is shown, without decoding it."""
    from PIL import Image, ImageOps
    item = item() if callable(item) else item
    if isinstance(item, dict):
        item = item.get("bytes") or item.get("path")
    if hasattr(item, "shape"):
        shape = [n for n in item.shape if n not in (1, 3, 4)] if len(item.shape) == 3 else item.shape
        return tuple(int(n) for n in shape[:2][::-1])
    if not hasattr(item, "size"):
        import io
        item = Image.open(io.BytesIO(item) if isinstance(item, bytes | bytearray) else Path(base) / item)
    return ImageOps.exif_transpose(item).size


def is_segmenter(cls):
    """Whether models of this class draw a mask of what a text names."""
    return "Segmentation" in cls.__name__ and {"pixel_values", "input_ids"} <= {*signature(unwrap(cls.forward)).parameters}


def own_size(folder):
    """The side of images that a model's own preprocessor makes, which may be larger than that of its towers; None if unsaid."""
    try:
        size = json.loads((Path(folder) / "preprocessor_config.json").read_text("utf-8"))["size"]
        return int(size if isinstance(size, int) else size.get("height") or size["shortest_edge"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def mask_of(item, base="."):
    """bool (h, w): white, of masks that hold 0 and 1 the ones."""
    m = decode(item, 10**6, base).amax(0)
    return m > (127 if m.max() > 1 else 0)


def fit(mask, side):
    return F.interpolate(mask[None, None].float(), (side, side), mode="nearest-exact")[0, 0] > 0.5


class Masked:
    """Rows of one table: decoded at the first look, kept while the budget lasts."""

    def __init__(self, items, masks, texts, side, base):
        self.items, self.masks, self.texts, self.side, self.base, self.kept, self.bytes = items, masks, texts, side, base, {}, 0

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        seen = self.kept.get(i)
        if seen is None:
            seen = self.look(i)
            if self.bytes + (size := sum(x.numel() for x in seen.values())) <= BUDGET:
                self.kept[i], self.bytes = seen, self.bytes + size
        return seen | {"ids": self.texts[i]}

    def look(self, i, told=None):
        seen = {"image": decode(self.items[i], self.side, self.base, told)}
        if self.masks is not None:
            mask, size = mask_of(self.masks[i], self.base), extent(self.items[i], self.base)
            if tuple(mask.shape[::-1]) != size:
                raise ValueError(f"the mask is {mask.shape[1]} x {mask.shape[0]} and the image {size[0]} x {size[1]} pixels")
            seen["mask"] = fit(mask, self.side)
        return seen


class TextSegmentation(ImageClassification):
    kind = "text-segmentation"
    reads = ("vision-language",)
    small = 100
    metrics = ("dice", "iou")
    asks = "phrase"                                  # the role of what is asked of an image

    def strata(self, table):
        return [0] * len(table)

    def targets(self, table):
        return None

    @property
    def side(self):
        sizes = self.origin.image.get("sizes") if self.origin else None
        return self.options.get("image_size") or (self.origin and own_size(self.origin.folder)) or (sizes or (352,))[-1]

    def learn(self, data):
        if self.origin:
            self.options["image_size"] = self.side

    def readable(self, table):
        bad, told, empty, rows = {}, Counter(), 0, self.rows_of(table)
        images, masks, said = (self.column(table, r) for r in ("image", "mask", "phrase"))
        for i, (image, mask, text) in enumerate(zip(images, masks, said, strict=True)):
            lacks = next((f"no {what} is named (column {self.roles[what]!r})" for what, v in (("image", image), ("mask", mask))
                          if v is None or isinstance(v, str) and not v.strip()), None)
            if lacks or not (isinstance(text, str) and text.strip()):
                bad[i] = lacks or f"the phrase (column {self.roles['phrase']!r}) is empty or no text"
                continue
            try:
                seen = rows.look(i, told)
                empty += not seen["mask"].any()
            except Exception as error:               # Pillow raises whatever its decoders do
                bad[i] = f"the image or mask cannot be used ({str(error)[:160] or type(error).__name__})"
        self.notes += [f"{n:,} images are {what}" for what, n in told.items()]
        table = self.without(table, bad)
        if empty:
            self.notes.append(f"{empty:,} of {len(table):,} masks are empty: what the phrase names is not there")
        return table

    @property
    def max_length(self):
        return min(self.options.get("max_length") or 10**6, self.origin.longest, self.tokenizer.model_max_length)

    def rows_of(self, table, texts=None):
        masks = self.column(table, "mask") if self.roles["mask"] in table.columns else None
        return Masked(self.column(table, "image"), masks, texts, self.side, self.base(table))

    def encode(self, table):
        said = [" ".join(str(t).split()) for t in self.column(table, "phrase")]
        whole = self.tokenizer(said)["input_ids"]
        long = sum(len(t) > self.max_length for t in whole)
        if long:
            self.notes.append(f"{table.source}: {long:,} phrases are longer than {self.max_length} tokens and are cut there")
        return self.rows_of(table, self.tokenizer(said, truncation=True, max_length=self.max_length)["input_ids"])

    def collate(self, examples):
        batch = super().collate([{"image": e["image"]} for e in examples])
        width, pad = max(len(e["ids"]) for e in examples), self.tokenizer.pad_token_id or 0
        batch["input_ids"] = torch.tensor([e["ids"] + [pad] * (width - len(e["ids"])) for e in examples])
        batch["attention_mask"] = torch.tensor([[1] * len(e["ids"]) + [0] * (width - len(e["ids"])) for e in examples])
        return batch | ({"labels": torch.stack([e["mask"] for e in examples]).float()} if "mask" in examples[0] else {})

    def build(self, seed=0, dtype=None):
        if self.model is None:
            raise BadData("This task has no model to build on. Open it with model=, e.g. model=\"CIDAS/clipseg-rd64-refined\".")
        model = zoo.load(self.model, dtype)
        if not is_segmenter(type(model)):
            raise DoesNotFit(f"{self.origin.ref} ({type(model).__name__}) draws no masks of what a text names. Use a "
                             "CLIPSegForImageSegmentation.")
        patch = getattr(getattr(model.config, "vision_config", None), "patch_size", 1)
        if self.side % patch:
            raise DoesNotFit(f"image_size={self.side} is no multiple of the {patch} pixels of a patch of {self.origin.ref}. "
                             f"Use {self.side - self.side % patch or patch}.")
        return model

    def logits(self, model, batch):
        dtype = next(model.parameters()).dtype
        return super().logits(model, {k: v.to(dtype) if k == "pixel_values" else v for k, v in batch.items()})

    def loss(self, model, batch):
        return self.loss_of(self.logits(model, batch), batch["labels"])

    def loss_of(self, logits, masks):                # (B, S, S), (B, S, S)
        m, p = masks.to(logits.device).flatten(1), logits.sigmoid().flatten(1)
        dice = (2 * (p * m).sum(1) + EPS) / (p.sum(1) + m.sum(1) + EPS)
        return DICE * (1 - dice).mean() + F.binary_cross_entropy_with_logits(logits.flatten(1), m)

    def score(self, model, examples, batch_size):
        dice, iou, total = [], [], 0.0
        for part, batch, logits in self.outcomes(model, examples, batch_size):
            P, M = (x.flatten(1).bool().cpu() for x in (logits > 0, batch["labels"]))
            both, p, m = ((x).sum(1).double() for x in (P & M, P, M))
            dice.append(torch.where(p + m > 0, 2 * both / (p + m).clamp(min=1), 1.0))
            iou.append(torch.where(p + m > 0, both / (p + m - both).clamp(min=1), 1.0))
            total += float(self.loss_of(logits, batch["labels"])) * len(part)
        return {"dice": float(torch.cat(dice).mean()), "iou": float(torch.cat(iou).mean()), "loss": total / len(examples),
                "n": len(examples)}

    # -- masks of the user's own images ---------------------------------------------------------------------------------
    def rows(self, inputs):
        one = isinstance(inputs, dict | tuple)
        inputs, found = [inputs] if one else list(inputs), {"image": [], "phrase": []}
        if not inputs:
            raise BadData("There is no input to predict. Give an image and a phrase.")
        for i, x in enumerate(inputs):
            row = dict(zip(("image", "phrase"), x, strict=False)) if isinstance(x, tuple) else x if isinstance(x, dict) else {}
            values = {role: row.get(self.roles[role], row.get(role)) for role in found}
            if values["image"] is None or not str(values["phrase"] or "").strip():
                raise BadData(f"Input {i} ({str(x)[:80]}) names no {'phrase' if values['image'] is not None else 'image'}. Give "
                              "pairs of an image and what to find in it: luthier predict DIR image.png \"a red circle\"")
            for role, v in values.items():
                found[role].append(v)
        return Table({self.roles[r]: v for r, v in found.items()}, "input", None, "number")

    def predict(self, model, inputs, batch_size=16):
        """[{"mask": bool array (h, w), of the image's own size, "share": of it that is white}] of (image, phrase) pairs, or dicts
        with the roles or columns as keys."""
        table, sizes = self.rows(inputs), []
        for i, item in enumerate(self.column(table, "image")):
            try:
                decode(item, self.side)
                sizes.append(extent(item))
            except Exception as error:
                raise BadData(f"Input {i} ({str(item)[:80]}) is not an image that can be read: {str(error)[:160]} Give a path to "
                              "a PNG or JPEG, its bytes, or an array (H, W, 3).") from error
        found, examples = [None] * len(table), self.encode(table)
        for part, _, logits in self.outcomes(model, examples, batch_size):
            for i, y in zip(part, logits, strict=True):
                y = F.interpolate(y[None, None], sizes[i][::-1], mode="bilinear", align_corners=False)[0, 0] > 0
                found[i] = {"mask": y.cpu().numpy(), "share": round(float(y.float().mean()), 4)}
        return found

    def write(self, inputs, found, folder):
        """The masks of `predict` as black and white PNG files in a folder, named by image and phrase; none is written over."""
        from PIL import Image

        folder, told = Path(folder), []
        folder.mkdir(parents=True, exist_ok=True)
        for x, y in zip(inputs, found, strict=True):
            if "error" in y:
                told.append(y)
                continue
            item, text = (self.column(self.rows([x]), role)[0] for role in ("image", "phrase"))
            stem = Path(item).stem if isinstance(item, str | Path) else "image"
            name = "-".join([stem, *"".join(c if c.isalnum() else " " for c in text).split()])[:80]
            path = next(p for n in range(10**9) if not (p := folder / f"{name}{f'-{n}' if n else ''}.png").exists())
            Image.fromarray((y["mask"] * 255).astype(np.uint8)).save(path)
            told.append({"mask": str(path), "share": y["share"]})
        return told

    def facts(self):
        return {"image_size": self.side}

    def state(self):
        return {}
