"""Sounds and a text in, a text out: what is heard, and what two clips have in common. A row has a sound or a list of them, a
prompt if anything is asked, the response. Sounds stand in front of the text, or where the prompt says <clip>, once for each.
All else is as with images (imagetext.py)."""

import io
import wave
from functools import cache
from pathlib import Path

import numpy as np
import torch

from .. import sounds
from .._compat import torchvision
from ..errors import BadData
from .imagetext import Album, ImageToText
from .read import Data, Table

MARK, WAV = "<clip>", (".wav",)


class Clips(Album):
    """Sounds, each once, as log-mel spectra, or as so many samples of mean 0 and variance 1."""

    def __init__(self, bins=80, frames=3000, samples=0):
        super().__init__(None)
        self.bins, self.samples, self.frames = bins, samples, samples * 100 // sounds.RATE or frames       # a hundred a second

    def look(self, k, told=None):
        if k not in self.kept:
            item, base = self.items[k]
            x = samples(item, base)
            if told is not None and len(x) > self.frames * sounds.RATE // 100:
                told[f"longer than {self.frames / 100:g} seconds: cut there"] += 1
            if self.samples:
                x = torch.from_numpy(x[:self.samples].copy())
                x = (x - x.mean()) / (x.var(correction=0) + 1e-7).sqrt()
                self.kept[k] = torch.nn.functional.pad(x, (0, self.samples - len(x)))
                return self.kept[k]
            made = extractor(self.bins, -(-self.frames // 100))(x, sampling_rate=sounds.RATE, return_tensors="pt")
            self.kept[k] = made["input_features"][0, :, :self.frames]
        return self.kept[k]


@cache
def extractor(bins, seconds):
    torchvision()
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=bins, chunk_length=seconds, sampling_rate=sounds.RATE)


def samples(item, base="."):
    """A path or bytes of a WAV file, or an array (n,) of samples 16,000 a second -> float (n,), its channels averaged."""
    item = item() if callable(item) else item
    if isinstance(item, str | Path | bytes | bytearray):
        with wave.open(io.BytesIO(item) if isinstance(item, bytes | bytearray) else str(Path(base) / item)) as file:
            rate, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
            raw = file.readframes(file.getnframes())
        if rate != sounds.RATE or width != 2:
            raise ValueError(f"it has {rate:,} samples a second of {8 * width} bits, and {sounds.RATE:,} of 16 bits are read: "
                             "ffmpeg -i IN -ar 16000 -c:a pcm_s16le OUT.wav")
        item = np.frombuffer(raw, "<i2").reshape(-1, channels).mean(1) / 32768
    x = np.asarray(item, np.float32)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"an array of shape {x.shape} is no sound: samples (n,), all finite")
    return x


class AudioToText(ImageToText):
    kind = "audio-to-text"
    reads = ("audio-text",)
    endings = WAV
    what, one, form = "sound", "a sound", "a path to a WAV file of 16,000 samples a second, its bytes, or an array (n,)"

    def __init__(self, model=None, *, roles=None, **more):
        super().__init__(model, roles={"image" if k == "audio" else k: v for k, v in (roles or {}).items()}, **more)

    def fitting_size(self):
        return None

    def new_album(self):
        facts = self.origin.image if self.origin else {}
        return Clips(**{k: facts[k] for k in ("bins", "frames", "samples") if k in facts})

    def pixels(self, keys):
        return torch.stack([album.look(k) for album, k in keys])

    def check(self, table):
        prompts = self.column(table, "prompt") if "prompt" in self.roles else ()
        for i, (prompt, shown) in enumerate(zip(prompts, self.column(table, "image"), strict=False)):
            marks, n = str(prompt).count(MARK), len(shown) if isinstance(shown, list | tuple) else 1
            if marks not in (0, n):
                raise BadData(f"{table.where(i)}: the prompt says {MARK} {marks} times, and the row has {n} sounds. Say it once "
                              "for each, or not at all.")

    def pieces(self, prompt):
        """The ids of what stands before, between and behind the marks."""
        prompt = prompt.rstrip() if self.apart else prompt.rstrip() + "\n" * bool(prompt.strip())
        first, *rest = prompt.split(MARK)
        return [super().ask("")[:0 if self.apart else 1] + (self.ids(first) if first else []),
                *(self.ids(piece) if piece else [] for piece in rest)]

    def ask(self, prompt):
        return sum(self.pieces(prompt), []) or super().ask("")

    def encode(self, table, album=None):
        self.check(table)
        rows = super().encode(table, album)
        prompts = self.column(table, "prompt") if "prompt" in self.roles else [""] * len(rows)
        for row, prompt in zip(rows, prompts, strict=True):
            pieces, n = self.pieces("" if prompt is None else str(prompt)), len(row["pictures"][1])
            lost = sum(map(len, pieces)) - len(row["ask"])
            at = np.cumsum([len(p) for p in pieces[:-1]]).tolist()
            row["places"] = [max(0, p - lost) for p in at] if at else [0] * n
        return rows

    def collate(self, examples, asking=False):
        batch, most = super().collate(examples, asking), max(len(e["places"]) for e in examples)
        batch["image_places"] = torch.tensor([e["places"] + [0] * (most - len(e["places"])) for e in examples])
        if not (asking or self.apart):
            batch["asked"] = torch.tensor([len(e["ask"]) for e in examples])
        return batch

    def facts(self):
        return {}


def built(kind, sizes=(("train", 400), ("val", 80), ("test", 160)), distinct=0.25):
    """Rows of one clip each ("name"), of three questions each ("ask"), or of two clips that are compared ("compare"): a part has
    a quarter as many sounds as rows, and no sound is in two parts."""
    def make(seed):
        splits, start = {}, 0
        for split, n in sizes:
            known = [(s := sounds.sound(start + i, seed), s.wave) for i in range(int(n * distinct))]
            rows, start = [], start + len(known)
            for i in range(n):
                draw = sounds.Draw("row", kind, split, seed, i)
                (a, heard), (b, then) = draw.one(known), draw.one(known)
                if kind == "compare":
                    question, answer = sounds.compare(a, b, f"{split}:{seed}:{i}")
                    rows.append(([heard, then], question, answer))
                else:
                    _, question, answer = draw.one(a.questions()) if kind == "ask" else (None, "", a.caption())
                    rows.append(([heard], question, answer))
            names = ("audio", "prompt", "response")
            splits[split] = Table({k: list(v) for k, v in zip(names, zip(*rows, strict=True), strict=True)
                                   if not (kind == "name" and k == "prompt")}, "sounds", None, f"{split} row")
        return Data("sounds", splits, columns={r: r for r in splits["train"].columns}, task="audio-to-text")
    return make


BUILT_IN = {"sounds:name": built("name"), "sounds:ask": built("ask"), "sounds:compare": built("compare")}
