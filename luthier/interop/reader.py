"""A peft folder as a Tuned: every setting, name and shape is checked before anything is attached."""

import fnmatch
import json
import math
import re
from pathlib import Path

import torch
from torch import nn

from ..attach import attach, base_of, plan
from ..errors import BadState, DoesNotFit, LuthierError, NoSuchSite, WrongBase, nearest
from ..host.patch import fetch
from ..method import Chain, call
from ..site import find, sites
from . import files
from .layout import layouts, rows_of
from .settings import COPIES, ROOT, TASKS, WRAP, declared, selected, task_of, tensors_of, understood, whole


def read(folder, config, model, name=None):
    """Attach what a peft folder holds; see luthier.interop.read."""
    from ..tasks import Headed

    understood(folder, config)
    base, tensors = base_of(model), files.tensors(folder)
    body, prefix = (base.backbone, "backbone.") if isinstance(base, Headed) else (base, "")
    files.same_base(folder, base, body)
    reader = Reader(folder, config, base, body, prefix)
    steps = reader.steps(tensors)
    return reader.attach(model, steps, name)


class Reader:
    """One folder on its way to a chain with states."""

    def __init__(self, folder, config, base, body, prefix):
        self.folder, self.config, self.base, self.body, self.prefix = folder, config, base, body, prefix
        self.where, self.kind = Path(folder) / files.CONFIG, config["peft_type"]
        self.every, self.told, self.old = sites(base), [], {}
        self.modules = dict(body.named_modules(remove_duplicate=False))
        held = {}
        for s in self.every:
            if s.kind == "weight":
                held.setdefault((s.path.removeprefix(prefix), s.param), []).append(s)
        self.held = held

    def steps(self, tensors):
        """[(method, {site name: state tensors})], every name and shape checked."""
        if any("prompt" in d for _, d in self._kinds()):
            steps = self._prompted(tensors)
        else:
            tensors = self._renamed(tensors)
            self._bases(tensors)
            copied = self._split(tensors)
            if self.kind == COPIES:
                kept = {k.replace(".ln_tuning_layers.", "."): t for k, t in tensors.items()}
                self._chosen({k[len(ROOT):].partition(".ln_tuning_layers.")[0] for k in tensors})
                steps = self._copies(kept | copied)
            else:
                steps = self._tuned(tensors) + self._copies(copied)
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

    def _renamed(self, tensors):
        """Modules by the names that transformers gives them today, where the adapter is older; `old` remembers its own names."""
        new = {}
        for key, t in tensors.items():
            path = key.removeprefix(ROOT)
            dots = [i for i, c in enumerate(path) if c == "."]
            known = any(path[:i] in self.modules and self.modules[path[:i]]._parameters for i in dots)
            for i in dots[::-1] if key.startswith(ROOT) and not known else ():
                name = _today(self.body, path[:i])
                if name != path[:i] and name in self.modules and not self.modules[name]._modules:
                    self.old[name], key = path[:i], f"{ROOT}{name}{path[i:]}"
                    break
            new[key] = t
        return new

    def _bases(self, tensors):
        """Where peft saved an embedding of the base beside the adapter, it must be this base's own."""
        for key in list(tensors):
            path, _, param = key.removeprefix(ROOT).rpartition(".")
            path = path.removesuffix(".base_layer")
            mine = self.modules.get(path)
            mine = mine._parameters.get(param) if mine is not None else None
            if mine is None or not key.startswith(ROOT) or self._kept(path):
                continue
            if mine.shape != tensors[key].shape or not mine.detach().cpu().equal(tensors[key].to(mine.dtype)):
                raise WrongBase(f"{self.folder} carries a {path}.{param} of {tuple(tensors[key].shape)} that is not this base's "
                                f"{tuple(mine.shape)}: the base was changed (new tokens?) before it was tuned. Load that base.")
            del tensors[key]

    def _kept(self, path):
        """Whether modules_to_save names this module, or one that it is in."""
        words = tuple(self.config.get("modules_to_save") or ())
        above = [path[:i] for i, c in enumerate(path) if c == "."] + [path]
        return bool(words) and any(a.endswith(words) and a in self.modules for a in above)

    def _split(self, tensors):
        """Take the tensors of modules_to_save out of `tensors`."""
        words, out = self.config.get("modules_to_save") or (), {}
        if "" in words:
            raise BadState(f"{self.where}: an empty name in modules_to_save.")
        for key in list(tensors):
            if key.startswith(ROOT) and self._kept(key[len(ROOT):].rpartition(".")[0]):
                out[key] = tensors.pop(key)
        for w in words:
            if not any(f".{k}".count(f"{w}.") for k in out):
                if any(n.endswith(w) and any(True for _ in m.parameters()) for n, m in self.modules.items()):
                    raise BadState(f"{self.folder}: modules_to_save names {w!r}, and the file has no tensor of it. Save again.")
                self.told.append(f"modules_to_save names {w!r}, which this model does not have; the file holds nothing of it.")
        return out

    # ---- one adapter a module
    def _tuned(self, tensors):
        m, d = self._method()
        lines = d.get("tensors", {}).keys() | {k for one in d.get("of", {}).values() for k in one}
        names = sorted(lines or d["names"], key=len, reverse=True)
        common, found = {}, {}
        for key, t in tensors.items():
            if key.startswith(WRAP) and key[len(WRAP):] in d.get("shared", ()):
                common[key[len(WRAP):]] = t
                continue
            tail = next((n for n in names if key.endswith("." + n)), None)
            if tail is None and any(key.endswith("." + n) for n in d.get("shared", ())):
                continue                                   # peft repeats what is shared at every module
            if not key.startswith(ROOT) or tail is None:
                kin = [k for _, o in self._kinds() for one in (o.get("tensors", {}), *o.get("of", {}).values()) for k in one]
                if key.startswith(ROOT) and any(key.endswith("." + k) for k in kin):
                    raise DoesNotFit(f"{self.folder}: {key!r:.120}: {m.__name__} is read at {d['layers'].replace(' ', ' or ')} "
                                     "layers only. Merge in peft first.")
                raise BadState(f"{self.folder}: {key!r:.120} is no tensor of {self.kind}. Known: {ROOT}MODULE."
                               f"{f', {ROOT}MODULE.'.join(names)}. Save the adapter with peft's save_pretrained.")
            found.setdefault(key[len(ROOT):-len(tail) - 1], {})[tail] = t
        self._chosen(set(found))
        groups = {}
        for path, ts in found.items():
            for hyper, site, state in self._at(m, d, path, ts, common):
                k = 0                                      # one step would give the two sides of a tied weight one state
                while any(site.name in o.tied for o in groups.get((hyper, k), ())):
                    k += 1
                groups.setdefault((hyper, k), {})[site] = state
        return [self._step(m, dict(hyper), states) for (hyper, _), states in groups.items()]

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
            raise BadState(f"{self.where} names no target_modules, so what peft would adapt is not known. Save the adapter "
                           "again.")
        if target == "all-linear":
            return
        wanted = {n for n in every if n and self._targeted(self.old.get(n, n))}
        for path in sorted(paths - wanted):
            raise BadState(f"{self.folder} has tensors for {path}, which target_modules does not select: peft would leave them "
                           "out. Correct target_modules, or take the adapter from its source.")
        lost = sorted(wanted - paths)
        lost = [n for n in lost if any(n == p for p, _ in self.held)]
        if lost:
            raise BadState(f"{self.folder}: target_modules selects {lost[0]}, and the file has no tensor for it"
                           f"{f' (and {len(lost) - 1} more)' * (len(lost) > 1)}. It is incomplete: take it from its source.")

    def _targeted(self, name):
        c = self.config
        out, saved, target = c.get("exclude_modules"), c.get("modules_to_save") or (), c["target_modules"]
        if out and (re.fullmatch(out, name) if isinstance(out, str) else selected(out, name)):
            return False
        if any(re.match(rf"(^|.*\.){re.escape(w)}($|\..*)", name) for w in saved):
            return False
        if isinstance(target, str):
            return bool(re.fullmatch(target, name))
        if not selected(target, name) or name in target:
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
            raise DoesNotFit(f"{self.folder}: {path} is a {what}, and {m.__name__} is read at "
                             f"{d['layers'].replace(' ', ' or ')} layers only. Merge in peft first.")
        lines = tensors_of(d, held[0].layout) if "tensors" in d else dict.fromkeys(d["names"])
        lost = [k for k in lines if k not in ts]
        if lost or ts.keys() - lines.keys():
            raise BadState(f"{self.folder}: {path} lacks {lost[0]}. The file is incomplete: take it from its source."
                           if lost else f"{self.folder}: {path} has {min(ts.keys() - lines.keys())}, which means nothing there.")
        if "read" in d:
            if len(held) > 1 or held[0].rows is not None:
                raise DoesNotFit(f"{self.folder}: {path} is several weights in one module, and {self.kind} of the whole is "
                                 "none of its parts. Merge in peft first.")
            state, hyper = self._try(path, d["read"], ts | common, held[0], self.config)
            return [(tuple({**hyper, **d.get("given", {})}.items()), held[0], state)]
        n = held[0].whole(held[0].parameter).shape[0]
        layout = {k: self._which(d, lines[k], self.old.get(path, path)) for k in ts}
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
                    raise DoesNotFit(f"{self.folder}: {path} is several weights in one module, and {', '.join(ts)} act on the "
                                     "input of all of them. Merge in peft first.")
                cut = self._trimmed(d, layout, cut, s)
                if cut is None:
                    continue
            mine = dict(hyper)
            size = next((t.shape[layout[k].axis("r")] for k, t in cut.items() if layout[k].axis("r") is not None), None)
            if size is not None and size != rank and len(d["factor"]) > 1 and d.get("patterns") == "number":
                top, below = d["factor"]
                mine[top], mine[below] = mine[top] / mine[below] * size, size
            state = {layout[k].name: layout[k].read(t) for k, t in cut.items()}
            for name, makes in d.get("makes", {}).items():
                if name in state and name not in self._made(m, s):
                    mine |= makes(s)
            new.append((tuple({**mine, **d.get("given", {})}.items()), s, state))
        if not covered.all():
            raise DoesNotFit(f"{self.folder}: {path} has rows that are no weight of their own here. Merge in peft first.")
        if len(held) > 1:
            self.told.append(f"{path} is one module of several weights: its adapter is kept row by row, at "
                             f"{', '.join(s.name for _, s, _ in new)}.")
        return new

    def _made(self, m, s):
        return call(m(), "init", site=s.bound(0, 0, {}, 1, 0), seen=None, rows=slice(None), model=self.base)

    def _which(self, d, line, path):
        """Of a tensor's alternative layouts, the one that the settings name for this module."""
        made = layouts(line)
        for key, name in d.get("listed", {}).items():
            value = self.config.get(key) or []
            inside = bool(re.fullmatch(value, path)) if isinstance(value, str) else path.endswith(tuple(value))
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
            whole(c, r, self.where)
            name = self.old.get(path, path)
            numbers = d.get("patterns") == "number"
            top, size = self._pattern("alpha_pattern", name, c.get(alpha)) if numbers else c.get(alpha), c[r]
            if numbers:
                size = self._pattern("rank_pattern", name, size)
                if size != rank:
                    raise BadState(f"{self.folder}: {path} has rank {rank}, and {files.CONFIG} says {size!r:.20}. One of them "
                                   "is from another adapter.")
            elif rank is not None and rank > size:
                raise BadState(f"{self.folder}: {path} has rank {rank}, more than {r}={size}. One of them is from another "
                               "adapter.")
            if type(top) not in (int, float) or not -1e30 < top < 1e30 or eps and top <= 0:
                raise BadState(f"{self.where}: {alpha} must be a number, not {json.dumps(top)[:40]}.")
            factor = top / math.sqrt(size) if c.get("use_rslora") and numbers else top / (size + eps)
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
            raise WrongBase(f"{self.folder}: {what} does not fit ({' '.join(str(e).split())[:160]}). Load the base it was made "
                            "for, or take the adapter from its source.") from None

    # ---- one tensor for the whole model
    def _prompted(self, tensors):
        m, d = self._kinds()[0]
        n, task = whole(self.config, "num_virtual_tokens", self.where), self.config.get("task_type")
        if task not in TASKS.values() or task != task_of(self.body, self.config, {}):
            raise DoesNotFit(f"{self.where}: a prompt for task_type {task!r:.40} acts inside another class of peft's than a "
                             f"{type(self.body).__name__} here. Read are prompts of "
                             f"{' and '.join(sorted(set(TASKS.values())))}.")
        if list(tensors) != ["prompt_embeddings"] or tensors["prompt_embeddings"].dim() != 2:
            raise BadState(f"{self.folder}: a prompt is one tensor, prompt_embeddings, of two axes; here are "
                           f"{', '.join(tensors)[:100]}. Save it again.")
        t = tensors["prompt_embeddings"]
        double = self.config.get("num_transformer_submodules") == 2 and len(t) == 2 * n
        if len(t) != n and not double:
            raise BadState(f"{self.folder}: prompt_embeddings has {len(t)} rows, and {files.CONFIG} says {n} virtual tokens.")
        if self.config.get("modules_to_save"):
            raise DoesNotFit(f"{self.where}: modules_to_save beside a prompt is not read. Save the prompt without it.")
        here = [s for s in find(self.every, m.at) if s.tower in ("", "encoder" if task == "SEQ_2_SEQ_LM" else "")]
        for s in here:
            if why := d["prompt"]["why"](s):
                raise DoesNotFit(f"{self.folder}: {m.__name__} at {s.name} would be something else than peft computes. {why}")
        if not here:
            raise DoesNotFit(f"{self.folder}: a {type(self.body).__name__} has no place for a prompt of {self.kind}.")
        states = self._try("prompt_embeddings", d["prompt"]["read"], t[:n], here)       # of a double prompt the first half runs
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
                    raise WrongBase(f"{self.folder}: {path}.{param} has shape {tuple(t.shape)}, and this base's "
                                    f"{tuple(P.shape)}. Load the base it was made for.")
                groups.setdefault(s, {})["bias" if param == s.bias else "weight"] = (s.read_b if param == s.bias else s.read)(t)
        if not groups:
            return []
        for s, have in groups.items():
            if s.bias and "bias" not in have or "weight" not in have:
                raise BadState(f"{self.folder}: of {s.path} only {', '.join(have)} is there. The file is incomplete.")
        m, d = self._copier(set(groups))
        steps = [{}]
        for s in (s for s in self.every if s in groups):
            state = {d["copies"][k]: t for k, t in groups[s].items()}
            twin = next((o for o in steps[0] if s.name in o.tied), None)
            if twin is None or all(t.equal(steps[0][twin][k]) for k, t in state.items()):
                steps[0][s] = state if twin is None else None                   # None: another view of the same state
            else:
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
        return made, {s.name: state for s, state in states.items() if state is not None}

    def attach(self, model, steps, name):
        chain = Chain(tuple(m for m, _ in steps))
        filler = Filler(self.folder, steps)
        filler.check(self.base, chain)
        tuned = attach(model, chain, name=name, state=filler)
        tuned.extra, tuned.told = {}, list(dict.fromkeys(self.told))
        return tuned


def _today(model, path):
    """The name that transformers gives a module today, by its own table of renamings."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:                                    # before transformers 5 nothing was renamed
        return path
    if not hasattr(getattr(model, "config", None), "model_type"):
        return path
    table = [r for r in get_model_conversion_mapping(model) if type(r) is WeightRenaming]
    return rename_source_key(f"{path}.weight", table, [])[0].removesuffix(".weight")


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
    views = set(find(every, " ".join(words))) - set(wanted)              # an embedding's name means its other views too
    return " ".join([*words, *(f"-{s.name}" for s in every if s in views)])


class Filler:
    """Hands `attach` the states that were read: (key, init) -> dict. `check` compares all of them with what the methods make, on
    shapes alone, before anything is attached."""

    def __init__(self, folder, steps):
        self.folder, self.made, self.shared = folder, {}, {}
        for i, (m, states) in enumerate(steps):
            for site, state in states.items():
                self.made[f"{i}:{type(m).__name__}@{site}".replace(".", "/")] = (m, site, state)

    def check(self, base, chain):
        for step in plan(base, chain).steps:
            pool = {}
            for r, s in enumerate(step.sites):
                b = s.bound(seed=0, step=step.number, pool=pool, n_sites=len(step.sites), rank=r)
                pool.setdefault("sites", []).append(b)
            for b in pool["sites"]:
                key = f"{step.number}:{type(step.method).__name__}@{b.name}".replace(".", "/")
                if key in self.made:
                    self._merged(key, call(step.method, "init", site=b, seen=None, rows=slice(None), model=base) or {})

    def __call__(self, key, init):
        return self._merged(key, init() or {}) if key in self.made else None

    def _merged(self, key, made):
        m, site, state = self.made[key]
        new = dict(made)
        for k, t in state.items():
            old = made.get(k)
            if not isinstance(old, torch.Tensor):
                raise DoesNotFit(f"{self.folder}: at {site}, {m!r} has no {k} (it has {', '.join(made) or 'nothing'}): what "
                                 "the file does there is something else. Merge it in the tool that wrote it.")
            if t.shape != old.shape and not (m.has("step") and t.dim() == old.dim()):
                raise WrongBase(f"{self.folder}: {k} at {site} has shape {tuple(t.shape)}, and {m!r} makes it "
                                f"{tuple(old.shape)} on this base. Load the base it was made for.")
            if t.is_floating_point() != old.is_floating_point():
                raise BadState(f"{self.folder}: {k} at {site} is {t.dtype}, and {m!r} makes it {old.dtype}.")
            cast = t.to(old.dtype)
            if not cast.to(t.dtype).equal(t):
                raise DoesNotFit(f"{self.folder}: {k} at {site} is {t.dtype}, and this base is {old.dtype}, which would round "
                                 "it. Load the base in the adapter's precision.")
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
