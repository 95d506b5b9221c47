"""ALLoRA on MiniLM and TREC with few steps, against LoRA whose factor and dropout were searched for. Huang and Balestriero, 2024,
arXiv:2410.09692. How fast B leaves zero is measured under plain gradient descent, of which the paper's argument speaks; Adam
divides a common factor of the gradient away again, and its figure stands beside it."""

import torch

from luthier import attach
from luthier.evidence import _bench, beats, fact, judge, not_below

SYSTEM, METHODS, SEEDS, MINUTES = "B061", ("allora",), (0, 1, 2, 3, 4), 12
CLAIM = "The forward pass is LoRA's; B leaves zero in fewer steps; with few steps accuracy no lower than a tuned LoRA's"
BASELINE = "lora of the same rank, the best of 6 pairs of factor and dropout, each with its own search for a learning rate"
MODEL, DATA = "minilm (22.7M)", "TREC question types: 400 train, 150 validation, 400 test rows"
STEPS, RANK, AT, ESCAPE = 40, 8, "attn.q attn.v", 20
ALPHAS, DROPOUTS = (RANK / 2, RANK, 4 * RANK), (0.0, 0.1)
ALLORA = f"allora(rank={RANK}, at={AT!r})"


def lora(alpha, dropout=0.0):
    return f"lora(rank={RANK}, alpha={float(alpha)}, dropout={dropout}, at={AT!r})"


def norms(task, chain, seed, optimizer, lr):
    """Norm of all B together after each of the first steps."""
    tuned = attach(task.build(seed), f"{chain} >> probe()", seed=seed).train()
    matrices = [p.B for p in tuned.states.values() if hasattr(p, "B")]
    opt, found = optimizer([p for _, p in tuned.trainable()], lr=lr), []
    for batch in task.batches("train", 16, seed=seed, epoch=0):
        task.loss(tuned, batch).backward()
        opt.step()
        opt.zero_grad()
        found.append(torch.stack([B.detach().norm() for B in matrices]).norm().item())
        if len(found) == ESCAPE:
            break
    return found


def escape(task, seed, optimizer, lr):
    """Steps until B is as long as LoRA's is after the last one."""
    goal = norms(task, lora(RANK), seed, optimizer, lr)[-1]
    ours = norms(task, ALLORA, seed, optimizer, lr)
    return next((k for k, norm in enumerate(ours, 1) if norm >= goal), 2 * ESCAPE)


@torch.no_grad()
def forward_gap(task, batch):
    """Relative difference of logits between ALLoRA and LoRA with a factor of 1 that hold the same numbers."""
    ours, theirs = (attach(task.build(0).eval(), c) for c in (ALLORA, lora(RANK)))
    _bench.shake(ours, by=0.1)
    for (_, p), (_, q) in zip(ours.trainable(), theirs.trainable(), strict=True):
        q.copy_(p)
    y = _bench.logits(theirs, batch)
    return {"gap": _bench.gap(_bench.logits(ours, batch), y) / float(y.abs().max()),
            "moved": _bench.gap(y, _bench.logits(task.build(0).eval(), batch))}


def run(seeds):
    task, tried = _bench.task("trec", "minilm"), {}
    for alpha in ALPHAS:
        for dropout in DROPOUTS:
            tried[lora(alpha, dropout)] = max(_bench.search(task, lora(alpha, dropout), STEPS, 16)[1].values(), default=0)
    best = max(tried, key=tried.get)
    per_seed, facts = _bench.arms(task, {"allora": ALLORA, "lora": best}, seeds, STEPS)
    for name, optimizer, lr in (("sgd", torch.optim.SGD, 0.1), ("adam", torch.optim.Adam, 1e-3)):
        per_seed[f"{name}.allora"] = [escape(task, s, optimizer, lr) for s in seeds]
        per_seed[f"{name}.lora"] = [ESCAPE for _ in seeds]
    facts |= {"searched": tried, "lora": best, "forward": forward_gap(task, _bench.first(task))}
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f, per = figures["facts"], figures["per_seed"]
    return judge(
        [not_below(figures, "allora", "lora", what=f"accuracy after {f['steps']} steps no lower than that of {f['lora']}"),
         beats(figures, "sgd.lora", "sgd.allora", f"gradient descent: fewer steps until B is as long as LoRA's after {ESCAPE}")],
        [fact(f["forward"]["gap"] < 1e-5 < f["forward"]["moved"],
              f"forward pass against LoRA's: relative difference {f['forward']['gap']:.1e}, needed below 1e-5; with Adam, steps "
              f"until B is as long as LoRA's after {ESCAPE}, by seed: {per['adam.allora']}")])
