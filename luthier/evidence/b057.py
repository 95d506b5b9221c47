"""AdaptFormer on DINOv2 and digits, tested on shifted images. Chen et al., 2022, arXiv:2205.13535.
Digits are far from the photographs of the pretraining; the test images are shifted besides (`_bench.shifted`)."""

from luthier.evidence import _bench, beats, fact, judge, not_below

SYSTEM, METHODS, SEEDS, MINUTES = "B057", ("adaptformer",), (0, 1, 2), 15
CLAIM = "Identity at init; under 2% of the parameters it beats a probe and comes near full tuning on shifted data; two forms"
BASELINE = "linear probe; full fine-tuning"
MODEL, DATA = "dinov2-s (22.1M)", "scikit-learn digits at 56 px: 400 train, 150 validation, 400 test images, shifted and plain"
FORMS = ("adaptformer", "sequential")
CHAINS = {"probe": "probe()", "adaptformer": "adaptformer(width=32)", "sequential": "adaptformer(width=32, parallel=False)",
          "full": "full()"}


def run(seeds):
    task = _bench.task("digits", "dinov2-s", image_size=56)
    test, spent = _bench.Shifted(task, "test"), {}

    def after(name, seed, tuned):
        spent[name] = _bench.body(tuned)
        return {"plain": _bench.score(tuned, task)}

    per_seed, facts = _bench.arms(test, CHAINS, seeds, steps=75, after=after)
    model, batch = task.build(0).eval(), _bench.first(task)
    base = _bench.logits(model, batch)
    gaps = {n: _bench.gap(_bench.logits(_bench.attach(task.build(0).eval(), CHAINS[n]), batch), base) for n in FORMS}
    whole = sum(p.numel() for p in model.backbone.parameters())
    facts |= {"init_gap": gaps, "method_parameters": spent, "backbone_parameters": whole}
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f = figures["facts"]
    share = f["method_parameters"]["adaptformer"] / f["backbone_parameters"]
    return judge(
        [beats(figures, "adaptformer", "probe", "accuracy above the linear probe, shifted"),
         not_below(figures, "adaptformer", "full", 0.03, "accuracy within 3 points of full tuning or above, shifted")],
        [fact(max(f["init_gap"].values()) == 0, f"differences of logits at init: {f['init_gap']}"),
         fact(share < 0.02, f"{share:.2%} of the backbone's parameters train"),
         fact(len({f["method_parameters"][n] for n in FORMS}) == 1, "the sequential form trains as many")])
