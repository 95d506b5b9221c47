"""What the runners on pairs of frozen encoders share: pairs of scenes to learn from, and zero-shot classification by what was
learned."""

import torch

from luthier.evidence import _bench
from luthier.tasks.dual import Named

CONNECTOR = 'full(at="connector")'
VISIONS, TEXTS = ("dinov2-s", "effnet-lite0"), ("minilm", "smollm2-135m", "stories260k")
SIDE, RANKED = 56, dict(train=300, val=100, test=50)         # what six pairs of encoders are ranked by


def pairs(model, data="scenes:retrieval", train=600, val=100, test=100, **options):
    return _bench.task(data, model, train, val, test, task="image-text-retrieval", image_size=SIDE, **options)


def names(model, test=200):
    """Forty names of a colour and a shape; its training rows are of no use here."""
    return _bench.task("scenes:classify", model, 2, 2, test, template="a {}", image_size=SIDE)


def zero_shot(tuned, named):
    """Accuracy on classes told by names alone."""
    return named.evaluate(Named(tuned.base, named.tokenizer, named.shown, named.template).eval())["accuracy"]


def arms(given, seeds, steps, batch, rates):
    """Train the heads of {name: task} over the seeds, each at its best rate; -> per_seed with zero-shot accuracy, facts."""
    per_seed, facts = {}, {}
    for name, task in given.items():
        named = names(task.model)
        mine, more = _bench.arms(task, {name: CONNECTOR}, seeds, steps, batch, rates, head=False,
                                 after=lambda name, seed, tuned, named=named: {"zero_shot": zero_shot(tuned, named)})
        per_seed |= mine
        for key, value in more.items():
            facts[key] = facts.get(key, {}) | value if isinstance(value, dict) else value
    return per_seed, facts


def finals(way, steps, batch, lr, seeds=(0, 1), visions=VISIONS, texts=TEXTS):
    """{"VISION+TEXT": mean zero-shot accuracy} of every pair of encoders, bridged by `way`."""
    found, memory = {}, {}
    for vision in visions:
        for text in texts:
            task, scores = pairs(f"{vision}+{text}:{way}", **RANKED), []
            task.memory = memory
            named = names(task.model)
            for seed in seeds:
                scores.append(zero_shot(_bench.trained(task, CONNECTOR, seed, lr, steps, batch, head=False), named))
            found[f"{vision}+{text}"] = sum(scores) / len(scores)
            _bench.say(f"{vision}+{text}: {found[f'{vision}+{text}']:.4f}")
    return found


def spearman(a, b):
    """Rank correlation of two dicts with the same keys; ties share their ranks."""
    def ranks(x):
        x = torch.tensor([x[k] for k in sorted(a)], dtype=torch.float64)
        r = (x[:, None] > x).double().sum(1) + ((x[:, None] == x).double().sum(1) - 1) / 2
        return r - r.mean()
    x, y = ranks(a), ranks(b)
    return float(x @ y / (x.norm() * y.norm()).clamp(min=1e-12))
