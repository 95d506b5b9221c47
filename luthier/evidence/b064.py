"""Arbitrary positions against designed modules at three depths of MiniLM, on TREC. Su et al., EMNLP 2023, arXiv:2306.02320.

Pretrained sizes of one family that fit into minutes are not to be had: the sizes are MiniLM's first 2, 4 and 6 layers. At
each size LoRA, adapter and prefix train about 12,288 numbers a layer (which their widths allow only nearly), and so do as
many numbers at random places, and modules thrown at random sites. Spread is the largest minus the smallest mean accuracy of
these five arms. The head trains in all of them; for the least count above chance it stays random, and only the count at
random places trains.
"""

from luthier import zoo
from luthier.evidence import _bench, fact, judge, not_below
from luthier.procedures.apet import apet

SYSTEM, METHODS, SEEDS, MINUTES = "B064", ("apet", "lora", "houlsby", "prefix"), (0, 1, 2), 15
CLAIM = "As many numbers at arbitrary places do as well as designed modules, the more so the larger the model"
BASELINE = "lora, houlsby and prefix with as many trained numbers; chance (the commonest class) for the least count"
MODEL, DATA = "minilm cut to its first 2, 4 and 6 layers", "TREC question types: 300 train, 100 validation, 250 test rows"
LAYERS, COUNT, STEPS, BATCH, COUNTS = (2, 4, 6), 12288, 30, 16, (64, 1024, 16384)
RATES = (5e-4, 3e-3, 2e-2, 1e-1)


def cut(task, layers):
    """The task on a MiniLM of so many layers."""
    task.model = model = zoo.load("minilm")
    model.encoder.layer = model.encoder.layer[:layers]
    model.config.num_hidden_layers = layers
    return task


def run(seeds):
    per_seed, facts = {}, {"arms": {}, "chance": 0.0, "least": {}, "spread": {}}
    for layers in LAYERS:
        task, n = cut(_bench.task("trec", "minilm", 300, 100, 250), layers), layers * COUNT
        chains = {"lora": "lora(rank=8)", "houlsby": "houlsby(width=7, norms=False)", "prefix": "prefix(n=16, reparam=False)",
                  "random": f"apet(count={n})", "thrown": repr(apet(task.build(0), n))}
        scores, facts["arms"][str(layers)] = _bench.arms(task, chains, seeds, STEPS, BATCH, RATES)
        means = [sum(v) / len(v) for v in scores.values()]
        per_seed |= {f"{layers}.{k}": v for k, v in scores.items()}
        per_seed[f"{layers}.spread"] = [max(v) - min(v) for v in zip(*scores.values(), strict=True)]
        facts["spread"][str(layers)] = max(means) - min(means)
        lr = facts["arms"][str(layers)]["learning_rate"]["random"]
        labels = [int(y) for b in task.batches("test", 64, shuffle=False) for y in b["labels"]]
        facts["chance"] = max(map(labels.count, set(labels))) / len(labels)
        for count in COUNTS:
            name = f"{layers}.count.{count}"
            per_seed[name] = [_bench.score(_bench.trained(task, f"apet(count={count})", s, lr, STEPS, BATCH, head=False), task)
                              for s in seeds]
            _bench.say(f"{name}: {per_seed[name]}")
        facts["least"][str(layers)] = next((c for c in COUNTS if above(per_seed[f"{layers}.count.{c}"], facts["chance"])), None)
    return {"per_seed": per_seed, "facts": facts}


def above(scores, chance):
    from luthier.compare.stats import interval

    return interval(scores)[1] > chance


def verdict(figures):
    f, (small, *_, large) = figures["facts"], map(str, LAYERS)
    spent = {k: v["trained_parameters"] for k, v in f["arms"].items()}
    heads = {k: v["random"] - int(k) * COUNT for k, v in spent.items()}
    off = max(abs(n - heads[k] - int(k) * COUNT) / (int(k) * COUNT) for k, v in spent.items()
              for arm, n in v.items() if arm != "thrown")
    return judge(
        [fact(f["spread"][large] <= f["spread"][small], "spread of the five arms: " + ", ".join(
            f"{v:.3f} at {k} layers" for k, v in f["spread"].items()) + ", needed no larger at the largest"),
         *(not_below(figures, f"{k}.random", f"{k}.{other}", 0.03, f"{k} layers, random places within 3 points of {other}")
           for k in (large,) for other in ("lora", "houlsby", "prefix")),
         fact(all(f["least"].values()) and f["least"][large] <= f["least"][small],
              f"least count at random places above chance ({f['chance']:.3f}): {f['least']}")],
        [fact(off < 0.15, f"trained numbers without heads: within {off:.1%} of each other, needed 15% "
              f"(thrown: whole units, at most): {spent}")])
