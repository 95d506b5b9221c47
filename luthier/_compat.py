"""torchvision's wheel on PyPI is built for CUDA: its compiled operators cannot load beside a CPU build of torch, and its import
then fails at the first operator it registers a shape rule for. Declaring those operators (never running them) lets it import."""

import importlib
import sys

import torch

_held = []           # a torch Library lives as long as it is referenced


def torchvision():
    """torchvision, imported; None when it is not installed. Call it before timm or an image processor is imported."""
    if "torchvision" in sys.modules:
        return sys.modules["torchvision"]
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return None
    except RuntimeError as error:
        if "+cpu" not in torch.__version__ or "does not exist" not in str(error) or _held:
            raise
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:       # half-imported
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "qnms"):
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _held.append(library)
    return importlib.import_module("torchvision")
