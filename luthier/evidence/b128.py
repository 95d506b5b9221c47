"""Ladder side-tuning on MiniLM and SST-2: what training keeps in memory, and what a pruned start is worth.
Sung et al., 2022, arXiv:2206.06522. The id C020 names the same system."""

import torch
from torch import nn

from luthier.evidence import _bench, beats, fact, judge

SYSTEM, METHODS, SEEDS, MINUTES = "B128", ("ladder",), (0, 1, 2), 15
CLAIM = "No gradient, no saved activation in the backbone; half of LoRA's training memory or less; beats a probe; pruning helps"
BASELINE = "lora at matched parameters (memory), linear probe, and the same ladder with random side weights"
MODEL, DATA = "minilm (22.7M)", "SST-2: 600 train, 150 validation, 400 test sentences"
STEPS, AT = 90, "attn.q attn.v"


def backbone_graph(tuned, task, batch):
    """Names of backbone modules whose output is part of the autograd graph, and of backbone weights that got a gradient."""
    touched, handles = [], []

    def watch(name):
        def hook(module, args, out):
            if torch.is_tensor(out) and out.requires_grad:
                touched.append(name)
        return hook

    for name, module in tuned.model.backbone.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) or "attention.self" in name:
            handles.append(module.register_forward_hook(watch(name)))
    tuned.train()
    task.loss(tuned, batch).backward()
    for h in handles:
        h.remove()
    return touched, [n for n, p in tuned.model.named_parameters() if p.grad is not None]


def mib(n):
    return f"{n / 2**20:.0f} MiB"


def run(seeds):
    task = _bench.task("sst2", "minilm", train=600)
    spent = _bench.body(_bench.attach(task.build(0), "ladder()"))
    rank = -(-spent // _bench.body(_bench.attach(task.build(0), f"lora(rank=1, at={AT!r})")))
    chains = {"probe": "probe()", "ladder": "ladder(start='fisher')", "norm start": "ladder()",
              "random start": "ladder(start='random')",
              "lora": f"lora(rank={rank}, at={AT!r})"}
    per_seed, facts = _bench.arms(task, chains, seeds, STEPS)
    facts["memory"], facts["method_parameters"] = {}, {}
    batch = _bench.first(task, size=100)                     # the paper's batch
    for name, chain in chains.items():
        data = _bench.Calibration(task, 16, 0)
        tuned = _bench.attach(task.build(0), _bench.with_head(chain), data, seed=0, loss=task.loss)
        facts["memory"][name], facts["method_parameters"][name] = _bench.memory(tuned, task, batch), _bench.body(tuned)
        if name in ("ladder", "lora"):
            touched, graded = backbone_graph(tuned, task, batch)
            facts[f"in_graph.{name}"], facts[f"graded.{name}"] = len(touched), len(graded)
    facts["memory_tokens"] = list(batch["input_ids"].shape)
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f = figures["facts"]
    ours, lora = f["memory"]["ladder"], f["memory"]["lora"]
    share = ours["peak"] / lora["peak"]
    return judge(
        [beats(figures, "ladder", "probe", "accuracy above the linear probe"),
         beats(figures, "ladder", "random start", "start pruned by Fisher information above random start"),
         beats(figures, "norm start", "random start", "start pruned by weight norms above random start"),
         fact(share <= 0.5, f"peak memory of a training step, weights included: {mib(ours['peak'])} against LoRA's "
                            f"{mib(lora['peak'])}, {share:.0%}, needed 50%; kept for backward: {mib(ours['saved'])} against "
                            f"{mib(lora['saved'])}")],
        [fact(f["in_graph.ladder"] == 0 < f["in_graph.lora"] and f["graded.ladder"] == 0,
              f"backbone layers in the autograd graph: {f['in_graph.ladder']} (with LoRA {f['in_graph.lora']}); backbone weights "
              f"with a gradient: {f['graded.ladder']}")])
