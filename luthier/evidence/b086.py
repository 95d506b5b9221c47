"""DSEE on MiniLM and TREC: half of the weights, or a quarter of the heads, taken away, against a dense LoRA; with and without S2.
Chen et al., ACL 2023, arXiv:2111.00160."""

import tempfile

import torch
from safetensors import safe_open

from luthier import find
from luthier.evidence import _bench, fact, judge, not_below
from luthier.methods.quantize._pack import unpack

SYSTEM, METHODS, SEEDS, MINUTES = "B086", ("dsee",), (0, 1, 2), 15
CLAIM = "At half of the weights or a quarter of the heads within 2 points of dense LoRA; mask, low rank and S2 are stored"
BASELINE = "lora of the same rank at q and v on the whole model; the same method without S2 is shown"
MODEL, DATA = "minilm (22.7M)", "TREC question types: 400 train, 150 validation, 400 test rows"
STEPS, RANK, HALF, QUARTER = 120, 8, "sparsity=0.5", "sparsity=0.0, heads=0.25"
CHAINS = {"lora": f"lora(rank={RANK})", "half": f"dsee(rank={RANK}, {HALF})", "no_s2": f"dsee(rank={RANK}, {HALF}, sparse=0)",
          "heads": f"dsee(rank={RANK}, {QUARTER})"}


def artefact(tuned):
    """Bytes of each kind of tensor in the saved file, the head's left out; bytes of the weights that it prunes."""
    kinds = {}
    with tempfile.TemporaryDirectory() as folder:
        tuned.save(f"{folder}/state")
        with safe_open(f"{folder}/state/state.safetensors", "pt") as f:
            for key in f.keys():
                if ":dsee." in key:
                    name = key.partition(":dsee.")[2].partition("#")[0]
                    kinds[name] = kinds.get(name, 0) + f.get_tensor(key).nbytes
    return kinds, sum(s.W.nbytes for s in find(tuned, "linear"))


def zeros(tuned):
    """Part of the weights that S1 takes away, part of the heads whose columns of attn.o are zero once merged."""
    sites = {s.name: s for s in find(tuned, "linear")}
    masks = [unpack(p.S1, 1, sites[p.site_name].W.shape[1]) for p in tuned.states.values() if hasattr(p, "S1")]
    tuned.merge()
    heads = [~s.W.unflatten(1, (s.heads[0], -1)).any(2).any(0) for s in find(tuned.base, "attn.o")]
    tuned.unmerge()
    weights = sum(float((m == 0).sum()) for m in masks) / max(1, sum(m.numel() for m in masks))
    return {"weights": weights, "heads": float(torch.stack(heads).float().mean())}


def run(seeds):
    task, found = _bench.task("trec", "minilm"), {}

    def after(name, seed, tuned):
        if name != "lora" and name not in found:
            found[name] = zeros(tuned) | dict(zip(("stored", "dense"), artefact(tuned), strict=True))
        return {}

    per_seed, facts = _bench.arms(task, CHAINS, seeds, STEPS, after=after)
    return {"per_seed": per_seed, "facts": facts | {"pruned": found}}


def verdict(figures):
    f, per = figures["facts"]["pruned"], figures["per_seed"]
    with_s2, without = (sum(per[n]) / len(per[n]) for n in ("half", "no_s2"))
    kinds = {n: set(v["stored"]) for n, v in f.items()}
    return judge(
        [not_below(figures, "half", "lora", 0.02, "half of the weights gone: accuracy within 2 points of dense LoRA"),
         not_below(figures, "heads", "lora", 0.02, "a quarter of the heads gone: accuracy within 2 points of dense LoRA")],
        [fact(abs(f["half"]["weights"] - 0.5) < 1e-3 and f["heads"]["heads"] == 0.25,
              f"gone: {f['half']['weights']:.2%} of the weights; {f['heads']['heads']:.0%} of the heads"),
         fact(kinds["half"] == {"S1", "A", "B", "v", "idx"} and kinds["no_s2"] == {"S1", "A", "B"},
              f"stored bytes: {f['half']['stored']}, for weights of {f['half']['dense']} bytes"),
         fact("v" in kinds["half"] and "v" not in kinds["no_s2"],
              f"S2 ablated: mean accuracy {with_s2:.4f} with it, {without:.4f} without")])
