"""Luthier fits pretrained models to a task at the least cost.

    import luthier
    tuned = luthier.attach(model, "lora(rank=8) >> ssf()")     # any nn.Module; the base is never written
    ...train tuned like the model it wraps...
    tuned.save("out"); model = tuned.detach()                   # undo is exact, to the bit
"""

__version__ = "0.1.0"

from .attach import Tuned, attach, attached, plan, switch
from .errors import LuthierError
from .method import Chain, Method, discover, parse, split
from .site import find, sites

__all__ = ["Chain", "LuthierError", "Method", "Rack", "Tuned", "attach", "attached", "bridge", "discover", "find", "load",
           "merge", "parse", "plan", "sites", "split", "switch"]


def __getattr__(name):
    """`luthier.zoo`, `luthier.tasks`, ... load when first used, so that `import luthier` stays quick."""
    import importlib

    if name == "load":
        return importlib.import_module("luthier.save").load
    if name == "bridge":
        return importlib.import_module("luthier.bridges").bridge
    if name == "merge":
        return importlib.import_module("luthier.merging").merge
    if name == "Rack":
        return importlib.import_module("luthier.serve").Rack
    if name in ("bridges", "check", "compare", "cost", "evidence", "interop", "procedures", "save", "scenes", "serve",
                "systems", "tasks", "train", "zoo"):
        return importlib.import_module(f"luthier.{name}")
    raise AttributeError(f"module 'luthier' has no attribute {name!r}")
