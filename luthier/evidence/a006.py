"""DPT on tiny-clip, sixteen shots of pictures in outline, a style it never saw. Xing et al., 2022, arXiv:2208.08340.
Its parts alone are the baselines: CoOp's context in the text, and VPT's prompts in every block of the image tower."""

import hashlib

import torch

from luthier import attach, zoo
from luthier.evidence import _bench, _names, beats, fact, judge

SYSTEM, METHODS, SEEDS, MINUTES = "A006", ("dpt", "cavpt"), (0, 1, 2), 20
CLAIM = "Prompts in both towers beat those in one; class-aware prompts differ between images; CLIP stays as it is to the bit"
BASELINE = "coop alone and deep vpt alone; zero-shot beside"
MODEL = "tiny-clip (1.3M)"
DATA = "scenes:classify-outline, 64 px, 40 classes: 16 a class in training, 4 in validation, 400 test images"
CHAINS = {"zero-shot": "none", "coop": "coop(n=8)", "vpt": 'vpt(at="vision.embed vision.block.1-.in", n=10)', "dpt": "dpt(n=8)"}


def digest(model):
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in model.state_dict().values())).hexdigest()


@torch.no_grad()
def spread(task):
    """How far what the class-aware prompts say of two images is apart, as a share of its length, away from the start."""
    tuned = _bench.shake(attach(task.build(0), "cavpt()"), by=0.05).train()
    tuned(pixel_values=_bench.first(task, size=2)["pixel_values"])
    a, b = next(iter(tuned.states.values())).noted["said"]
    return float((a - b).norm() / a.norm())


def run(seeds, steps=100):
    def make(seed):
        return _names.task("scenes:classify-outline", seed, limit={"test": 400})
    same = []

    def after(name, seed, tuned):
        if name != "zero-shot":
            tuned.detach()
            same.append(digest(tuned.model.dual) == digest(zoo.load(_names.MODEL)))
        return {}
    per_seed, facts = _names.arms(make, CHAINS, seeds, steps, after=after)
    return {"per_seed": per_seed, "facts": facts | {"same_bits": all(same), "prompts_apart": spread(make(0))}}


def verdict(figures):
    f = figures["facts"]
    return judge(
        [beats(figures, "dpt", "coop", "above CoOp alone"), beats(figures, "dpt", "vpt", "above VPT alone")],
        [fact(f["same_bits"], "after training, the hash of all of CLIP's weights is what it was"),
         fact(f["prompts_apart"] > 0.01, f"what the prompts of two images say differs by {f['prompts_apart']:.1%}")])
