"""The two files of an adapter's folder, read with suspicion: JSON and safetensors, nothing else, nothing outside the folder."""

import json
import stat
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open

from ..errors import BadState, WrongBase, named, nearest
from ..save import CODES, DTYPES, LARGEST, fingerprint

CONFIG, WEIGHTS, OURS, HEAD = "adapter_config.json", "adapter_model.safetensors", "luthier.json", "head.safetensors"
CONVERT = ("python -c \"import torch, safetensors.torch as s; s.save_file({k: v.clone() for k, v in torch.load('%s', "
           "map_location='cpu', weights_only=True).items()}, '%s')\"")


def place(folder):
    folder = Path(named(folder, "an adapter's folder", BadState))
    if not folder.is_dir():
        near = nearest(folder.name, [p.name for p in folder.parent.iterdir()]) if folder.parent.is_dir() else ""
        raise BadState(f"{folder} is {'a file' if folder.exists() else 'not there'}. Give a folder with {CONFIG}; hub ids are "
                       f"not fetched: download the folder first. {near}")
    return folder


def checked(path):
    """`path`, refused where it is a link out of its folder or no regular file."""
    if path.parent.resolve() not in path.resolve().parents:
        raise BadState(f"{path} is a link that leads out of its folder. Copy the real file there if you trust it.")
    if not stat.S_ISREG(path.stat().st_mode):
        raise BadState(f"{path} is not a regular file.")
    return path


def words(path):
    """The JSON object in a file."""
    try:
        if checked(path).stat().st_size > LARGEST:
            raise BadState(f"{path} is larger than any configuration is. It was damaged or made by something else.")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise BadState(f"{path} is not JSON ({str(e)[:100]}). Save the adapter again.") from None
    if not isinstance(found, dict):
        raise BadState(f"{path} must hold a JSON object, not {type(found).__name__}. Save the adapter again.")
    return found


def config(folder):
    folder = place(folder)
    if not (folder / CONFIG).exists():
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        tuned = " That is Luthier's own format: luthier.load reads it." if (folder / "recipe.json").exists() else ""
        raise BadState(f"{folder} holds no {CONFIG} (it holds {there}).{tuned} Give the folder that save_pretrained wrote.")
    return words(folder / CONFIG)


def recorded(folder):
    """What `export` wrote beside an adapter; {} for folders of others."""
    path = Path(folder) / OURS
    return words(path) if path.exists() else {}


def tensors(folder, name=WEIGHTS, pickled=("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")):
    """name -> tensor of a safetensors file; finite, or refused. `pickled`: the names under which pickles come instead."""
    path = Path(folder) / name
    if not path.exists():
        bad = next((p for p in pickled if (path.parent / p).exists()), None)
        if bad:
            raise BadState(f"{path.parent} holds its weights as a pickle, {bad}. Pickles can run code, and are never read. If "
                           f"you trust it, convert it once, in that folder: {CONVERT % (bad, name)}")
        sharded = [p.name for p in path.parent.iterdir() if p.name.endswith(".index.json")]
        raise BadState(f"{path.parent} holds no {name}"
                       + (f"; it is in shards ({sharded[0]}). Save it again in one file." if sharded else ". Save it again."))
    try:
        with open(checked(path), "rb") as f:
            if f.read(2) in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"):
                raise BadState(f"{path} is a pickle under another name. Pickles can run code, and are never read.")
        with safe_open(path, "pt") as f:
            found = {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, ValueError) as e:
        raise BadState(f"{path} is corrupt or cut short ({str(e)[:100]}). Take it from its source, or save it again.") from None
    if not found:
        raise BadState(f"{path} holds no tensor. Save the adapter again.")
    for k, t in found.items():
        if t.dtype not in CODES:
            raise BadState(f"{path}: {k!r:.100} is of {t.dtype}, which is not read. Save it in one of {', '.join(DTYPES)}.")
        if t.is_floating_point() and not torch.isfinite(t).all():
            raise BadState(f"{path}: {k!r:.100} holds NaN or infinity. Take the adapter from its source, or train it again.")
    return found


def touched(body, paths):
    """The fingerprint of the modules at `paths` alone, whatever head or pooler is beside them."""
    inside = dict(body.named_modules(remove_duplicate=False))
    found = [(f"{path}.{n}", p) for path in paths if path in inside for n, p in inside[path].named_parameters()]
    return fingerprint(SimpleNamespace(named_parameters=lambda remove_duplicate: found))


def same_base(folder, base, body):
    """Where `export` recorded the base, it must be this one; of a base that had a head of its own, the part that was tuned."""
    said = recorded(folder).get("base")
    if not isinstance(said, dict) or not isinstance(said.get("fingerprint"), str):
        return
    want, have = said["fingerprint"], fingerprint(base)
    if base is body and said.get("model") == "Headed" and isinstance(said.get("touched"), list):
        want, have = said.get("part"), touched(body, [p for p in said["touched"] if isinstance(p, str)])
    if want != have:
        same = isinstance(want, str) and want.split(":")[0] == have.split(":")[0]
        why = "the same shapes with other weights" if same else \
            f"parameters of other names, shapes or dtypes ({type(base).__name__} here, {said.get('model')} there)"
        raise WrongBase(f"{folder} was made for {said.get('origin') or said.get('model')}, and this model has {why}. Load the "
                        f"base it was made for, in the same dtype and before any training (fingerprint {want}).")
