"""CoCoOp against CoOp on tiny-clip: half the pairs of colour and shape are only in the test, all are drawn in outline, a style it
never saw. Zhou et al., 2022, arXiv:2203.05557. Both start from the words "a photo of a", as the authors do; sixteen shots of the
twenty old classes."""

import torch

from luthier import attach
from luthier.evidence import _bench, _names, beats, fact, judge, not_below

SYSTEM, METHODS, SEEDS, MINUTES = "A009", ("cocoop",), (0, 1, 2), 15
CLAIM = "New-class accuracy and the harmonic mean beat CoOp's; without its net it is CoOp"
BASELINE = "coop with the same start; zero-shot beside"
MODEL = "tiny-clip (1.3M)"
DATA = "scenes:classify-base-new-outline, 64 px, 20 old and 20 new classes: 16 shots of the old ones, 400 test images"
WORDS = 'words="a photo of a"'
CHAINS = {"zero-shot": "none", "coop": f"coop({WORDS})", "cocoop": f"cocoop({WORDS})"}


@torch.no_grad()
def bare_gap(task):
    """Largest difference of logits between CoOp and CoCoOp with the last layer of its net at zero; and what that layer does."""
    batch = _bench.first(task, size=4)
    a, b = (_bench.shake(attach(task.build(0), CHAINS[k]), by=0.1) for k in ("coop", "cocoop"))
    (_, P), theirs = a.trainable()[0], dict(b.trainable())
    one = {k: v[:1] for k, v in batch.items()}
    moved = _bench.logits(b, one)
    for name, p in theirs.items():
        p.copy_(P) if name.endswith(".P") else p.zero_() if name.endswith(("W2", "b2")) else None
    return _bench.gap(_bench.logits(a, one), _bench.logits(b, one)), _bench.gap(moved, _bench.logits(b, one))


def run(seeds, steps=80):
    def make(seed):
        return _names.task("scenes:classify-base-new-outline", seed, limit={"test": 400})
    per_seed, facts = _names.arms(make, CHAINS, seeds, steps, batch=8)
    gap, moved = bare_gap(make(0))
    return {"per_seed": per_seed, "facts": facts | {"gap_without_net": gap, "net_moved": moved}}


def verdict(figures):
    f = figures["facts"]
    return judge(
        [beats(figures, "cocoop.new", "coop.new", "accuracy on new classes above CoOp's"),
         beats(figures, "cocoop", "coop", "harmonic mean above CoOp's"),
         not_below(figures, "cocoop", "zero-shot", 0.0, "harmonic mean not below zero-shot")],
        [fact(f["gap_without_net"] == 0 < f["net_moved"], f"with its net at zero the logits are CoOp's: they differ by "
              f"{f['gap_without_net']:.1e} (the net had moved them by {f['net_moved']:.2g})")])
