"""GPTQ on SmolLM2-135M: every linear layer of all 30 blocks at 4 and 3 bits, against rounding to the nearest on the same grid.
Frantar et al., GPTQ, 2022, arXiv:2210.17323.

Blocks are quantised in order, each on what the quantised blocks before it put out. A seed draws the calibration text (16 pieces
of 128 tokens); perplexity and layer errors are of other text. Layer error: ‖(W - Q) X‖² / ‖W X‖², mean over three blocks' layers.
"""

import tempfile
from pathlib import Path

import torch

from luthier import attach, sites, tasks
from luthier.evidence import _bench, beats, fact, judge
from luthier.method import parse
from luthier.methods.quantize._pack import pack, unpack

SYSTEM, METHODS, SEEDS, MINUTES = "B105", ("gptq",), (0, 1, 2), 18
CLAIM = "Layer output error and perplexity below round-to-nearest at 3 and 4 bits; packing exact; bytes near bits/16 of fp16"
BASELINE = "round-to-nearest: the same grid, codes and bytes, no error passed on (damp towards infinity)"
MODEL, DATA = "smollm2-135m (30 blocks, 210 linear layers)", "tinyshakespeare: 16 x 128 tokens to calibrate, 24 x 128 held out"
BITS, LOOK, NEAREST = (4, 3), (0, 14, 29), 1e9


def text(split, size, seed=0):
    task = tasks.open("tinyshakespeare", model="smollm2-135m", limit={"train": 400, "test": 24})
    batch = next(iter(task.batches(split, size, seed=seed, epoch=0)))
    return {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}


@torch.no_grad()
def perplexity(model, batch):
    return float(torch.stack([model(**{k: v[i:i + 8] for k, v in batch.items()}).loss for i in range(0, 24, 8)]).mean().exp())


@torch.no_grad()
def inputs(model, batch, method):
    """site -> 2 X Xᵀ of text that no seed calibrates on, at the layers whose error is measured."""
    looked = [s for s in sites(model) if s.block in LOOK and s.kind == "weight" and s.layout == "linear"]
    seen, handles = {}, []
    for s in looked:
        def see(module, args, s=s):
            seen[s] = method.observe(args[0].flatten(0, -2))
        handles.append(s.module.register_forward_pre_hook(see))
    model(**{k: v[:16] for k, v in batch.items()})
    for h in handles:
        h.remove()
    return seen


def layer_error(tuned, seen):
    """Mean over layers of tr(D H Dᵀ) / tr(W H Wᵀ), D = W - Q."""
    (m,), states = tuned.chain, {p.site_name: p for p in tuned.states.values()}
    def power(D, H):
        return float((D @ H * D).sum())
    return sum(power(s.W - m.weight(states[s.name]), H) / power(s.W, H) for s, H in seen.items()) / len(seen)


def size(tuned):
    """(stored bytes, of the same weights in half precision), and whether packing is exact on every layer."""
    (m,) = tuned.chain
    with tempfile.TemporaryDirectory() as folder:
        tuned.save(Path(folder) / "q")
        stored = sum(f.stat().st_size for f in (Path(folder) / "q").iterdir())
    codes = [(p.codes, unpack(p.codes, m.bits, p.d_in)) for p in tuned.states.values()]
    return stored, 2 * sum(c.numel() for _, c in codes), all(torch.equal(pack(c, m.bits), packed) for packed, c in codes)


def run(seeds):
    held, model = text("test", 24), tasks.open("tinyshakespeare", model="smollm2-135m", limit=24).build(0)
    seen = inputs(model, held, parse("gptq()")[0])
    per_seed, facts = {}, {"base": perplexity(model, held), "bytes": {}, "exact": {}}
    for bits in BITS:
        for arm, chain in {"nearest": f"gptq(bits={bits}, damp={NEAREST})", "gptq": f"gptq(bits={bits})"}.items():
            for seed in seeds:
                name = f"{arm}.{bits}"
                if arm == "nearest" and seed != seeds[0]:    # no calibration, no seed
                    for key in ("perplexity", "error"):
                        per_seed[f"{name}.{key}"].append(per_seed[f"{name}.{key}"][0])
                    continue
                batch = {k: v for k, v in text("train", 16, seed).items() if k != "labels"}
                data = [{k: v[:1, :16] for k, v in batch.items()} if arm == "nearest" else batch]
                tuned = attach(model, chain, data=data)
                per_seed.setdefault(f"{name}.error", []).append(layer_error(tuned, seen))
                if arm == "gptq" and seed == seeds[0]:
                    stored, half, facts["exact"][str(bits)] = size(tuned)
                    facts["bytes"][str(bits)] = [stored, half]
                per_seed.setdefault(f"{name}.perplexity", []).append(perplexity(tuned.merge(), held))
                tuned.detach()
                _bench.say(f"{name} seed {seed}: perplexity {per_seed[f'{name}.perplexity'][-1]:.2f}")
    return {"per_seed": per_seed, "facts": facts | {"base_again": perplexity(model, held)}}


def verdict(figures):
    f, main, also = figures["facts"], [], []
    for bits in map(str, BITS):
        stored, half = f["bytes"][bits]
        main += [beats(figures, f"nearest.{bits}.{key}", f"gptq.{bits}.{key}", f"{what} at {bits} bits, nearest over GPTQ")
                 for key, what in (("error", "layer output error"), ("perplexity", "perplexity"))]
        also += [fact(f["exact"][bits], f"codes of {bits} bits come out of packing as they went in, in every layer"),
                 fact(abs(stored / half * 16 / int(bits) - 1) < 0.05,
                      f"{stored} bytes on disk, {stored / half:.4f} of half precision; {int(bits) / 16:.4f} needed, within 5%")]
    return judge(main, also + [fact(f["base"] == f["base_again"], "the base computes the same after every attachment")])
