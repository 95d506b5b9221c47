"""The budget-aware schedule UBA on a ResNet trained from scratch and a small Llama tuned on raw text, at three step budgets.
Tang et al., Stepsize anything, 2025, arXiv:2505.24452.

Each schedule may choose one of three shapes (UBA its φ, cosine and linear the floor they end at, step its drops) and climbs the
same grid of learning rates with each, on a seed of its own and the validation split: the same effort for every schedule. Scores
are accuracy on test digits and minus the test loss per token.
"""

import itertools
import math

import torch
from torch.nn.functional import cross_entropy

from luthier._compat import torchvision
from luthier.evidence import _bench, fact, judge, not_below
from luthier.schedule import schedule
from luthier.train import rate

SYSTEM, METHODS, SEEDS, MINUTES = "C037", (), (0, 1, 2), 10
CLAIM = "phi = 2 is the cosine and both ends are exact; with phi picked on validation no worse than cosine, linear and step"
BASELINE = "cosine, linear and step schedules with as many shapes and the same search for a learning rate"
MODEL = "ResNet of two stages from scratch; stories260k (a Llama of 0.26M)"
DATA = "scikit-learn's digits; TREC questions as raw text"
BUDGETS, SHARES = {"digits": 160, "text": 48}, (0.25, 0.5, 1.0)
FLOORS = ("floor=0.0", "floor=0.05", "floor=0.2")
SHAPES = {"uba": [f"uba(phi={phi})" for phi in (0.5, 1, 5)], "cosine": [f"cosine({f})" for f in FLOORS],
          "linear": [f"linear({f})" for f in FLOORS],
          "step": ["step(at=(0.5, 0.75))", "step(at=(0.33, 0.67))", "step(at=(0.5, 0.75), by=0.3)"]}


class Digits:
    """A ResNet from scratch with SGD and momentum."""
    rates = (0.01, 0.03, 0.1, 0.3)

    def __init__(self):
        from sklearn.datasets import load_digits

        found, order = load_digits(), torch.randperm(1797, generator=torch.Generator().manual_seed(_bench.TUNE))
        x, y = torch.tensor(found.images, dtype=torch.float32)[order, None] / 8 - 1, torch.tensor(found.target)[order]
        self.split = {"train": (x[:600], y[:600]), "val": (x[600:1100], y[600:1100]), "test": (x[1100:], y[1100:])}

    def start(self, seed):
        torchvision()
        from transformers import ResNetConfig, ResNetForImageClassification

        torch.manual_seed(seed)
        model = ResNetForImageClassification(ResNetConfig(
            num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10))
        return model, lambda lr: torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4)

    def batches(self, seed):
        (x, y), g = self.split["train"], torch.Generator().manual_seed(seed)
        while True:
            at = torch.randint(len(x), (32,), generator=g)
            yield {"pixel_values": x[at], "labels": y[at]}

    def loss(self, model, batch):
        return cross_entropy(model(batch["pixel_values"]).logits, batch["labels"])

    def score(self, model, split):
        x, y = self.split[split]
        return float((model(x).logits.argmax(-1) == y).float().mean())


class Text:
    """A pretrained Llama, all of it tuned with AdamW."""
    rates = (3e-4, 1e-3, 3e-3, 1e-2)

    def __init__(self):
        self.task = _bench.task("trec", "stories260k", 2000, 100, 200, task="causal-lm", columns={"text": "text"})

    def start(self, seed):
        model = self.task.build(seed)
        return model, lambda lr: torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)

    def batches(self, seed):
        for epoch in itertools.count():
            for batch in self.task.batches("train", 8, seed=seed, epoch=epoch):
                yield {k: v[:, :32] for k, v in batch.items()}

    def loss(self, model, batch):
        return self.task.loss(model, batch)

    def score(self, model, split):
        return -float(torch.stack([self.task.loss(model, b) for b in self.task.batches(split, 64, shuffle=False)]).mean())


def fit(on, text, lr, steps, seed, split):
    """Train from the seed's start; -> score on the split."""
    model, optimizer = on.start(seed)
    optimizer = optimizer(lr)
    model.train()
    for k, batch in zip(range(steps), on.batches(seed), strict=False):
        optimizer.param_groups[0]["lr"] = rate(k, steps, lr, text)
        loss = on.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return on.score(model, split)


def pick(on, shapes, steps):
    """The shape and rate of the best validation score: every shape climbs the grid of rates from its middle."""
    found = {}

    def worth(text, i):
        if (text, i) not in found:
            value = fit(on, text, on.rates[i], steps, _bench.TUNE, "val")
            found[text, i] = value if math.isfinite(value) else -math.inf
        return found[text, i]

    best = max(((text, _bench.climb(lambda i: worth(text, i), len(on.rates))) for text in shapes),     # noqa: B023
               key=lambda at: worth(*at))
    return best[0], on.rates[best[1]]


def run(seeds):
    per_seed, facts = {}, {"picked": {}, "budgets": {k: [round(b * s) for s in SHARES] for k, b in BUDGETS.items()}}
    models = {"digits": Digits(), "text": Text()}
    for kind, steps, (arm, shapes) in ((k, b, s) for k in models for b in facts["budgets"][k] for s in SHAPES.items()):
        on, name = models[kind], f"{kind}.{steps}.{arm}"
        text, lr = facts["picked"][name] = pick(on, shapes, steps)
        per_seed[name] = [fit(on, text, lr, steps, seed, "test") for seed in seeds]
        _bench.say(f"{name} {text} {lr:g}: {per_seed[name]}")
    for arm in SHAPES:                                       # of a model: mean over its budgets
        for kind in ("digits", "text"):
            rows = [per_seed[f"{kind}.{steps}.{arm}"] for steps in facts["budgets"][kind]]
            per_seed[f"{kind}.{arm}"] = [sum(r) / len(r) for r in zip(*rows, strict=True)]
    curves = [abs(schedule("uba(phi=2)")(k / 100) - schedule("cosine")(k / 100)) for k in range(101)]
    ends = [schedule(f"uba(phi={phi}, floor=0.1)")(x) for phi in (0.5, 1, 5) for x in (0, 1)]
    facts |= {"cosine_gap": max(curves), "end_gap": max(abs(e - w) for e, w in zip(ends, (1, 0.1) * 3, strict=True))}
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f = figures["facts"]
    return judge(
        [not_below(figures, f"{kind}.uba", f"{kind}.{other}",
                   what=f"{kind}, mean over budgets of {f['budgets'][kind]} steps: UBA and {other}")
         for kind in ("digits", "text") for other in ("cosine", "linear", "step")],
        [fact(f["cosine_gap"] < 1e-12, f"phi = 2 and the cosine: largest difference {f['cosine_gap']:.1e}"),
         fact(f["end_gap"] < 1e-12, f"first and last rate off by {f['end_gap']:.1e}")])
