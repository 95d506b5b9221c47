"""Task vectors: what experts changed, τ = W_expert - W, read a few rows of a site at a time from

    a folder that save() wrote with whole weights in it (a full fine-tune)
    a folder with a plain model's *.safetensors
    one .safetensors file of name -> weight, where names are parameters or sites

Files are read by position into memory of our own, so no page of theirs stays with the process.
"""

import functools
import itertools
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from luthier.errors import BadChain, BadState, WrongBase, nearest
from luthier.host.patch import fetch

PART = 1 << 18                             # entries worked on at a time: enough for several threads, few enough for the cache
EVERY = 64                                 # of so many parts, one says where a cut will about be


def located(experts):
    """Their names, each recognisable as a path (so that loading a state never looks for them)."""
    return tuple(e if os.sep in e else os.path.join(".", e) for e in experts)


def near(model, folder):
    """Three experts close to a model, as files: for checks."""
    g, files = torch.Generator().manual_seed(0), [str(Path(folder) / f"expert{i}.safetensors") for i in range(3)]
    for file in files:
        save_file({n: (p + 0.05 * torch.randn(p.shape, generator=g).to(p)).detach() for n, p in model.named_parameters()}, file)
    return {"experts": tuple(files)}


def vectors(site, expert, rows=slice(None)):
    """(τ: (d_out, d_in), τ_b: (d_out,) or None), in single precision at least; of a sliced site some stored rows alone."""
    W, b = site.part(rows)
    wide = torch.promote_types(W.dtype, torch.float32)
    new, new_b = _read(expert, site, rows)
    if b is not None:
        b = torch.zeros_like(b, dtype=wide) if new_b is None else _minus(new_b, b, wide)
    return _minus(new, W, wide), b


def _minus(new, own, wide):
    return new.to(own.device, wide).sub_(own.to(wide))      # what was read is ours to write on


def parts(site, rows=slice(None)):
    """Slices of about PART entries that cover these stored rows of a site; the whole where it is not sliced."""
    if not site.sliced:
        return [slice(None)]
    low, high, _ = rows.indices(len(site.parameter))
    step = max(1, PART // max(site.parameter[0].numel(), 1))
    return [slice(k, min(k + step, high)) for k in range(low, high, step)]


def cut(site, experts, density):
    """expert -> the smallest |τ| among the `density` share of its entries that it changed most, over all sites of the step."""
    places = site.pool.get("sites", (site,))

    def one(expert):
        def pieces(every=1):
            for s, rows in itertools.islice(((site, r) for site in places for r in parts(site)), 0, None, every):
                for t in vectors(s, expert, rows):
                    if t is not None:
                        t = t.mT if s.turned and t.dim() == 2 else t                # as it is stored: nothing to copy
                        yield t.to("cpu", wide).reshape(-1).abs_().numpy().view(bits)

        n = sum(s.W.numel() + (0 if s.b is None else s.b.numel()) for s in places)
        wide = functools.reduce(torch.promote_types, (s.W.dtype for s in places), torch.float32)
        bits, k = np.int32 if wide == torch.float32 else np.int64, round(density * n)
        return float(kth(pieces, n, k, bits).view(np.float32 if bits is np.int32 else np.float64)) if k else math.inf

    def make():
        each = list(dict.fromkeys(experts))
        with ThreadPoolExecutor(max(1, min(len(each), torch.get_num_threads()))) as pool:
            return dict(zip(each, pool.map(one, each), strict=True))
    return site.shared(("cut", experts, density), make)


def kth(pieces, n, k, bits):
    """The k-th largest of the n whole numbers >= 0 that pieces() yields, array by array, without holding them: a sample says
    between which two it will lie; a pass counts what is above and keeps what is between, or of too many a finer sample.
    (A float >= 0 is ordered as its bits are, so this is exact for floats too; NaN counts as the largest.)"""
    sample, kept, single = np.concatenate(list(pieces(EVERY))), np.empty(n // 64 + PART, bits), False
    sample.sort()
    low, high, over, inside = 0, int(np.iinfo(bits).max), 0, n          # it is in [low, high]: so many above, so many there
    while True:
        s = sample[np.searchsorted(sample, low):np.searchsorted(sample, high, "right")]
        at, wide = len(s) * (over + inside - k) // inside, 0 if single else len(s) // 512 + 256
        a, b = (int(s[max(at - wide, 0)]), int(s[min(at + wide, len(s) - 1)])) if len(s) else (low, high)
        got, every, above, least = 0, 1, 0, 0
        for v in pieces():
            beyond, reach = v > b, v >= a
            above, least = above + np.count_nonzero(beyond), least + np.count_nonzero(reach)
            if a < b:
                new = v[beyond ^ reach][::every]
                while got + len(new) > len(kept):           # too many: every second one
                    every, new, half = 2 * every, new[::2], kept[:got:2].copy()
                    got = len(half)
                    kept[:got] = half
                kept[got:got + len(new)], got = new, got + len(new)
        if above < k <= least:
            if a == b:
                return bits(a)
            if every == 1:
                kept[:got].partition(least - k)
                return kept[least - k]
            sample, low, high, over, inside = np.sort(kept[:got]), a, b, above, least - above
            single = True                                   # a value that very many have? if not, that one is out of the way
        elif k <= above:
            low, inside, single = b + 1, above - over, False
        else:
            high, over, inside, single = a - 1, least, over + inside - least, False


def total(τ):
    """Their sum, added one after the other: the same bits however many entries there are."""
    out = torch.zeros_like(τ[0])
    for t in τ:
        out += t
    return out


def elect(τ):
    """E of shape (…) -> (…): the sign with more mass, then the mean over the experts that have it; nothing where they balance."""
    sign, n, out = total(τ).sign_(), torch.zeros_like(τ[0]), torch.zeros_like(τ[0])
    for t in τ:
        agree = (t * sign).gt_(0)                           # 1 where it has that sign, else 0
        n += agree
        out += agree.mul_(t)
    return out.div_(n.clamp_(min=1))


def merged(site, method, thin, combine, rows=slice(None)):
    """State: one merged τ (and τ_b) of what `thin(number, expert, what, τ, rows)` leaves of each expert, which it may change."""
    experts = method.experts
    if not experts:
        raise BadChain(f"{method!r} has no experts to combine. Name tuned models: experts=(\"runs/a\", \"runs/b\").")
    if not site.parameter.is_floating_point():
        return None
    first, like = rows.start or 0, dict(zip(("tau", "tau_b"), site.part(rows), strict=True))
    state = {what: torch.empty_like(t) for what, t in like.items() if t is not None}
    for part in parts(site, rows):
        found = [vectors(site, e, part) for e in experts]
        here = part if part == slice(None) else slice(part.start - first, part.stop - first)
        for k, (what, made) in enumerate(state.items()):
            place = (slice(None), here) if site.turned and what == "tau" else here
            made[place] = combine([thin(i, e, what, found[i][k], part) for i, e in enumerate(experts)])
    return state


# -- files ----------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A tensor in a file, or one row of a stack of them."""

    file: str
    dtype: torch.dtype
    shape: tuple
    start: int

    def read(self, rows=slice(None), across=False):
        """Some rows of it, or (across) some columns."""
        shape, start, size = list(self.shape), self.start, self.dtype.itemsize
        lines, step = 1, 0                                  # how many runs of bytes, and how far apart
        if rows != slice(None):
            low, high, _ = rows.indices(shape[across])
            lines, step = (shape[0], shape[1] * size) if across else (1, 0)
            start += low * size * (1 if across else math.prod(shape[1:]))
            shape[across] = high - low
        t = torch.empty(shape, dtype=self.dtype)
        data = memoryview(t.reshape(-1).view(torch.uint8).numpy())
        try:
            with open(self.file, "rb", buffering=0) as f:
                for k in range(lines):
                    line, got = data[len(data) // lines * k:len(data) // lines * (k + 1)], 0
                    f.seek(start + k * step)
                    while got < len(line):
                        got += f.readinto(line[got:]) or _short()
        except OSError as e:
            raise BadState(f"{self.file} cannot be read to its end ({e.strerror or e}). Copy or save the expert again.") from e
        return t


def _short():
    raise OSError("it was cut short meanwhile")


def _read(expert, site, rows):
    table = site.shared(("experts", expert), lambda: _table(expert, _stamp(expert)))
    if (site.name, "W") in table:
        return _whole(expert, site, rows, table[site.name, "W"], table.get((site.name, "b")))
    stored = [_key(table, f"{site.path}.{own}".lstrip(".")) if own else None for own in (site.param, site.bias)]
    if stored[0] is None and site.name in table:
        return _whole(expert, site, rows, table[site.name], table.get(f"{site.name}.bias"))
    for key, own in zip(stored, (site.param, site.bias), strict=True):
        if own and key is None:
            names = [k if isinstance(k, str) else k[0] for k in table]
            raise BadState(f"{expert} holds nothing for {site.name} ({site.path}.{own}). {nearest(site.name, names)} "
                           f"Leave the site out with at=\"all -{site.name}\", or give an expert that has it.")
    W, b = (None if key is None else table[key] for key in stored)
    if W.shape != site.parameter.shape:
        raise WrongBase(f"{expert}: {stored[0]} is {list(W.shape)}, and {list(site.parameter.shape)} in this model "
                        f"({site.name}). Experts must be tuned from this very base.")
    if b is not None:
        _same(expert, site, "bias", b, fetch(site.module, site.bias))
    return site.read(W.read(rows)), None if b is None else site.read_b(b.read(rows))


def _whole(expert, site, rows, W, b):
    """Of what is stored as (d_out, d_in)."""
    _same(expert, site, "weight", W, site.W)
    if b is not None and site.b is not None:
        _same(expert, site, "bias", b, site.b)
    return W.read(rows, site.turned), None if b is None or site.b is None else b.read(rows)


def _key(table, name):
    """The parameter's own name, or the one key that is its name with or without a wrapper's prefix."""
    if name in table:
        return name
    found = [k for k in table if isinstance(k, str) and (k.endswith("." + name) or name.endswith("." + k))]
    return found[0] if len(found) == 1 else None


def _same(expert, site, what, new, own):
    if new.shape != own.shape:
        raise WrongBase(f"{expert}: the {what} of {site.name} is {list(new.shape)} there and {list(own.shape)} here. "
                        "Experts must be tuned from this very base; leave sites that differ out with at=\"all -SITE\".")
    return new


def _stamp(expert):
    path = Path(expert)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if not files or files[0].suffix != ".safetensors":
        near = nearest(path.name, os.listdir(path.parent)) if path.parent.is_dir() and not path.exists() else ""
        raise BadState(f"The expert {expert!r} is no .safetensors file and no folder that holds one. {near} Pickled weights "
                       "(.bin, .pt) are never read: save the model with save_pretrained(folder) first.")
    return tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files)


@functools.lru_cache(maxsize=32)
def _table(expert, stamp):
    """name -> Stored: site name with "W" or "b" for what save() wrote, else the file's own names."""
    if (Path(expert) / "recipe.json").exists():
        from luthier.save import STATE, read
        recipe, there = read(expert), _tensors(str(Path(expert) / STATE))
        table = {(step["sites"][j], t["name"]): there[key] if t["shared"] else _row(there[key], row)
                 for step in recipe["steps"] for key, t in step["tensors"].items() if t["name"] in ("W", "b")
                 for row, j in enumerate(t["of"])}
        if not any(name == "W" for _, name in table):
            raise BadState(f"{expert} holds changes ({recipe['chain']}), no whole weights. Make a model of it first: "
                           f"`luthier merge {expert} --out MODEL_DIR`, and give that folder.")
        return table
    return {k: t for file, *_ in stamp for k, t in _tensors(file).items()}


def _row(t, row):
    return Stored(t.file, t.dtype, t.shape[1:], t.start + row * math.prod(t.shape[1:]) * t.dtype.itemsize)


def _tensors(file):
    """name -> Stored, of a file that safetensors itself finds whole."""
    from luthier.save import DTYPES as common

    dtypes = common | {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    try:
        with safe_open(file, "pt") as f:
            names = set(f.keys())
        with open(file, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size))
    except (SafetensorError, OSError, ValueError) as e:
        raise BadState(f"{file} is no whole safetensors file ({e}). Copy or save the expert again.") from e
    return {k: Stored(file, dtypes[t["dtype"]], tuple(t["shape"]), 8 + size + t["data_offsets"][0])
            for k, t in header.items() if k in names and t["dtype"] in dtypes}
