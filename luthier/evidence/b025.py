"""One linear map from a frozen vision model into a frozen language model. Merullo et al., LiMBeR, 2023, arXiv:2209.15162.

The paper's probe asks whether encoders trained without words carry visual properties as well as categories: the shares of words
for either that the model's captions hold, for an encoder trained by itself, by labels, and by contrast with text.
"""

from luthier import zoo
from luthier.evidence import _pairs, beats, fact, judge

SYSTEM, METHODS, SEEDS, MINUTES = "B025", ("full",), (0, 1, 2), 10
CLAIM = "Exactly one matrix trains; captions beat the shuffled-image control; three encoders give a table of what they carry"
BASELINE = "the same bridge trained and tested on images of other rows, at its own best learning rate"
MODEL = "dinov2-s, effnet-lite0 and tiny-clip, each + stories260k"
DATA = "captions of scenes: 300 train, 80 validation, 150 test rows"
STEPS, ENCODERS = 300, {"self-supervised": "dinov2-s", "labels": "effnet-lite0", "contrastive": "tiny-clip"}


def run(seeds):
    there = {kind: f"{name}+stories260k:limber()" for kind, name in ENCODERS.items() if name in zoo.names()}
    given = {kind: (_pairs.captions(model), _pairs.CONNECTOR) for kind, model in there.items()}
    given["shuffled"] = (_pairs.captions(there["self-supervised"], see="shuffled"), _pairs.CONNECTOR)
    tensors = {}

    def after(name, seed, tuned, task):
        tensors[name] = [n.rpartition("/")[2] for n, _ in tuned.trainable()]
        return _pairs.named(tuned, task)
    per_seed, facts = _pairs.arms(given, seeds, STEPS, after=after)
    return {"per_seed": per_seed, "facts": facts | {"tensors": tensors}}


def verdict(figures):
    f, per = figures["facts"], figures["per_seed"]
    table = {kind: {w: round(sum(per[f"{kind}.{w}"]) / len(per[f"{kind}.{w}"]), 3) for w in ("category", "property")}
             for kind in ENCODERS if kind in per}
    return judge(
        [beats(figures, "self-supervised", "shuffled", "captions of the images themselves beat those of shuffled ones")],
        [fact(all(t == ["weight.W", "weight.b"] for t in f["tensors"].values()), "one matrix and its bias train"),
         fact(all(f["frozen"].values()), "both frozen models keep their bits"),
         fact(len(table) == 3, f"shares of words for categories and properties in captions: {table}; three encoders needed")])
