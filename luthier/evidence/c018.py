"""A trained connector re-aligned to another language model. Geigle et al., mBLIP, 2024, arXiv:2307.06930.

A is stories260k, B the same model after it was tuned in full on German sentences (Multi30k): another language, other weights, the
same width, as mT0 follows Flan-T5. The connector is trained on A, moved to B, and tuned there beside LoRA, against a fresh one.
"""

from luthier import attach, tasks, zoo
from luthier.bridges import bridge
from luthier.evidence import _bench, _pairs, beats, fact, judge
from luthier.procedures.realign import realign
from luthier.save import fingerprint
from luthier.train import train

SYSTEM, METHODS, SEEDS, MINUTES = "C018", ("full", "lora"), (0, 1, 2), 10
CLAIM = "Re-alignment reaches the target caption loss in fewer steps than a fresh connector, training connector and LoRA only"
BASELINE = "a fresh connector on B, at its own best learning rate, the same chain and rows"
MODEL = "dinov2-s + stories260k (A) and stories260k tuned on German (B)"
DATA = "captions of scenes: 300 train, 80 validation, 150 test rows; Multi30k's German for B"
FIRST, STEPS, EVERY, GERMAN = 400, 200, 20, 300
PLACES = " ".join(f"text.{p}" for p in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"))
CHAIN = f'full(at="connector") >> lora(rank=8, alpha=16, dropout=0.05, at="{PLACES}")'


def german():
    """B: stories260k, all of it tuned on German sentences and merged."""
    task = tasks.open("multi30k", model="stories260k", task="causal-lm", columns={"text": "de"}, limit=400)
    tuned = _bench.trained(task, "full()", 0, 1e-3, GERMAN, head=False)
    tuned.merge()
    model = zoo.load("stories260k")
    model.load_state_dict(tuned.base.state_dict())
    return model.eval()


def curve(task, model, seed, lr):
    """Losses of validation captions after every EVERY steps."""
    tuned, found = attach(model, CHAIN, seed=seed), []

    def look(k, total, loss):
        if k % EVERY == 0:
            found.append(-_pairs.worth(tuned, task, "val"))
            tuned.train()
    train(tuned, task, steps=STEPS, lr=lr, batch_size=16, seed=seed, progress=look, log=False)
    found.append(-_pairs.worth(tuned.eval(), task))
    parts = {}
    for name, p in tuned.trainable():
        method = "connector" if ":full@connector" in name else "lora" if ":lora@text" in name else "else"
        parts[method] = parts.get(method, 0) + p.numel()
    tuned.detach()
    return found, parts


def run(seeds):
    task, B = _pairs.captions("dinov2-s+stories260k:limber()"), german()
    before, per, facts = fingerprint(B), {}, {"learning_rate": {}}

    def made(seed):
        A = _bench.trained(task, _pairs.CONNECTOR, seed, 3e-3, FIRST)
        return {"realigned": realign(A, B, seed), "fresh": bridge(A.base.vision, B, A.base.way, seed=seed)}
    models = made(_bench.TUNE)
    for name, model in models.items():
        tried = {lr: curve(task, model, _bench.TUNE, lr)[0][-2] for lr in _pairs.RATES}
        facts["learning_rate"][name] = min(tried, key=tried.get)
    for seed in seeds:
        curves = {}
        for name, model in made(seed).items():
            curves[name], facts["trained_parameters"] = curve(task, model, seed, facts["learning_rate"][name])
            per.setdefault(name, []).append(-curves[name][-1])
        target = curves["fresh"][-2]                        # what the fresh one reaches at its end
        for name, losses in curves.items():
            steps = next((EVERY * (k + 1) for k, loss in enumerate(losses[:-1]) if loss <= target), STEPS + EVERY)
            per.setdefault(f"{name}.speed", []).append(-steps)
        _bench.say(f"seed {seed}: {per}")
    return {"per_seed": per, "facts": facts | {"kept": before == fingerprint(B)}}


def verdict(figures):
    f = figures["facts"]
    return judge(
        [beats(figures, "realigned.speed", "fresh.speed", "fewer steps to the loss that a fresh connector ends at")],
        [fact(f["kept"], "the language model keeps its bits"),
         fact(f["trained_parameters"].keys() == {"connector", "lora"}, f"connector and LoRA train: {f['trained_parameters']}")])
