"""DARE on MiniLM: three models, fully tuned for sentiment, question types and news topics from one base, thinned and merged.
Yu et al., 2023, arXiv:2311.03099.

Every arm works on the same three fine-tunes of a seed; a task's own head stays with it, the rest of the model is merged. Scores
are test accuracies; those of merged models are means over the three tasks.
"""

import tempfile

from luthier import attach
from luthier.evidence import _bench, beats, fact, judge, not_below
from luthier.methods.merge.dare import mask

SYSTEM, METHODS, SEEDS, MINUTES = "B058", ("dare", "full"), (0, 1, 2), 15
CLAIM = "Drop and rescale keeps a delta's mean; at p = 0.9 within 2 points where no rescaling collapses; merges at least as well"
BASELINE = "the fine-tuned model itself; the same drop without rescaling; plain averaging of the same three models"
MODEL, DATA = "minilm (22.7M)", "SST-2, TREC and AG News: 400 train and 300 test rows each"
TASKS, STEPS, RATE, BODY, DROP = ("sst2", "trec", "agnews"), 75, 3e-4, "all -head", 0.9
ARMS = (("plain", "mean", 0.0), ("dare", "mean", DROP), ("dare_half", "mean", 0.5), ("plain", "sum", 0.0), ("dare", "sum", DROP))


def tuned_models(tasks, seed, folder):
    """Fine-tunes every parameter for each task; saves the bodies, returns heads and own scores."""
    heads, own = {}, {}
    for name, task in tasks.items():
        tuned = _bench.trained(task, "full()", seed, RATE, STEPS)
        own[name], heads[name] = _bench.score(tuned, task), {k: p for k, p in tuned.states.items() if k.endswith("@head")}
        tuned.save(f"{folder}/{name}")
        tuned.detach()
    return heads, own


def scores(tasks, heads, seed, thin, *only):
    """Accuracy of each task with its own head on a body that the chain changes."""
    found = {}
    for name in only or tasks:
        (head,) = heads[name].values()

        def state(key, init, p=head):
            return dict(W=p.W, b=p.b) if "probe@" in key else init()
        tuned = attach(tasks[name].build(seed), f"dare(at={BODY!r}, {thin}, seed={seed}) >> probe()", state=state)
        found[name] = _bench.score(tuned.merge(), tasks[name])
    return found


def mean(found):
    return sum(found.values()) / len(found)


def kept_mean(n=200, entries=4096):
    """Largest distance of the mean over n masks from 1, in standard errors: what rescaled dropping does to a delta of ones."""
    total = sum(mask(seed, 0, "x", (entries,), DROP) / (1 - DROP) for seed in range(n)) / n
    return float((total - 1).abs().max() / (DROP / (1 - DROP) / n) ** 0.5), float(total.mean())


def run(seeds):
    tasks = {n: _bench.task(n, "minilm", 400, 100, 300) for n in TASKS}
    per_seed = {}

    def note(name, value):
        per_seed.setdefault(name, []).append(value)
        _bench.say(f"{name} seed {seeds[len(per_seed[name]) - 1]}: {value:.4f}")

    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            heads, own = tuned_models(tasks, seed, folder)
            note("tuned", mean(own))
            for arm, rescale in (("dropped", True), ("not_rescaled", False)):
                alone = [scores(tasks, heads, seed, f"experts={(f'{folder}/{n}',)!r}, drop={DROP}, rescale={rescale}", n)
                         for n in TASKS]
                note(arm, sum(s for found in alone for s in found.values()) / len(alone))
            experts = tuple(f"{folder}/{n}" for n in TASKS)
            for arm, combine, drop in ARMS:
                found = scores(tasks, heads, seed, f"experts={experts!r}, drop={drop}, combine={combine!r}")
                note(f"{arm}.{combine}", mean(found))
    worst, average = kept_mean()
    return {"per_seed": per_seed, "facts": {"mask_worst": worst, "mask_mean": average, "learning_rate": RATE, "steps": STEPS}}


def verdict(figures):
    f = figures["facts"]
    return judge(
        [not_below(figures, "dropped", "tuned", 0.02, f"one model with {DROP:.0%} of its delta dropped and the rest rescaled"),
         beats(figures, "dropped", "not_rescaled", "rescaling against the same drop without it", by=0.02),
         not_below(figures, "dare.mean", "plain.mean", 0.0, "average of three thinned models against plain averaging"),
         not_below(figures, "dare.sum", "plain.sum", 0.0, "task arithmetic on thinned deltas against the same on whole ones")],
        [fact(f["mask_worst"] < 5 and abs(f["mask_mean"] - 1) < 0.005,
              f"mean over 200 masks: {f['mask_mean']:.4f} of a delta, worst entry {f['mask_worst']:.1f} standard errors off")])


