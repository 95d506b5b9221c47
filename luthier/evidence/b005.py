"""VLSM-Adapter on a small CLIPSeg: tiny-clip's towers under a decoder of masks that this runner trains once on plain scenes, as
CLIPSeg's was, and that is then adapted to another style. Dhakal et al., MICCAI 2024, arXiv:2405.06196."""

import json
import tempfile
from pathlib import Path

import torch

from luthier import attach, tasks, zoo
from luthier.attach import base_of
from luthier.evidence import _bench, beats, fact, judge, not_below
from luthier.train import train

SYSTEM, METHODS, SEEDS, MINUTES = "B005", ("vlsm_dense", "vlsm_shallow"), (0, 1, 2), 8
CLAIM = "adapters under 5% of the parameters reach Dice within 3 points of full fine-tuning, above frozen zero-shot"
BASELINE = "full fine-tuning of everything, and the frozen model as it is"
MODEL = "CLIPSeg of tiny-clip's towers and a decoder of three layers, 64 wide (1.5M)"
STYLE, ROWS = "outline", {"train": 400, "val": 80, "test": 200}
DATA = f"scenes:segment-{STYLE}, 64 px: {ROWS['train']} train, {ROWS['val']} validation, {ROWS['test']} test rows"
DECODER = "full(at='decoder *.reduces.*.weight *.film_*.weight *.transposed_convolution.*')"
PRE, STEPS, BATCH, RATES = 600, 120, 16, (3e-4, 1e-3, 3e-3, 1e-2)
CHAINS = {"full": "full()", "dense": "vlsm_dense(width=16, cond=32)", "shallow": "vlsm_shallow(width=32, cond=32)"}


def clipseg(folder, steps=PRE):
    """Into `folder`: tiny-clip as CLIPSeg's frozen towers, and a decoder trained on plain scenes."""
    import transformers as t

    dual = zoo.load("tiny-clip")
    text, vision = dual.config.text_config.to_dict(), dual.config.vision_config.to_dict()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = t.CLIPSegForImageSegmentation(t.CLIPSegConfig(
            text_config=text, vision_config=vision, projection_dim=dual.config.projection_dim, reduce_dim=64,
            extract_layers=[1, 2, 3], decoder_num_attention_heads=4, decoder_intermediate_size=256)).eval()
    model.clip.load_state_dict(dual.state_dict())
    facts = zoo.about("tiny-clip")
    facts.tokenizer().save_pretrained(folder)
    Path(folder, "preprocessor_config.json").write_text(json.dumps(
        {f"image_{k}": list(facts.image.get(k, (0.5,) * 3)) for k in ("mean", "std")}), "utf-8")
    with zoo.quiet():
        model.save_pretrained(folder)
        task = tasks.open("scenes:segment", model=folder, limit={"train": 1600, "val": 50, "test": 50})
        tuned = attach(task.build(), DECODER)
        train(tuned, task, steps=steps, lr=3e-3, batch_size=16, progress=False, log=False)
        tuned.merge()
        plain = task.evaluate(tuned)["dice"]
        base_of(tuned).save_pretrained(folder)
    return plain


def run(seeds):
    with tempfile.TemporaryDirectory() as folder:
        plain = clipseg(folder)
        task = tasks.open(f"scenes:segment-{STYLE}", model=folder, limit=ROWS)
        frozen = task.evaluate(task.build())["dice"]
        kept = {}

        def after(name, seed, tuned):
            kept[name] = kept.get(name, 1.0) * _bench.frozen(task, seed, tuned)
            return {}
        per_seed, facts = _bench.arms(task, CHAINS, seeds, STEPS, BATCH, RATES, after, head=False)
        total = sum(p.numel() for p in task.build().parameters())
    per_seed["zero-shot"] = [frozen] * len(seeds)
    return {"per_seed": per_seed, "facts": facts | {"frozen": kept, "parameters": total, "plain_dice": plain}}


def verdict(figures):
    f = figures["facts"]
    share = {k: f["trained_parameters"][k] / f["parameters"] for k in ("dense", "shallow")}
    return judge(
        [claim for k in ("dense", "shallow") for claim in (
            not_below(figures, k, "full", 0.03, f"{k} within 3 points of Dice of full fine-tuning"),
            beats(figures, k, "zero-shot", f"{k} above the frozen model"))],
        [fact(share[k] < 0.05, f"{k} trains {share[k]:.1%} of the parameters, needed below 5%") for k in share]
        + [fact(f["frozen"][k] == 1, f"no tensor of the model under {k} was written") for k in share])
