"""DiST on DINOv2-S and clips of a moving shape. Qing et al., 2023, arXiv:2309.07911."""

from luthier.evidence import _bench, _clips, beats, fact, judge

SYSTEM, METHODS, SEEDS, MINUTES = "B055", ("dist",), (0, 1, 2), 20
CLAIM = "Beats frozen features averaged over frames; no backbone activation is kept; peak memory below adapters in the backbone"
BASELINE = "a head on frame-averaged frozen features (accuracy), adaptformer in the backbone (memory)"
MODEL = "dinov2-s (22.1M)"
DATA = "scenes.clip, 4 frames of 56 px, 4 directions: 320 train, 96 validation, 240 test clips"
STEPS, BATCH, RATES, SIZES = 120, 8, (5e-4, 3e-3, 2e-2), {"train": 320, "val": 96, "test": 240}
CHAINS = {"dist": "dist(frames=4, pool=1)", "frame average": "probe()"}


def run(seeds, model="dinov2-s", side=56, steps=STEPS, sizes=SIZES, rates=RATES):
    task = _clips.Directions(model, 4, side, sizes)
    per_seed, facts = _bench.arms(task, CHAINS, seeds, steps, BATCH, rates)
    batch = _bench.first(task, size=BATCH)
    facts |= {"memory": {}, "graph": {}, "method_parameters": {}}
    for name, chain in (CHAINS | {"adaptformer": "adaptformer(width=64)"}).items():
        tuned = _bench.attach(task.build(0), _bench.with_head(chain), seed=0)
        facts["memory"][name], facts["method_parameters"][name] = _bench.memory(tuned, task, batch), _bench.body(tuned)
        facts["graph"][name] = _clips.in_graph(tuned, task, batch)
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f = figures["facts"]
    ours, inside = f["memory"]["dist"], f["memory"]["adaptformer"]
    return judge(
        [beats(figures, "dist", "frame average", "accuracy above frozen features averaged over frames"),
         fact(ours["peak"] < inside["peak"],
              f"peak memory of a training step, weights included: {ours['peak'] / 2**20:.0f} MiB against adaptformer's "
              f"{inside['peak'] / 2**20:.0f} MiB; kept for backward {ours['saved'] / 2**20:.0f} against "
              f"{inside['saved'] / 2**20:.0f} MiB")],
        [fact(f["graph"]["dist"] == [0, 0] and f["graph"]["adaptformer"][0] > 0,
              f"backbone layers in the autograd graph: {f['graph']['dist'][0]} (with adaptformer "
              f"{f['graph']['adaptformer'][0]}); backbone weights with a gradient: {f['graph']['dist'][1]}")])
