"""Image-text retrieval with a dual encoder: which caption belongs to an image (i2t) and which image to a caption (t2i), by
R@K, the share of queries with a right answer among the K most similar. Rows with the same image file or the same caption
belong together.

Trained with the model's own kind of loss: cross-entropy both ways over a batch (CLIP 2103.00020 §2.3), or a sigmoid for every
pair (SigLIP 2303.15343 §3.2) where the model has a logit bias."""

import torch
from torch.nn import functional as F

from ..errors import BadData
from . import metrics
from .dual import loaded
from .image import UNREADABLE, ImageClassification


class Retrieval(ImageClassification):
    kind = "image-text-retrieval"
    reads = ("vision-language",)
    metrics = ("recall@1", "recall@5", "recall@10")

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
                if isinstance(text, str) and text.strip():
                    rows.append((i, " ".join(text.split())))
                else:
                    bad.append(i)
        if len(bad) > UNREADABLE * max(len(rows), 100):
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

    def examples(self, split):
        images, table = super().examples(split), self.tables[split]
        if getattr(images, "texts", None) is None:
            captions, masked = self.column(table, "caption"), "attention_mask" in self.tokenizer.model_input_names
            images.texts = self.tokenizer(captions, truncation=True, max_length=self.max_length,
                                          padding=False if masked else "max_length")["input_ids"]
            long = sum(len(t) == self.max_length for t in images.texts) if masked else 0
            if long:
                self.notes.append(f"{split}: {long:,} captions fill or exceed {self.max_length} tokens and are cut there")
            keys = table.columns.get("_same") or self.column(table, "image")
            images.keys = [key if isinstance(key, (str, int)) else i for i, key in enumerate(keys)]
            images.captions = captions
        return _Pairs(images)

    def collate(self, examples):
        batch, masked = super().collate(examples), "attention_mask" in self.tokenizer.model_input_names
        width, pad = max(len(e["ids"]) for e in examples), self.tokenizer.pad_token_id
        batch["input_ids"] = torch.tensor([e["ids"] + [pad] * (width - len(e["ids"])) for e in examples])
        if masked:
            batch["attention_mask"] = torch.tensor([[1] * len(e["ids"]) + [0] * (width - len(e["ids"])) for e in examples])
        same = [[a["key"] == b["key"] or a["caption"] == b["caption"] for b in examples] for a in examples]
        return batch | {"labels": torch.tensor(same)}    # (text, image): which pairs belong together

    def build(self, seed=0, dtype=None):
        return loaded(self, dtype)

    def loss(self, model, batch):
        out, same = self.forward(model, batch), batch["labels"]
        logits = out.logits_per_text.float()
        same = same.to(logits.device).float()
        if hasattr(model, "logit_bias"):
            return -F.logsigmoid(logits * (2 * same - 1)).sum(1).mean()
        return sum(F.cross_entropy(y, t / t.sum(1, keepdim=True)) for y, t in ((logits, same), (logits.T, same.T))) / 2

    def logits(self, model, batch):
        return self.forward(model, batch).logits_per_text.float()

    def forward(self, model, batch):
        device = next(model.parameters()).device
        given = {k: v.to(device) for k, v in batch.items() if k != "labels"}
        given["pixel_values"] = given["pixel_values"].to(next(model.parameters()).dtype)
        return model(**given)

    def score(self, model, examples, batch_size):
        was, images, texts, total = model.training, [], [], 0.0
        model.eval()
        try:
            with torch.no_grad():
                for i in range(0, len(examples), batch_size):
                    batch = self.collate([examples[k] for k in range(i, min(i + batch_size, len(examples)))])
                    out = self.forward(model, batch)
                    images.append(out.image_embeds.float().cpu())
                    texts.append(out.text_embeds.float().cpu())
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

    def predict(self, model, inputs, batch_size=64):
        raise BadData("Retrieval ranks the pairs of a data set; single inputs have nothing to be ranked among. Use class-names.")

    def state(self):
        return {}


class _Pairs:
    """Images with their captions' tokens."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        inner = self.images
        return inner[i] | {"ids": inner.texts[i], "key": inner.keys[i], "caption": inner.captions[i]}
