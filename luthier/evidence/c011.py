"""Gated heads over frozen DINOv2 and MiniLM. Zhang et al., SAIL, 2024, arXiv:2412.04616.

Pairs are scenes of one to four shapes and what they show; zero-shot is the name of a single shape's colour and kind, forty of
them. The probe is the same training with linear heads; the gated heads without the second caption are told beside them."""

from luthier.evidence import _encoders, beats, fact, judge
from luthier.procedures.matching import rank
from luthier.save import fingerprint

SYSTEM, METHODS, SEEDS, MINUTES = "C011", ("full",), (0, 1, 2), 8
CLAIM = "Heads alone on kept features: zero-shot far above chance and above the linear probe, whose score ranks encoders"
BASELINE = "the alignment probe: linear heads, trained alike at their own best rate"
MODEL, DATA = "dinov2-s + minilm; five other pairs are ranked", "scenes:retrieval-extra: 600, 100 and 100 pairs"
STEPS, BATCH, RATES, SIZE = 120, 64, (1e-3, 3e-3), "dim=256"
GATED, LINEAR = f"sail({SIZE}, wide=2)", f"sail({SIZE}, gated=False)"
CHANCE = 1 / 40


def run(seeds, steps=STEPS, visions=_encoders.VISIONS, texts=_encoders.TEXTS):
    model = f"{visions[0]}+{texts[0]}"
    given = {"sail": (GATED, "scenes:retrieval-extra"), "probe": (LINEAR, "scenes:retrieval-extra"),
             "single": (GATED, "scenes:retrieval")}
    given = {name: _encoders.pairs(f"{model}:{way}", data) for name, (way, data) in given.items()}
    base = given["sail"].build(0)
    before = fingerprint(base.vision), fingerprint(base.language)
    per_seed, facts = _encoders.arms(given, seeds, steps, BATCH, RATES)
    after = given["sail"].build(0)
    facts["frozen"] = before == (fingerprint(after.vision), fingerprint(after.language))
    rows = rank("scenes:retrieval", visions, texts, steps=steps, image_size=_encoders.SIDE, batch_size=BATCH,
                limit=_encoders.RANKED)
    facts["probe"] = {f"{r['vision']}+{r['language']}": r["recall@1"] for r in rows}
    facts["final"] = _encoders.finals(GATED, steps, BATCH, facts["learning_rate"]["sail"], visions=visions, texts=texts)
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f, per = figures["facts"], figures["per_seed"]
    mean = sum(per["sail.zero_shot"]) / len(per["sail.zero_shot"])
    rho = _encoders.spearman(f["probe"], f["final"])
    told = ", ".join(f"{k} {f['probe'][k]:.3f} / {x:.3f}" for k, x in sorted(f["final"].items(), key=lambda kx: -kx[1]))
    return judge(
        [beats(figures, "sail.zero_shot", "probe.zero_shot", "zero-shot accuracy above the linear probe"),
         fact(rho > 0.5, f"the probe's R@1 ranks encoders as zero-shot accuracy: Spearman {rho:.2f}, needed above 0.5 ({told})")],
        [fact(mean > 5 * CHANCE, f"zero-shot accuracy {mean:.3f}, needed above five times chance ({5 * CHANCE:.3f}); with one "
              f"caption {sum(per['single.zero_shot']) / len(per['single.zero_shot']):.3f}"),
         fact(f["frozen"], "both encoders keep their bits")])
