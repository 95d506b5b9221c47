"""Lottery-ticket sparse tuning on a Llama of 0.26M: a task learned in English and a language learned from raw text, added up.
Ansell et al., 2022, arXiv:2110.07560.

The other language is English whose MOVED commonest pieces of words are permuted, for each seed anew. φ_task comes from labelled
English questions, φ_language from next-token prediction on unlabelled questions of the other language; scores are accuracies on
test questions of the other language, no label of which was seen. The dense deltas are the full fine-tunes of the very same runs.
"""

import tempfile
from pathlib import Path

import torch

from luthier import attach, load
from luthier.evidence import _bench, beats, fact, judge
from luthier.procedures.lt_sft import lt_sft

SYSTEM, METHODS, SEEDS, MINUTES = "B022", ("sparse", "full"), (0, 1, 2), 12
CLAIM = "Density exactly K; order of composition is free; task + language beats task alone and the sum of dense deltas; size ~ K"
BASELINE = "φ_task alone, zero-shot; θ₀ + (θ_task - θ₀) + (θ_language - θ₀) of the dense fine-tunes of the same runs"
MODEL, DATA = "stories260k (a Llama of 0.26M)", "TREC question types: 2000 labelled rows; raw and test rows in the other language"
MOVED, DENSITY, STEPS, BATCH, RATE = 64, 0.08, 300, 32, 3e-3
PHI = f"sparse(at='all -head', density={DENSITY})"


class Other:
    """A task whose text is in the other language: pieces of words stand for others."""

    def __init__(self, task, perm):
        self.task, self.perm = task, perm

    def __getattr__(self, name):
        return getattr(self.task, name)

    def batches(self, *args, **options):
        for batch in self.task.batches(*args, **options):
            moved = {"input_ids": self.perm[batch["input_ids"]]}
            if self.task.kind == "causal-lm":
                moved["labels"] = torch.where(batch["labels"] < 0, batch["labels"], self.perm[batch["labels"].clamp(min=0)])
            yield {**batch, **moved}


def language(raw, seed):
    """A permutation of token ids without a fixed point among the MOVED commonest."""
    count = torch.zeros(512, dtype=torch.long)
    for batch in raw.batches("train", 64, seed=0, epoch=0):
        count += batch["input_ids"].flatten().bincount(minlength=512)
    count[:3] = 0                                            # beginning, end, padding
    top = count.topk(MOVED).indices[torch.randperm(MOVED, generator=torch.Generator().manual_seed(seed))]
    perm = torch.arange(512)
    perm[top] = top.roll(1)
    return perm


@torch.no_grad()
def accuracy(model, task, split="test"):
    right = [(_bench.logits(model, b).argmax(-1) == b["labels"]).float() for b in task.batches(split, 100, shuffle=False)]
    return float(torch.cat(right).mean())


def carried(tuned):
    """Gives a chain, on any model, the states that another attachment has at the same sites."""
    found = {key.split(":")[1]: p for key, p in tuned.states.items()}

    def state(key, init):
        p = found.get(key.split(":")[1])
        plain = {"biased": p.biased} if hasattr(p, "biased") else {}
        return None if p is None else {**dict(p.named_parameters()), **dict(p.named_buffers()), **plain}
    return state


def composed(english, seed, task, speech, first="task"):
    """θ₀ + φ_task + φ_language with the task's head, attached in either order."""
    model = english.build(seed)
    parts = [("task", f"{PHI} >> probe()", task), ("language", PHI, speech)]
    for name, chain, tuned in parts if first == "task" else parts[::-1]:
        tuned = attach(model, chain, name=name, state=carried(tuned))
    return tuned


def dense(english, seed, folder):
    """θ₀ + both dense deltas, with the head of the dense task model."""
    task = carried(load(english.build(seed), f"{folder}/task/full"))
    experts = tuple(f"{folder}/{n}/full" for n in ("task", "language"))
    return attach(english.build(seed), f"dare(at='all -head', experts={experts!r}, drop=0.0, combine='sum') >> probe()",
                  state=lambda key, init: task(key, init) if "probe@" in key else init())


def places(tuned):
    """(K that φ has, parameters it chose from)."""
    sites = [s for s in tuned._plan.steps[0].sites if s not in tuned._plan.steps[0].twins]
    return [sum(len(p.v) for p in tuned.states.values() if hasattr(p, "v")),
            sum(s.W.numel() + (0 if s.b is None else s.d_out) for s in sites)]


def run(seeds):
    english = _bench.task("trec", "stories260k", 2000, 200, 400)
    raw = _bench.task("trec", "stories260k", None, 50, 50, task="causal-lm", columns={"text": "text"})
    options = dict(density=DENSITY, steps=STEPS, lr=RATE, batch_size=BATCH, progress=False, log=False)
    per_seed, facts = {}, {"places": [], "order_gap": 0.0, "learning_rate": RATE, "steps": STEPS}

    def note(name, value):
        per_seed.setdefault(name, []).append(value)
        _bench.say(f"{name} seed {seeds[len(per_seed[name]) - 1]}: {value:.4f}")

    for seed in seeds:
        perm = language(raw, seed)
        other = Other(english, perm)
        with tempfile.TemporaryDirectory() as folder:
            task = lt_sft(english.build(seed), english, f"{folder}/task", seed=seed, **options)
            speech = lt_sft(raw.build(seed), Other(raw, perm), f"{folder}/language", at="all", beside="", seed=seed, **options)
            note("english", accuracy(task, english))
            note("task_alone", accuracy(task, other))
            note("sum", accuracy(both := composed(english, seed, task, speech), other))
            note("dense_sum", accuracy(dense(english, seed, folder), other))
            batch = _bench.first(other, "test")
            turned = _bench.logits(composed(english, seed, task, speech, "language"), batch)
            gap = _bench.gap(_bench.logits(both, batch), turned) / float(turned.abs().max())
            facts["order_gap"], facts["places"] = max(gap, facts["order_gap"]), facts["places"] + [places(task), places(speech)]
    facts["bytes"] = {}
    for density in (DENSITY / 4, DENSITY / 2, DENSITY):
        with tempfile.TemporaryDirectory() as folder:
            tuned = attach(raw.build(0), f"sparse(density={density})")
            tuned.save(f"{folder}/phi")
            facts["bytes"][str(places(tuned)[0])] = Path(f"{folder}/phi/state.safetensors").stat().st_size
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f = figures["facts"]
    (k1, b1), *_, (k2, b2) = ((int(k), b) for k, b in f["bytes"].items())
    return judge(
        [beats(figures, "sum", "task_alone", "φ_task + φ_language above φ_task alone, in the other language"),
         beats(figures, "sum", "dense_sum", "sum of sparse deltas above the sum of dense ones")],
        [fact(all(k == round(DENSITY * n) for k, n in f["places"]), "K of {} numbers: exactly {}".format(*f["places"][0][::-1])),
         fact(f["order_gap"] < 1e-5, f"either order of attaching: relative difference {f['order_gap']:.1e}, needed below 1e-5"),
         fact(7.9 < (b2 - b1) / (k2 - k1) < 8.1, f"{(b2 - b1) / (k2 - k1):.2f} bytes for each further entry, 8 needed")])
