"""VL-Adapter: one set of adapters for four image-text tasks against a set for each, against full tuning, and beside the weights
that it compares: half-shared sets, Compacter's and Hyperformer's. The connector and, with adapters, the norms train in every arm.
Sung, Cho, Bansal, CVPR 2022, arXiv:2112.06825."""

from luthier import attach
from luthier.compare.fit import aware
from luthier.evidence import _bench, fact, judge, not_below

SYSTEM, METHODS, SEEDS, MINUTES = "C001", ("vl_adapter",), (0, 1, 2), 15
CLAIM = "One shared set of adapters matches a set for each task at a share of its numbers, within 2 points of full tuning"
BASELINE = "separate adapters, full tuning"
MODEL, DATA = "tiny-vlt5", "scenes:multitask (captions, questions, NLVR, places): 1200 train, 200 validation, 400 test rows"
ARMS = {"shared": "vl_adapter(reduce=4)", "up": "vl_adapter(reduce=4, share='up')", "down": "vl_adapter(reduce=4, share='down')",
        "separate": "vl_adapter(reduce=4, share='none')", "compacter": "vl_adapter(weights='compacter', reduce=4)",
        "hyperformer": "vl_adapter(weights='hyperformer', reduce=4, embed=64, hidden=32)", "full": "full()"}
STEPS = 200


def adapters(task, chain):
    """Numbers in the adapters alone."""
    tuned = attach(task.build(0), aware(chain, task))
    return sum(p.numel() for s in tuned.states.values() for n, p in s.named_parameters() if n in "DdUu")


def run(seeds):
    task = _bench.task("scenes:multitask", "tiny-vlt5", train=1200, val=200, test=400)
    model, kept = task.build(0), []
    chains = {name: chain if name == "full" else _bench.seeing(model, chain) for name, chain in ARMS.items()}

    def after(name, seed, tuned):
        kept.append(_bench.frozen(task, seed, tuned))
        return {}

    per_seed, facts = _bench.arms(task, chains, seeds, STEPS, after=after, head=False)
    facts |= {"adapters": {n: adapters(task, ARMS[n]) for n in ("shared", "separate")}, "tasks": len(task.kinds),
              "frozen": min(kept)}
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f = figures["facts"]
    one, each = f["adapters"]["shared"], f["adapters"]["separate"]
    return judge(
        [not_below(figures, "shared", "separate", 0.01, f"shared adapters ({one} numbers) within 1 point of separate ({each})"),
         not_below(figures, "shared", "full", 0.02, "shared adapters within 2 points of full tuning")],
        [fact(one * f["tasks"] == each, f"the shared set has 1/{f['tasks']} of the separate sets' numbers: {one} of {each}"),
         fact(f["frozen"] == 1, "every tensor of the base is what it was, to the bit, after every run")])
