"""MLP projectors between encoders chosen by similarity, on pairs balanced over concepts. Maniparambil et al., From Unimodal to
Multimodal: Scaling up Projectors to Align Modalities, 2024, arXiv:2409.19425.

The pool that pairs are chosen from is skewed: the k-th of forty names is shown in proportion to 1 / k. The judge of concepts is
tiny-clip, its prototypes from labelled images, as the authors' are from CLIP and labelled sets."""

import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from luthier import scenes
from luthier.evidence import _encoders, beats, fact, judge
from luthier.procedures.matching import rank
from luthier.save import fingerprint

SYSTEM, METHODS, SEEDS, MINUTES = "C035", ("full",), (0, 1, 2), 8
CLAIM = "Similarity before training ranks zero-shot accuracy; only projectors train; balanced pairs beat as many random ones"
BASELINE = "as many pairs drawn at random from the same pool, at their own best learning rate"
MODEL, DATA = "dinov2-s + minilm; six pairs are ranked", "scenes of one shape: 240 of a skewed pool of 3000 pairs"
POOL, KEPT, STEPS, BATCH, RATES, WAY = 3000, 6, 150, 64, (1e-3, 3e-3), "projectors(dim=256)"
NAMES = [(c, s) for c in scenes.COLOURS for s in scenes.SHAPES]


def pool(folder, n=POOL, seed=77):
    """Pairs of a picture and what it shows, written as files; the last 200 are for validation and test."""
    g, size, i, rows = np.random.default_rng(seed), scenes.SIZES, 0, []
    order, share = g.permutation(len(NAMES)), 1 / np.arange(1, len(NAMES) + 1)
    left = np.bincount(g.choice(order, n, p=share / share.sum()), minlength=len(NAMES))
    for k, (colour, shape) in enumerate(NAMES):
        for _ in range(left[k]):
            at = g.uniform(0.25, 0.75, 2)
            s = scenes.Scene((scenes.Shape(shape, colour, list(size)[g.integers(2)], *at),), 64, f"pool:{i}")
            Image.fromarray(s.image()).save(folder / f"{i}.png")
            rows.append({"image": f"{i}.png", "caption": s.caption()})
            i += 1
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(rows[j]) for j in g.permutation(len(rows))) + "\n")
    return folder / "pairs.jsonl"


def run(seeds, steps=STEPS, visions=_encoders.VISIONS, texts=_encoders.TEXTS, n=POOL):
    model = f"{visions[0]}+{texts[0]}:{WAY}"
    with tempfile.TemporaryDirectory() as folder:
        data = pool(Path(folder), n)
        balanced = _encoders.pairs(model, data, train=None, concepts="scenes:classify", judge="tiny-clip", shots=KEPT)
        drawn = _encoders.pairs(model, data, train=balanced.size())
        base = drawn.build(0)
        before = fingerprint(base.vision), fingerprint(base.language)
        per_seed, facts = _encoders.arms({"balanced": balanced, "random": drawn}, seeds, steps, BATCH, RATES)
        facts["rows"] = {"balanced": balanced.size(), "random": drawn.size()}
        facts["kinds"] = {k: len({" ".join(c.split()[-2:]) for c in t.column(t.tables["train"], "caption")})
                          for k, t in (("balanced", balanced), ("random", drawn))}
        after = drawn.build(0)
        facts["frozen"] = before == (fingerprint(after.vision), fingerprint(after.language))
    rows = rank("scenes:retrieval", visions, texts, image_size=_encoders.SIDE, limit=_encoders.RANKED)
    facts["cka"] = {f"{r['vision']}+{r['language']}": r["cka"] for r in rows}
    facts["final"] = _encoders.finals(WAY, steps, BATCH, 1e-3, visions=visions, texts=texts)
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f = figures["facts"]
    rho = _encoders.spearman(f["cka"], f["final"])
    told = ", ".join(f"{k} {f['cka'][k]:.3f} / {x:.3f}" for k, x in sorted(f["final"].items(), key=lambda kx: -kx[1]))
    return judge(
        [beats(figures, "balanced.zero_shot", "random.zero_shot",
               f"zero-shot accuracy, {f['rows']['balanced']} balanced pairs ({f['kinds']['balanced']} of 40 names) against "
               f"{f['rows']['random']} random ones ({f['kinds']['random']} names)"),
         fact(rho > 0.5, f"CKA before training ranks zero-shot accuracy: Spearman {rho:.2f}, needed above 0.5 ({told})")],
        [fact(f["frozen"], "both encoders keep their bits: only the projectors train"),
         fact(f["rows"]["balanced"] == f["rows"]["random"], "both arms train on as many pairs")])
