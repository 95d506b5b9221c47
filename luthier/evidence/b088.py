"""Experts for image tokens inside a frozen language model. Luo et al., Mono-InternVL, 2024, arXiv:2410.08202.

First-token latency is that of a forward pass over image and prompt, bare models in turns, against the same patches through the
whole vision encoder (LiMBeR) on the same two models.
"""

import torch

from luthier import zoo
from luthier.compare.measure import against
from luthier.evidence import _pairs, beats, fact, judge

SYSTEM, METHODS, SEEDS, MINUTES = "B088", ("full",), (0, 1, 2), 10
CLAIM = "Text-only logits stay bit-identical; visual experts beat patch embeddings alone on captions; prefill beats encoder + LM"
BASELINE = "the same bridge with patch embeddings alone; in latency, encoder + LM; each at its own best learning rate"
MODEL = "dinov2-s + stories260k (latency: + smollm2-135m)"
DATA = "captions of scenes: 300 train, 80 validation, 150 test rows"
STEPS = 400


def run(seeds):
    given = {n: _pairs.captions(f"dinov2-s+stories260k:monointern({said})") for n, said in (("experts", ""), (
        "patches", "experts=False"))}
    text = []

    def after(name, seed, tuned, task):
        ids = torch.randint(3, 500, (4, 24), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            text.append(torch.equal(tuned(ids).logits, zoo.load("stories260k")(ids).logits))
        return {}
    per_seed, facts = _pairs.arms({k: (t, _pairs.CONNECTOR) for k, t in given.items()}, seeds, STEPS, after=after)
    ids, x = torch.randint(3, 500, (1, 8)), torch.zeros(1, 3, 224, 224)
    inside, beside = (zoo.load(f"dinov2-s+smollm2-135m:{way}()") for way in ("monointern", "limber"))
    with torch.no_grad():
        seconds, ratio = against(lambda: inside(ids, pixel_values=x), lambda: beside(ids, pixel_values=x), 7)
    return {"per_seed": per_seed, "facts": facts | {"text_identical": text, "prefill_seconds": seconds, "prefill_ratio": ratio}}


def verdict(figures):
    f = figures["facts"]
    return judge(
        [beats(figures, "experts", "patches", "captions with visual experts beat those with patch embeddings alone")],
        [fact(all(f["text_identical"]), "logits of text alone equal the language model's to the bit after training"),
         fact(all(f["frozen"].values()), "both frozen models keep their bits"),
         fact(f["prefill_ratio"] < 1, f"time to the first token {f['prefill_ratio']:.2f} x encoder + LM, needed below 1")])
