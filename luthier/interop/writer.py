"""A Tuned as a peft folder: adapter_config.json and adapter_model.safetensors, exact or refused."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from .. import save
from ..attach import base_of
from ..errors import BadState, DoesNotFit
from ..host import Host
from ..host.patch import fetch
from . import files
from .layout import layouts, rows_of
from .settings import COPIES, ROOT, WRAP, declared, selected, task_of, tensors_of


@dataclass
class Part:
    """One method's state at one site, and where that is for peft; view: the site as whose it is laid out (tied weights)."""

    method: object
    site: object
    p: object
    path: str
    view: object

    @property
    def d(self):
        return self.method.peft

    @property
    def name(self):
        return f"{type(self.method).__name__} at {self.site.name}"

    @property
    def factor(self):
        top, *below = (float(getattr(self.method, n)) for n in self.d["factor"])
        return top / below[0] if below else top


def export(tuned, folder):
    """Write `tuned` as a peft folder; returns notes. Whatever peft cannot represent is refused, with the reason."""
    from ..tasks import Headed

    folder, base, notes = Path(folder), base_of(tuned), []
    _exportable(tuned, folder, base)
    body, prefix = (base.backbone, "backbone.") if isinstance(base, Headed) else (base, "")
    copies, head, parts = {}, {}, {}
    for part in _parts(tuned):
        s, inside = part.site, part.site.path.startswith(prefix)
        part.path = s.path.removeprefix(prefix)
        if not inside and not ("copies" in part.d and s.module is base.head):
            raise DoesNotFit(f"{part.name}: this head is Luthier's own, no module of peft's base, and only a copy of it can go "
                             f"beside the adapter. Take the head out with {type(part.method).__name__}(at=\"... -{s.name}\").")
        if "copies" in part.d:
            target = copies if inside else head
            target.setdefault(part.path, {}).update(_copied(part, target.get(part.path, {})))
        else:
            parts.setdefault(part.path, []).append(part)
    both = sorted(copies.keys() & parts.keys())
    if both:
        raise DoesNotFit(f"{both[0]} is both tuned and kept whole, which peft cannot do to one module. merge() the chain "
                         "instead.")
    config, tensors = _adapter([p for ps in parts.values() for p in ps], parts, body, notes)
    config |= dict(base_model_name_or_path=_ref(base), revision=None, inference_mode=True,
                   task_type=task_of(body, config, copies))
    if copies and config["peft_type"] == COPIES:
        config["target_modules"] = _targets(copies, body)
        tensors = {f"{ROOT}{path}.ln_tuning_layers.{k}": t for path, ts in copies.items() for k, t in ts.items()}
    elif copies:
        config["modules_to_save"] = _saved(copies, body)
        tensors |= {f"{ROOT}{path}.{k}": t for path, ts in copies.items() for k, t in ts.items()}
    if copies and any(s.tied for step in tuned._plan.steps for s in step.sites if "copies" in step.method.peft):
        notes.append("A tied weight is kept whole: in peft too its twin stays as it is in the base.")
    touched = sorted({path for path in (*copies, *parts)})
    ours = dict(chain=repr(tuned.chain), base=save._base(base) | dict(touched=touched, part=files.touched(body, touched)),
                extra=tuned.__dict__.get("extra") or {})
    out = {files.WEIGHTS: _tensors(tensors), files.CONFIG: _json(config), files.OURS: _json(ours)}
    if head:
        out[files.HEAD] = _tensors({k: t for ts in head.values() for k, t in ts.items()})
        notes.append(f"The head is no part of peft's base: it lies beside the adapter in {files.HEAD} (pool: {base.pool}).")
    save.write(folder, out)
    return notes


def _exportable(tuned, folder, base):
    if tuned._gone or tuned._merged:
        raise BadState("A detached or merged attachment has no state to export. Export before, or unmerge() it first.")
    others = [o.name for o in Host.of(base).owners if o is not tuned._owner and o.active]
    if others:
        raise DoesNotFit(f"{others[0]!r} is attached to the same base, and peft would not know of it. detach() or merge() it "
                         "first.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadState(f"{folder} is there already and not empty. Give a new folder.")
    for m in tuned.chain:
        if not isinstance(getattr(m, "peft", None), dict):
            known = ", ".join(declared())
            raise DoesNotFit(f"peft has nothing that computes what {type(m).__name__} does. It has: {known}. Where the change "
                             "is one of weights, `luthier merge` writes a plain model that any tool loads.")


def _parts(tuned):
    for step in tuned._plan.steps:
        states = tuned._states_of[step.number]
        for s in step.sites:
            view = step.twins.get(s, s)
            if (p := states.get(view.name)) is not None:
                yield Part(step.method, s, p, s.path, view)


def _copied(part, have):
    """The parameters of a site's module as the method keeps them, in the module's own layout."""
    s, m, names = part.site, part.site.module, part.d["copies"]
    if s.param != "weight" or any(True for _ in m.children()):
        raise DoesNotFit(f"{part.name}: peft keeps modules whole, and {s.path}.{s.param} is a parameter of a module that holds "
                         f"more. Leave it out with {type(part.method).__name__}(at=\"{part.method.at} -{s.name}\").")
    new = dict(have)
    for param, tensor in names.items():
        if (t := getattr(part.p, tensor, None)) is None:
            continue
        own = s.bias if param == "bias" else s.param
        base = new.get(own, fetch(m, own).detach()).cpu()
        new[own] = (s.write_b if param == "bias" else part.view.write)(base, t.detach().cpu()).contiguous()
    return {n: new.get(n, q.detach().cpu().contiguous()) for n, q in m.named_parameters()}


def _adapter(parts, at, body, notes):
    """(settings, tensors) of the one kind of adapter that a peft folder holds."""
    if not parts:
        return dict(peft_type=COPIES), {}
    d = parts[0].d
    for p in parts:
        if (p.d["type"], p.d.get("when")) != (d["type"], d.get("when")):
            raise DoesNotFit(f"A peft folder holds one kind of adapter, and this chain has {type(parts[0].method).__name__} "
                             f"and {type(p.method).__name__}. Export them one by one, or merge() one of them first.")
        if p.view is not p.site:
            raise DoesNotFit(f"{p.name}: this weight is tied to {p.view.name} and changes with it, which peft has no word for. "
                             f"Choose one of the two: {type(p.method).__name__}(at=\"{p.method.at} -{p.site.name}\").")
        if "prompt" not in d and p.site.layout not in d["layers"].split():
            raise DoesNotFit(f"{p.name}: peft's {d['type']} wraps {' and '.join(d['layers'].split())} layers, and this is a "
                             f"{p.site.layout}. Leave it out with {type(p.method).__name__}(at=\"{p.method.at} "
                             f"-{p.site.name}\").")
    config = dict(peft_type=d["type"], **d.get("when", {}), **d.get("settings", {}))
    if "prompt" in d:
        return _prompt(config, parts, body)
    config["target_modules"] = _targets(at, body)
    for key, name in d.get("fields", {}).items():
        values = {getattr(p.method, name) for p in parts}
        config[key] = max(values)
        if len(values) > 1 and name not in d.get("factor", ()):
            notes.append(f"{key}: peft keeps one for all modules; {config[key]} is written. It matters in training only.")
    if "conv1d" in d["layers"].split():
        config["fan_in_fan_out"] = any(p.site.layout == "conv1d" for p in parts)
    for key, tensor in d.get("listed", {}).items():
        inside = {path: ps for path, ps in at.items() if any(hasattr(p.p, tensor) for p in ps)}
        config[key] = _targets(inside, body) if inside else []
    if "prepare" in d:
        config |= d["prepare"]([(p.method, p.p, p.site) for p in parts])
    tensors, ranks, factors = {}, {}, {}
    for path, here in at.items():
        new, ranks[path], factors[path] = _module(path, here, config, notes)
        tensors |= {f"{ROOT}{path}.{k}": t for k, t in new.items()}
    if "factor" in d:
        _scales(config, d, ranks, factors)
    for k, t in d["common"]([(p.method, p.p, p.site) for p in parts]).items() if "common" in d else ():
        tensors[WRAP + k] = t
    return config, tensors


def _module(path, parts, config, notes):
    """({tensor: value}, rank, factor) of all that acts on one module."""
    d, first = parts[0].d, parts[0]
    factor = first.factor if "factor" in d else None
    n = first.site.whole(first.site.parameter).shape[0]
    if "write" in d or len(parts) == 1 and first.site.rows is None:
        if len(parts) > 1 or first.site.rows is not None:
            raise DoesNotFit(f"{path} is several weights in one module, and {d['type']} of one part of it is no adapter of the "
                             f"whole. Use {type(first.method).__name__} on modules of one weight, or merge() it.")
        if "write" in d:
            return d["write"](first.p, first.site, config), None, factor
        layout = _present(first)
        new = {k: one.write(_cpu(getattr(first.p, one.name))) for k, one in layout.items()}
        return new, next((t.shape[layout[k].axis("r")] for k, t in new.items() if layout[k].axis("r") is not None), None), factor
    return _joined(path, parts, n, notes)


def _present(part):
    """{tensor: its layout} as far as this state has it."""
    lines = tensors_of(part.d, part.site.layout)
    return {k: one for k, text in lines.items() for one in layouts(text) if hasattr(part.p, one.name)}


def _cpu(t):
    return t.detach().cpu()


def _joined(path, parts, n, notes):
    """Several parts of a fused module, or several of a kind on one weight, as one adapter of the module: exact, because rows are
    independent and zero blocks add nothing."""
    d, first = parts[0].d, parts[0]
    rows = [rows_of(p.site, n) for p in parts]
    met = Counter(torch.cat(rows).tolist())
    if max(met.values()) > 1 and not d.get("sums"):
        raise DoesNotFit(f"{path} carries {type(first.method).__name__} twice, which is no single {d['type']}. merge() one "
                         "first.")
    layout, new, rank = _present(first), {}, None
    whole = [{k: one.write(_cpu(getattr(p.p, one.name))) for k, one in layout.items()} for p in parts]
    plain = [k for k, one in layout.items() if one.axis("r") is not None and one.axis("out") is None]
    alike = max(met.values()) == 1 and all(w[k].equal(whole[0][k]) for w in whole for k in plain)     # one factor for all rows
    ranks = [next((w[k].shape[one.axis("r")] for k, one in layout.items() if one.axis("r") is not None), 0) for w in whole]
    rank = (ranks[0] if alike else sum(ranks)) or None
    ratio = [p.factor / first.factor for p in parts] if "factor" in d else [1.0] * len(parts)
    if any(math.frexp(x)[0] != 0.5 for x in ratio):
        notes.append(f"{path}: scales of {', '.join(f'{p.factor:g}' for p in parts)} are folded into one, to rounding.")
    for k, one in layout.items():
        out, r = one.axis("out"), one.axis("r")
        if out is None and r is None:
            raise DoesNotFit(f"{path} is several weights in one module, and {k} of {first.name} belongs to one of them alone. "
                             f"Use {type(first.method).__name__} on modules of one weight, or merge() it.")
        if out is None:
            new[k] = whole[0][k] if alike else torch.cat([w[k] for w in whole], r)
            continue
        shape = list(whole[0][k].shape)
        shape[out] = n
        if r is not None:
            shape[r] = rank
        new[k] = _rest(d, first, one, shape)
        start = 0
        for w, at, x, size in zip(whole, rows, ratio, ranks, strict=True):
            index = [slice(None)] * len(shape)
            index[out] = at
            if r is not None:
                index[r] = slice(None) if alike else slice(start, start + size)
                start += size
            new[k][tuple(index)] = w[k] * x if r is not None and x != 1 else w[k]
    if first.site.rows is not None:
        notes.append(f"{path} is one module of several weights: written as one adapter over all of it, zero where nothing was "
                     "tuned.")
    return new, rank, first.factor if "factor" in d else None


def _rest(d, part, one, shape):
    """A tensor of the whole module with what rows have that the method leaves alone."""
    P = part.site.whole(fetch(part.site.module, part.site.param)).detach().cpu()
    value, like = d.get("rest", {}).get(one.name, 0), getattr(part.p, one.name)
    full = torch.full(shape, 0.0 if callable(value) else float(value), dtype=like.dtype)
    return one.write(value(P).to(like.dtype)).reshape(shape) if callable(value) else full


def _scales(config, d, ranks, factors):
    """The settings that make peft scale each module as the method does: rank and alpha, with patterns where they differ."""
    alpha, rank, eps = d["scale"]
    if d.get("patterns") == "number":
        wanted = {path: (ranks[path], _number(factors[path] * (ranks[path] + eps))) for path in ranks}
        (config[rank], config[alpha]), _ = Counter(wanted.values()).most_common(1)[0]
        config["rank_pattern"] = {path: r for path, (r, _) in wanted.items() if r != config[rank]}
        config["alpha_pattern"] = {path: a for path, (_, a) in wanted.items() if a != config[alpha]}
        return
    if len(set(factors.values())) > 1:
        raise DoesNotFit(f"{d['type']} has one {alpha} for all modules, and this chain has {len(set(factors.values()))} "
                         "different scales. Export the steps one by one.")
    full = config[rank] = max([config[rank], *(r for r in ranks.values() if r)])
    config[alpha] = _number(next(iter(factors.values())) * (full + eps))
    lost = {path: r for path, r in ranks.items() if r is not None and r != full}
    if lost:
        config["rank_pattern"] = {f"{path}.{d['patterns']}": [True] * r + [False] * (full - r) for path, r in lost.items()}


def _number(x):
    return int(x) if float(x).is_integer() else x


def _prompt(config, parts, body):
    d, m = parts[0].d["prompt"], parts[0].method
    for p in parts:
        if why := d["why"](p.site):
            raise DoesNotFit(f"{p.name}: peft computes something else here. {why}")
    stacks = {id(p.site.stack) for p in parts}
    if len({id(p.method) for p in parts}) > 1 or len(stacks) > 1:
        raise DoesNotFit(f"A peft folder holds one prompt for one tower; this chain has several of {type(m).__name__}.")
    task = task_of(body, config, {})
    if task is None:
        raise DoesNotFit(f"peft puts prompts into language models only, and a {type(body).__name__} is none that it knows.")
    made, more = d["write"](m, [(p.p, p.site) for p in parts])
    return config | dict(num_virtual_tokens=len(made), num_transformer_submodules=1, num_layers=parts[0].site.stack.n_blocks,
                         **more), {"prompt_embeddings": made}


def _ref(base):
    origin = next((m.__dict__["luthier_origin"] for m in base.modules() if "luthier_origin" in m.__dict__), None)
    return str(origin.ref) if origin is not None else getattr(getattr(base, "config", None), "name_or_path", "") or None


def _targets(paths, body):
    """target_modules that select these paths and no other: their last words where those suffice, else the paths."""
    every = [n for n, _ in body.named_modules() if n]
    for words in (sorted({p.rpartition(".")[2] for p in paths}), sorted(paths)):
        if {n for n in every if selected(words, n)} == set(paths):
            return words
    raise DoesNotFit(f"peft selects modules by the end of their names, and that selects more than "
                     f"{', '.join(sorted(paths)[:3])} in this {type(body).__name__}.")


def _saved(paths, body):
    for words in (sorted({p.rpartition(".")[2] for p in paths}), sorted(paths)):           # here the end of a word suffices
        if {n for n, _ in body.named_modules(remove_duplicate=False) if n.endswith(tuple(words))} == set(paths):
            return words
    raise DoesNotFit(f"peft selects modules_to_save by the end of their names, and that selects more than "
                     f"{', '.join(sorted(paths)[:3])} in this {type(body).__name__}.")


def _tensors(found):
    whole = {k: t.detach().cpu().clone().contiguous() for k, t in found.items()}
    return lambda path: save_file(whole, path, {"format": "pt"})


def _json(found):
    text = json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")
