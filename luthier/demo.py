"""What `luthier demo` compares: data for the demo, nothing more. A real ViT on real digits, small enough for two cores.

The learning rates are the best of 1e-4 3e-4 1e-3 3e-3 1e-2 for each method, baselines included, on the validation split with a
seed that is not reported; `luthier compare digits --model dinov2-s --tune-lr ...` with the settings below finds them again.
"""

DATA, MODEL = "digits", "dinov2-s"
RATES = {
    "probe": 1e-2, "full": 1e-4, "lora": 1e-3, "dora": 1e-3, "houlsby": 1e-3, "adaptformer": 1e-3, "vpt": 1e-2, "ssf": 3e-3,
    "bitfit": 3e-3, "ia3": 1e-2, "ladder": 3e-3,
}
OPTIONS = dict(epochs=3, batch_size=16, image_size=56, limit={"train": 400, "test": 300})


def demo(out, seeds=3, jobs=1, **more):
    """Run the demo's comparison; returns the document that results.json holds."""
    from .compare import compare

    return compare(DATA, MODEL, ", ".join(RATES), seeds, out, lr=RATES, jobs=jobs, **OPTIONS, **more)
