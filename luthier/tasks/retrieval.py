"""Image-text retrieval with a dual encoder: which caption belongs to an image (i2t) and which image to a caption (t2i), by
R@K, the share of queries with a right answer among the K most similar. Rows with the same image file or the same caption
belong together. A second caption (the role `extra`) is one more text of its image in training, and of no other use.

Trained with the model's own kind of loss: cross-entropy both ways over a batch (CLIP 2103.00020 §2.3), or a sigmoid for every
pair (SigLIP 2303.15343 §3.2) where the model has a logit bias; a bridge's way may bring its own. What an encoder that nothing
tunes sees or reads is computed once."""

from collections import Counter
from contextlib import contextmanager

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ..attach import base_of
from ..errors import BadData, DoesNotFit
from ..still import at_hand, once
from . import metrics
from .dual import loaded
from .image import UNREADABLE, ImageClassification, decode
from .source import IMAGES


class Retrieval(ImageClassification):
    kind = "image-text-retrieval"
    asks = "caption"                                 # the role of the texts beside images
    reads = ("vision-language",)
    small = 100
    metrics = ("recall@1", "recall@5", "recall@10")

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        self.encoders, self.memory = (None, None), {}

    def strata(self, table):
        return [0] * len(table)

    def targets(self, table):
        return None

    def outputs(self):
        return 0

    def check(self, table):
        """A list of captions is as many rows; empty captions are left out and counted, as broken images are."""
        image, caption = self.roles["image"], self.roles["caption"]
        rows, bad = [], []
        for i, told in enumerate(self.column(table, "caption")):
            for text in told if isinstance(told, (list, tuple)) else [told]:
                text = str(text) if isinstance(text, int | float) and not isinstance(text, bool) and text == text else text
                if isinstance(text, str) and text.strip():
                    rows.append((i, " ".join(text.split())))
                else:
                    bad.append(i)
        if bad and self.too_many(len(bad), table):
            raise BadData(f"{table.where(bad[0])}: the caption (column {caption!r}) is empty; in all {len(bad)} are, and at most "
                          f"{UNREADABLE:.0%} may be. Fill them in or drop the rows.")
        if bad:
            self.notes.append(f"{len(bad)} empty captions left out, first {table.where(bad[0])}")
        kept = table.take([i for i, _ in rows])
        kept.columns[caption] = [text for _, text in rows]
        if not isinstance(kept.columns[image][0], str):
            kept.columns["_same"] = [i for i, _ in rows]
        table.columns, table.lines = kept.columns, kept.lines

    def learn(self, data):
        if not self.options.get("image_size") and self.origin:
            self.options["image_size"] = self.fitting_size()

    @property
    def max_length(self):
        return min(self.options.get("max_length") or 10**6, self.origin.longest, self.tokenizer.model_max_length)

    def tokens(self, texts):
        masked = "attention_mask" in self.tokenizer.model_input_names
        return self.tokenizer(texts, truncation=True, max_length=self.max_length,
                              padding=False if masked else "max_length")["input_ids"]

    def examples(self, split):
        images, table = super().examples(split), self.tables[split]
        if getattr(images, "texts", None) is None:
            captions, masked = self.column(table, "caption"), "attention_mask" in self.tokenizer.model_input_names
            images.texts, images.extra = self.tokens(captions), None
            if "extra" in self.roles and split == "train":
                images.extras = [x or c for x, c in zip(self.column(table, "extra"), captions, strict=True)]
                images.extra = self.tokens(images.extras)
            whole = images.texts if masked else self.tokenizer(captions)["input_ids"]
            long = sum(len(t) >= self.max_length for t in whole)
            if long:
                self.notes.append(f"{split}: {long:,} captions fill or exceed {self.max_length} tokens and are cut there")
            keys = table.columns.get("_same") or self.column(table, "image")
            images.keys = [key if isinstance(key, (str, int)) else i for i, key in enumerate(keys)]
            images.captions, images.split = captions, split
        return _Pairs(images)

    def collate(self, examples):
        """The captions' rows, and behind them the second captions'."""
        second = [e["extra"] for e in examples if "extra" in e]
        rows = [(e["ids"], e["key"], e["caption"]) for e in examples] + [
            (ids, e["key"], text) for e, (ids, text) in zip(examples, second, strict=False)]
        eyes, ears = self.encoders
        batch = super().collate(examples) if eyes is None else dict(image_states=torch.stack(self.seen(examples)))
        batch |= self.padded([ids for ids, *_ in rows]) if ears is None else dict(
            text_states=pad_sequence(self.heard([ids for ids, *_ in rows]), batch_first=True))
        same = [[key == e["key"] or text == e["caption"] for e in examples] for _, key, text in rows]
        return batch | {"labels": torch.tensor(same)}    # (text, image): which pairs belong together

    def padded(self, rows):
        width, pad = max(map(len, rows)), self.tokenizer.pad_token_id
        made = {"input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids in rows])}
        if "attention_mask" in self.tokenizer.model_input_names:
            made["attention_mask"] = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in rows])
        return made

    # -- what frozen encoders see and read is computed once ------------------------------------------------------------------
    @contextmanager
    def seeing(self, model):
        """Within, batches are for `model`: of a bridged one whose encoders nothing tunes, they hold what these make of rows."""
        from ..save import fingerprint

        base, before = base_of(model), self.encoders
        if hasattr(base, "hear") and at_hand(base):
            where = repr(base.way), self.side, str(next(base.parameters()).device)
            self.encoders = tuple((base, self.memory.setdefault((fingerprint(part), *where), {})) if base.still(part) else None
                                  for part in (base.vision, base.language))
        try:
            yield self
        finally:
            self.encoders = before

    def seen(self, examples):
        base, memory = self.encoders[0]

        def see(new):
            x = ImageClassification.collate(self, new)["pixel_values"]
            return base.see(x.to(next(base.parameters()).device))[:, 0]
        return once(memory, [(e["split"], e["key"]) for e in examples], examples, see)

    def heard(self, rows):
        base, memory = self.encoders[1]

        def hear(new):
            states = base.hear(**{k: v.to(next(base.parameters()).device) for k, v in self.padded(new).items()})
            return [s[:len(ids)] if s.dim() == 2 else s for s, ids in zip(states, new, strict=True)]
        return once(memory, [tuple(ids) for ids in rows], rows, hear)

    def build(self, seed=0, dtype=None):
        return loaded(self, seed, dtype)

    def loss(self, model, batch):
        out, same = self.forward(model, batch), batch["labels"]
        logits = out.logits_per_text.float()
        same, base = same.to(logits.device).float(), base_of(model)
        if getattr(base, "has_loss", False):
            return base.objective(logits, same)
        if hasattr(model, "logit_bias"):
            return -F.logsigmoid(logits * (2 * same - 1)).sum(1).mean()
        return sum(F.cross_entropy(y, t / t.sum(1, keepdim=True)) for y, t in ((logits, same), (logits.T, same.T))) / 2

    def logits(self, model, batch):
        return self.forward(model, batch).logits_per_text.float()

    def forward(self, model, batch):
        device = next(model.parameters()).device
        given = {k: v.to(device) for k, v in batch.items() if k != "labels"}
        if "pixel_values" in given:
            given["pixel_values"] = given["pixel_values"].to(next(model.parameters()).dtype)
        return model(**given)

    def evaluate(self, model, split="test", batch_size=64):
        with self.seeing(model):
            return super().evaluate(model, split, batch_size)

    def score(self, model, examples, batch_size):
        was, images, texts, total = model.training, [], [], 0.0
        model.eval()
        try:
            with torch.no_grad():
                for i in range(0, len(examples), batch_size):
                    batch = self.collate([examples[k] for k in range(i, min(i + batch_size, len(examples)))])
                    out = self.forward(model, batch)
                    images.append(out.image_embeds.float().cpu())
                    texts.append(out.text_embeds[:len(images[-1])].float().cpu())
                    total += float(self.loss(model, batch)) * len(texts[-1])
        finally:
            model.train(was)
        images, texts, inner = torch.cat(images), torch.cat(texts), examples.images
        first = [i for i, key in enumerate(inner.keys) if inner.keys.index(key) == i]       # each image once
        images = images[first]
        true = [{inner.captions[j] for j, k in enumerate(inner.keys) if k == inner.keys[i]} for i in first]
        match = torch.tensor([[c in told for c in inner.captions] for told in true])        # (image, text)
        near, found = images @ texts.T, {}
        for k in (1, 5, 10):
            found[f"i2t_recall@{k}"] = metrics.recall(near, match, k)
            found[f"t2i_recall@{k}"] = metrics.recall(near.T, match.T, k)
            found[f"recall@{k}"] = (found[f"i2t_recall@{k}"] + found[f"t2i_recall@{k}"]) / 2
        return found | {"loss": total / len(texts), "n": len(texts)}

    def facts(self):
        return {"image_size": self.side}

    def among(self, shown, asked):
        """The inputs of rank: images (or rows of a file) and the texts beside them."""
        rows = [x if isinstance(x, dict) else {"image": x} for x in shown] + [{"caption": q} for q in asked]
        if not any(row.get("caption", row.get(self.roles["caption"])) for row in rows):
            raise DoesNotFit("There are images, and no text to rank them by. Name one behind them: luthier predict DIR "
                             "pictures/ \"a red circle\"")
        return rows

    def predict(self, model, inputs, batch_size=64):
        """Of images and texts, or rows of both: [{"images": [{"image", "score"}, ...]}] for a text, best first, and "texts" for
        each image; the score is the cosine."""
        return self.rank(model, inputs, None, batch_size)

    def rank(self, model, inputs, errors, batch_size=64, most=10):
        """As predict; an image that cannot be read is noted in the dict `errors` {number: error}, if any, and ranked nowhere."""
        rows, images, texts, told = [self._row(i, x) for i, x in enumerate(inputs)], {}, {}, Counter()
        found = [{} for _ in rows]
        for i, (name, image, text) in enumerate(rows):
            try:
                if image is not None and name not in images:
                    images[name] = decode(image, self.side, told=told)
                if text:
                    texts.setdefault(text, len(texts))
            except Exception as error:               # Pillow raises whatever its decoders do
                bad = BadData(f"Input {i} ({name[:80]}) is not an image that can be read: {str(error)[:160].rstrip('.')}. Give "
                              "a path to a PNG or JPEG, its bytes, or an array (H, W, 3).")
                if errors is None:
                    raise bad from error
                errors[i], found[i] = bad, {"error": str(bad)}
        self.notes += [f"{n:,} images are {what}" for what, n in told.items()]
        if not images or not texts:
            raise next(iter((errors or {}).values()), BadData(
                f"There are {len(images)} images and {len(texts)} texts: nothing to rank. Give at least one of each."))
        long = sum(len(t) > self.max_length for t in self.tokenizer(list(texts))["input_ids"])
        self.notes += [f"{long:,} texts exceed {self.max_length} tokens and are cut there"] * bool(long)
        near = self.near(model, list(images.values()), list(texts), batch_size)
        for i, (name, image, text) in enumerate(rows):
            if text in texts:
                found[i]["images"] = _best("image", near[:, texts[text]], list(images), most)
            if image is not None and name in images:
                found[i]["texts"] = _best("text", near[list(images).index(name)], list(texts), most)
        return found

    def near(self, model, images, texts, batch_size=64):
        """The cosine of every image and every text, (N, M)."""
        was, x, t = model.training, [], []
        model.eval()
        try:
            with torch.no_grad():
                for k in range(0, max(len(images), len(texts)), batch_size):
                    a, b = images[k:k + batch_size], texts[k:k + batch_size]
                    out = self.forward(model, ImageClassification.collate(self, [{"image": v} for v in a or images[:1]])
                                       | self.words(b or texts[:1]))
                    x += out.image_embeds[:len(a)].float().cpu()
                    t += out.text_embeds[:len(b)].float().cpu()
        finally:
            model.train(was)
        return torch.stack(x) @ torch.stack(t).T

    def _row(self, i, x):
        """(the image's name, image, text) of an input, each but the first None where there is none."""
        x = dict(zip(("image", "caption"), x, strict=False)) if isinstance(x, tuple) else x
        if not isinstance(x, dict) or "bytes" in x:
            x = {"caption": x} if isinstance(x, str) and not x.lower().endswith(IMAGES) else {"image": x}
        image, text = (x.get(self.roles[r], x.get(r)) for r in ("image", "caption"))
        text = text[0] if isinstance(text, list | tuple) and text else text
        image = None if isinstance(image, str) and not image.strip() else image
        return image if isinstance(image, str) else f"input {i}", image, " ".join(text.split()) if isinstance(text, str) else None

    def words(self, captions):
        """Their tokens as a batch."""
        masked = "attention_mask" in self.tokenizer.model_input_names
        found = self.tokenizer(captions, truncation=True, max_length=self.max_length, padding=True if masked else "max_length",
                               return_tensors="pt")
        return {k: found[k] for k in ("input_ids", *["attention_mask"] * masked)}

    def state(self):
        return {}


def _best(what, scores, names, most):
    top = scores.topk(min(most, len(names)))
    return [{what: names[k], "score": s} for s, k in zip(top.values.tolist(), top.indices.tolist(), strict=True)]


class _Pairs:
    """Images with their captions' tokens."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        inner = self.images
        more = {"extra": (inner.extra[i], inner.extras[i])} if inner.extra else {}
        return inner[i] | {"ids": inner.texts[i], "key": inner.keys[i], "caption": inner.captions[i], "split": inner.split} | more
