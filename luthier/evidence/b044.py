"""SpIEL on MiniLM and TREC: sparse deltas whose support is learned, against the same number of deltas at random places.
Ansell et al., 2024, arXiv:2401.16405."""

import torch

from luthier.evidence import _bench, beats, fact, judge

SYSTEM, METHODS, SEEDS, MINUTES = "B044", ("spiel",), (0, 1, 2, 3, 4), 18
CLAIM = "The active count is constant through drop and regrow; optimizer state follows density; exact merge; beats a random mask"
BASELINE = "the same method with its first random support kept (every beyond the run)"
MODEL, DATA = "minilm (22.7M)", "TREC question types: 400 train, 150 validation, 400 test rows"
STEPS, DENSITY, AT = 200, 0.001, "attn.q attn.k attn.v attn.o mlp.up mlp.down"


def chain(density=DENSITY, every=20):
    return f"spiel(density={density}, every={every}, gather=3, at={AT!r})"


def states(tuned):
    return [p for p in tuned.states.values() if hasattr(p, "idx")]


def optimizer_numbers(task, density):
    """Numbers that AdamW holds after a step, the head's not counted."""
    tuned = _bench.attach(task.build(0), chain(density), seed=0)
    tuned.total_steps = STEPS
    optimizer = torch.optim.AdamW([p for _, p in tuned.trainable()], lr=1e-3)
    tuned.train()
    task.loss(tuned, _bench.first(task)).backward()
    optimizer.step()
    return sum(t.numel() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.numel() > 1)


def run(seeds):
    task = _bench.task("trec", "minilm")
    chains = {"spiel": chain(), "random": chain(every=10 * STEPS)}
    per_seed, facts = _bench.arms(task, chains, seeds, STEPS)
    tuned = _bench.attach(task.build(seeds[0]), f"{chain()} >> probe()", seed=seeds[0])
    start, counts = [p.idx.clone() for p in states(tuned)], []
    _bench.train(tuned, task, steps=STEPS, lr=facts["learning_rate"]["spiel"], batch_size=16, seed=seeds[0], log=False,
                 progress=lambda *_: counts.append(sum(len(p.idx.unique()) for p in states(tuned))))
    kept = sum(int(torch.isin(a, p.idx).sum()) for a, p in zip(start, states(tuned), strict=True))
    batch = _bench.first(task)
    before = _bench.logits(tuned, batch)
    merged = _bench.gap(_bench.logits(tuned.merge(), batch), before) / float(before.abs().max())
    facts |= {"active": sorted(set(counts)), "replaced": 1 - kept / counts[-1], "merge_gap": merged,
              "optimizer_numbers": {str(d): optimizer_numbers(task, d) for d in (DENSITY, 4 * DENSITY)},
              "model_numbers": sum(p.numel() for p in task.build(0).parameters())}
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f = figures["facts"]
    few, many = f["optimizer_numbers"].values()
    return judge(
        [beats(figures, "spiel", "random", "accuracy above a fixed random mask of the same density")],
        [fact(len(f["active"]) == 1 and f["replaced"] > 0.5,
              f"active entries {f['active']} at every step, while {f['replaced']:.0%} of them were replaced"),
         fact(3.9 < many / few < 4.1 and many < f["model_numbers"] / 50,
              f"optimizer numbers {few} and {many} at density {DENSITY:g} and {4 * DENSITY:g}: in step with density, "
              f"against {f['model_numbers']} of the model"),
         fact(f["merge_gap"] < 1e-5, f"merged equals unmerged: relative difference {f['merge_gap']:.1e}, needed below 1e-5")])
