"""What the runners on bridges share: captions of procedural scenes, bridged models that are trained on them at the best rate of
the same small grid, and scores by the loss of held-out captions (nats a token, negated: more is better)."""

import torch

from luthier import tasks
from luthier.evidence import _bench
from luthier.save import fingerprint

CONNECTOR = 'full(at="connector")'
RATES = (1e-3, 3e-3, 1e-2)
WORDS = dict(category=("circle", "square", "triangle", "diamond", "cross"), property=(
    "red", "green", "blue", "yellow", "purple", "orange", "cyan", "white", "small", "large"))


def captions(model, train=300, val=80, test=150, see="true", data="scenes:caption", **options):
    """The task; see: "true", "shuffled" (the images of other rows) or "blind" (one image for every row)."""
    task = tasks.open(data, model=model, limit=dict(train=train, val=val, test=test), metric="accuracy", image_size=56, **options)
    for split in ("train", "val", "test"):
        rows = task.examples(split)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(len(rows))).tolist()
        shown = [rows[i]["pictures"] for i in (order if see == "shuffled" else [0] * len(rows))]
        for row, other in zip(rows, shown if see != "true" else (), strict=see != "true"):
            row["pictures"] = other
    return task


def worth(tuned, task, split="test"):
    """Minus the loss of a token."""
    with task.seeing(tuned):
        total, count = task.summed(tuned, task.examples(split), 50)
    return -total / count


def arms(given, seeds, steps, batch=16, rates=RATES, after=None):
    """Train every arm of {name: (task, chain)} at its best rate. -> per_seed, facts. `after(name, seed, tuned, task)`: more."""
    per_seed, facts = {}, {"learning_rate": {}, "trained_parameters": {}, "share": {}, "frozen": {}, "steps": steps}
    for name, (task, chain) in given.items():
        tried = {lr: worth(_bench.trained(task, chain, _bench.TUNE, lr, steps, batch), task, "val") for lr in rates}
        lr = facts["learning_rate"][name] = max(tried, key=tried.get)
        for seed in seeds:
            base = task.build(seed)
            before = fingerprint(base.vision), fingerprint(base.language)
            tuned = _bench.trained(task, chain, seed, lr, steps, batch)
            n = sum(p.numel() for _, p in tuned.trainable())
            facts["trained_parameters"][name], facts["share"][name] = n, n / sum(p.numel() for p in tuned.base.parameters())
            facts["frozen"][name] = before == (fingerprint(tuned.base.vision), fingerprint(tuned.base.language))
            per_seed.setdefault(name, []).append(worth(tuned, task))
            for key, value in (after(name, seed, tuned, task) if after else {}).items():
                per_seed.setdefault(f"{name}.{key}", []).append(value)
            _bench.say(f"{name} seed {seed}: {per_seed[name][-1]:.4f}")
    return per_seed, facts


def named(tuned, task, n=100):
    """Of the words for categories and for properties in true captions, the shares that the model's own captions hold."""
    rows = task.examples("test")[:n]
    with task.seeing(tuned):
        said = [set(text.split()) for text in task.said(tuned, rows, 50)]
    found = {}
    for kind, words in WORDS.items():
        true = [row["answers"][0].replace(",", "").split() for row in rows]
        hits = [w in s for s, right in zip(said, true, strict=True) for w in right if w in words]
        found[kind] = sum(hits) / max(1, len(hits))
    return found
