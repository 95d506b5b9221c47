"""CoOp on tiny-clip, sixteen shots of forty pairs of colour and shape, drawn in outline, a style it never saw. Zhou et al., 2022,
arXiv:2109.01134. How far the learned words carry to the other styles of drawing is reported beside the test in outline."""

from luthier.evidence import _names, beats, fact, judge

SYSTEM, METHODS, SEEDS, MINUTES = "B054", ("coop",), (0, 1, 2), 12
CLAIM = "With 16 shots, a context under 0.1% of the parameters beats the hand-written prompt, and so does one for each class"
BASELINE = "zero-shot with \"a photo of a {}.\""
MODEL = "tiny-clip (1.3M)"
DATA = "scenes:classify-outline, 64 px, 40 classes: 16 a class in training, 4 in validation, 400 test images; 210 in seven styles"
CHAINS = {"zero-shot": "none", "coop": "coop(n=8)", "own": "coop(n=8, own=True)"}


def run(seeds, steps=150):
    def make(seed):
        return _names.task("scenes:classify-outline", seed, limit={"test": 400})

    def shifted(name, seed, model):
        task = _names.task("scenes:classify-shift", seed, shots=1, limit={"test": 210, "val": 40})
        return {k: v for k, v in task.evaluate(model).items() if k.startswith("accuracy_")}

    per_seed, facts = _names.arms(make, CHAINS, seeds, steps, after=shifted)
    model = make(0).build(0)
    return {"per_seed": per_seed, "facts": facts | {"model_parameters": sum(p.numel() for p in model.parameters())}}


def verdict(figures):
    f = figures["facts"]
    share = f["trained_parameters"]["coop"] / f["model_parameters"]
    domains = sorted(k.split(".accuracy_")[1] for k in figures["per_seed"] if k.startswith("coop.accuracy_"))
    return judge(
        [beats(figures, "coop", "zero-shot", "one context for all classes above zero-shot"),
         beats(figures, "own", "zero-shot", "a context for each class above zero-shot")],
        [fact(share < 0.001, f"the shared context is {share:.3%} of the parameters, needed below 0.1%"),
         fact(len(domains) > 1, f"accuracy on shifted styles is reported: {', '.join(domains)}")])
