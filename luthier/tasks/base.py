"""What every kind of task shares: splits, batches, evaluation, and a description. A kind adds its encoding, loss and score."""

import torch

from .. import ranks, zoo
from ..errors import BadData, DoesNotFit, nearest
from .headed import POOLS, Headed, head
from .roles import parts
from .split import divide, order, shares

UNREADABLE = 0.01              # share of all rows that may be of no use before the data is refused


class Task:
    kind = ""
    reads = ()                                       # kinds of models that can do it
    metrics = ()                                     # the first is the default primary one
    higher = True                                    # whether more of the metric is better
    small = 0                                        # rows that a table counts as, at least, when bad ones are weighed
    bad = 0                                          # rows that cannot be used, so far

    def __init__(self, model=None, *, source="", roles=None, metric=None, tokenizer=None, **options):
        self.model, self.source, self.roles, self.notes = model, source, dict(roles or {}), []
        self.metric = metric or self.metrics[0]
        if self.metric not in self.metrics:
            raise BadData(f"{self.kind} has no metric {metric!r}. {nearest(metric, self.metrics)} It has: "
                          f"{', '.join(self.metrics)}.")
        if options.get("pool") not in (None, *POOLS):
            raise BadData(f"There is no pool {options['pool']!r}. {nearest(options['pool'], POOLS)} Pools: {', '.join(POOLS)}.")
        self._tokenizer, self.options, self.tables, self._encoded = tokenizer, options, {}, {}
        self.origin = zoo.about(model) if model is not None else None
        if self.origin and not self.can_read():
            fit = [e["name"] for e in zoo.entries() if e["kind"] in self.reads]
            raise BadData(f"{source or 'This data'} is a task of {self.kind}, which {self.origin.ref} (a model of kind "
                          f"{self.origin.kind}) cannot do. Use another model, in the zoo {', '.join(fit)}, or set task= to "
                          "another kind.")

    def can_read(self):
        """Whether the model is of a kind that can do this task."""
        return self.origin.kind in (*self.reads, "other")

    # data

    def fill(self, data, seed, limit):
        """Divide, learn what training rows define (labels, scale), check the rest against it, apply the limit."""
        self.notes += data.notes
        self.tables = divide(data.splits, self.strata, seed, self.notes)
        for name, table in self.tables.items():
            if not len(table):
                raise BadData(f"{self.source}: too few rows: nothing is left for {name}. Give at least ten rows.")
        for table in self.tables.values():
            self.check(table)
        self.learn(data)
        self.repeats()
        for name in self.tables:
            most = limit.get(name) if isinstance(limit, dict) else limit
            self.limit(name, most, seed)
        return self

    def too_many(self, bad, table):
        """Whether `bad` rows of a table that cannot be used are, with those found before, more than UNREADABLE of all."""
        self.bad += bad
        rows = max(sum(map(len, self.tables.values())), self.small * len(self.tables))
        return bad == len(table) or self.bad > UNREADABLE * rows

    def without(self, table, bad):
        """The table without rows that cannot be used, {number: why}; refused when they are too many."""
        if not bad:
            return table
        i, why = next(iter(bad.items()))
        if self.too_many(len(bad), table):
            raise BadData(f"{table.where(i)}: {why}; in all {len(bad)} of {len(table)} rows cannot be used, and at most "
                          f"{UNREADABLE:.0%} may be so. Mend or remove them.")
        self.notes.append(f"{len(bad)} rows that cannot be used are left out; {table.where(i)}: {why}")
        return table.take([i for i in range(len(table)) if i not in bad])

    def check(self, table):
        """Refuse rows that cannot be read, before anything is learned from them."""

    def repeats(self):
        """Say how much of the test part was already seen in training, word for word."""
        role = next((r for r in ("text", "prompt") if r in self.roles), None)
        if role and len(self.tables["test"]) > 1:
            seen = {repr(v) for v in self.column(self.tables["train"], role)}
            n = sum(repr(v) in seen for v in self.column(self.tables["test"], role))
            if n:
                self.notes.append(f"test: {n:,} of {len(self.tables['test']):,} rows have a {role} that also stands in train")

    def limit(self, name, most, seed):
        if name == "train" and self.options.get("concepts"):
            self.balance(seed)
        table = self.tables[name]
        if most is not None and most < len(table):
            if most < 1:
                raise BadData(f"limit={most}: a limit is at least 1.")
            self.tables[name] = table.take(shares(self.strata(table), most, seed))
            self.notes.append(f"{name}: {most:,} of {len(table):,} rows kept (limit)")

    def balance(self, seed):
        """Of the training rows, those that give every concept its share of texts (balance.py)."""
        from .balance import balanced

        per, judge, table = self.options.get("shots"), self.options.get("judge"), self.tables["train"]
        role = next((r for r in ("caption", "response") if r in self.roles), None)
        if role is None or not (per and judge):
            raise BadData(f"concepts={self.options['concepts']!r} chooses pairs of image and text that a dual encoder finds near "
                          "to images of each concept: it needs a caption or response, judge= (such as a CLIP) and shots=, the "
                          "rows a concept may have.")
        texts = [t[0] if isinstance(t, (list, tuple)) else t for t in self.column(table, role)]
        kept, n = balanced([t if isinstance(t, str) else "" for t in texts], self.options["concepts"], judge, per, seed)
        self.notes.append(f"train: {len(kept):,} of {len(table):,} rows kept, at most {per} for each of {n:,} concepts")
        self.tables["train"] = table.take(kept)

    def column(self, table, role):
        """A role's values; a role may join columns, like "context + question"."""
        if self.roles[role] in table.columns:
            return table.columns[self.roles[role]]
        names = parts(self.roles[role])
        missing = [n for n in names if n not in table.columns]
        if missing:
            raise BadData(f"{table.source} has no column {missing[0]!r} (the {role}). {nearest(missing[0], table.columns)} "
                          f"It has: {', '.join(map(str, table.columns))}.")
        rows = zip(*(table.columns[n] for n in names), strict=True)
        return ["\n".join(str(v) for v in row if v not in (None, "")) for row in rows]

    def strata(self, table):
        return [0] * len(table)

    def examples(self, split):
        if split not in self._encoded:
            if split not in self.tables:
                raise BadData(f"There is no split {split!r}. {nearest(split, self.tables)} There are: "
                              f"{', '.join(self.tables) or 'none'}.")
            self._encoded[split] = self.encode(self.tables[split])
        return self._encoded[split]

    def size(self, split="train"):
        return len(self.tables[split]) if split in self.tables else len(self.examples(split))

    def batches(self, split, size, seed=0, epoch=0, shuffle=None, start=0):
        """Batches of tensors, the same for the same (seed, epoch); `start` skips that many at no cost."""
        examples = self.examples(split)
        plan = order(len(examples), size, seed, epoch, split == "train" if shuffle is None else shuffle,
                     (lambda i: self.length(examples[i])) if self.length(examples[0]) is not None else None)
        for index in plan[start:]:
            yield self.collate([examples[i] for i in index])

    def n_batches(self, split, size):
        return -(-len(self.examples(split)) // size)

    def length(self, example):
        return None

    # model

    @property
    def tokenizer(self):
        if self._tokenizer is None:
            if self.origin is None:
                raise BadData("This task has no model, so nothing can be tokenised. Open it with model=.")
            self._tokenizer = self.origin.tokenizer()
        return self._tokenizer

    def outputs(self):
        """How many numbers the head gives."""
        raise NotImplementedError

    def pool(self, backbone):
        raise NotImplementedError

    def build(self, seed=0, dtype=None):
        """The pretrained model with this task's head. Weights are fresh each call; the head depends on `seed` only."""
        if self.model is None:
            raise BadData("This task has no model to build on. Open it with model=, e.g. model=\"minilm\".")
        if self.options.get("own"):                  # the head that came with the model, of an adapter made elsewhere
            return zoo.load(self.model, dtype)
        first = None
        for backbone in bodies(zoo.load(self.model, dtype), self.origin.kind, self.reads):
            model = Headed(backbone, self.pool(backbone), None, self.extra(backbone)).eval()
            try:
                with torch.no_grad():                # one example says whether it fits, and how wide the features are
                    width = model.features(**self.probe()).shape[-1]
            except Exception as error:               # a backbone that wants other inputs says so in its own way
                first = first or error
                continue
            model.head = head(width, self.outputs(), seed, next(backbone.parameters()).dtype)
            model.luthier_origin = self.origin
            return model
        raise DoesNotFit(f"{self.origin.ref} does not read what {self.kind} gives it ({', '.join(self.probe())}): "
                         f"{str(first)[:300]} Use another model (`luthier zoo`).") from first

    def extra(self, backbone):
        return {}

    # training and evaluation

    def loss(self, model, batch):
        raise NotImplementedError

    def counted(self, batch):
        """How many things the loss of a batch is the mean of."""
        return len(next(iter(batch.values())))

    def logits(self, model, batch):
        out = model(**{k: v for k, v in to_device(batch, model).items() if k != "labels"})
        return (out["logits"] if isinstance(out, dict) else out.logits).float()

    def outcomes(self, model, examples, batch_size):
        """Yield (batch, logits) over examples sorted by length, with the indices of each batch."""
        index = sorted(range(len(examples)), key=lambda i: self.length(examples[i]) or 0)

        def run(part):
            batch = self.collate([examples[k] for k in part])
            if hasattr(model, "serve_rows"):               # a rack: each row has its own adapter
                model.serve_rows(part)
            logits = self.logits(model, batch)
            return part, {k: v for k, v in batch.items() if k == "labels"}, logits

        was = model.training
        model.eval()
        try:
            with torch.no_grad():
                yield from ranks.spread([index[i:i + batch_size] for i in range(0, len(index), batch_size)], run)
        finally:
            model.train(was)

    def evaluate(self, model, split="test", batch_size=64):
        """All metrics of this kind, the primary one first, then `loss` and `n`."""
        scores = self.score(model, self.examples(split), batch_size)
        return {self.metric: scores.pop(self.metric)} | scores

    # what it is

    def describe(self):
        return {"kind": self.kind, "source": str(self.source), "model": self.origin.ref if self.origin else None,
                "metric": self.metric, "higher": self.higher, "columns": self.roles,
                "sizes": {s: self.size(s) for s in self.tables}, "each": self.each()} | self.facts() | {"notes": list(self.notes)}

    def facts(self):
        return {}

    def each(self):
        """Where the metric is a mean over parts of the data: {the score of a part, as evaluate() names it: its metric}."""
        return {}

    def samples(self, n=8):
        """Rows of the test split that a person can look at, with what is true; see ImageToText."""
        return []

    def spec(self):
        """JSON from which `tasks.restore` makes a task without data, for prediction."""
        if not (self.model is None or isinstance(self.model, str)):
            raise BadData("A task over a module given in Python has no name to store its model by. Open it with model=NAME or "
                          "a folder.")
        facts = {k: getattr(self, k) for k in ("kind", "model", "roles", "metric", "options")}
        return facts | self.state()

    def state(self):
        return {}


def to_device(batch, model):
    device = next(model.parameters()).device
    return batch if device.type == "cpu" else {k: v.to(device, non_blocking=True) for k, v in batch.items()}


TOWERS = {"vision": ("vision_model", "vision_tower", "visual"), "text": ("text_model", "language_model")}


def bodies(model, kind, reads):
    """The part of a model below its own head; then, where that may not run on its own, what it was cut from."""
    if hasattr(model, "reset_classifier"):           # timm's own way; it pools by itself
        model.reset_classifier(0)
        yield model
        return
    base = getattr(model, "base_model", model)
    if kind == "vision-language":
        names = TOWERS["vision" if "vision" in reads else "text"]
        base = next((m for n, m in base.named_modules() if n.split(".")[-1] in names), base)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        base = base.get_encoder()
    if hasattr(getattr(base, "config", None), "mask_ratio"):
        base.config.mask_ratio = 0.0                 # masked autoencoders hide most patches otherwise
    pooler = getattr(base, "pooler", None)
    if isinstance(pooler, torch.nn.Module) and any(True for _ in pooler.parameters()):
        base.pooler = None                           # it would only feed the head that is replaced
        yield base
        base.pooler = pooler
    yield base
    if base is not model:
        yield model


def finite(value, where):
    """A float, refused when it is none or not finite."""
    try:
        x = float(value)
    except (TypeError, ValueError):
        x = None
    if x is None or x != x or x in (float("inf"), float("-inf")):
        raise BadData(f"{where}: the target {value!r} is not a finite number. Mend or drop the row.") from None
    return x
