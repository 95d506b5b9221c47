"""ZeroI2V on tiny-clip's vision tower and clips of a moving shape. Li et al., 2023, arXiv:2310.01324.
Learned places in time are left out of both arms: with them frames differ without looking at each other."""

import torch

from luthier import cost
from luthier.attach import attach
from luthier.evidence import _bench, _clips, beats, fact, judge

SYSTEM, METHODS, SEEDS, MINUTES = "B083", ("stdha", "linear_adapter", "zeroi2v"), (0, 1, 2), 10
CLAIM = "Merged equals unmerged to 1e-5 at the image model's operations; shifted heads well above none on directions"
BASELINE = "the same linear adapters and head without shifted heads"
MODEL = "vision tower of tiny-clip"
DATA = "scenes.clip, 4 frames of 64 px, 4 directions: 320 train, 160 validation, 320 test clips"
STEPS, BATCH, RATES = 120, 16, (5e-4, 3e-3, 2e-2)
CHAINS = {"shifted": "stdha() >> linear_adapter()", "not shifted": "linear_adapter()"}
WELL = 0.1                                                   # of accuracy


def run(seeds, model="tiny-clip", side=64, steps=STEPS, sizes=_clips.SIZES, rates=RATES):
    task = _clips.Directions(model, 4, side, sizes)
    per_seed, facts = _bench.arms(task, CHAINS, seeds, steps, BATCH, rates)
    base, batch = task.build(0), _bench.first(task, "test")
    pixels = {"pixel_values": batch["pixel_values"]}
    facts["flops"] = {"base": cost.flops(lambda: base(**pixels))}
    heads = attach(base, "stdha()").eval()
    still = _bench.logits(base, batch)
    tuned = _bench.shake(attach(base, "linear_adapter()", seed=0).eval(), by=0.05)
    y = _bench.logits(tuned, batch)
    facts["flops"]["unmerged"] = cost.flops(lambda: tuned(**pixels))
    tuned.merge()
    facts["flops"]["merged"] = cost.flops(lambda: tuned(**pixels))
    facts["merge_gap"], facts["moved"] = _bench.gap(_bench.logits(tuned, batch), y) / float(y.abs().max()), _bench.gap(y, still)
    facts["heads_train"] = len(heads.trainable())
    facts["backwards"] = {"shifted": _bench.gap(_bench.logits(base, _clips.reverse(batch)), _bench.logits(base, batch))}
    tuned.detach()
    heads.detach()
    with torch.no_grad():
        facts["backwards"]["base"] = _bench.gap(_bench.logits(base, _clips.reverse(batch)), _bench.logits(base, batch))
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f = figures["facts"]
    n = f["flops"]
    return judge(
        [beats(figures, "shifted", "not shifted", "accuracy with shifted heads above without", by=WELL)],
        [fact(f["merge_gap"] < 1e-5 < f["moved"],
              f"merged equals unmerged: relative difference {f['merge_gap']:.1e}, needed below 1e-05 (logits moved by "
              f"{f['moved']:.2g})"),
         fact(n["merged"] == n["base"] < n["unmerged"],
              f"operations of {n['base'] / 1e6:.0f}M on the image model, {n['merged'] / 1e6:.0f}M merged, "
              f"{n['unmerged'] / 1e6:.0f}M unmerged"),
         fact(f["heads_train"] == 0 and f["backwards"]["base"] < 1e-4 < f["backwards"]["shifted"],
              f"shifted heads train nothing; played backwards logits move by {f['backwards']['shifted']:.2g}, those of the base "
              f"by {f['backwards']['base']:.1e}")])
