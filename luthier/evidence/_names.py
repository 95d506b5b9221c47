"""What the runners on dual encoders share: chains trained on a class-names task whose data, few shots and start are a seed's
own."""

from luthier import tasks
from luthier.evidence import _bench

MODEL = "tiny-clip"


def task(data, seed, shots=16, **options):
    return tasks.open(data, model=MODEL, seed=seed, shots=shots, **options)


def arms(make, chains, seeds, steps, batch=16, rates=_bench.RATES, after=None):
    """As `_bench.arms`, for models without a new head; make(seed) -> task. `none` is scored as it is. Besides the task's own
    metric, every other one of the test split is stored as `name.metric`."""
    per_seed, facts = {}, {"learning_rate": {}, "trained_parameters": {}, "steps": steps, "batch": batch}
    tried = {}
    for name, chain in chains.items():
        if chain != "none":
            facts["learning_rate"][name], tried[name] = _bench.search(make(_bench.TUNE), chain, steps, batch, rates, head=False)
    for seed in seeds:
        mine = make(seed)
        for name, chain in chains.items():
            model = mine.build(seed) if chain == "none" else _bench.trained(
                mine, chain, seed, facts["learning_rate"][name], steps, batch, head=False)
            trained = sum(p.numel() for _, p in model.trainable()) if chain != "none" else 0
            facts["trained_parameters"][name] = trained
            scores = mine.evaluate(model)
            per_seed.setdefault(name, []).append(scores[mine.metric])
            more = {k: v for k, v in scores.items() if k not in (mine.metric, "n")} | (after(name, seed, model) if after else {})
            for key, value in more.items():
                per_seed.setdefault(f"{name}.{key}", []).append(value)
            _bench.say(f"{name} seed {seed}: {per_seed[name][-1]:.4f}")
    return per_seed, facts | {"validation": {n: {f"{k:g}": v for k, v in t.items()} for n, t in tried.items()}}
