"""Text and text-pair classification, token classification, and regression on text."""

from collections import Counter

import torch
from torch.nn import functional as F

from ..errors import BadData, nearest
from . import metrics
from .base import Task, finite
from .roles import numbers, parts

IGNORE = -100
TEXT = ("text-encoder", "text-decoder", "text-pair", "vision-language")


def names_of(values):
    """Label names in order: numbers by value, else words by alphabet."""
    kinds = sorted({str(v) for v in values})
    return sorted(kinds, key=float) if numbers(kinds) is not None else kinds


def label(value):
    """One spelling for one class: 1, 1.0, "1" and " 1 " are the same."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


class Labelled(Task):
    """Tasks with one class an example."""
    metrics = ("accuracy", "macro_f1", "matthews")
    labels, old = (), 0                              # old: how many of the labels stand in training rows; these come first
    grows = False                                    # whether other splits may bring classes of their own

    def strata(self, table):
        return [label(v) if v not in (None, "") else "" for v in self.column(table, "label")]

    def learn(self, data):
        for table in self.tables.values():
            for i, value in enumerate(self.column(table, "label")):
                if value is None or value != value or (isinstance(value, str) and not value.strip()):
                    raise BadData(f"{table.where(i)}: the label (column {self.roles['label']!r}) is missing. Fill it in or "
                                  "drop the row.")
        train = self.tables["train"]
        self.labels = names_of(map(label, self.column(train, "label")))
        if len(self.labels) == 1:
            raise BadData(f"{train.source}: every training row has the label {self.labels[0]!r} (column "
                          f"{self.roles['label']!r}). Add rows "
                          "of a second class, or name another column with columns={\"label\": ...}.")
        self.old = len(self.labels)
        if self.grows:
            every = {label(v) for table in self.tables.values() for v in self.column(table, "label")}
            self.labels = [*self.labels, *names_of(every - set(self.labels))]
        known = set(self.labels)
        for table in self.tables.values():
            for i, value in enumerate(map(label, self.column(table, "label"))):
                if value not in known:
                    raise BadData(f"{table.where(i)}: the label {value!r} is in no training row. {nearest(value, self.labels)} "
                                  "Training labels must cover all others: mend the label, or drop the row.")
        self.shown = self.labels
        if data.classes and all(n.lstrip("-").isdigit() and 0 <= int(n) < len(data.classes) for n in self.labels):
            self.shown = [data.classes[int(n)] for n in self.labels]
        if self.metric == "matthews" and len(self.labels) != 2:
            raise BadData(f"metric=\"matthews\" is for two classes; {self.source} has {len(self.labels)}. Use accuracy or "
                          "macro_f1.")
        rare = [n for n, times in Counter(self.strata(train)).items() if times < 2]
        if rare:
            self.notes.append(f"{len(rare)} classes have a single training row, first {rare[0]!r}")

    def targets(self, table):
        if "label" not in self.roles or self.roles["label"] not in table.columns:
            return None
        number = {n: i for i, n in enumerate(self.labels)}
        return [number[label(v)] for v in self.column(table, "label")]

    def outputs(self):
        return len(self.labels)

    def loss(self, model, batch):
        logits = self.logits(model, batch)
        return F.cross_entropy(logits, batch["labels"].to(logits.device))

    def score(self, model, examples, batch_size):
        predicted, truth, total = [], [], 0.0
        for _, batch, logits in self.outcomes(model, examples, batch_size):
            logits, labels = logits.cpu(), batch["labels"]
            predicted.append(logits.argmax(-1))
            truth.append(labels)
            total += F.cross_entropy(logits, labels, reduction="sum").item()
        predicted, truth = torch.cat(predicted), torch.cat(truth)
        scores = {"accuracy": metrics.accuracy(predicted, truth), "macro_f1": metrics.macro_f1(predicted, truth, self.outputs())}
        if self.outputs() == 2:
            scores["matthews"] = metrics.matthews(predicted, truth)
        return scores | {"loss": total / len(truth), "n": len(truth)}

    def predict(self, model, inputs, batch_size=64):
        """[{"label", "score", "scores": {label: probability}}] for raw inputs."""
        examples = self.encode(self.rows(inputs))
        found = [None] * len(examples)
        for index, _, logits in self.outcomes(model, examples, batch_size):
            for i, p in zip(index, logits.softmax(-1).tolist(), strict=True):
                best = max(range(len(p)), key=p.__getitem__)
                found[i] = {"label": self.shown[best], "score": p[best], "scores": dict(zip(self.shown, p, strict=True))}
        return found

    def facts(self):
        counts = {s: [0] * len(self.labels) for s in self.tables}
        for s, table in self.tables.items():
            for t in self.targets(table):
                counts[s][t] += 1
        return {"labels": list(self.shown), "train_counts": counts.get("train", [])}

    def state(self):
        return {"labels": self.labels, "shown": self.shown}


class Text(Task):
    """What tasks over text share: tokens, dynamic padding, pools."""
    reads = TEXT
    longest = 256                                    # tokens, unless max_length or the model says otherwise

    @property
    def max_length(self):
        return min(self.options.get("max_length") or self.longest, self.tokenizer.model_max_length, self.origin.longest)

    def pad_id(self):
        t = self.tokenizer
        return next(i for i in (t.pad_token_id, t.eos_token_id, 0) if i is not None)

    def tokenise(self, texts, pairs=None, **more):
        """Lists of ids, at most max_length; an empty text keeps one token, so that every row has something to read."""
        coded = self.tokenizer(texts, pairs, truncation=True, max_length=self.max_length, **more)
        keys = [k for k in ("input_ids", "attention_mask", "token_type_ids") if k in coded]
        rows = [{k: coded[k][i] for k in keys} for i in range(len(texts))]
        for row in rows:
            if not row["input_ids"]:
                row.update({k: [self.pad_id() if k == "input_ids" else int(k == "attention_mask")] for k in keys})
        return rows, coded

    def length(self, example):
        return len(example["input_ids"])

    def collate(self, examples):
        """Right-padded tensors; padding is masked, and labelled IGNORE where labels are one a token."""
        width = max(len(e["input_ids"]) for e in examples)
        batch = {}
        for key in examples[0]:
            if isinstance(examples[0][key], list):
                fill = {"input_ids": self.pad_id(), "labels": IGNORE}.get(key, 0)
                batch[key] = torch.tensor([e[key] + [fill] * (width - len(e[key])) for e in examples])
            else:
                batch[key] = torch.tensor([e[key] for e in examples])
        return batch

    def probe(self):
        """A batch of one, to try a backbone with."""
        return self.collate(self.tokenise(["a b"])[0])

    def pool(self, backbone):
        asked = self.options.get("pool") or self.origin.pool
        return asked or ("last" if self.origin.kind == "text-decoder" else "mean")

    def rows(self, inputs):
        """A Table of raw inputs: strings, pairs (text, text_pair), or dicts with the roles or columns as keys."""
        from .read import Table
        inputs = [inputs] if isinstance(inputs, (str, dict)) else list(inputs)
        if not inputs:
            raise BadData("There is no input to predict. Give at least one.")
        role = [r for r in ("text", "text_pair", "prompt", "tokens") if r in self.roles]
        columns = {}
        for r in role:
            column = self.roles[r]
            values = []
            for i, x in enumerate(inputs):
                if isinstance(x, dict):
                    v = x.get(column, x.get(r))
                    if v is None and all(p in x for p in parts(column)):
                        v = "\n".join(str(x[p]) for p in parts(column))
                elif isinstance(x, (tuple, list)) and "tokens" not in self.roles:
                    v = dict(zip(role, x, strict=False)).get(r)
                else:
                    v = x if r == role[0] else None
                if v is None:
                    raise BadData(f"Input {i} lacks its {r} (key {column!r}). Give " + (
                        "a text." if len(role) == 1 else f"an object with the keys {', '.join(map(repr, role))}."))
                values.append(v)
            columns[column] = values
        return Table(columns, "input", None, "number")

    def check(self, table):
        for role in self.roles.keys() & {"text", "text_pair", "prompt", "response"}:
            self.texts(table, role)

    def texts(self, table, role="text"):
        values = self.column(table, role)
        for i, v in enumerate(values):
            if not isinstance(v, str):
                raise BadData(f"{table.where(i)}: the {role} (column {self.roles[role]!r}) is {v!r}, not a text. Fill it in or "
                              "drop the row.")
        return values

    def encode_text(self, table):
        pairs = self.texts(table, "text_pair") if "text_pair" in self.roles else None
        return self.tokenise(self.texts(table), pairs)[0]


class TextClassification(Text, Labelled):
    kind = "text-classification"

    def encode(self, table):
        rows, targets = self.encode_text(table), self.targets(table)
        return rows if targets is None else [r | {"labels": t} for r, t in zip(rows, targets, strict=True)]


class Regression(Text):
    kind = "regression"
    metrics = ("r2", "mae")
    mean, scale = 0.0, 1.0

    @property
    def higher(self):
        return self.metric == "r2"

    def learn(self, data):
        every = {s: [finite(v, t.where(i)) for i, v in enumerate(self.column(t, "target"))] for s, t in self.tables.items()}
        x = torch.tensor(every["train"], dtype=torch.float64)
        if x.min() == x.max():
            raise BadData(f"{self.source}: every training target (column {self.roles['target']!r}) is {x[0].item()}. There is "
                          "nothing to learn; name another column.")
        self.mean, self.scale = x.mean().item(), x.std(unbiased=False).item()

    def encode(self, table):
        rows = self.encode_text(table)
        if self.roles["target"] not in table.columns:
            return rows
        y = [(finite(v, table.where(i)) - self.mean) / self.scale for i, v in enumerate(self.column(table, "target"))]
        return [r | {"labels": t} for r, t in zip(rows, y, strict=True)]

    def outputs(self):
        return 1

    def loss(self, model, batch):
        y = self.logits(model, batch).squeeze(-1)
        return F.mse_loss(y, batch["labels"].to(y.device))

    def score(self, model, examples, batch_size):
        found = [(logits.squeeze(-1).cpu(), batch["labels"]) for _, batch, logits in self.outcomes(model, examples, batch_size)]
        predicted, truth = (torch.cat(x).double() for x in zip(*found, strict=True))
        return {"r2": metrics.r2(predicted, truth), "mae": metrics.mae(predicted, truth) * self.scale,
                "loss": F.mse_loss(predicted, truth).item(), "n": len(truth)}

    def predict(self, model, inputs, batch_size=64):
        examples = self.encode(self.rows(inputs))
        found = [None] * len(examples)
        for index, _, logits in self.outcomes(model, examples, batch_size):
            for i, y in zip(index, logits.squeeze(-1).tolist(), strict=True):
                found[i] = {"value": y * self.scale + self.mean}
        return found

    def facts(self):
        return {"target_mean": self.mean, "target_std": self.scale}

    def state(self):
        return {"mean": self.mean, "scale": self.scale}


class TokenClassification(Text):
    """One tag a word, predicted at the word's first piece; the other pieces are ignored."""
    kind = "token-classification"
    metrics = ("f1", "accuracy")
    labels = ()

    def learn(self, data):
        for table in self.tables.values():
            for i, (words, tags) in enumerate(zip(self.column(table, "tokens"), self.column(table, "tags"), strict=True)):
                if not isinstance(words, (list, tuple)) or not isinstance(tags, (list, tuple)) or len(words) != len(tags):
                    n = [len(x) if isinstance(x, (list, tuple)) else x for x in (words, tags)]
                    raise BadData(f"{table.where(i)}: {n[0]} tokens but {n[1]} tags. Each row needs two lists of one length.")
                if not words:
                    raise BadData(f"{table.where(i)}: the row has no tokens. Drop it.")
        train = self.tables["train"]
        self.labels = names_of(label(t) for tags in self.column(train, "tags") for t in tags)
        if len(self.labels) == 1:
            raise BadData(f"{train.source}: every token has the tag {self.labels[0]!r}. There is nothing to learn.")
        known = set(self.labels)
        for table in self.tables.values():
            for i, tags in enumerate(self.column(table, "tags")):
                new = [t for t in map(label, tags) if t not in known]
                if new:
                    raise BadData(f"{table.where(i)}: the tag {new[0]!r} is in no training row. {nearest(new[0], self.labels)} "
                                  "Mend the tag, or drop the row.")

    @property
    def outside(self):
        """The number of the tag that marks nothing (O), or -1."""
        return self.labels.index("O") if "O" in self.labels else -1

    def encode(self, table):
        words = [list(map(str, w)) for w in self.column(table, "tokens")]
        if not getattr(self.tokenizer, "is_fast", False):
            raise BadData(f"The tokenizer of {self.origin.ref} cannot say which word a piece comes from. Use a model with "
                          "tokenizer.json.")
        if self.tokenizer.tokenize(" a")[0] == "Ġa":                 # byte-level pieces carry the space before them
            words = [[w[0], *(" " + x for x in w[1:])] for w in words]
        rows, coded = self.tokenise(words, is_split_into_words=True)
        tags = self.column(table, "tags") if self.roles["tags"] in table.columns else [None] * len(rows)
        number = {n: i for i, n in enumerate(self.labels)}
        lost = 0
        for i, (row, tag) in enumerate(zip(rows, tags, strict=True)):
            ids, before = coded.word_ids(i), None
            row["labels"] = [IGNORE] * len(row["input_ids"])
            for k, w in enumerate(ids):
                if w is not None and w != before:
                    row["labels"][k] = number[label(tag[w])] if tag is not None else 0
                before = w
            lost += len(words[i]) - len({w for w in ids if w is not None})
        if lost and tags[0] is not None:
            self.notes.append(f"{table.source}: {lost:,} words lie beyond max_length={self.max_length} or have no piece; left "
                              "out")
        return rows

    def outputs(self):
        return len(self.labels)

    def pool(self, backbone):
        return "tokens"

    def loss(self, model, batch):
        logits = self.logits(model, batch)
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten().to(logits.device), ignore_index=IGNORE)

    def counted(self, batch):
        return int((batch["labels"] != IGNORE).sum())

    def score(self, model, examples, batch_size):
        predicted, truth, total = [], [], 0.0
        for _, batch, logits in self.outcomes(model, examples, batch_size):
            there = batch["labels"] != IGNORE
            kept, labels = logits.cpu()[there], batch["labels"][there]
            predicted.append(kept.argmax(-1))
            truth.append(labels)
            total += F.cross_entropy(kept, labels, reduction="sum").item()
        predicted, truth = torch.cat(predicted), torch.cat(truth)
        return {"f1": metrics.micro_f1(predicted, truth, self.outside), "accuracy": metrics.accuracy(predicted, truth),
                "loss": total / len(truth), "n": len(truth)}

    def predict(self, model, inputs, batch_size=32):
        """[{"tokens": words, "tags": one a word (None where the text was cut)}]; a string is cut at spaces."""
        table = self.rows(inputs if not isinstance(inputs, str) else [inputs])
        name = self.roles["tokens"]
        table.columns[name] = [v.split() if isinstance(v, str) else list(v) for v in table.columns[name]]
        examples, found = self.encode(table), [None] * len(table)
        for index, batch, logits in self.outcomes(model, examples, batch_size):
            for row, i in enumerate(index):
                said = iter(logits[row].argmax(-1).cpu()[batch["labels"][row] != IGNORE].tolist())
                words = table.columns[name][i]
                tags = [next(said, None) for _ in words]
                found[i] = {"tokens": words, "tags": [None if t is None else self.labels[t] for t in tags]}
        return found

    def facts(self):
        return {"labels": list(self.labels)}

    def state(self):
        return {"labels": self.labels}
