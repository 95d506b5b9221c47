"""Checkpoints of a training run: one safetensors file each, whole or not there at all, nothing in it that can execute.

    checkpoints/step-00000120.safetensors    state/NAME  optimizer/NAME/KEY  rng/NAME  history/loss, and one JSON string of facts

A file is written beside its final name, flushed to the disk and then renamed; the last two are kept. A file that is damaged all
the same is passed over for the one before it. Parameters may have other shapes than at the start (methods grow and shrink them).
"""

import contextlib
import json
import os
import random
from pathlib import Path

import torch

from . import ranks
from .errors import BadState
from .save import _fsync

KEEP = 2


def write(folder, step, tensors, facts):
    """Write one checkpoint and drop all but the last two. OSError (a full disk) leaves the earlier ones as they were."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".partial-*"):                 # of a run that was killed while it wrote
        left.unlink(missing_ok=True)
    path, partial = folder / f"step-{step:08d}.safetensors", folder / f".partial-{os.getpid()}"
    try:
        _store(tensors, facts, partial)
        _fsync(partial)
        os.replace(partial, path)
        _fsync(folder)
    finally:
        partial.unlink(missing_ok=True)
    for old in sorted(folder.glob("step-*.safetensors"))[:-KEEP]:
        old.unlink(missing_ok=True)
    return path


def _store(tensors, facts, path):
    from safetensors.torch import save_file

    seen, plain = set(), {}
    for name, t in tensors.items():
        t = t.detach().cpu().contiguous()
        owner = t.untyped_storage().data_ptr()
        plain[name] = t.clone() if owner in seen or t.untyped_storage().nbytes() != t.nbytes else t
        seen.add(owner)
    save_file(plain, path, metadata={"luthier": json.dumps(facts)})


def newest(folder):
    """(tensors, facts, path) of the last checkpoint that is whole, or None where there is none."""
    from safetensors import SafetensorError, safe_open

    paths = sorted(Path(folder).glob("step-*.safetensors"), reverse=True)
    for path in paths:
        with contextlib.suppress(SafetensorError, OSError, ValueError, KeyError, TypeError), safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, json.loads(f.metadata()["luthier"]), path
    if paths:
        raise BadState(f"None of the checkpoints in {folder} can be read (newest: {paths[0].name}). "
                       "Delete the folder and start anew.")
    return None


# -- the states of an attachment ------------------------------------------------------------------------------------


def tensors_of(states):
    """name -> tensor of everything that init cannot recompute; what several sites share is named once."""
    seen, found = set(), {}
    for name, t in states.state_dict(keep_vars=True).items():
        if id(t) not in seen:
            seen.add(id(t))
            found[name] = t
    return found


def plain_of(states):
    """name -> {attribute: value} of the numbers, strings and flags that states carry beside their tensors."""
    found = {}
    for name, module in states.named_modules():
        own = {k: v for k, v in vars(module).items() if not k.startswith("_") and isinstance(v, int | float | str | bool)}
        own.pop("training", None)
        if own:
            found[name] = own
    return found


def restore(states, tensors, plain):
    own = tensors_of(states)
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise BadState(f"The checkpoint belongs to another chain or model: {len(odd)} states differ, such as {odd[0]!r}. "
                       "Resume with the chain and model it was made with, or choose another --out.")
    with torch.no_grad():
        for name, new in tensors.items():                  # .data: optimizers and other sites keep hold of the same object
            own[name].data = new.to(device=own[name].device, dtype=own[name].dtype, copy=True)    # aligned as torch aligns
    modules = dict(states.named_modules())
    for name, values in plain.items():
        for k, v in values.items():
            setattr(modules[name], k, v)


# -- the optimizer --------------------------------------------------------------------------------------------------


def optimizer_tensors(optimizer, named):
    """NAME/KEY -> tensor for every tensor the optimizer keeps for a named parameter (plain numbers become tensors)."""
    return {f"{name}/{key}": v if torch.is_tensor(v) else torch.tensor(v, dtype=torch.float64)
            for name, p in named for key, v in optimizer.state.get(p, {}).items() if v is not None}


def restore_optimizer(optimizer, named, tensors):
    """Straight into `optimizer.state`: load_state_dict would refuse or cast what changed its shape."""
    for name, p in named:
        mine = {k.rpartition("/")[2]: v for k, v in tensors.items() if k.rpartition("/")[0] == name}
        if mine:
            optimizer.state[p] = {k: v.clone() if k == "step" else ranks.like(v, p) for k, v in mine.items()}


# -- random numbers -------------------------------------------------------------------------------------------------


def rng():
    """(tensors, facts) of every generator that training may draw from."""
    import numpy

    kind, keys, *rest = numpy.random.get_state()
    tensors = {"torch": torch.get_rng_state()}
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        tensors[f"cuda{i}"] = torch.cuda.get_rng_state(i)
    version, inner, gauss = random.getstate()
    return tensors, {"numpy": [kind, keys.tolist(), *rest], "python": [version, list(inner), gauss]}


def restore_rng(tensors, facts):
    import numpy

    torch.set_rng_state(tensors["torch"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda{i}"], i)
    kind, keys, *rest = facts["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype="uint32"), *rest))
    version, inner, gauss = facts["python"]
    random.setstate((version, tuple(inner), gauss))
