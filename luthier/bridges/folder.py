"""A bridged model in one folder. bridge.json says the way and which two models there are, each by its zoo or timm name or, where
it is of transformers, by a folder inside with configuration and tokenizer; model.safetensors holds all tensors, a tied one once.

    write(model, folder)        what a bridged model's write() does; luthier.zoo.load(folder) reads it. No path is followed out.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import BadState, DoesNotFit

FORMAT, FACTS, TENSORS, PARTS = 1, "bridge.json", "model.safetensors", ("vision", "language")
AGAIN = "It was damaged or made by something else: write it again."


def write(model, folder, save_file=None):
    from safetensors.torch import save_file as plain

    from .. import zoo

    folder, origin = Path(folder), zoo.about(model)
    found = dict(format=FORMAT, way=repr(model.way), side=model.side, licence=origin.licence, pool=model.pool,
                 image={k: list(v) if isinstance(v, tuple) else v for k, v in origin.image.items()})
    folder.mkdir(parents=True, exist_ok=True)
    for name, known in zip(PARTS, origin.parts, strict=True):
        found[name] = _described(getattr(model, name), known, folder / name, name)
    (save_file or plain)(_once(model), folder / TENSORS, {"format": "pt"})
    (folder / FACTS).write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return "luthier.zoo.load(\"{}\")"


def _once(model):
    """state_dict without further names of tied tensors."""
    known = {}
    for name, t in model.state_dict().items():
        known.setdefault((t.data_ptr(), tuple(t.shape)) if t.numel() else name, (name, t.contiguous()))
    return dict(known.values())


def _described(part, origin, folder, name):
    """What `part()` finds it again by; writes what that needs."""
    import transformers

    from .. import zoo

    config, make = getattr(part, "config", None), getattr(transformers, type(part).__name__, None)
    if make is None or not hasattr(config, "save_pretrained"):
        if origin.ref in zoo.TABLE or origin.ref.startswith("timm:"):
            return origin.ref
        raise DoesNotFit(f"The {name} model, {type(part).__name__}, is neither of transformers nor named in the zoo or timm, so "
                         "no file can say how to build it again. Keep its tensors with safetensors yourself.")
    config.architectures = [type(part).__name__]
    config.save_pretrained(folder)
    if name == "language" and origin.folder:
        origin.tokenizer().save_pretrained(folder)
    return f"./{name}"


def facts(folder):
    """What bridge.json says."""
    path = Path(folder) / FACTS
    try:
        found = json.loads(path.read_text("utf-8"))
        whole = found["format"] == FORMAT and isinstance(found["image"], dict) and isinstance(found["licence"], str)
        if whole and type(found["side"]) is int and all(isinstance(found[k], str) for k in ("way", *PARTS)):
            return found
        why = f"its format is {found['format']!r}, not {FORMAT}, or an entry is of another type"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        why = f"{type(error).__name__}: {error}"
    raise BadState(f"{path} does not describe a bridged model ({why}). {AGAIN}")


def part(folder, found, name):
    """What luthier.zoo takes for one of the two."""
    from .. import zoo

    said = found[name]
    if said == f"./{name}":
        return str(Path(folder) / name)
    if said in zoo.TABLE or said.startswith("timm:"):
        return said
    raise BadState(f"{Path(folder) / FACTS}: {name} is {said!r}, neither ./{name} nor a name in the zoo or of timm. {AGAIN}")


def read(folder, dtype=None, weights=True):
    """The model, its connector trained."""
    from .. import zoo
    from . import parse
    from .model import eyes, kind

    found, path = facts(folder), Path(folder) / TENSORS
    with torch.random.fork_rng(devices=[]):
        vision, language = (zoo.load(part(folder, found, name), dtype, weights=False) for name in PARTS)
        model = kind(way := parse(found["way"]))(eyes(vision), language, way, found["side"], 0, str(found.get("pool", "")))
    model.trained = True
    if weights:
        try:
            state = load_file(path)
            for home in [m for m in (model.vision, model.language) if isinstance(getattr(m, "pooler", None), torch.nn.Module)]:
                if not any(name.split(".")[1] == "pooler" for name in state if getattr(model, name.split(".")[0]) is home):
                    home.pooler = None                      # the base of a classifier has none
            lacks, more = model.load_state_dict(state, strict=False)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise BadState(f"The tensors in {path} do not fit the model: {str(error).splitlines()[0][:200]} {AGAIN}") from error
        own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        there = {id(own[name]) for name in state if name in own}
        if missing := [n for n in lacks if id(own.get(n)) not in there] + list(more):
            raise BadState(f"{path} and the model differ in {len(missing)} tensors, first {missing[0]}. {AGAIN}")
    return model.eval()
