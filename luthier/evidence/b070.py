"""DyLoRA on a small Llama and TREC: one run cut to every rank, a LoRA of its own for each rank, and a plain LoRA cut the same
way. Valipour et al., EACL 2023, arXiv:2210.07558."""

import contextlib

import torch

from luthier.evidence import _bench, beats, fact, judge, not_below

SYSTEM, METHODS, SEEDS, MINUTES = "B070", ("dylora",), (0, 1, 2, 3, 4), 12
CLAIM = "One run serves ranks 1 to 8, each within 2 points of its own LoRA; cutting a plain LoRA is worse at low rank"
BASELINE = "lora of each rank with its own search for a learning rate; lora(rank=8) cut to the rank"
MODEL, DATA = "stories260k (0.26M weights)", "TREC question types: 1500 train, 300 validation, 500 test rows"
STEPS, RANK, LOW, AT = 150, 8, (1, 2), "attn.q attn.k attn.v attn.o mlp.up mlp.gate mlp.down"


def ranked(tuned):
    return [p for p in tuned.states.values() if hasattr(p, "A")]


@contextlib.contextmanager
def cut(tuned, b):
    """Within, a plain LoRA computes with its first b ranks."""
    whole = [p.B.detach().clone() for p in ranked(tuned)]
    for p in ranked(tuned):
        p.B.data[:, b:] = 0
    yield
    for p, B in zip(ranked(tuned), whole, strict=True):
        p.B.data.copy_(B)


def served(task, seed, lr):
    """Largest relative difference of logits, over all ranks, between the run cut to a rank and a LoRA that holds those ranks."""
    tuned = _bench.trained(task, f"dylora(rank={RANK}, at={AT!r})", seed, lr, 10, 32)
    with torch.no_grad():
        return max(alone(tuned, b, _bench.first(task)) for b in range(1, RANK + 1))


def alone(tuned, b, batch):
    """Relative difference of logits between the run at rank b and its head over a LoRA that holds its first b ranks."""
    tuned.context = {"rank": b}
    y, whole = _bench.logits(tuned, batch), [p.B.clone() for p in ranked(tuned)]
    own = _bench.attach(tuned.base, f"lora(rank={b}, at={AT!r})", name="own").eval()
    for p, q in zip(ranked(tuned), ranked(own), strict=True):
        q.A.copy_(p.A[:b])
        q.B.copy_(p.B[:, :b])
        p.B.zero_()
    gap = _bench.gap(_bench.logits(own, batch), y) / float(y.abs().max())
    own.detach()
    for p, B in zip(ranked(tuned), whole, strict=True):
        p.B.copy_(B)
    return gap


def run(seeds):
    task = _bench.task("trec", "stories260k", train=1500, val=300, test=500)

    def after(name, seed, tuned):
        found = {}
        for b in range(1, RANK + 1) if name == "dylora" else LOW if name == f"lora.{RANK}" else ():
            tuned.context = {"rank": b}
            with cut(tuned, b) if name != "dylora" else contextlib.nullcontext():
                found[b if name == "dylora" else f"cut.{b}"] = _bench.score(tuned, task)
        return found

    chains = {"dylora": f"dylora(rank={RANK}, at={AT!r})"}
    chains |= {f"lora.{b}": f"lora(rank={b}, at={AT!r})" for b in range(1, RANK + 1)}
    per_seed, facts = _bench.arms(task, chains, seeds, STEPS, batch=32, after=after)
    return {"per_seed": per_seed, "facts": facts | {"served": served(task, seeds[0], facts["learning_rate"]["dylora"])}}


def verdict(figures):
    served = figures["facts"]["served"]
    return judge(
        [not_below(figures, f"dylora.{b}", f"lora.{b}", 0.02, f"rank {b}: accuracy within 2 points of its own LoRA")
         for b in range(1, RANK + 1)] +
        [beats(figures, f"dylora.{b}", f"lora.{RANK}.cut.{b}", f"rank {b}: accuracy above lora({RANK}) cut to it") for b in LOW],
        [fact(served < 1e-5, f"each rank computes what a LoRA with its rows computes: relative difference {served:.1e}, needed "
                             "below 1e-5")])
