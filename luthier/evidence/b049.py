"""R-AMT on tiny-clip: a bit for every attention weight of its image tower. Zheng et al., 2023, arXiv:2307.15049.
Pictures are outlined, a style that tiny-clip never saw. What may be forgotten are pairs of colour and shape that training never
names."""

import tempfile
from pathlib import Path

import torch

from luthier import attach
from luthier.evidence import _bench, _names, beats, fact, judge

SYSTEM, METHODS, SEEDS, MINUTES = "B049", ("ramt",), (0, 1, 2), 15
CLAIM = "16 shots beat zero-shot with under 5% masked; gradient dropout forgets less than without; a bit a weight is stored"
BASELINE = "zero-shot; the same masks without gradient dropout"
MODEL = "tiny-clip (1.3M)"
DATA = "scenes:classify-outline, 40 classes, 16 shots, 400 test images; the same of 20 old classes, with 20 more in the test"
GAIN = {"zero-shot": "none", "masks": "ramt()"}
FORGET = {"zero-shot": "none", "masks": "ramt()", "no dropout": "ramt(drop=0.0)"}
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)                # masks begin 0.005 above their threshold


def masked(name, seed, tuned):
    """The share of weights that are masked, and bytes on disk for each of them."""
    states = [p for p in getattr(tuned, "states", {}).values()] if name != "zero-shot" else []
    if not states:
        return {}
    weights = sum(site.parameter.numel() for step in tuned._plan.steps for site in step.sites)
    with tempfile.TemporaryDirectory() as folder:
        tuned.save(Path(folder) / "bits")
        size = (Path(folder) / "bits" / "state.safetensors").stat().st_size
    ones = sum(int((p.bits[..., None].int() >> torch.arange(8) & 1).sum()) for p in states)
    return {"masked": 1 - ones / weights, "bytes_a_weight": size / weights}


def run(seeds, steps=100):
    def gain(seed):
        return _names.task("scenes:classify-outline", seed, limit={"test": 400})

    def forget(seed):
        return _names.task("scenes:classify-base-new-outline", seed, limit={"test": 400})
    a, facts = _names.arms(gain, GAIN, seeds, steps, rates=RATES, after=masked)
    b, more = _names.arms(forget, FORGET, seeds, steps, rates=RATES, after=masked)
    mine, batch = gain(0), _bench.first(gain(0))
    base = _bench.logits(mine.build(0), batch)
    gap = _bench.gap(_bench.logits(attach(mine.build(0), "ramt()").eval(), batch), base)
    return {"per_seed": a | {f"old-new {k}": v for k, v in b.items()}, "facts": facts | {"old-new": more, "all_ones_gap": gap}}


def verdict(figures):
    f, s = figures["facts"], figures["per_seed"]
    share, size = max(s["masks.masked"]), max(s["masks.bytes_a_weight"])
    return judge(
        [beats(figures, "masks", "zero-shot", "16 shots on outlined pictures, above zero-shot"),
         beats(figures, "old-new masks.new", "old-new no dropout.new", "classes never trained, above the same without dropout")],
        [fact(f["all_ones_gap"] == 0, f"with nothing masked the logits are the base's: they differ by {f['all_ones_gap']:.1e}"),
         fact(share < 0.05, f"at most {share:.2%} of the weights are masked, needed below 5%"),
         fact(size < 1 / 8 + 0.1, f"{8 * size:.2f} bits on disk for each weight, names and shapes included")])
