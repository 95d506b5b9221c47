"""Image classification by the names of the classes, with a dual encoder (CLIP, SigLIP): no new head. Untrained (`none`) it is
zero-shot. Classes that only the test part shows are *new* ones:

  base, new, harmonic   accuracy of the old classes among themselves, of the new ones among themselves, and 2ab / (a + b)
                        (CoCoOp 2203.05557 §4.1)
  seen, unseen, auc     all classes together: a bias is added to the scores of new classes and swept over all values; the area
                        under (accuracy on new, accuracy on old), and both accuracies at the bias of their best harmonic mean
                        (Chao et al. 1605.04253 §3.3; the accuracies that CSP 2204.03574 §5 reports)

What nothing tunes looks once at an image of the data; texts that no image has a say in are read once an evaluation."""

from contextlib import contextmanager, nullcontext

import torch
from torch.nn import functional as F

from ..attach import base_of
from ..errors import BadData
from ..still import at_hand, once, resting, still
from . import metrics
from .classify import label
from .dual import Named, encode, loaded
from .image import ImageClassification

TEMPLATE = "a photo of a {}."


class ClassNames(ImageClassification):
    kind = "class-names"
    reads = ("vision-language",)
    small = 100
    metrics = ("accuracy", "macro_f1", "harmonic", "auc")
    grows = True
    parts = None
    eyes, memory = None, (None, {})

    @property
    def template(self):
        return self.options.get("template") or TEMPLATE

    def fill(self, data, seed, limit):
        if self.template.count("{}") != 1 or "{" in self.template.replace("{}", ""):
            raise BadData(f"template={self.template!r}: a template holds {{}} once, where the name goes, as in {TEMPLATE!r}.")
        if "label" not in self.roles:
            if not {"attribute", "object"} <= self.roles.keys():
                raise BadData(f"{data.source}: class-names needs a column for label, or one for attribute and one for object. "
                              "Say which is which with columns={...}.")
            for table in data.splits.values():
                pairs = zip(self.column(table, "attribute"), self.column(table, "object"), strict=True)
                table.columns["label"] = [f"{a} {o}" for a, o in pairs]
            self.roles["label"] = "label"
        return super().fill(data, seed, limit)

    def learn(self, data):
        super().learn(data)
        if {"attribute", "object"} <= self.roles.keys():
            self.parts = self._parts()
            self.shown = [f"{self.parts['attributes'][a]} {self.parts['objects'][o]}" for a, o in self.parts["pairs"]]
        self.shown, known = [clean(n) for n in self.shown], {}
        for name, given in zip(self.shown, self.labels, strict=True):
            other = known.setdefault(name, given)
            if other != given:
                raise BadData(f"{data.source}: the classes {other!r} and {given!r} have one name, {name!r}. Rename or merge one.")
        if self.origin:
            self._tellable(data.source)
        if self.metric in ("harmonic", "auc") and self.old == len(self.labels):
            raise BadData(f"{data.source}: metric={self.metric!r} compares classes that training shows with others, and the test "
                          "part has no others. Use accuracy.")

    def named(self, names):
        """With these classes, whatever it was trained with."""
        self.labels, self.shown, self.parts = list(names), [clean(n) for n in names], None
        self.old = len(self.labels)
        for name in self.shown:
            if not name:
                raise BadData("A class has no name. Give the names with commas between: \"red circle, blue square\".")
            if self.shown.count(name) > 1:
                raise BadData(f"The class {name!r} is named twice. Name every class once.")
        self._tellable("the names given")
        return self

    def _tellable(self, source):
        """Names that are different texts may still be the same tokens."""
        ids, _, _ = encode(self.tokenizer, [self.template.format(n) for n in self.shown], self.origin.longest)
        seen = {}
        for i, row in enumerate(map(tuple, ids.tolist())):
            if (other := seen.setdefault(row, i)) != i:
                raise BadData(f"{source}: to this model's tokenizer the names {self.shown[other]!r} and {self.shown[i]!r} "
                              "are the same. Rename one.")

    def _parts(self):
        """{"attributes", "objects": words, "pairs": their numbers for each class}."""
        found = {}
        for table in self.tables.values():
            for name, *pair in zip(*(self.column(table, r) for r in ("label", "attribute", "object")), strict=True):
                found[label(name)] = tuple(clean(str(v)) for v in pair)
        words = [sorted({p[k] for p in found.values()}) for k in (0, 1)]
        pairs = [[w.index(v) for w, v in zip(words, found[n], strict=True)] for n in self.labels]
        return {"attributes": words[0], "objects": words[1], "pairs": pairs}

    def limit(self, name, most, seed):
        shots = self.options.get("shots")
        if shots and name != "test":                 # as in CoOp's runs, validation has at most four a class
            table, n = self.tables[name], shots if name == "train" else min(shots, 4)
            self.tables[name] = few(table, self.strata(table), n, seed, self.notes, name)
        super().limit(name, most, seed)

    def build(self, seed=0, dtype=None):
        model = Named(loaded(self, seed, dtype), self.tokenizer, self.shown, self.template, self.old, self.parts)
        model.luthier_origin = self.origin
        return model.eval()

    # -- what does not change is computed once ------------------------------------------------------------------------
    @contextmanager
    def seeing(self, model):
        """Within, batches are for `model`: where nothing tunes what looks at images, they hold their features."""
        from ..save import fingerprint

        base, before = base_of(model), self.eyes
        named = isinstance(base, Named) and at_hand(base)
        self.eyes = base if named and still(base, base.sides[0]) else None
        if self.eyes is not None:
            which = fingerprint(base.dual), self.side, str(next(base.parameters()).device)
            self.memory = self.memory if self.memory[0] == which else (which, {})
        try:
            with base.keeping() if named else nullcontext():
                yield self
        finally:
            self.eyes = before

    def collate(self, examples):
        if self.eyes is None or not all("key" in e for e in examples):
            return super().collate(examples)

        def look(new):
            x = super(ClassNames, self).collate(new)["pixel_values"]
            with resting(self.eyes.sides[0]):
                return self.eyes.images(x.to(next(self.eyes.parameters()).device))
        found = once(self.memory[1], [e["key"] for e in examples], examples, look)
        return {"image_features": torch.stack(found), "labels": torch.tensor([e["labels"] for e in examples])}

    def outcomes(self, model, examples, batch_size):
        base = base_of(model)
        with base.keeping(settled=True) if isinstance(base, Named) and at_hand(base) else nullcontext():
            yield from super().outcomes(model, examples, batch_size)

    def evaluate(self, model, split="test", batch_size=64):
        with self.seeing(model):
            return super().evaluate(model, split, batch_size)

    def loss(self, model, batch):
        labels, logits = batch["labels"], self.logits(model, batch)
        return F.cross_entropy(logits, labels.to(logits.device))

    def score(self, model, examples, batch_size):
        index, found = [], []
        for part, _, logits in self.outcomes(model, examples, batch_size):
            index += part
            found.append(logits.cpu())
        logits, truth = torch.cat(found), torch.tensor([examples.targets[i] for i in index])
        said, n = logits.argmax(1), self.old
        scores = {"accuracy": metrics.accuracy(said, truth), "macro_f1": metrics.macro_f1(said, truth, len(self.labels))}
        if 0 < int((truth < n).sum()) < len(truth):
            old, fresh = truth < n, truth >= n
            a = metrics.accuracy(logits[old, :n].argmax(1), truth[old])
            b = metrics.accuracy(n + logits[fresh, n:].argmax(1), truth[fresh])
            scores |= {"base": a, "new": b, "harmonic": 2 * a * b / max(a + b, 1e-12)} | metrics.swept(logits, truth, n)
        if examples.domains:
            where = [examples.domains[i] for i in index]
            scores |= {f"accuracy_{d}": metrics.accuracy(said[at], truth[at]) for d in dict.fromkeys(where)
                       if (at := torch.tensor([w == d for w in where])) is not None}
        if self.metric not in scores:                # a part without new classes, such as the validation part
            scores[self.metric] = scores["accuracy"]
        return scores | {"loss": F.cross_entropy(logits, truth).item(), "n": len(truth)}

    def examples(self, split):
        images = super().examples(split)
        images.split = split
        images.domains = list(self.column(self.tables[split], "domain")) if "domain" in self.roles else None
        return images

    def each(self):
        return {"base": "accuracy", "new": "accuracy"} if self.old < len(self.labels) else {}

    def facts(self):
        return super().facts() | {"template": self.template, "old_classes": self.old}

    def state(self):
        return super().state() | {"old": self.old, "parts": self.parts}


def clean(name):
    """A folder's or column's word for a class as one would write it: red_circle -> red circle."""
    return " ".join(name.replace("_", " ").split())


def few(table, labels, shots, seed, notes, name):
    """At most `shots` rows of each class, drawn with a seed of their own."""
    order, left, kept = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed)).tolist(), {}, []
    for i in order:
        if left.setdefault(labels[i], shots):
            left[labels[i]] -= 1
            kept.append(i)
    short = sum(n > 0 for n in left.values())
    notes.append(f"{name}: {len(kept):,} rows, {shots} a class" + (f"; {short} classes have fewer" if short else ""))
    return table.take(sorted(kept))
