"""SSF: exact on a ViT, a CNN and an MLP, and against a linear probe on a shifted few-shot split of CIFAR-10.
Lian et al., 2022, arXiv:2210.08823. Shifted: low contrast, noise and an offset on the normalised pixels (`_bench.shifted`)."""

import torch
from torch import nn

from luthier import zoo
from luthier.evidence import _bench, beats, fact, judge

SYSTEM, METHODS, SEEDS, MINUTES = "B136", ("ssf",), (0, 1, 2, 3, 4), 10
CLAIM = "Identity at init; exact merge without extra parameters on ViT, CNN and MLP; beats a probe on a shifted few-shot split"
BASELINE = "linear probe"
MODEL = "dinov2-s (22.1M); effnet-lite0 and an MLP for exactness"
DATA = "CIFAR-10 at 56 px, all of it shifted: 160 train, 150 validation, 400 test images"


def models():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 5))
    image = {"pixel_values": torch.randn(2, 3, 56, 56)}
    return {"dinov2-s": (zoo.load("dinov2-s"), image),
            "effnet-lite0": (zoo.load("effnet-lite0"), {"x": torch.randn(2, 3, 64, 64)}),
            "mlp": (mlp, {"input": torch.randn(4, 16)})}


def run(seeds):
    task = _bench.task("cifar10", "dinov2-s", train=160, image_size=56)
    test = _bench.Shifted(task, "train", "val", "test")
    per_seed, facts = _bench.arms(test, {"probe": "probe()", "ssf": "ssf()"}, seeds, steps=60)
    facts["mechanics"] = {n: _bench.mechanics(m, x, "ssf()") for n, (m, x) in models().items()}
    cnn, image = models()["effnet-lite0"]                    # its convolutions have no biases to fold into; its norms have
    facts["mechanics"]["effnet-lite0, norms alone"] = _bench.mechanics(cnn, image, "ssf(at='norm')")
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f, exact = figures["facts"]["mechanics"], []
    for name, m in f.items():
        exact += [(ok, f"{name} {text}") for ok, text in _bench.exact(m)]
        exact.append(fact(m["extra_parameters"] == 0, f"{name}: merging adds {m['extra_parameters']} parameters"))
    return judge([beats(figures, "ssf", "probe", "accuracy above the linear probe on the shifted few-shot split")], exact)
