"""DAS: of eight blocks of a small vision-language model three are skipped, those that the bandit finds, random ones, or the last.
Wu et al., NeurIPS 2023, arXiv:2309.01479. Blocks do not cost the same: the baselines may keep more work than the learned set, and
never less. Not among the eight: the first blocks of the language model, which make the bias of positions for all others."""

import copy
import random

import torch

from luthier import cost
from luthier.attach import attach
from luthier.evidence import _bench, beats, fact, judge
from luthier.procedures.das import das, skipping
from luthier.site import find

SYSTEM, METHODS, SEEDS, MINUTES = "B085", ("das",), (0, 1, 2, 3, 4), 8
CLAIM = "the learned skip set loses less accuracy than random or last-layer skips at equal FLOPs; measured latency falls"
BASELINE = "random blocks and the last blocks, as many and with no fewer FLOPs left, the same adapters and training"
MODEL = "tiny-vlt5 (4 vision, 3 encoder, 3 decoder blocks)"
DATA = "scenes:vqa: 1000 train, 200 validation, 400 test rows"
AT, SKIP, WIDTH = "block.1-.out vision.block.0.out", 3, 16
BESIDE = "houlsby(at='attn.out mlp.out', width=16, norms=False)"
STEPS, SOUGHT, BATCH, RATES = 100, 120, 16, (1e-3, 3e-3, 1e-2)


def work(model, names, batch):
    """Multiply-adds of one forward without these blocks."""
    tuned = attach(model, skipping(model, names, WIDTH)).eval()
    found = cost.flops(lambda: tuned(**batch))
    tuned.detach()
    return found


def others(model, names, seed, batch):
    """Random blocks that leave no less work than `names` do, and the last ones in the order data meets them."""
    pool, draw, most = [s.name for s in find(model, AT)], random.Random(f"das/{seed}"), work(model, names, batch)
    sets = [sorted(draw.sample(pool, SKIP), key=pool.index) for _ in range(30)]
    chance = next((c for c in sets if c != list(names) and work(model, c, batch) >= most), pool[-SKIP:])
    return chance, pool[-SKIP:]


def spent(model, chains, batch):
    """Multiply-adds of one forward under each chain, and milliseconds of the first two in turns."""
    flops = {}
    for name, chain in chains.items():
        tuned = attach(model, chain).eval()
        flops[name] = cost.flops(lambda: tuned(**batch))  # noqa: B023
        tuned.detach()
    a, b = (attach(m, c).eval() for m, c in zip((model, copy.deepcopy(model)), list(chains.values())[:2], strict=True))
    with torch.no_grad():
        seconds = cost.latency([lambda: a(**batch), lambda: b(**batch)], 15)
    a.detach()
    return flops, {"whole": 1e3 * seconds[0], "learned": 1e3 * seconds[1]}


def run(seeds):
    task = _bench.task("scenes:vqa", MODEL.split()[0], train=1000, val=200, test=400)
    base = task.build(0).eval()
    beside = _bench.seeing(base, BESIDE)
    some = list({s.tower: s.name for s in find(base, AT)}.values())[:SKIP]          # of each tower, for the search for a rate
    facts = {"learning_rate": {}, "skipped": {}, "preferences": {}, "flops": {}, "latency": {}}
    for name, chain in (("whole", beside), ("skips", skipping(base, some, WIDTH, beside))):
        facts["learning_rate"][name], _ = _bench.search(task, chain, STEPS, BATCH, RATES, head=False)
    per_seed, batch = {}, dict(_bench.first(task))
    for seed in seeds:
        found = das(task, SKIP, at=AT, width=WIDTH, beside=beside, steps=SOUGHT, turn=2, lr=facts["learning_rate"]["skips"],
                    batch_size=BATCH, seed=seed)
        chance, last = others(base, found.skipped, seed, batch)
        sets = {"learned": list(found.skipped), "random": chance, "last": last}
        chains = {"whole": beside} | {k: skipping(base, v, WIDTH, beside) for k, v in sets.items()}
        facts["skipped"][str(seed)], facts["preferences"][str(seed)] = sets, found.preferences
        facts["flops"][str(seed)], facts["latency"][str(seed)] = spent(base, chains, batch)
        for name, chain in chains.items():
            lr = facts["learning_rate"]["whole" if name == "whole" else "skips"]
            per_seed.setdefault(name, []).append(_bench.score(_bench.trained(task, chain, seed, lr, STEPS, BATCH, False), task))
            _bench.say(f"{name} seed {seed}: {per_seed[name][-1]:.4f} {sets.get(name, '')}")
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f = figures["facts"]
    saved = [1 - x["learned"] / x["whole"] for x in f["flops"].values()]
    more = [x[k] / x["learned"] for x in f["flops"].values() for k in ("random", "last")]
    faster = [x["learned"] / x["whole"] for x in f["latency"].values()]
    return judge(
        [beats(figures, "learned", "random", "accuracy above that of random blocks"),
         beats(figures, "learned", "last", "accuracy above that of the last blocks")],
        [fact(min(saved) > 0, f"skipping saves {min(saved):.1%} to {max(saved):.1%} of the multiply-adds"),
         fact(min(more) > 0.999, f"the others are allowed no less work: {min(more):.2f} to {max(more):.2f} of the learned set's"),
         fact(max(faster) < 1, f"measured time of a forward: {min(faster):.2f} to {max(faster):.2f} of the whole model's")])
