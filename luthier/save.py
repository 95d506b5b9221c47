"""A tuned state on disk: a folder with `state.safetensors` (tensors) and `recipe.json` (how to make them act again, readable).

    save(tuned, folder)    -> writes both, or nothing
    load(model, folder)    -> Tuned, or a BadState that says what is wrong; the model is then as it was
    fingerprint(model)     -> "structure:content" of a base model

Nothing in the folder is ever executed and no path in it is ever followed. A folder is complete at every moment: a new one appears
by one rename; over an old one, the new files are first completed in `folder/.next`, and whoever opens the folder next finishes the
move if the writer was killed. Tensors that `site.fixed` marks are not stored: `init` makes them again from the seed and the base.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections import Counter
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .errors import BadState, LuthierError, WrongBase, nearest

STATE, RECIPE, NEXT, FORMAT = "state.safetensors", "recipe.json", ".next", 1
LARGEST = 64 << 20                       # bytes of a recipe or of a safetensors header; real ones are far smaller
FIELDS = dict(format=int, luthier=str, torch=str, chain=str, seed=int, name=str, stepped=list, on=list, base=dict, steps=list,
              sha256=str, extra=dict, digest=str)
STEP = dict(method=str, sites=list, tensors=dict, plain=dict, init=bool)
TENSOR = dict(name=str, trained=bool, shared=bool, of=list, shape=list, dtype=str)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
CODES = {dtype: code for code, dtype in DTYPES.items()}


# -- the base -------------------------------------------------------------------------------------------------
def fingerprint(model):
    """"structure:content": a hash of every parameter's name, shape and dtype, and one of 64 values spread over each of them."""
    structure, content = hashlib.sha256(), hashlib.sha256()
    for name, p in sorted(model.named_parameters(remove_duplicate=False), key=lambda item: item[0]):
        structure.update(f"{name} {tuple(p.shape)} {p.dtype}\n".encode())
        if p.numel() and not p.is_meta:
            flat = p.detach().reshape(-1)
            at = torch.linspace(0, p.numel() - 1, min(64, p.numel()), dtype=torch.float64).round().long()
            content.update(flat[at.to(flat.device)].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return f"{structure.hexdigest()[:16]}:{content.hexdigest()[:16]}"


def _base(model):
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
                raise BadState(f"{method} holds {name} as {dtype}, which is not stored. Make it one of {', '.join(CODES.values())}.")
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
    """Write `tuned`'s state and recipe into `folder`. `extra`: what the caller wants to find again (JSON), under recipe["extra"]."""
    from .attach import base_of
    from .host import Host

    if tuned._gone or tuned._merged:
        raise BadState("A detached attachment has no state left to save." if tuned._gone else
                       "A merged attachment is saved with its model; call unmerge() before save(), or `luthier merge` to write the model.")
    base = base_of(tuned)
    owners = Host.of(base).owners
    under = [repr(o.tuned["chain"]) for o in owners[:owners.index(tuned._owner)] if o.active]
    steps, tensors = packed(tuned)
    recipe = dict(format=FORMAT, luthier=_version(), torch=torch.__version__, chain=repr(tuned.chain), seed=tuned.seed,
                  name=tuned.name, stepped=[tuned.k, tuned.total_steps], on=under, base=_base(base), steps=steps, extra=extra or {})
    with torch.no_grad():
        whole = {k: (torch.stack(group) if not _shared(steps, k) else group[0].clone()).cpu().contiguous()
                 for k, group in tensors.items()}

    def state(path):
        save_file(whole, path, {"format": "pt", "luthier": str(FORMAT)})

    def words(path):
        recipe["sha256"] = _sha256(path.parent / STATE)
        recipe["digest"] = _digest(recipe)
        path.write_text(json.dumps(recipe, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    try:
        json.dumps(recipe["extra"])
    except (TypeError, ValueError) as e:
        raise BadState(f"extra={extra!r} cannot be written as JSON ({e}). Use plain numbers, strings, lists and dicts.") from None
    write(folder, {STATE: state, RECIPE: words})
    return Path(folder)


def _shared(steps, key):
    return next(t["shared"] for s in steps for k, t in s["tensors"].items() if k == key)


def _version():
    from importlib.metadata import PackageNotFoundError, version
    try:
        return version("luthier")
    except PackageNotFoundError:
        return "unknown"


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


def write(folder, files):
    """Put `files` (name -> a function that writes the file at a path) into `folder`, all of them or none."""
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
        for name, put in files.items():
            put(part / name)
            _fsync(part / name)
        _fsync(part)
        os.rename(part, folder if fresh else folder / NEXT)
        _fsync(folder.parent if fresh else folder)
        _finish(folder)
    except OSError as e:
        raise BadState(f"{folder} could not be written ({e.strerror or e}). What was there before is still there; free some space "
                       "or choose another folder.") from e
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


# -- loading --------------------------------------------------------------------------------------------------
def read(folder):
    """The recipe in `folder`, as a dict, after every check that needs no model. Touches nothing but an unfinished save."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadState(f"{folder} is {'a file' if folder.exists() else 'not there'}. Give the folder that save() or `luthier tune` "
                       f"wrote, with {STATE} and {RECIPE} in it; pickled files (.bin, .pt) are never read. "
                       f"{'' if folder.exists() or not folder.parent.is_dir() else nearest(folder.name, os.listdir(folder.parent))}")
    with contextlib.suppress(OSError):     # read-only: the checks below decide
        _finish(folder)
    for name in (RECIPE, STATE):
        path = folder / name
        if not path.exists() and not path.is_symlink():
            there = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
            raise BadState(f"{folder} holds no {name} (it holds {there}). Give a folder that save() or `luthier tune` wrote; "
                           "pickled files (.bin, .pt) are never read.")
        if folder.resolve() not in path.resolve().parents:
            raise BadState(f"{path} is a link that leads out of its folder. Copy the real file there if you trust it.")
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadState(f"{path} is not a regular file. {_again}")
    if (folder / RECIPE).stat().st_size > LARGEST:
        raise BadState(f"{folder / RECIPE} is larger than any recipe ({LARGEST >> 20} MB). {_again}")
    try:
        recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise BadState(f"{folder / RECIPE} is not JSON ({str(e)[:100]}). {_again}") from None
    except OSError as e:
        raise BadState(f"{folder / RECIPE} cannot be read ({e.strerror}). Check who owns the folder.") from e
    _check(recipe, f"{folder / RECIPE}")
    _check_tensors(folder / STATE, recipe)
    return recipe


_again = "It was damaged or made by something else: take it from its source, or save it again."


def _typed(thing, fields, where):
    if not isinstance(thing, dict):
        raise BadState(f"{where} should be an object with {', '.join(fields)}. {_again}")
    for name in thing:
        if name not in fields:
            raise BadState(f"{where} has a field {name!r:.60} that is not known here. {nearest(name, fields)} {_again}")
    for name, kind in fields.items():
        if type(thing.get(name, ...)) is not kind:
            raise BadState(f"{where}: {name!r} should be {kind.__name__}, and is {thing.get(name, 'missing')!r:.60}. {_again}")


def _check(recipe, where):
    if isinstance(recipe, dict) and type(recipe.get("format")) is int and recipe["format"] != FORMAT:
        raise BadState(f"{where} has format {recipe['format']}; this luthier reads format {FORMAT}. Install the luthier that wrote it.")
    _typed(recipe, FIELDS, where)
    if _digest(recipe) != recipe["digest"]:
        raise BadState(f"{where} was changed after it was saved (its digest differs). To use other hyperparameters, attach() anew.")
    if not all(isinstance(c, str) for c in recipe["on"]) or not isinstance(recipe["base"].get("fingerprint"), str):
        raise BadState(f"{where}: 'on' and 'base' do not say what lay underneath. {_again}")
    k = recipe["stepped"]
    if len(k) != 2 or type(k[0]) is not int or type(k[1]) not in (int, type(None)):
        raise BadState(f"{where}: 'stepped' should be [steps done, steps planned]. {_again}")
    for i, step in enumerate(recipe["steps"]):
        _typed(step, STEP, f"{where}, step {i}")
        n = len(step["sites"])
        if not all(isinstance(s, str) for s in step["sites"]) or len(set(step["sites"])) != n:
            raise BadState(f"{where}, step {i}: 'sites' should be different names. {_again}")
        for key, t in step["tensors"].items():
            _typed(t, TENSOR, f"{where}, tensor {key!r:.60}")
            fits = (all(type(j) is int and 0 <= j < n for j in t["of"]) and len(set(t["of"])) == len(t["of"]) > 0
                    and all(type(j) is int and j >= 0 for j in t["shape"]) and t["dtype"] in DTYPES and t["name"].isidentifier())
            if not fits:
                raise BadState(f"{where}, tensor {key!r:.60}: its name, sites, shape or dtype make no sense. {_again}")
        for name, values in step["plain"].items():
            if not name.isidentifier() or not isinstance(values, dict) or not values.keys() <= {str(j) for j in range(n)}:
                raise BadState(f"{where}, step {i}: 'plain' value {name!r:.60} makes no sense. {_again}")


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
                           f"{path} is no complete safetensors file: {size} bytes, of which its header claims {header}. {_again}")
        with safe_open(path, "pt") as f:
            there = {k: (f.get_slice(k).get_shape(), f.get_slice(k).get_dtype()) for k in f.keys()}
    except (SafetensorError, ValueError, RecursionError) as e:
        raise BadState(f"{path} is corrupt or cut short ({str(e)[:100]}). {_again}") from None
    except OSError as e:
        raise BadState(f"{path} cannot be read ({e.strerror or e}). Check who owns the folder.") from e
    for key in want:
        if key not in there:
            raise BadState(f"{path} lacks the tensor {key!r:.80}. {_again}")
    for key, (shape, dtype) in there.items():
        if key not in want:
            raise BadState(f"{path} holds a tensor {key!r:.80} that the recipe does not name. {nearest(key, want)} {_again}")
        t = want[key]
        full = t["shape"] if t["shared"] else [len(t["of"]), *t["shape"]]
        if (shape, dtype) != (full, t["dtype"]):
            raise BadState(f"{path}: {key!r:.80} is {dtype} {shape}; the recipe says {t['dtype']} {full}. {_again}")
    if _sha256(path) != recipe["sha256"]:
        raise BadState(f"{path} is not the file that was saved (its sha256 differs). {_again}")


def load(model, folder, name=None):
    """Attach what `folder` holds to `model`, the base it was made for. If anything is wrong the model stays as it was."""
    from .attach import attach, base_of, plan
    from .host import Host
    from .method import parse

    recipe, base = read(folder), base_of(model)
    try:
        chain = parse(recipe["chain"])
    except LuthierError as e:
        raise BadState(f"{Path(folder) / RECIPE}: its chain is not one that can be attached here. {e}") from e
    if [type(m).__name__ for m in chain] != [s["method"] for s in recipe["steps"]]:
        raise BadState(f"{Path(folder) / RECIPE}: the chain {chain!r} and the steps differ. {_again}")
    _same_base(base, recipe, folder)
    owners = Host.of(base).owners if Host.of(base) else []
    under = [repr(o.tuned["chain"]) for o in owners if o.active]
    if under != recipe["on"]:
        raise WrongBase(f"{folder} was trained on top of {' and '.join(recipe['on']) or 'the bare base'}; this model carries "
                        f"{' and '.join(under) or 'nothing'}. Load or attach the same below it first.")
    todo = plan(model, chain)
    found = [{s.name: s for s in step.sites} for step in todo.steps]
    for sites, step in zip(found, recipe["steps"], strict=True):
        for s in step["sites"]:
            if s not in sites:
                raise BadState(f"{folder} holds a state for {s!r:.80}, and {step['method']} reaches no such site of this model. "
                               f"{nearest(s, sites)} {_again}")
    with safe_open(Path(folder) / STATE, "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}
    fill = _Filler(recipe, tensors, chain, found, folder)
    try:
        tuned = attach(model, chain, seed=recipe["seed"], name=name, state=fill)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, IndexError) as e:
        raise BadState(f"{folder} does not fit its own chain {chain!r} ({type(e).__name__}: {str(e)[:100]}). {_again}") from e
    tuned.k, tuned.total_steps = recipe["stepped"]
    tuned.extra = recipe["extra"]
    return tuned


def _same_base(base, recipe, folder):
    want, have = recipe["base"]["fingerprint"].split(":"), fingerprint(base).split(":")
    if want == have:
        return
    said = recipe["base"]
    name = said.get("origin") or said.get("model", "another model")
    why = (f"parameters of other names, shapes or dtypes ({type(base).__name__} here, {said.get('model')} there)" if want[0] != have[0]
           else "the same shapes with other weights")
    raise WrongBase(f"{folder} was made for {name}, and this model has {why}. Load the base it was made for, in the same dtype"
                    f"{'' if want[0] != have[0] else ' and before any other training'}; its fingerprint is {':'.join(want)}.")


class _Filler:
    """Hands each site its state out of the file: key, init -> dict, or None where there was none."""

    def __init__(self, recipe, tensors, chain, found, folder):
        self.recipe, self.tensors, self.chain, self.found, self.folder = recipe, tensors, chain, found, folder
        self.where = {f"{i}:{s['method']}@{site}".replace(".", "/"): (i, j)
                      for i, s in enumerate(recipe["steps"]) for j, site in enumerate(s["sites"])}
        self.shared = {}

    def __call__(self, key, init):
        if key not in self.where:
            return None
        i, j = self.where[key]
        step, m = self.recipe["steps"][i], self.chain[i]
        site = self.found[i][step["sites"][j]]
        if step["init"] and _paths(m):
            raise BadState(f"{self.folder}: {m!r} would read {_paths(m)[0]!r} while loading. Loading follows no path out of a recipe; "
                           "attach the chain anew with attach().")
        made = init() if step["init"] or not (m.has("observe") or _paths(m)) else None
        new = {name: _revived(values[str(j)]) for name, values in step["plain"].items() if str(j) in values}
        for k, t in step["tensors"].items():
            if j in t["of"]:
                new[t["name"]] = self._tensor(k, t, j, _device(site))
        if made is not None:
            self._compare(key, m, made, new)
        return {**(made or {}), **new}

    def _tensor(self, k, t, j, device):
        if t["shared"] and (k, device) in self.shared:
            return self.shared[k, device]
        v = (self.tensors[k] if t["shared"] else self.tensors[k][t["of"].index(j)].clone()).to(device)
        v = nn.Parameter(v, requires_grad=v.is_floating_point()) if t["trained"] else v
        if t["shared"]:
            self.shared[k, device] = v
        return v

    def _compare(self, key, m, made, new):
        """What init makes and what the file holds have the same names, kinds and dtypes; shapes may differ where a schedule resizes."""
        from .site import Fixed
        kinds = {n: v for n, v in made.items() if isinstance(v, torch.Tensor)}
        have = {n: v for n, v in new.items() if isinstance(v, torch.Tensor)}
        for n in kinds.keys() ^ have.keys():
            if isinstance(made.get(n), Fixed) or n in kinds:
                raise BadState(f"{self.folder}: {key} {'lacks' if n in kinds else 'must not hold'} the tensor {n!r}. {_again}")
            raise BadState(f"{self.folder}: {m!r} has no tensor {n!r} at {key}. {nearest(n, kinds)} {_again}")
        for n, v in kinds.items():
            same = v.shape == have[n].shape or (m.has("step") and v.dim() == have[n].dim())
            if not same or v.dtype != have[n].dtype or isinstance(v, nn.Parameter) != isinstance(have[n], nn.Parameter):
                raise BadState(f"{self.folder}: {n!r} of {key} is {have[n].dtype} {list(have[n].shape)}; {m!r} makes it {v.dtype} "
                               f"{list(v.shape)}. {_again}")


def _revived(v):
    return tuple(map(_revived, v)) if isinstance(v, list) else v


def _paths(m):
    """Hyperparameters that look like paths: an init that is given one might open it."""
    def words(v):
        return [v] if isinstance(v, str) else [w for x in v for w in words(x)] if isinstance(v, tuple) else []

    return [w for n, v in vars(m).items() if n != "at" for w in words(v) if "/" in w or "\\" in w or "." in w]


def _device(site):
    p = site.module._parameters.get(site.param) if site.param else next(site.module.parameters(), None)
    return p.device if p is not None else torch.device("cpu")
