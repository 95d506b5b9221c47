"""CSP on tiny-clip: pairs of colour and shape in outline, a style it never saw; every other pair is only in the test. Nayak
et al., 2023, arXiv:2204.03574. Unseen-pair accuracy is, as in the paper, that at the bias which favours unseen pairs most;
the area under the whole sweep stands beside it."""

from luthier.evidence import _names, beats, fact, judge

SYSTEM, METHODS, SEEDS, MINUTES = "B134", ("csp",), (0, 1, 2), 12
CLAIM = "Unseen-pair accuracy and the area of the bias sweep above zero-shot and CoOp; (attributes + objects) d numbers train"
BASELINE = "zero-shot with \"a photo of {}.\"; coop started from the same words"
MODEL = "tiny-clip (1.3M)"
DATA = "scenes:compose-outline, 64 px: 16 shots of 20 seen pairs, 600 test images of all 40"
CHAINS = {"zero-shot": "none", "coop": 'coop(words="a photo of")', "csp": "csp()"}


def run(seeds, steps=120):
    def make(seed):
        return _names.task("scenes:compose-outline", seed, template="a photo of {}.")
    per_seed, facts = _names.arms(make, CHAINS, seeds, steps)
    model = make(0).build(0)
    words = len(model.parts["attributes"]) + len(model.parts["objects"])
    return {"per_seed": per_seed, "facts": facts | {"words": words, "width": model.dual.text_embed_dim}}


def verdict(figures):
    f = figures["facts"]
    n = f["words"] * f["width"]
    return judge(
        [beats(figures, "csp.new", "zero-shot.new", "unseen pairs, above zero-shot"),
         beats(figures, "csp.new", "coop.new", "unseen pairs, above CoOp"),
         beats(figures, "csp", "zero-shot", "area of the sweep, above zero-shot"),
         beats(figures, "csp", "coop", "area of the sweep, above CoOp")],
        [fact(f["trained_parameters"]["csp"] == n, f"{f['trained_parameters']['csp']} numbers train: {f['words']} words of "
              f"{f['width']}")])
