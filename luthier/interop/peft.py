"""peft's folders (checked against peft 0.21.2): adapter_config.json and adapter_model.safetensors, both ways.

A method says what it is there by a class attribute `peft`, a dict of:

    type, also       peft_type; further types of the same content
    when             settings that tell two methods of one type apart
    layers           site layouts that peft's layer can wrap
    tensors          {name of the tensor in the file: layout.py's line}
    fields           {setting: hyperparameter}, equal in both
    factor, scale    (alpha, rank): the method multiplies by alpha / rank, and peft by its first setting over its second plus a third
    patterns         "number" (rank_pattern and alpha_pattern) or the tensor whose lost ranks rank_pattern masks
    rest             {state tensor: its value at rows of a fused weight that the method leaves alone, or a function of W}
    sums             whether several of it on one weight are one of the summed rank
    listed           {setting: state tensor}: a list of the modules whose state has that tensor
    given            hyperparameters of what was read
    settings         further settings to write
    prepare, write, read, common      functions in place of `tensors` (see randlora, spiel)
    prompt           the same for the one tensor of a prompt: write, read, why
    copies           {parameter: state tensor}: the method keeps a module's parameters whole; modules_to_save, or alone LN_TUNING
    rounds           where logits agree to rounding only, and why; absent: equal to the bit
"""

import fnmatch
import json
import math
import re
import re._parser as sre
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from .. import save
from ..attach import attach, base_of
from ..errors import BadState, DoesNotFit, LuthierError, NoSuchSite, WrongBase, nearest
from ..host import Host, fetch
from ..method import Chain, call, discover
from ..site import find, sites
from . import files
from .layout import layouts, rows_of

ROOT, WRAP = "base_model.model.", "base_model."
COPIES = "LN_TUNING"                                       # peft's type for modules that are kept whole and nothing else
LONGEST = 2000                                             # characters of a pattern

# settings that change nothing of what a loaded adapter computes: bookkeeping, starts, and the schedule of a training that is over
INERT = set("""auto_mapping base_model_name_or_path peft_type peft_version revision task_type inference_mode init_weights
    init_ia3_weights fan_in_fan_out loftq_config eva_config corda_config lora_ga_config qalora_group_size megatron_core
    runtime_config encoder_hidden_size encoder_num_layers encoder_dropout encoder_reparameterization_type prefix_projection
    prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs num_layers num_attention_heads token_dim
    target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step projection_prng_key sparse very_sparse mask_type
    random_seed randlora_dropout""".split())
READ = set("""target_modules exclude_modules layers_to_transform layers_pattern modules_to_save rank_pattern alpha_pattern
    use_rslora num_virtual_tokens num_transformer_submodules save_projection""".split())
STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "loraga_stable")     # leave the base as it is
NEUTRAL = {                                                # setting -> (values that mean nothing, why others are refused)
    "bias": (("none", None), "it trains the base's own biases in place, and a file of them cannot be added to a base exactly. "
                             "Merge in peft, or train biases with a method of their own"),
    "lora_bias": ((False, None), "its bias rides on lora_B and is scaled with it. Fold it into the layer's bias first"),
    "use_qalora": ((False, None), "it pools the layer's input before lora_A. Merge in peft first"),
    "init_lora_weights": (STARTS, "this start also changes the base's weights. Convert it: save_pretrained("
                                  "path_initial_model_for_weight_conversion=...) in peft"),
    "layer_replication": ((None, []), "it makes a deeper model by repeating layers. Build that model first"),
    "trainable_token_indices": ((None, [], {}), "it retrains single rows of an embedding. Save the embedding whole (modules_to_save)"),
    "target_parameters": ((None, []), "it reaches parameters without a layer of their own. Target the layers themselves"),
    "alora_invocation_tokens": ((None, []), "an activated LoRA switches on at a token of the text. There is no such switch here"),
    "megatron_config": ((None, {}), "Megatron's parallel layers are no plain linears. Export the adapter from Megatron first"),
    "ensure_weight_tying": ((False, None), "it ties what is saved to other modules. Save without it"),
    "use_dora": ((False, None), "no method here has this form for the modules it is set for"),
    **{k: ((None, False, {}), f"{what}. Merge in peft first") for k, what in dict(
        use_bdlora="block-diagonal factors are no plain low-rank update", arrow_config="it routes between adapters by the input",
        kasa_config="it cuts the base's own weight by its singular values", velora_config="it changes what is computed beside lora_A",
        monteclora_config="it draws its factors at random").items()},
}
TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}


def declared():
    """name -> (class, declaration) of every method that peft has too."""
    return {n: (m, m.peft) for n, m in discover().items() if isinstance(getattr(m, "peft", None), dict)}


def describe(d):
    if "copies" in d:
        return f"modules_to_save, or {COPIES}", ", ".join(f"{p} = {t}" for p, t in d["copies"].items()), d.get("rounds", "to the bit")
    when = "".join(f", {k}={v}" for k, v in d.get("when", {}).items())
    what = {**d.get("tensors", {}), **{k: f"{v}" for k, v in d.get("fields", {}).items()}} or {"prompt_embeddings": "the whole state"}
    return (" or ".join((d["type"], *d.get("also", ()))) + when, "; ".join(f"{k} = {v}" for k, v in what.items()),
            d.get("rounds", "to the bit"))


# -- writing ---------------------------------------------------------------------------------------------------------------
@dataclass
class Part:
    """One method's state at one site, and where that is for peft."""

    method: object
    site: object
    p: object
    path: str

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
        raise DoesNotFit(f"{both[0]} is both tuned and kept whole, which peft cannot do to one module. merge() the chain instead.")
    config, tensors = _adapter([p for ps in parts.values() for p in ps], parts, body, notes)
    config |= dict(base_model_name_or_path=_ref(base), revision=None, inference_mode=True, task_type=_task(body, config, copies))
    if copies and config["peft_type"] == COPIES:
        config["target_modules"] = _targets(copies, body)
        tensors = {f"{ROOT}{path}.ln_tuning_layers.{k}": t for path, ts in copies.items() for k, t in ts.items()}
    elif copies:
        config["modules_to_save"] = _saved(copies, body)
        tensors |= {f"{ROOT}{path}.{k}": t for path, ts in copies.items() for k, t in ts.items()}
    if copies and any(s.tied for step in tuned._plan.steps for s in step.sites if "copies" in step.method.peft):
        notes.append("A tied weight is kept whole: in peft too its twin stays as it is in the base.")
    ours = dict(chain=repr(tuned.chain), base=save._base(base), extra=getattr(tuned, "extra", {}) or {})
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
        raise DoesNotFit(f"{others[0]!r} is attached to the same base, and peft would not know of it. detach() or merge() it first.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadState(f"{folder} is there already and not empty. Give a new folder.")
    for m in tuned.chain:
        if not isinstance(getattr(m, "peft", None), dict):
            known = ", ".join(declared())
            raise DoesNotFit(f"peft has nothing that computes what {type(m).__name__} does. It has: {known}. Where the change is one "
                             "of weights, `luthier merge` writes a plain model that any tool loads.")


def _parts(tuned):
    for step in tuned._plan.steps:
        states = tuned._states_of[step.number]
        for s in step.sites:
            if (p := states.get(step.twins.get(s, s).name)) is not None:
                yield Part(step.method, s, p, s.path)


def _copied(part, have):
    """The parameters of a site's module as the method keeps them, in the module's own layout."""
    s, m, names = part.site, part.site.module, part.d["copies"]
    if s.param != "weight" or any(True for _ in m.children()):
        raise DoesNotFit(f"{part.name}: peft keeps modules whole, and {s.path}.{s.param} is a parameter of a module that holds more. "
                         f"Leave it out with {type(part.method).__name__}(at=\"{part.method.at} -{s.name}\").")
    new = dict(have)
    for param, tensor in names.items():
        if (t := getattr(part.p, tensor, None)) is None:
            continue
        own = s.bias if param == "bias" else s.param
        base = new.get(own, fetch(m, own).detach()).cpu()
        new[own] = (s.write_b if param == "bias" else s.write)(base, t.detach().cpu()).contiguous()
    return {n: new.get(n, q.detach().cpu().contiguous()) for n, q in m.named_parameters()}


def _adapter(parts, at, body, notes):
    """(settings, tensors) of the one kind of adapter that a peft folder holds."""
    if not parts:
        return dict(peft_type=COPIES), {}
    d = parts[0].d
    for p in parts:
        if (p.d["type"], p.d.get("when")) != (d["type"], d.get("when")):
            raise DoesNotFit(f"A peft folder holds one kind of adapter, and this chain has {type(parts[0].method).__name__} and "
                             f"{type(p.method).__name__}. Export them one by one, or merge() one of them first.")
        if "prompt" not in d and p.site.layout not in d["layers"].split():
            raise DoesNotFit(f"{p.name}: peft's {d['type']} wraps {' and '.join(d['layers'].split())} layers, and this is a "
                             f"{p.site.layout}. Leave it out with {type(p.method).__name__}(at=\"{p.method.at} -{p.site.name}\").")
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
            raise DoesNotFit(f"{path} is several weights in one module, and {d['type']} of one part of it is no adapter of the whole. "
                             f"Use {type(first.method).__name__} on modules of one weight, or merge() it.")
        if "write" in d:
            return d["write"](first.p, first.site, config), None, factor
        new = {k: one.write(_cpu(getattr(first.p, one.name))) for k, one in _present(d, first.p).items()}
        rank = next((t.shape[one.axis("r")] for (k, one), t in zip(_present(d, first.p).items(), new.values(), strict=True)
                     if one.axis("r") is not None), None)
        return new, rank, factor
    return _joined(path, parts, n, notes)


def _present(d, p):
    """{tensor: its layout} as far as this state has it."""
    return {k: one for k, text in d["tensors"].items() for one in layouts(text) if hasattr(p, one.name)}


def _cpu(t):
    return t.detach().cpu()


def _joined(path, parts, n, notes):
    """Several parts of a fused module, or several of a kind on one weight, as one adapter of the module: exact, because rows are
    independent and zero blocks add nothing."""
    d, first = parts[0].d, parts[0]
    rows = [rows_of(p.site, n) for p in parts]
    met = Counter(torch.cat(rows).tolist())
    if max(met.values()) > 1 and not d.get("sums"):
        raise DoesNotFit(f"{path} carries {type(first.method).__name__} twice, which is no single {d['type']}. merge() one first.")
    layout, new, rank = _present(d, first.p), {}, None
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
            raise DoesNotFit(f"{path} is several weights in one module, and {k} of {first.name} belongs to one of them alone. Use "
                             f"{type(first.method).__name__} on modules of one weight, or merge() it.")
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
        notes.append(f"{path} is one module of several weights: written as one adapter over all of it, zero where nothing was tuned.")
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
        raise DoesNotFit(f"{d['type']} has one {alpha} for all modules, and this chain has {len(set(factors.values()))} different "
                         "scales. Export the steps one by one.")
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
    task = _task(body, config, {})
    if task is None:
        raise DoesNotFit(f"peft puts prompts into language models only, and a {type(body).__name__} is none that it knows.")
    made, more = d["write"](m, [(p.p, p.site) for p in parts])
    return config | dict(num_virtual_tokens=len(made), num_transformer_submodules=1, num_layers=parts[0].site.stack.n_blocks,
                         **more), {"prompt_embeddings": made}


def _task(body, config, copies):
    name = type(body).__name__
    if name.endswith("ForSequenceClassification") and {"classifier", "score"} & copies.keys() and config["peft_type"] != COPIES:
        return "SEQ_CLS"                                   # with this type peft insists on the head's weights
    return next((t for ending, t in TASKS.items() if name.endswith(ending)), None)


def _ref(base):
    origin = next((m.__dict__["luthier_origin"] for m in base.modules() if "luthier_origin" in m.__dict__), None)
    return str(origin.ref) if origin is not None else getattr(getattr(base, "config", None), "name_or_path", "") or None


def _targets(paths, body):
    """target_modules that select these paths and no other: their last words where those suffice, else the paths."""
    every = [n for n, _ in body.named_modules() if n]
    for words in (sorted({p.rpartition(".")[2] for p in paths}), sorted(paths)):
        if {n for n in every if _selected(words, n)} == set(paths):
            return words
    raise DoesNotFit(f"peft selects modules by the end of their names, and that selects more than {', '.join(sorted(paths)[:3])} in "
                     f"this {type(body).__name__}.")


def _saved(paths, body):
    for words in (sorted({p.rpartition(".")[2] for p in paths}), sorted(paths)):           # here the end of a word suffices
        if {n for n, _ in body.named_modules(remove_duplicate=False) if n.endswith(tuple(words))} == set(paths):
            return words
    raise DoesNotFit(f"peft selects modules_to_save by the end of their names, and that selects more than "
                     f"{', '.join(sorted(paths)[:3])} in this {type(body).__name__}.")


def _selected(words, name):
    return name in words or name.endswith(tuple(f".{w}" for w in words))


def _tensors(found):
    whole = {k: t.detach().cpu().clone().contiguous() for k, t in found.items()}
    return lambda path: save_file(whole, path, {"format": "pt"})


def _json(found):
    text = json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")


# -- reading ---------------------------------------------------------------------------------------------------------------
def read(folder, config, model, name=None):
    """Attach what a peft folder holds; see luthier.interop.read."""
    from ..tasks import Headed

    _settings(folder, config)
    base, tensors = base_of(model), files.tensors(folder)
    files.same_base(folder, base)
    body, prefix = (base.backbone, "backbone.") if isinstance(base, Headed) else (base, "")
    reader = Reader(folder, config, base, body, prefix)
    steps = reader.steps(tensors)
    return reader.attach(model, steps, name)


def _settings(folder, config):
    """Every setting is understood, means nothing, or is refused by name."""
    kind, where = config["peft_type"], Path(folder) / files.CONFIG
    known = {}
    for _, d in declared().values():
        for t in (d.get("type", COPIES), *d.get("also", ())):
            known.setdefault(t, []).append(d)
    if not isinstance(kind, str) or kind not in known:
        raise DoesNotFit(f"{where}: no method here computes what peft's {str(kind)[:40]} does. {nearest(kind, known)} "
                         f"Read are: {', '.join(sorted(known))}. In peft, merge_and_unload() gives a plain model.")
    own = {k for d in known[kind] for k in (*d.get("fields", ()), *d.get("when", ()), *d.get("listed", ()), *d.get("scale", ())[:2],
                                            *d.get("settings", ()), *d.get("reads", ()))}
    for key, value in config.items():
        if key in NEUTRAL and key not in {k for d in known[kind] for k in d.get("when", ())}:
            neutral, why = NEUTRAL[key]
            if value not in neutral:
                raise DoesNotFit(f"{where}: {key}={json.dumps(value)[:60]} cannot be represented: {why}.")
        elif key not in INERT | READ | own | NEUTRAL.keys() and value not in (None, False, [], {}, ""):
            raise DoesNotFit(f"{where}: the setting {key}={json.dumps(value)[:60]} is not known here, and nothing is left out unread. "
                             f"{nearest(key, INERT | READ | own | NEUTRAL.keys())}")
    for key, values in {k: {v for d in known[kind] if (v := d.get("when", {}).get(k)) is not None} | {False, None}
                        for d in known[kind] for k in d.get("when", ())}.items():
        if config.get(key) not in values:
            raise BadState(f"{where}: {key}={json.dumps(config[key])[:60]} is no value of this setting.")
    for key, kinds in dict(target_modules=(list, str), exclude_modules=(list, str), modules_to_save=(list,), rank_pattern=(dict,),
                           alpha_pattern=(dict,), layers_to_transform=(list, int), layers_pattern=(list, str),
                           feedforward_modules=(list, str)).items():
        value = config.get(key)
        words = value if isinstance(value, list) else list(value) if isinstance(value, dict) else []
        whole = key == "layers_to_transform"
        if value is not None and (type(value) not in kinds or any(type(w) is not (int if whole else str) for w in words)):
            raise BadState(f"{where}: {key} must be a {' or a '.join(k.__name__ for k in kinds)} of "
                           f"{'numbers' if whole else 'names'}, not {json.dumps(value)[:60]}.")
    for text in _patterns(config):
        _pattern(where, text)


def _patterns(config):
    found = [v for k in ("target_modules", "exclude_modules", "feedforward_modules") if isinstance(v := config.get(k), str)]
    found += [config["layers_pattern"]] if isinstance(config.get("layers_pattern"), str) else config.get("layers_pattern") or []
    return found + [k for key in ("rank_pattern", "alpha_pattern") for k in config.get(key) or ()]


def _pattern(where, text):
    """A regular expression of somebody else's: refused where it does not parse, or could take for ever."""
    def loops(tree, inside=False):
        for op, arg in tree:
            again = op in (sre.MAX_REPEAT, sre.MIN_REPEAT, getattr(sre, "POSSESSIVE_REPEAT", None)) and arg[1] > 64
            if again and inside:
                return True
            for sub in arg if isinstance(arg, tuple | list) else ():
                for t in sub if isinstance(sub, list) else [sub]:
                    if isinstance(t, sre.SubPattern) and loops(t, inside or again):
                        return True
        return False

    try:
        if len(text) > LONGEST or loops(sre.parse(text)) or text.count("*") + text.count("+") > 12:
            raise BadState(f"{where}: the pattern {text[:60]!r} could take for ever to match. List the modules' names instead.")
    except (re.error, RecursionError, OverflowError) as e:
        raise BadState(f"{where}: {text[:60]!r} is no regular expression ({e}). List the modules' names instead.") from None


def _int(config, key, where, least=1):
    value = config.get(key)
    if type(value) is not int or value < least:
        raise BadState(f"{where}: {key} must be a whole number of at least {least}, not {json.dumps(value)[:40]}.")
    return value


class Reader:
    """One folder on its way to a chain with states."""

    def __init__(self, folder, config, base, body, prefix):
        self.folder, self.config, self.base, self.body, self.prefix = folder, config, base, body, prefix
        self.where, self.kind = Path(folder) / files.CONFIG, config["peft_type"]
        self.every, self.told = sites(base), []
        self.modules = dict(body.named_modules(remove_duplicate=False))
        held = {}
        for s in self.every:
            if s.kind == "weight":
                held.setdefault((s.path.removeprefix(prefix), s.param), []).append(s)
        self.held = held

    def steps(self, tensors):
        """[(method, {site name: state tensors})], every name and shape checked."""
        self._bases(tensors)
        copied = self._split(tensors)
        steps, kind = [], self.kind
        if kind == COPIES:
            copied |= {k.replace(".ln_tuning_layers.", "."): t for k, t in tensors.items()}
            self._chosen({k[len(ROOT):].rpartition(".")[0] for k in copied})
        elif "prompt_embeddings" in tensors or any("prompt" in d for _, d in self._kinds()):
            steps = self._prompted(tensors)
        else:
            steps = self._tuned(tensors)
        steps += self._copies(copied)
        head = Path(self.folder) / files.HEAD
        if head.exists():
            if self.prefix:
                found = {f"{ROOT}head.{k}": t for k, t in files.tensors(self.folder, files.HEAD, ()).items()}
                steps += self._copies(found, "")
            else:
                self.told.append(f"{files.HEAD} belongs to a head that this model does not have: it was left aside.")
        if not steps:
            raise BadState(f"{self.folder} holds no adapter. Save it again.")
        return steps

    def _kinds(self):
        return [(m, d) for m, d in declared().values() if "copies" not in d and self.kind in (d["type"], *d.get("also", ()))]

    def _bases(self, tensors):
        """Where peft saved an embedding of the base beside the adapter, it must be this base's own."""
        words = tuple(self.config.get("modules_to_save") or ())
        for key in list(tensors):
            path, _, param = key.removeprefix(ROOT).rpartition(".")
            path, wrapped = path.removesuffix(".base_layer"), path.endswith(".base_layer")
            mine = self.modules.get(path)
            mine = mine._parameters.get(param) if mine is not None else None
            if mine is None or not key.startswith(ROOT) or words and path.endswith(words):
                continue
            if not wrapped and self.held.get((path, param), [None])[0] not in (None,) and "embed" not in key and "head" not in key:
                continue
            if mine.shape != tensors[key].shape or not mine.detach().cpu().equal(tensors[key].to(mine.dtype)):
                raise WrongBase(f"{self.folder} carries a {path}.{param} of {tuple(tensors[key].shape)} that is not this base's "
                                f"{tuple(mine.shape)}: the base was changed (new tokens?) before it was tuned. Load that base.")
            del tensors[key]

    def _split(self, tensors):
        """Take the tensors of modules_to_save out of `tensors`."""
        words, out = tuple(self.config.get("modules_to_save") or ()), {}
        if "" in words:
            raise BadState(f"{self.where}: an empty name in modules_to_save.")
        for key in list(tensors) if words else ():
            path = key.removeprefix(ROOT)
            above = [path[:i] for i, c in enumerate(path) if c == "."]
            if any(a.endswith(words) and a in self.modules for a in above):
                out[key] = tensors.pop(key)
        if words and not out and self.kind != COPIES:
            heads = [w for w in words if any(n.endswith(w) for n in self.modules)]
            if heads:
                raise BadState(f"{self.folder}: modules_to_save names {heads[0]!r}, and the file has no tensor of it. Save it again.")
            self.told.append(f"modules_to_save names {', '.join(words)}, which this model does not have; the file holds nothing of it.")
        return out

    # ---- one adapter a module
    def _tuned(self, tensors):
        m, d = self._method()
        names = list(d["tensors"]) if "tensors" in d else list(d["names"])
        common, found = {}, {}
        for key, t in tensors.items():
            if key.startswith(WRAP) and key[len(WRAP):] in d.get("shared", ()):
                common[key[len(WRAP):]] = t
                continue
            tail = next((n for n in sorted(names, key=len, reverse=True) if key.endswith("." + n)), None)
            if tail is None and any(key.endswith("." + n) for n in d.get("shared", ())):
                continue                                   # peft repeats what is shared at every module
            if not key.startswith(ROOT) or tail is None:
                raise BadState(f"{self.folder}: {key!r:.120} is no tensor of {self.kind}. Known: {ROOT}MODULE."
                               f"{f', {ROOT}MODULE.'.join(names)}. Save the adapter with peft's save_pretrained.")
            found.setdefault(key[len(ROOT):-len(tail) - 1], {})[tail] = t
        self._chosen(set(found))
        groups = {}
        for path, ts in found.items():
            for hyper, site, state in self._at(m, d, path, ts, common):
                groups.setdefault(hyper, {})[site] = state
        return [self._step(m, dict(hyper), states) for hyper, states in groups.items()]

    def _method(self):
        """The method whose `when` says most of what the settings say."""
        fits = [(m, d) for m, d in self._kinds() if all(self.config.get(k) == v for k, v in d.get("when", {}).items())]
        return max(fits, key=lambda f: len(f[1].get("when", {})))

    def _chosen(self, paths):
        """The modules in the file are those that target_modules selects; peft would ignore or invent the others."""
        c, every = self.config, self.modules
        for path in sorted(paths):
            if path not in every or not path:
                raise WrongBase(f"{self.folder} has an adapter for {path!r:.100}, and a {type(self.body).__name__} has no such "
                                f"module. {nearest(path, every)} Load the base it was made for "
                                f"({str(c.get('base_model_name_or_path'))[:80]}).")
        target = c.get("target_modules")
        if target is None or target in ([], ""):
            raise BadState(f"{self.where} names no target_modules, so what peft would adapt is not known. Save the adapter again.")
        if target == "all-linear":
            return
        wanted = {n for n in every if n and self._targeted(n)}
        for path in sorted(paths - wanted):
            raise BadState(f"{self.folder} has tensors for {path}, which target_modules does not select: peft would leave them out. "
                           "Correct target_modules, or take the adapter from its source.")
        lost = sorted(wanted - paths)
        lost = [n for n in lost if any(n == p for p, _ in self.held)]
        if lost:
            raise BadState(f"{self.folder}: target_modules selects {lost[0]}, and the file has no tensor for it"
                           f"{f' (and {len(lost) - 1} more)' * (len(lost) > 1)}. It is incomplete: take it from its source.")

    def _targeted(self, name):
        c = self.config
        out, saved, target = c.get("exclude_modules"), c.get("modules_to_save") or (), c["target_modules"]
        if out and (re.fullmatch(out, name) if isinstance(out, str) else _selected(out, name)):
            return False
        if any(re.match(rf"(^|.*\.){re.escape(w)}($|\..*)", name) for w in saved):
            return False
        if isinstance(target, str):
            return bool(re.fullmatch(target, name))
        if not _selected(target, name) or name in target:
            return name in target
        layers, pattern = c.get("layers_to_transform"), c.get("layers_pattern")
        if layers is None or layers == []:
            return True
        words = [pattern] if isinstance(pattern, str) and pattern else pattern or []
        tries = [rf"(?:^|.*?\.){w}\.(?P<idx>\d+)\." for w in words] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        hit = next((m for t in tries if (m := re.match(t, name))), None)
        return hit is not None and int(hit["idx"]) in ([layers] if isinstance(layers, int) else layers)

    def _at(self, m, d, path, ts, common):
        """(hyperparameters, site, state tensors) for one module; a fused one gives several, row by row."""
        held = [s for s in self.held.get((path, "weight"), ()) if s.layout in d["layers"].split()]
        module = self.modules[path]
        if not held:
            what = next((s.layout for s in self.held.get((path, "weight"), ())), type(module).__name__)
            raise DoesNotFit(f"{self.folder}: {path} is a {what}, and {m.__name__} is read at {d['layers'].replace(' ', ' or ')} "
                             "layers only. Merge in peft first.")
        lost = [k for k in d.get("tensors", ()) if k not in ts]
        if lost:
            raise BadState(f"{self.folder}: {path} lacks {lost[0]}. The file is incomplete: take it from its source.")
        if "read" in d:
            if len(held) > 1 or held[0].rows is not None:
                raise DoesNotFit(f"{self.folder}: {path} is several weights in one module, and {self.kind} of the whole is none of its "
                                 "parts. Merge in peft first.")
            state, hyper = self._try(path, d["read"], ts | common, held[0], self.config)
            return [(tuple({**hyper, **d.get("given", {})}.items()), held[0], state)]
        n = held[0].whole(held[0].parameter).shape[0]
        layout = {k: self._which(d, k, path, t) for k, t in ts.items()}
        sizes = {"out": n, "in": held[0].d_in}
        rank = None
        for k, t in ts.items():
            self._try(f"{path}.{k}", layout[k].read, t)
            for word, size in zip(layout[k].there, t.shape, strict=True):
                if sizes.setdefault(word, size) != size:
                    raise WrongBase(f"{self.folder}: {path}.{k} has shape {tuple(t.shape)}; this base's {path} is "
                                    f"({n}, {held[0].d_in}), the rank {sizes.get('r', 'none')}. Load the base it "
                                    "was made for.")
            rank = sizes.get("r")
        hyper, new, covered = self._hyper(d, path, rank), [], torch.zeros(n, dtype=torch.bool)
        for s in held:
            at = rows_of(s, n)
            covered[at] = True
            cut = {k: t if s.rows is None or layout[k].axis("out") is None else t.index_select(layout[k].axis("out"), at)
                   for k, t in ts.items()}
            if s.rows is not None:
                if any(layout[k].axis("out") is None and layout[k].axis("r") is None for k in ts):
                    raise DoesNotFit(f"{self.folder}: {path} is several weights in one module, and {', '.join(ts)} act on the input of "
                                     "all of them. Merge in peft first.")
                cut = self._trimmed(d, layout, cut, s)
                if cut is None:
                    continue
            mine = dict(hyper)
            size = next((t.shape[layout[k].axis("r")] for k, t in cut.items() if layout[k].axis("r") is not None), None)
            if size is not None and size != rank and len(d["factor"]) > 1 and d.get("patterns") == "number":
                top, below = d["factor"]
                mine[top], mine[below] = mine[top] / mine[below] * size, size
            new.append((tuple({**mine, **d.get("given", {})}.items()), s, {layout[k].name: layout[k].read(t) for k, t in cut.items()}))
        if not covered.all():
            raise DoesNotFit(f"{self.folder}: {path} has rows that are no weight of their own here. Merge in peft first.")
        if len(held) > 1:
            self.told.append(f"{path} is one module of several weights: its adapter is kept row by row, at "
                             f"{', '.join(s.name for _, s, _ in new)}.")
        return new

    def _which(self, d, k, path, t):
        """Of a tensor's alternative layouts, the one that the settings name for this module."""
        made = layouts(d["tensors"][k])
        for key, name in d.get("listed", {}).items():
            value = self.config.get(key) or []
            inside = bool(re.fullmatch(value, path)) if isinstance(value, str) else path.endswith(tuple(value)) if value else False
            made = [one for one in made if (one.name == name) == inside]
        return made[0]

    def _trimmed(self, d, layout, cut, s):
        """A site's rows without ranks that are zero there; None where the rows are untouched altogether."""
        rest, both = d.get("rest", {}), [k for k in cut if {"out", "r"} <= set(layout[k].there)]
        still = all(not cut[k].any() for k in both)
        for k in cut:
            if layout[k].axis("out") is not None and k not in both:
                want = rest.get(layout[k].name, 0)
                want = layout[k].write(want(s.W.cpu())) if callable(want) else torch.tensor(float(want))
                still = still and bool((cut[k] == want.to(cut[k])).all())
        if still:
            return None
        if not both:
            return cut
        used = torch.stack([cut[k].movedim(layout[k].axis("r"), 0).flatten(1).ne(0).any(1) for k in both]).any(0)
        if used.all() or not used.any():
            return cut
        keep = used.nonzero()[:, 0]
        return {k: t if layout[k].axis("r") is None else t.index_select(layout[k].axis("r"), keep) for k, t in cut.items()}

    def _hyper(self, d, path, rank):
        """Hyperparameters of the method at one module, patterns and rank-stabilised scales worked in."""
        c, hyper = self.config, {}
        for key, name in d.get("fields", {}).items():
            if key in c:
                hyper[name] = c[key]
        if "factor" in d:
            alpha, r, eps = d["scale"]
            _int(c, r, self.where)
            top, size = self._pattern("alpha_pattern", path, c.get(alpha)), c[r]
            if d.get("patterns") == "number":
                size = self._pattern("rank_pattern", path, size)
                if size != rank:
                    raise BadState(f"{self.folder}: {path} has rank {rank}, and {files.CONFIG} says {size!r:.20}. One of them is from "
                                   "another adapter.")
            elif rank is not None and rank > size:
                raise BadState(f"{self.folder}: {path} has rank {rank}, more than {r}={size}. One of them is from another adapter.")
            if type(top) not in (int, float) or not math.isfinite(top):
                raise BadState(f"{self.where}: {alpha} must be a number, not {json.dumps(top)[:40]}.")
            factor = top / math.sqrt(size) if c.get("use_rslora") else top / (size + eps)
            names = d["factor"]
            hyper |= {names[0]: factor * size, names[1]: size} if len(names) > 1 else {names[0]: factor}
        return hyper

    def _pattern(self, key, path, default):
        for k, v in (self.config.get(key) or {}).items():
            if re.match(rf"(.*\.)?({k})$", path):
                return v
        return default

    def _try(self, what, fn, *args):
        try:
            return fn(*args)
        except (ValueError, RuntimeError, KeyError, IndexError, TypeError) as e:
            raise WrongBase(f"{self.folder}: {what} does not fit ({' '.join(str(e).split())[:160]}). Load the base it was made for, or "
                            "take the adapter from its source.") from None

    # ---- one tensor for the whole model
    def _prompted(self, tensors):
        m, d = self._kinds()[0]
        n, task = _int(self.config, "num_virtual_tokens", self.where), self.config.get("task_type")
        if list(tensors) != ["prompt_embeddings"] or tensors["prompt_embeddings"].dim() != 2:
            raise BadState(f"{self.folder}: a prompt is one tensor, prompt_embeddings, of two axes; here are {', '.join(tensors)[:100]}. "
                           "Save it again.")
        t = tensors["prompt_embeddings"]
        double = self.config.get("num_transformer_submodules") == 2 and len(t) == 2 * n
        if len(t) != n and not double:
            raise BadState(f"{self.folder}: prompt_embeddings has {len(t)} rows, and {files.CONFIG} says {n} virtual tokens.")
        if task not in TASKS.values() or task != _task(self.body, self.config, {}):
            raise DoesNotFit(f"{self.where}: a prompt for task_type {task!r:.40} acts inside another class of peft's than a "
                             f"{type(self.body).__name__} here. Read are prompts of {' and '.join(sorted(set(TASKS.values())))}.")
        here = [s for s in find(self.every, m.at) if s.tower in ("", "encoder" if task == "SEQ_2_SEQ_LM" else "")]
        for s in here:
            if why := d["prompt"]["why"](s):
                raise DoesNotFit(f"{self.folder}: {m.__name__} at {s.name} would be something else than peft computes. {why}")
        if not here:
            raise DoesNotFit(f"{self.folder}: a {type(self.body).__name__} has no place for a prompt of {self.kind}.")
        states = self._try("prompt_embeddings", d["prompt"]["read"], t[:n], here)       # of a double prompt peft runs the first half
        return [self._step(m, dict(n=n, **d.get("given", {})), dict(zip(here, states, strict=True)))]

    # ---- modules that are kept whole
    def _copies(self, copied, prefix=None):
        groups, prefix = {}, self.prefix if prefix is None else prefix
        for key, t in copied.items():
            path, _, param = key.removeprefix(ROOT).rpartition(".")
            full = f"{prefix}{path}"
            held = [s for s in self.every if s.kind == "weight" and s.path == full and param in (s.param, s.bias)]
            if not key.startswith(ROOT) or not held:
                raise WrongBase(f"{self.folder}: {key!r:.120} is no parameter of this {type(self.body).__name__}. "
                                f"{nearest(path, [s.path for s in self.every])} Load the base it was made for.")
            for s in held:
                P = fetch(s.module, param)
                if t.shape != P.shape:
                    raise WrongBase(f"{self.folder}: {path}.{param} has shape {tuple(t.shape)}, and this base's {tuple(P.shape)}. Load "
                                    "the base it was made for.")
                groups.setdefault(s, {})["bias" if param == s.bias else "weight"] = (s.read_b if param == s.bias else s.read)(t)
        if not groups:
            return []
        for s, have in groups.items():
            if s.bias and "bias" not in have or "weight" not in have:
                raise BadState(f"{self.folder}: of {s.path} only {', '.join(have)} is there. The file is incomplete.")
        m, d = self._copier(set(groups))
        steps = [{}]
        for s, have in groups.items():
            state = {d["copies"][k]: t for k, t in have.items()}
            twin = next((o for o in steps[0] if s.name in o.tied), None)
            if twin is None:
                steps[0][s] = state
            elif not all(t.equal(steps[0][twin][k]) for k, t in state.items()):
                steps.append({s: state})                   # a tied weight of which two copies went apart
        return [self._step(m, {}, states) for states in steps]

    def _copier(self, wanted):
        """Of the methods that keep whole modules, the one whose own sites are the fewest that include these."""
        fits = []
        for m, d in declared().values():
            if "copies" in d:
                try:
                    own = set(find(self.every, m.at))
                except NoSuchSite:
                    own = set()
                fits.append((not wanted <= own, len(own), m.__name__, m, d))
        return min(fits)[3:]

    # ---- the chain
    def _step(self, m, hyper, states):
        text = _selector(self.every, set(states))
        try:
            made = m(**hyper, at=text) if text != m.at else m(**hyper)
        except LuthierError as e:
            raise DoesNotFit(f"{self.where}: {e}") from None
        return made, {s.name: state for s, state in states.items()}

    def attach(self, model, steps, name):
        chain = Chain(tuple(m for m, _ in steps))
        filler = Filler(self.folder, steps)
        filler.check(self.base, chain)
        tuned = attach(model, chain, name=name, state=filler)
        tuned.extra, tuned.told = {}, list(dict.fromkeys(self.told))
        return tuned


def _selector(every, wanted):
    """A selector that finds exactly these sites: by role where a role has no others, else by name."""
    words, left = [], {s: None for s in every if s in wanted}
    for s in list(left):
        if s not in left:
            continue
        tail = s.name.partition(f"block.{s.block}.")[2] if s.block is not None else ""
        for word in ([f"{s.tower}.{tail}", tail] if s.tower else [tail])[::-1] if tail else []:
            got = set(find(every, word)) if not fnmatch.fnmatchcase(word, "*[[*?]*") else set()
            if got and got <= wanted:
                words.append(word)
                left = {o: None for o in left if o not in got}
                break
        else:
            words.append(s.name)
            left.pop(s)
    return " ".join(words)


class Filler:
    """Hands `attach` the states that were read: (key, init) -> dict. `check` compares all of them with what the methods make, on
    shapes alone, before anything is attached."""

    def __init__(self, folder, steps):
        self.folder, self.made, self.shared = folder, {}, {}
        for i, (m, states) in enumerate(steps):
            for site, state in states.items():
                self.made[f"{i}:{type(m).__name__}@{site}".replace(".", "/")] = (m, site, state)

    def check(self, base, chain):
        from ..attach import plan

        for step in plan(base, chain).steps:
            pool = {}
            for r, s in enumerate(step.sites):
                b = s.bound(seed=0, step=step.number, pool=pool, n_sites=len(step.sites), rank=r)
                pool.setdefault("sites", []).append(b)
            for b in pool["sites"]:
                key = f"{step.number}:{type(step.method).__name__}@{b.name}".replace(".", "/")
                if key in self.made:
                    self._merged(key, call(step.method, "init", site=b, seen=None) or {})

    def __call__(self, key, init):
        return self._merged(key, init() or {}) if key in self.made else None

    def _merged(self, key, made):
        m, site, state = self.made[key]
        new = dict(made)
        for k, t in state.items():
            old = made.get(k)
            if not isinstance(old, torch.Tensor):
                raise DoesNotFit(f"{self.folder}: at {site}, {m!r} has no {k} (it has {', '.join(made) or 'nothing'}): what the file "
                                 "does there is something else. Merge it in the tool that wrote it.")
            if t.shape != old.shape and not (m.has("step") and t.dim() == old.dim()):
                raise WrongBase(f"{self.folder}: {k} at {site} has shape {tuple(t.shape)}, and {m!r} makes it {tuple(old.shape)} on this "
                                "base. Load the base it was made for.")
            cast = t.to(old.dtype)
            if not cast.to(t.dtype).equal(t):
                raise DoesNotFit(f"{self.folder}: {k} at {site} is {t.dtype}, and this base is {old.dtype}, which would round it. Load "
                                 "the base in the adapter's precision.")
            cast = cast.to(old.device) if not old.is_meta else cast
            new[k] = nn.Parameter(cast.clone()) if isinstance(old, nn.Parameter) else self._once(old, cast)
        missing = [k for k, v in made.items() if isinstance(v, nn.Parameter) and k not in state]
        if missing:
            raise BadState(f"{self.folder}: at {site} the file lacks what {m!r} trains there ({', '.join(missing)}).")
        return new

    def _once(self, old, new):
        """One object for all sites whose init shares one, where the values are the same too."""
        for was, kept in self.shared.setdefault(id(old), []):
            if was is old and kept.dtype == new.dtype and kept.equal(new):
                return kept
        self.shared[id(old)].append((old, new))
        return new
