"""What `luthier demo` compares: data for the demo, nothing more. A real ViT on real digits, small enough for two cores.

The learning rates are those that did best on the validation split, for each method, baselines included, with a seed that is not
reported, steps of about three between rates and 400 training images; `luthier compare digits --model dinov2-s --tune-lr ...`
searches them again. Two entries train at a time, on one core each; all costs are measured afterwards, alone.
"""

DATA, MODEL = "digits", "dinov2-s"
RATES = {
    "probe": 3e-2, "full": 3e-5, "lora": 1e-3, "dora": 1e-3, "houlsby": 3e-3, "adaptformer": 3e-3, "vpt": 3e-3, "ssf": 3e-3,
    "bitfit": 3e-3, "ia3": 3e-2, "ladder": 3e-2,
}
OPTIONS = dict(epochs=3, batch_size=16, image_size=56, limit={"train": 320, "test": 250})


def demo(out, seeds=3, jobs=2, **more):
    """Run the demo's comparison; returns the document that results.json holds."""
    from .compare import compare

    return compare(DATA, MODEL, ", ".join(RATES), seeds, out, lr=RATES, jobs=jobs, **OPTIONS, **more)
