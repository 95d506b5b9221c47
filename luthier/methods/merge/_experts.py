"""Task vectors: what experts changed, τ = W_expert - W, read site by site from

    a folder that save() wrote with whole weights in it (a full fine-tune)
    a folder with a plain model's *.safetensors
    one .safetensors file of name -> weight, where names are parameters or sites
"""

import functools
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from luthier.errors import BadChain, BadState, WrongBase, nearest


def located(experts):
    """Their names, each recognisable as a path (so that loading a state never looks for them)."""
    return tuple(e if os.sep in e else os.path.join(".", e) for e in experts)


def near(model, folder):
    """Three experts close to a model, as files: for checks."""
    g, files = torch.Generator().manual_seed(0), [str(Path(folder) / f"expert{i}.safetensors") for i in range(3)]
    for file in files:
        save_file({n: (p + 0.05 * torch.randn(p.shape, generator=g).to(p)).detach() for n, p in model.named_parameters()}, file)
    return {"experts": tuple(files)}


def vectors(site, expert):
    """(τ: (d_out, d_in), τ_b: (d_out,) or None), in single precision at least."""
    wide = torch.promote_types(site.W.dtype, torch.float32)
    W, b = site.W.to(wide), None if site.b is None else site.b.to(wide)
    new, new_b = _read(expert, site)
    _same(expert, site, "weight", new, W)
    if b is not None and new_b is not None:
        _same(expert, site, "bias", new_b, b)
    return new.to(W) - W, None if b is None else torch.zeros_like(b) if new_b is None else new_b.to(b) - b


def cut(site, expert, density):
    """The smallest |τ| among the `density` share of an expert's entries that it changed most, over all sites of the step."""
    def make():
        parts = [t for s in site.pool.get("sites", (site,)) for t in vectors(s, expert) if t is not None]
        every = torch.cat([t.reshape(-1).abs() for t in parts])
        k = round(density * len(every))
        return every.kthvalue(len(every) - k + 1).values if k else every.new_tensor(float("inf"))
    return site.shared(("cut", expert, density), make)


def elect(τ):
    """(E, …) -> (…): the sign with more mass, then the mean over the experts that have it; where they balance, nothing."""
    agree = (τ.sign() == τ.sum(0).sign()) & (τ != 0)
    return (τ * agree).sum(0) / agree.sum(0).clamp(min=1)


def merged(site, method, thin, combine):
    """State: one merged τ (and τ_b) of what `thin(number, expert, what, τ)` leaves of each expert."""
    experts = method.experts
    if not experts:
        raise BadChain(f"{method!r} has no experts to combine. Name tuned models: experts=(\"runs/a\", \"runs/b\").")
    if not site.parameter.is_floating_point():
        return None
    found, state = [vectors(site, e) for e in experts], {}
    for k, (what, like) in enumerate({"tau": site.W, "tau_b": site.b}.items()):
        if like is not None:
            state[what] = combine(torch.stack([thin(i, e, what, found[i][k]) for i, e in enumerate(experts)])).to(like)
    return state


# -- files ----------------------------------------------------------------------------------------------------


def _read(expert, site):
    table = _table(expert, _stamp(expert))
    if (site.name, "W") in table:
        return _tensor(table[site.name, "W"]), _tensor(table.get((site.name, "b")))
    stored = [_key(table, f"{site.path}.{own}".lstrip(".")) if own else None for own in (site.param, site.bias)]
    if stored[0] is None and site.name in table:
        return _tensor(table[site.name]), _tensor(table.get(f"{site.name}.bias"))
    for key, own in zip(stored, (site.param, site.bias), strict=True):
        if own and key is None:
            names = [k if isinstance(k, str) else k[0] for k in table]
            raise BadState(f"{expert} holds nothing for {site.name} ({site.path}.{own}). {nearest(site.name, names)} "
                           f"Leave the site out with at=\"all -{site.name}\", or give an expert that has it.")
    W, b = (None if key is None else _tensor(table[key]) for key in stored)
    if W.shape != site.parameter.shape:
        raise WrongBase(f"{expert}: {stored[0]} is {list(W.shape)}, and {list(site.parameter.shape)} in this model "
                        f"({site.name}). Experts must be tuned from this very base.")
    return site.read(W), None if b is None else site.read_b(b)


def _key(table, name):
    """The parameter's own name, or the one key that is its name with or without a wrapper's prefix."""
    found = [k for k in table if isinstance(k, str) and (k.endswith("." + name) or name.endswith("." + k))]
    return name if name in table else found[0] if len(found) == 1 else None


def _same(expert, site, what, new, own):
    if new.shape != own.shape:
        raise WrongBase(f"{expert}: the {what} of {site.name} is {list(new.shape)} there and {list(own.shape)} here. "
                        "Experts must be tuned from this very base; leave sites that differ out with at=\"all -SITE\".")


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
    """name -> (file, key, row): site name with "W" or "b" for what save() wrote, else the file's own names."""
    if (Path(expert) / "recipe.json").exists():
        from luthier.save import STATE, read
        recipe, file = read(expert), str(Path(expert) / STATE)
        table = {(step["sites"][j], t["name"]): (file, key, None if t["shared"] else row)
                 for step in recipe["steps"] for key, t in step["tensors"].items() if t["name"] in ("W", "b")
                 for row, j in enumerate(t["of"])}
        if not any(name == "W" for _, name in table):
            raise BadState(f"{expert} holds changes ({recipe['chain']}), no whole weights. Make a model of it first: "
                           f"`luthier merge {expert} --out MODEL_DIR`, and give that folder.")
        return table
    table = {}
    for file, *_ in stamp:
        try:
            with safe_open(file, "pt") as f:
                table |= {k: (file, k, None) for k in f.keys()}
        except (SafetensorError, OSError) as e:
            raise BadState(f"{file} is no whole safetensors file ({e}). Copy or save the expert again.") from e
    return table


def _tensor(entry):
    if entry is None:
        return None
    file, key, row = entry
    with safe_open(file, "pt") as f:
        return f.get_tensor(key) if row is None else f.get_slice(key)[row]
