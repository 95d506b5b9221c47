"""SoRA on MiniLM and TREC: gates that become exact zeros, and a LoRA of the size that is left. Ding et al., EMNLP 2023,
arXiv:2311.11696. One more run raises ξ in stages and notes, at the end of each, gates left and validation accuracy."""

import math

import torch

from luthier.evidence import _bench, fact, judge, not_below

SYSTEM, METHODS, SEEDS, MINUTES = "B096", ("sora",), (0, 1, 2, 3, 4), 12
CLAIM = "Gates become exact zeros; the cut module computes what the gated one did; ranks differ; no worse than LoRA of its size"
BASELINE = "lora whose uniform rank is the mean rank that sora kept, rounded up, at the same matrices"
MODEL, DATA = "minilm (22.7M)", "TREC question types: 400 train, 150 validation, 400 test rows"
STEPS, RANK, XI, AT = 150, 8, 4e-3, "attn.q attn.k attn.v attn.o"
STAGES = 5


def states(tuned):
    return [p for p in tuned.states.values() if hasattr(p, "g")]


def ranks(tuned):
    return [int((p.g != 0).sum()) for p in states(tuned)]


@torch.no_grad()
def cut(task, batch):
    """Largest relative difference of logits when ranks with zero gates (half of them, all of one site) are deleted."""
    tuned = _bench.shake(_bench.attach(task.build(0).eval(), f"sora(rank={RANK}, xi=0.0, at={AT!r})"), by=0.1)
    g = torch.Generator().manual_seed(0)
    for i, p in enumerate(states(tuned)):
        p.g *= torch.rand(RANK, generator=g) > (0.5 if i else 1)
    before, tuned.total_steps = _bench.logits(tuned, batch), 1
    tuned.step()
    left = sum(len(p.g) for p in states(tuned))
    return {"gap": _bench.gap(_bench.logits(tuned, batch), before) / float(before.abs().max()), "left": left,
            "of": RANK * len(states(tuned))}


def trace(task, seed, lr):
    """[[ξ, gates left, validation accuracy]] at the end of each stage of algorithm 1."""
    chain, rows, ends = f"sora(rank={RANK}, xi={XI / 4}, peak={4 * XI}, stages={STAGES}, at={AT!r})", [], STEPS // STAGES
    tuned = _bench.attach(task.build(seed), f"{chain} >> probe()", seed=seed)

    def watch(k, total, loss):
        if k % ends == 0:
            tuned.eval()
            rows.append([tuned.chain[0].threshold(k, total), sum(ranks(tuned)), _bench.score(tuned, task, "val")])
            tuned.train()

    _bench.train(tuned, task, steps=ends * STAGES, lr=lr, batch_size=16, seed=seed, progress=watch, log=False)
    return rows


def run(seeds):
    task, kept = _bench.task("trec", "minilm"), []

    def after(name, seed, tuned):
        if name == "sora":
            kept.append(ranks(tuned))
        return {}

    per_seed, facts = _bench.arms(task, {"sora": f"sora(rank={RANK}, xi={XI}, at={AT!r})"}, seeds, STEPS, after=after)
    size = max(1, math.ceil(sum(map(sum, kept)) / sum(map(len, kept))))
    more, other = _bench.arms(task, {"lora": f"lora(rank={size}, at={AT!r})"}, seeds, STEPS)
    for key in ("learning_rate", "validation", "trained_parameters"):
        facts[key] |= other[key]
    facts |= {"start": RANK, "kept": kept, "lora_rank": size, "cut": cut(task, _bench.first(task)),
              "trace": trace(task, seeds[0], facts["learning_rate"]["sora"])}
    return {"per_seed": per_seed | more, "facts": facts}


def verdict(figures):
    f = figures["facts"]
    total, most = [sum(k) for k in f["kept"]], f["start"] * len(f["kept"][0])
    xi, gates = [row[0] for row in f["trace"]], [row[1] for row in f["trace"]]
    return judge(
        [not_below(figures, "sora", "lora", what=f"accuracy no worse than lora(rank={f['lora_rank']}), its mean rank, up")],
        [fact(max(total) < most, f"ranks left, of {most}: {total} (the other gates are zero to the bit)"),
         fact(all(len(set(k)) > 1 for k in f["kept"]), f"ranks by site of the first run: {f['kept'][0]}"),
         fact(f["cut"]["gap"] < 1e-5, f"deleting {f['cut']['of'] - f['cut']['left']} of {f['cut']['of']} ranks moved logits by "
                                      f"{f['cut']['gap']:.1e} of the largest, needed below 1e-5"),
         fact(xi == sorted(xi) and gates == sorted(gates, reverse=True) and gates[-1] < gates[0],
              f"as ξ rises {[float(f'{x:.2g}') for x in xi]}, gates fall {gates} (validation accuracy "
              f"{[row[2] for row in f['trace']]})")])
