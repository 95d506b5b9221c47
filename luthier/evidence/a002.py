"""Two-step LoRA on clinical notes (MTS-Dialog): a domain delta from unlabelled notes, a task delta on top of it.
Gema et al., Clinical LLaMA-LoRA, 2023, arXiv:2307.03042.

Step 1 trains a LoRA by next-token prediction on the notes of the train split. Step 2 classifies a note's section from a few
labelled notes: task LoRA and head alone, or the same over the frozen domain delta (W + ΔW_domain + ΔW_task). AUROC is one
against the rest, averaged over the sections.
"""

from collections import Counter

import torch

from luthier import attach, tasks
from luthier.evidence import _bench, beats, fact, judge
from luthier.tasks.source import find

SYSTEM, METHODS, SEEDS, MINUTES = "A002", ("lora",), (0, 1, 2, 3, 4), 10
CLAIM = "Domain LoRA lowers perplexity of unseen notes; domain + task LoRA has a higher AUROC than task LoRA alone; separable"
BASELINE = "task LoRA alone, of the same rank at the same matrices, with the same search for a learning rate"
MODEL = "stories260k (a Llama of 0.26M, trained on children's stories)"
DATA = "MTS-Dialog: notes of 1201 visits (domain); 160 labelled notes of the 6 commonest sections (task), test: 200 visits"
DOMAIN, TASK = "lora(rank=8, at='linear')", "lora(rank=4, at='attn.q attn.v') >> probe()"
STEPS, BATCH, CLASSES = {"domain": 250, "task": 120}, 16, 6


def notes():
    """(notes as running text, notes with their sections); rows of the rarer sections are left to the first."""
    data = find("mts_dialog")
    data.columns, data.task = {}, None
    common = {s for s, _ in Counter(data.splits["train"].columns["section_header"]).most_common(CLASSES)}
    for name, table in data.splits.items():
        data.splits[name] = table.take([i for i, s in enumerate(table.columns["section_header"]) if s in common])
    roles = {"text": "section_text", "label": "section_header"}
    labelled = tasks.KINDS["text-classification"]("stories260k", source=data.source, roles=roles, max_length=128)
    text = _bench.task("mts_dialog", "stories260k", None, 100, 200, task="causal-lm", columns={"text": "section_text"})
    return text, labelled.fill(data, 0, {"train": 160, "val": 80})


def auroc(score, positive):
    """Probability that a positive is ranked above a negative, ties counting half."""
    a, b = score[positive], score[~positive]
    wins = (a[:, None] > b).double().mean() + 0.5 * (a[:, None] == b).double().mean()
    return float(wins)


@torch.no_grad()
def mean_auroc(model, task, split="test"):
    batches = list(task.batches(split, 64, shuffle=False))
    scores, labels = torch.cat([_bench.logits(model, b).softmax(-1) for b in batches]), torch.cat([b["labels"] for b in batches])
    return sum(auroc(scores[:, c], labels == c) for c in labels.unique()) / len(labels.unique())


def stacked(labelled, domain, seed):
    """A fresh classifier, with the domain delta (if any) attached below and frozen, and the task chain on top."""
    model = labelled.build(seed)
    below = attach(model, DOMAIN, name="domain") if domain else None
    if domain:
        for (name, p), (other, q) in zip(below.trainable(), domain, strict=True):
            assert name == other                             # the same sites in the language model and in the classifier
            p.data.copy_(q)
            p.requires_grad_(False)
    return attach(below or model, TASK, seed=seed, name="task"), below


def run(seeds):
    text, labelled = notes()
    per_seed, facts = {}, {"learning_rate": {}, "steps": STEPS}

    def put(name, value):
        per_seed.setdefault(name, []).append(value)

    def learned(seed, lr):
        return _bench.trained(text, DOMAIN, seed, lr, STEPS["domain"], BATCH, head=False)

    def fit(domain, seed, lr):
        tuned, below = stacked(labelled, domain, seed)
        _bench.train(tuned, labelled, steps=STEPS["task"], lr=lr, batch_size=BATCH, seed=seed, log=False, progress=False)
        return tuned.eval(), below

    def best(name, domain):
        def worth(i):
            return mean_auroc(fit(domain, _bench.TUNE, _bench.RATES[i])[0], labelled, "val")

        facts["learning_rate"][name] = _bench.RATES[_bench.climb(worth, len(_bench.RATES))]

    facts["learning_rate"]["domain"], _ = _bench.search(text, DOMAIN, STEPS["domain"], BATCH, head=False)
    domain = {s: learned(s, facts["learning_rate"]["domain"]) for s in (*seeds, _bench.TUNE)}
    best("task", None)
    best("domain + task", domain[_bench.TUNE].trainable())
    for seed in seeds:
        put("log perplexity.base", torch.tensor(_bench.score(text.build(), text)).log().item())
        put("log perplexity.domain", torch.tensor(_bench.score(domain[seed], text)).log().item())
        for name, below in (("task", None), ("domain + task", domain[seed].trainable())):
            tuned, _ = fit(below, seed, facts["learning_rate"][name])
            put(f"auroc.{name}", mean_auroc(tuned, labelled))
            facts.setdefault("task_parameters", {})[name] = sum(p.numel() for _, p in tuned.trainable())
        _bench.say(f"seed {seed}: " + ", ".join(f"{k} {v[-1]:.4f}" for k, v in per_seed.items()))
    both = fit(domain[seeds[0]].trainable(), seeds[0], facts["learning_rate"]["domain + task"])
    facts["separable"] = separable(labelled, *both)
    return {"per_seed": per_seed, "facts": facts}


def separable(labelled, tuned, below):
    """Largest differences of logits when one delta leaves: what stays must equal what was there without the other."""
    batch, model = _bench.first(labelled), tuned.base
    both = _bench.logits(tuned, batch)
    with tuned.off():
        domain_only = _bench.logits(tuned, batch)
    with below.off():
        task_only = _bench.logits(tuned, batch)
    tuned.detach()
    found = {"domain_left": _bench.gap(_bench.logits(model, batch), domain_only), "both_differ": _bench.gap(both, task_only)}
    below.detach()
    fresh = labelled.build(tuned.seed).eval()
    return found | {"base_left": _bench.gap(_bench.logits(model, batch), _bench.logits(fresh, batch))}


def verdict(figures):
    f, s = figures["facts"], figures["facts"]["separable"]
    return judge(
        [beats(figures, "log perplexity.base", "log perplexity.domain", "log-perplexity of unseen notes lowered"),
         beats(figures, "auroc.domain + task", "auroc.task", "AUROC of domain + task above task alone")],
        [fact(len(set(f["task_parameters"].values())) == 1, f"task parameters: {f['task_parameters']}"),
         fact(s["domain_left"] == 0 == s["base_left"] and s["both_differ"] > 0,
              f"differences left after detaching the task ({s['domain_left']:.1e}) and both ({s['base_left']:.1e}) deltas")])
