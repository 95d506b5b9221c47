"""A tuned state on disk: a folder with `state.safetensors` (tensors) and `recipe.json` (how to make them act again, readable).

    save(tuned, folder)    -> writes both, or nothing
    load(model, folder)    -> Tuned, or a BadState that says what is wrong; the model is then as it was
    fingerprint(model)     -> "structure:content" of a base model

Nothing in the folder is ever executed and no path in it is ever followed. A folder is complete at every moment: a new one
appears by one rename; over an old one, the new files are first completed in `folder/.next`, and whoever opens the folder next
finishes the move if the writer was killed. Tensors that `site.fixed` marks are not stored: `init` makes them again from the
seed and the base.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
from collections import Counter
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .errors import BadState, LuthierError, WrongBase, named, nearest

STATE, RECIPE, NEXT, FORMAT = "state.safetensors", "recipe.json", ".next", 1
LARGEST = 64 << 20                       # bytes of a recipe or of a safetensors header; real ones are far smaller
FIELDS = dict(format=int, luthier=str, torch=str, chain=str, seed=int, name=str, stepped=list, on=list, base=dict, steps=list,
              extra=dict, sha256=str, digest=str)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
CODES = {dtype: code for code, dtype in DTYPES.items()}
AGAIN = "It was damaged or made by something else: take it from its source, or save it again."


# -- the base -------------------------------------------------------------------------------------------------
def fingerprint(model):
    """"structure:content": a hash of every parameter's name, shape and dtype, and one of 64 values spread over each."""
    structure, content = hashlib.sha256(), hashlib.sha256()
    for name, p in sorted(model.named_parameters(remove_duplicate=False), key=lambda item: item[0]):
        structure.update(f"{name} {tuple(p.shape)} {p.dtype}\n".encode())
        if p.numel() and not p.is_meta:
            flat = p.detach().reshape(-1)
            at = torch.linspace(0, p.numel() - 1, min(64, p.numel()), dtype=torch.float64).round().long()
            content.update(flat[at.to(flat.device)].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return f"{structure.hexdigest()[:16]}:{content.hexdigest()[:16]}"


def _base(model):
    if "luthier_base" in model.__dict__:                    # its tensors are spread over processes: what it was before
        return model.__dict__["luthier_base"]
    origin = next((m.__dict__["luthier_origin"] for m in model.modules() if "luthier_origin" in m.__dict__), None)
    known = dict(origin=str(origin.ref), licence=str(origin.licence)) if origin is not None else {}
    return dict(model=type(model).__name__, fingerprint=fingerprint(model), **known)


# -- saving ---------------------------------------------------------------------------------------------------
def packed(tuned):
    """(steps, tensors) as they are stored. Tensors of one name and shape are stacked over a step's sites, because a name for each
    would outweigh small states; one that several sites share is stored once."""
    steps, tensors = [], {}
    for step in tuned._plan.steps:
        method, states = type(step.method).__name__, list(tuned._states_of[step.number].values())
        here = [(i, name, t, _where(t)) for i, p in enumerate(states) for name, t in p.stored().items()]
        uses, groups, plain = Counter((name, where) for _, name, _, where in here), {}, {}
        for i, name, t, where in here:
            kind = (name, isinstance(t, nn.Parameter), tuple(t.shape), t.dtype, where if uses[name, where] > 1 else None)
            groups.setdefault(kind, []).append((i, t.detach()))
        table = {}
        for (name, trained, shape, dtype, shared), found in groups.items():
            if dtype not in CODES:
                raise BadState(f"{method} holds {name} as {dtype}, which is not stored. Use one of {', '.join(CODES.values())}.")
            key = next(k for n in count(1) if (k := f"{step.number}:{method}.{name}" + f"#{n}" * (n > 1)) not in tensors)
            table[key] = dict(name=name, trained=trained, shared=shared is not None, of=[i for i, _ in found], shape=list(shape),
                              dtype=CODES[dtype])
            tensors[key] = [t for _, t in found[:1 if shared else None]]
        for i, p in enumerate(states):
            for name, value in _plain(p):
                plain.setdefault(name, {})[str(i)] = value
        strange = [n for n, values in plain.items() if ... in values.values()]
        steps.append(dict(method=method, sites=[p.site_name for p in states], tensors=table,
                          plain={n: v for n, v in plain.items() if n not in strange},
                          init=bool(strange) or any(p.fixed_names for p in states)))
    return steps, tensors


def _where(t):
    return t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), t.stride()


def stored_bytes(tuned):
    """Bytes of the tensors that save() writes."""
    return sum(t.nbytes for group in packed(tuned)[1].values() for t in group)


def _plain(p):
    """(name, value) of what a state carries beside tensors; `...` where it is no plain value and only init can make it."""
    def fits(v):
        return v is None or isinstance(v, bool | int | float | str) or isinstance(v, list | tuple) and all(map(fits, v))

    skip = {"training", "key", "site_name", "fixed_names", "moved"}
    for name, v in vars(p).items():
        if not name.startswith("_") and name not in skip:
            yield name, (v if fits(v) else ...)


def save(tuned, folder, extra=None):
    """Write `tuned`'s state and recipe into `folder`. `extra`: what the caller wants to find again there, as JSON."""
    from . import __version__
    from .attach import base_of
    from .host import Host

    if tuned._gone:
        raise BadState("A detached attachment has no state left. Save it before detach().")
    if tuned._merged:
        raise BadState("A merged attachment is part of the weights. Call unmerge() before save(), or save the model itself.")
    base = base_of(tuned)
    owners = Host.of(base).owners
    under = [repr(o.chain) for o in owners[:owners.index(tuned._owner)] if o.active]
    steps, tensors = packed(tuned)
    whole = {k: torch.stack(t) if len(t) > 1 or not _shared(steps, k) else t[0].clone() for k, t in tensors.items()}
    recipe = dict(format=FORMAT, luthier=__version__, torch=torch.__version__, chain=repr(tuned.chain), seed=tuned.seed,
                  name=tuned.name, stepped=[tuned.k, tuned.total_steps], on=under, base=_base(base), steps=steps,
                  extra=extra or {})
    try:
        json.dumps(recipe["extra"])
    except (TypeError, ValueError) as e:
        raise BadState(f"extra={extra!r} is not JSON ({e}). Use plain numbers, strings, lists and dicts.") from None

    def state(path):
        save_file({k: t.cpu().contiguous() for k, t in whole.items()}, path, {"format": "pt"})

    def words(path):
        recipe["sha256"] = _sha256(path.parent / STATE)
        recipe["digest"] = _digest(recipe)
        lines = json.dumps(recipe, indent=1, ensure_ascii=False)
        path.write_text(re.sub(r"\[[\s\d,]+\]", lambda m: " ".join(m[0].split()), lines) + "\n", encoding="utf-8")

    write(folder, {STATE: state, RECIPE: words})
    return Path(folder)


def _shared(steps, key):
    return next(t["shared"] for s in steps for k, t in s["tensors"].items() if k == key)


def _sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _digest(recipe):
    """Of everything a recipe says, so that a changed word is noticed."""
    rest = {k: v for k, v in recipe.items() if k != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# -- a folder that is complete at every moment ----------------------------------------------------------------
def _fsync(path):
    fd = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):   # some file systems cannot sync a folder
        os.fsync(fd)
    os.close(fd)


def writable(folder):
    """Refuse, before any work, a folder that cannot be written; nothing is made."""
    folder = Path(os.path.abspath(folder))
    near = next(p for p in (folder, *folder.parents) if p.exists())
    if not near.is_dir() or not os.access(near, os.W_OK | os.X_OK):
        raise BadState(f"Nothing can be written into {folder}: {near} is {'a file' if near.is_file() else 'not open to you'}. "
                       "Give another folder.")


def write(folder, files):
    """Put `files` (name -> a function that writes the file at a path; or one function that fills a folder) into `folder`, all of
    them or none."""
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not folder.is_dir():
        raise BadState(f"{folder} is a file. Give the name of a folder to save into.")
    made = [p for p in folder.parents if not p.exists()]
    fresh = not folder.exists()
    part = (folder.parent / f".{folder.name}.part-{os.getpid()}") if fresh else folder / f"{NEXT}.part-{os.getpid()}"
    try:
        if not fresh:
            _finish(folder)
        for stale in part.parent.glob(part.name.rsplit("-", 1)[0] + "-*") if part.parent.exists() else ():
            if stale == part or not _alive(stale.name.rsplit("-", 1)[1]):
                shutil.rmtree(stale, ignore_errors=True)
        part.mkdir(parents=True)
        for name, put in files.items() if isinstance(files, dict) else ():
            put(part / name)
        if not isinstance(files, dict):
            files(part)
        for path in part.iterdir():
            _fsync(path)
        _fsync(part)
        os.rename(part, folder if fresh else folder / NEXT)
        _fsync(folder.parent if fresh else folder)
        _finish(folder)
    except OSError as e:
        raise BadState(f"{folder} could not be written ({e.strerror or e}). What was there before still is; free some space or "
                       "choose another folder.") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for parent in made if not folder.exists() else ():
            with contextlib.suppress(OSError):
                parent.rmdir()


def _alive(pid):
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:
        pass
    return True


def _finish(folder):
    """Complete the move of a finished `.next` into the folder: the same however often it is interrupted."""
    ready = folder / NEXT
    if ready.is_dir() and not ready.is_symlink():
        for f in sorted(ready.iterdir()):
            os.replace(f, folder / f.name)
        _fsync(folder)
        ready.rmdir()


# -- loading ---------------------------------------------------------------------------------------------------
def read(folder):
    """The recipe in `folder`, after every check that needs no model. Changes nothing, but completes an unfinished save."""
    folder = Path(named(folder, "a saved state", BadState))
    if not folder.is_dir():
        near = nearest(folder.name, os.listdir(folder.parent)) if folder.parent.is_dir() and not folder.exists() else ""
        raise BadState(f"{folder} is {'a file' if folder.exists() else 'not there'}. Give the folder that save() or "
                       f"`luthier tune` wrote ({STATE}, {RECIPE}); pickled files (.bin, .pt) are never read. {near}")
    with contextlib.suppress(OSError):     # a folder that cannot be written: the checks below decide
        _finish(folder)
    for name in (RECIPE, STATE):
        path = folder / name
        if not path.exists():
            there = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
            raise BadState(f"{folder} holds no {name} (it holds {there}). Give a folder that save() or `luthier tune` wrote; "
                           "pickled files (.bin, .pt) are never read.")
        if folder.resolve() not in path.resolve().parents:
            raise BadState(f"{path} is a link that leads out of its folder. Copy the real file there if you trust it.")
        if not stat.S_ISREG(path.stat().st_mode) or name == RECIPE and path.stat().st_size > LARGEST:
            raise BadState(f"{path} is not a regular file of a sensible size. {AGAIN}")
    path = folder / RECIPE
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise BadState(f"{path} is not JSON ({str(e)[:100]}). {AGAIN}") from None
    except OSError as e:
        raise BadState(f"{path} cannot be read ({e.strerror}). Check who owns it.") from e
    if not isinstance(recipe, dict) or recipe.get("format") != FORMAT:
        raise BadState(f"{path} is not of format {FORMAT}, which this luthier reads. Install the luthier that wrote it.")
    for name in recipe.keys() | FIELDS:
        if name not in FIELDS or type(recipe.get(name)) is not FIELDS[name]:
            raise BadState(f"{path}: {name!r:.60} is missing, unknown or of the wrong kind. {AGAIN}")
    if _digest(recipe) != recipe["digest"]:
        raise BadState(f"{path} was changed after it was saved (its digest differs). For other hyperparameters attach() anew.")
    with _sense(path):
        _check_tensors(folder / STATE, recipe)
    return recipe


@contextlib.contextmanager
def _sense(path):
    """A recipe whose digest is right and whose content still makes no sense was made to deceive."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, RuntimeError) as e:
        raise BadState(f"{path} does not make sense ({type(e).__name__}: {' '.join(str(e).split())[:100]}). {AGAIN}") from e


def _check_tensors(path, recipe):
    """The file holds exactly the tensors of the recipe, whole."""
    want = {k: t for step in recipe["steps"] for k, t in step["tensors"].items()}
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            start = f.read(8)
        header = int.from_bytes(start, "little")
        if len(start) < 8 or header > min(LARGEST, size - 8):
            pickled = start[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")
            raise BadState(f"{path} is a pickle under another name. Pickles can run code, and are never read." if pickled else
                           f"{path} is no complete safetensors file: {size} bytes, of which its header claims {header}. {AGAIN}")
        with safe_open(path, "pt") as f:
            there = {k: (f.get_slice(k).get_shape(), f.get_slice(k).get_dtype()) for k in f.keys()}
    except (SafetensorError, ValueError) as e:
        raise BadState(f"{path} is corrupt or cut short ({str(e)[:100]}). {AGAIN}") from None
    except OSError as e:
        raise BadState(f"{path} cannot be read ({e.strerror or e}). Check who owns it.") from e
    for key in want.keys() - there:
        raise BadState(f"{path} lacks the tensor {key!r:.80}. {AGAIN}")
    for key, (shape, dtype) in there.items():
        if key not in want:
            raise BadState(f"{path} holds a tensor {key!r:.80} that the recipe does not name. {AGAIN}")
        t = want[key]
        full = t["shape"] if t["shared"] else [len(t["of"]), *t["shape"]]
        if (shape, dtype) != (full, t["dtype"]):
            raise BadState(f"{path}: {key!r:.80} is {dtype} {shape}; the recipe says {t['dtype']} {full}. {AGAIN}")
    if _sha256(path) != recipe["sha256"]:
        raise BadState(f"{path} is not the file that was saved (its sha256 differs). {AGAIN}")


def load(model, folder, name=None):
    """Attach what `folder` holds to `model`, the base it was made for. If anything is wrong the model stays as it was."""
    from .attach import attach

    recipe, chain, state = contents(model, folder)
    k, total = recipe["stepped"]
    tuned = attach(model, chain, seed=recipe["seed"], name=name, state=state)
    tuned.k, tuned.total_steps, tuned.extra = k, total, recipe["extra"]
    return tuned


def contents(model, folder, lazy=False):
    """(recipe, chain, what hands each site its state) of what `folder` holds for `model`, its base; lazy: tensors stay in the
    file until they are asked for."""
    from .attach import base_of, plan
    from .host import Host
    from .method import parse

    recipe, base, path = read(folder), base_of(model), Path(folder) / RECIPE
    try:
        chain = parse(recipe["chain"])
    except LuthierError as e:
        raise BadState(f"{path}: its chain cannot be attached here. {' '.join(str(e).split())[:400]}") from e
    with _sense(path):
        _same_base(base, recipe, folder)
        _, _ = recipe["stepped"]
        found = [{s.name: s for s in step.sites} for step in plan(model, chain).steps]
        names = [(type(m).__name__, step["method"]) for m, step in zip(chain, recipe["steps"], strict=True)]
        for (mine, theirs), sites, step in zip(names, found, recipe["steps"], strict=True):
            lost = [s for s in step["sites"] if s not in sites]
            if mine != theirs or lost:
                raise BadState(f"{path}: {theirs} at {lost[:1] or step['sites'][:1]} is not what {chain!r} does here. {AGAIN}")
        host = Host.of(base)
        under = [repr(o.chain) for o in (host.owners if host else ()) if o.active]
        if under != recipe["on"]:
            raise WrongBase(f"{folder} was trained on top of {' and '.join(recipe['on']) or 'the bare base'}; this model carries "
                            f"{' and '.join(under) or 'nothing'}. Load or attach the same below it first.")
        with safe_open(Path(folder) / STATE, "pt") as f:
            tensors = {k: _Slice(Path(folder) / STATE, k) if lazy else f.get_tensor(k) for k in f.keys()}
    return recipe, chain, _Filler(folder, recipe, tensors, chain, found)


class _Slice:
    """A stored tensor that is read when it is asked for."""

    def __init__(self, file, key):
        self.file, self.key = file, key

    def __getitem__(self, at):
        with safe_open(self.file, "pt") as f:
            return f.get_tensor(self.key) if at is ... else f.get_slice(self.key)[at]


def _same_base(base, recipe, folder):
    said = recipe["base"]
    want, have = said["fingerprint"].split(":"), fingerprint(base).split(":")
    if want != have:
        why = (f"parameters of other names, shapes or dtypes ({type(base).__name__} here, {said.get('model')} there)"
               if want[0] != have[0] else "the same shapes with other weights")
        raise WrongBase(f"{folder} was made for {said.get('origin') or said.get('model')}, and this model has {why}. Load the "
                        f"base it was made for, in the same dtype and before any training (fingerprint {':'.join(want)}).")


class _Filler:
    """Hands each site its state out of the file: (key, init) -> dict, or None for a site that init had skipped."""

    def __init__(self, folder, recipe, tensors, chain, found):
        self.folder, self.steps, self.tensors, self.chain, self.found = folder, recipe["steps"], tensors, chain, found
        self.shared = {}
        self.where = {f"{i}:{step['method']}@{site}".replace(".", "/"): (i, j)
                      for i, step in enumerate(self.steps) for j, site in enumerate(step["sites"])}

    def __call__(self, key, init):
        if key not in self.where:
            return None
        i, j = self.where[key]
        step, m, paths = self.steps[i], self.chain[i], _paths(self.chain[i])
        if step["init"] and paths:
            raise BadState(f"{self.folder}: {m!r} would open {paths[0]!r}, and loading follows no path. attach() the chain anew.")
        new = {name: _revived(values[str(j)]) for name, values in step["plain"].items() if str(j) in values}
        for k, t in step["tensors"].items():
            if j in t["of"]:
                new[t["name"]] = self._tensor(k, t, j, self.found[i][step["sites"][j]].like.device)
        if not step["init"] and (m.observes or paths):
            return new                     # its init needs data or files; digest and sha256 vouch for what is here
        made = init() or {}
        self._compare(key, m, made, new)
        return made | new

    def _tensor(self, k, t, j, device):
        if t["shared"]:                    # one object for all its sites
            if (k, device) not in self.shared:
                self.shared[k, device] = self._of(self.tensors[k][...].clone().to(device), t)      # where torch would put it
            return self.shared[k, device]
        return self._of(self.tensors[k][t["of"].index(j)].clone().to(device), t)

    def _of(self, v, t):
        return nn.Parameter(v) if t["trained"] else v

    def _compare(self, key, m, made, new):
        """What init makes and what the file holds: same names, kinds and dtypes; other shapes only where a schedule resizes."""
        mine, theirs = ({n: v for n, v in d.items() if isinstance(v, torch.Tensor)} for d in (made, new))
        if mine.keys() != theirs.keys():
            raise BadState(f"{self.folder}: at {key}, {m!r} has {', '.join(mine) or 'no tensor'} and the file has "
                           f"{', '.join(theirs) or 'none'}. {AGAIN}")
        for n, v in mine.items():
            w = theirs[n]
            same = v.shape == w.shape or m.has("step") and v.dim() == w.dim()
            if not same or v.dtype != w.dtype or isinstance(v, nn.Parameter) != isinstance(w, nn.Parameter):
                raise BadState(f"{self.folder}: {n} of {key} is {w.dtype} {list(w.shape)}; {m!r} makes it {v.dtype} "
                               f"{list(v.shape)}. {AGAIN}")


def _revived(v):
    return tuple(map(_revived, v)) if isinstance(v, list) else v


def _paths(m):
    """Hyperparameters that look like paths: an init that is given one might open it."""
    def words(v):
        return [v] if isinstance(v, str) else [w for x in v for w in words(x)] if isinstance(v, tuple) else []

    return [w for n, v in vars(m).items() if n != "at" for w in words(v) if "/" in w or "\\" in w or "." in w]
