"""The rack: many tuned states over one base, a different one for each row of a batch.

    rack = Rack(model, memory="2GB")
    rack.load("alice", "runs/alice")                       # a folder that save() wrote; refused before anything moves
    out = rack(batch, names=["alice", "bob", None, "alice"])         # None: the base model
    ids = rack.generate(input_ids=ids, names=[...], max_new_tokens=20)

`rack(...)` raises RowsFailed after it has run the rows that could be run; `rack.run(...)` returns (outputs, errors) instead.
Either way a row whose adapter is missing or broken fails alone: its outputs are NaN (padding, for generated ids).

Adapters of one chain make a *kind* and share a batch: their states are stacked and the chain's verbs mapped over the rows, see
`rows`. Adapters whose chains differ in numbers only (rank, alpha) are of one kind too where padding their states with zeros
changes nothing, which is tried out on random states before it is believed. Other rows run one kind, or where a verb cannot be
mapped one adapter, after the other; `cost()` says which and why.

States lie on disk, memory-mapped; those in use lie in memory, at most `memory` bytes of them, the least recently used leaving
first. Random bases that all adapters of a kind share (one seed) count to the model; those of other seeds count like states.

Threads may share a rack: they take turns, since rows are told apart by what is bound to the one model.
"""

import copy
import functools
import math
import re
import threading
from collections import Counter, OrderedDict
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from .. import save
from ..attach import base_of
from ..errors import BadState, DoesNotFit, LuthierError, RowsFailed, UnknownName, WrongBase, nearest
from ..host import Host, Owner
from .fold import Refold
from .kind import Adapter, Kind, Resident
from .rows import Learning, NotByRow, NotWithBase, Unlearned

UNITS = {"": 1, "B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}


def size(text):
    """"2GB" -> bytes"""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*", str(text).upper())
    if not found or not float(found[1]):
        raise DoesNotFit(f"memory={text!r} is no size. Write for example \"2GB\" or \"500MB\".")
    unit = found[2] if found[2] in UNITS else found[2] + "B"
    return int(float(found[1]) * UNITS[unit])


def _alone(method):
    """One thread at a time."""
    @functools.wraps(method)
    def locked(self, *args, **kwargs):
        with self._lock:
            return method(self, *args, **kwargs)
    return locked


class Rack:
    """See the head of this file."""

    def __init__(self, model, memory="2GB"):
        self.model = base_of(model)
        where = {p.device for p in self.model.parameters()}
        if len(where) > 1:
            raise DoesNotFit(f"This model lies on several devices ({', '.join(map(str, where))}). A rack needs one.")
        self.device, self.memory, self.used = where.pop(), size(memory), 0
        self.adapters, self.kinds, self.items = {}, [], OrderedDict()
        self.stats, self._lock = Counter(), threading.RLock()
        self._base = None                                  # the base's fingerprint: it is never written, so it is taken once
        self.owner = Owner("rack")                         # keeps the host between kinds
        self.owner.active, self.owner.states, self.owner.chain = False, nn.ModuleDict(), ()

    # -- loading --------------------------------------------------------------------------------------------------------
    @_alone
    def load(self, name, folder):
        """Know the state in `folder` as `name`. All of it is checked now; its tensors stay on disk until they are used."""
        if not isinstance(name, str) or not name:
            raise BadState(f"{name!r} is no name for an adapter. Give a text.")
        if name in self.adapters:
            raise BadState(f"An adapter is called {name!r} already. unload() it first, or choose another name.")
        recipe = save.read(folder)
        try:
            adapter = Adapter(name, folder, recipe)
        except LuthierError as e:
            raise BadState(f"{folder}: its chain cannot be served here. {e}") from e
        self._fits_in(adapter, folder)
        kind = None
        if self._base is not None:
            self._fits(recipe, folder)
            with save._sense(adapter.folder / save.RECIPE):
                kind = next((k for k in self.kinds if k.admits(adapter, recipe)), None)
        if kind is None:
            kind = self._new(folder, recipe)
        elif kind.own_bases(adapter.seed):
            adapter.bytes, kind.many_bases = adapter.bytes + kind.fixed_bytes, True
            self._fits_in(adapter, folder)
        adapter.kind, kind.n = kind, kind.n + 1
        self.adapters[name] = adapter
        self.stats["loads"] += 1
        return self

    def load_all(self, folder):
        """Load every state in the sub-folders of `folder` under the sub-folder's name; returns name -> error of the refused."""
        folder, errors = Path(folder), {}
        if not folder.is_dir():
            raise BadState(f"{folder} is no folder. Give one whose sub-folders hold tuned states.")
        for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
            try:
                self.load(path.name, path)
            except LuthierError as e:
                errors[path.name] = e
        if not self.adapters:
            raise next(iter(errors.values()), BadState(f"{folder} has no sub-folder. Put what `luthier tune` wrote there."))
        return errors

    def _fits_in(self, adapter, folder):
        need = 2 * adapter.bytes
        if need > self.memory:
            raise DoesNotFit(f"{folder} needs {_human(need)} in memory, and this rack may hold {_human(self.memory)}. Give it "
                             f"more: Rack(model, memory=\"{_human(2 * need, True)}\").")

    def _fits(self, recipe, folder):
        want, have = recipe["base"].get("fingerprint"), self._base
        if want != have:
            save._same_base(self.model, recipe, folder)     # says how it differs
            raise WrongBase(f"{folder} was made for another base ({want}; here {have}).")
        host = Host.of(self.model)
        under = [repr(o.chain) for o in host.owners if o.active] if host else []
        if under != recipe["on"]:
            raise WrongBase(f"{folder} was trained on top of {' and '.join(recipe['on']) or 'the bare base'}; this rack stands "
                            f"on {' and '.join(under) or 'the bare base'}. Make another rack for it.")

    def _new(self, folder, recipe):
        on = [k for k in self.kinds if k.owner in self._host_owners()]
        for k in on:
            self._lift(k)
        try:
            kind = Kind(self, folder, recipe)
        except LuthierError:
            self._bare()
            raise
        self._base = recipe["base"]["fingerprint"]
        self.kinds.append(kind)
        return kind

    def _host_owners(self):
        host = Host.of(self.model)
        return host.owners if host else []

    def _lift(self, kind):
        Host.of(self.model).drop(kind.owner)

    def _bare(self):
        host = Host.of(self.model)
        if host is not None and host.owners == [self.owner]:
            host.drop(self.owner)

    @_alone
    def unload(self, name):
        """Forget an adapter; its file stays."""
        adapter = self._named(name)
        del self.adapters[name]
        for key in [k for k in self.items if name in (k[1] if k[0] == "rows" else (k[1],))]:
            self._evict(key)
        adapter.kind.n -= 1
        if not adapter.kind.n:
            kind = adapter.kind
            if kind.owner in self._host_owners():
                self._lift(kind)
            self.kinds.remove(kind)
            if not self.kinds:
                self._bare()
                self._base = None
        return self

    @_alone
    def close(self):
        """Leave the base as it was."""
        for name in list(self.adapters):
            self.unload(name)

    @property
    def names(self):
        return list(self.adapters)

    def __contains__(self, name):
        return name in self.adapters

    def __len__(self):
        return len(self.adapters)

    def __repr__(self):
        return f"Rack({type(self.model).__name__}, {len(self)} adapters, {_human(self.used)} of {_human(self.memory)} used)"

    def _named(self, name):
        if name not in self.adapters:
            raise UnknownName(f"No adapter is called {name!r}. {nearest(name, self.adapters)} load() it first.")
        return self.adapters[name]

    # -- memory ------------------------------------------------------------------------------------------------------------
    def _evict(self, key):
        self.used -= self.items.pop(key).bytes

    def forget(self, kind):
        """Drop what is in memory of a kind (its adapters stay on disk)."""
        for key in [k for k, item in self.items.items() if getattr(item, "kind", None) is kind
                    or isinstance(item, Resident) and item.adapter.kind is kind]:
            self._evict(key)

    def _room(self, need, keep=()):
        while self.used + need > self.memory:
            key = next((k for k in self.items if k not in keep), None)
            if key is None:
                raise MemoryError
            self._evict(key)
            self.stats["evictions"] += 1

    def resident(self, name, keep=()):
        key = ("state", name)
        if key not in self.items:
            adapter = self.adapters[name]
            self._room(adapter.bytes, keep)
            self.items[key] = Resident(adapter, adapter.tensors(self.device), adapter.kind.fixed_of(adapter.seed))
            self.used += adapter.bytes
            self.stats["reads"] += 1
        self.items.move_to_end(key)
        return self.items[key]

    def _mixed(self, kind, names):
        """The composition of these rows, made once for as long as it stays in memory."""
        key = ("rows", tuple(names))
        if key not in self.items:
            there = [n for n in dict.fromkeys(names) if n is not None]
            keep = {("state", n) for n in there}
            residents = {n: self._resident(n, keep) for n in there}
            self._room(kind.row_bytes() * (2 * len(names) + len(there)), keep)      # with what verbs keep: no more than a state
            mixed = kind.compose(list(names), residents)
            tensors = {t.untyped_storage()._cdata: t for s in mixed.states.values() for _, t, d in s if d is not None}
            mixed.bytes = sum(t.untyped_storage().nbytes() for t in tensors.values())
            self.items[key] = mixed
            self.used += mixed.bytes
            self.stats["compositions"] += 1
        self.items.move_to_end(key)
        return self.items[key]

    # -- running ---------------------------------------------------------------------------------------------------------------
    def __call__(self, batch=None, *, names, **kwargs):
        """The model's output for a batch (a dict of its arguments), row i with adapter names[i], None being the base model.
        Where some adapter is missing or broken it raises RowsFailed, which carries the outputs of the other rows."""
        out, errors = self.run(batch, names=names, **kwargs)
        if errors:
            raise RowsFailed(out, errors)
        return out

    def run(self, batch=None, *, names, **kwargs):
        """-> (outputs, {row: error})"""
        return self._run({**(batch or {}), **kwargs}, names, lambda b, first=False: self.model(**b))

    def generate(self, *, names, **kwargs):
        """The model's generate(), row i with adapter names[i]; beams and several sequences a row work as they do there."""
        n = len(list(names))
        batch = {k: v for k, v in kwargs.items() if torch.is_tensor(v) and v.dim() and len(v) == n}
        rest = {k: v for k, v in kwargs.items() if k not in batch}
        fill = next((i for c in (kwargs.get("generation_config"), getattr(self.model, "generation_config", None))
                     if c is not None and (i := c.pad_token_id) is not None), 0)
        fill = kwargs.get("pad_token_id", fill)

        def run(b, first=False):
            short = {k: v for k, v in rest.items() if k not in ("max_length", "min_length", "min_new_tokens", "streamer")}
            return self.model.generate(**b, **(short | {"max_new_tokens": 1} if first else rest))

        out, errors = self._run(batch, names, run, fill)
        if errors:
            raise RowsFailed(out, errors)
        return out

    @contextmanager
    def serving(self, name):
        """Within, the model itself runs with this one adapter."""
        with self._lock:
            adapter = self._named(name)
            with self._serving(adapter.kind, self.resident(name)) as model:
                yield model

    def view(self, names):
        """A model for row i of a data set, which takes adapter names[i]; `serve_rows(rows)` says which rows come next."""
        return View(self, list(names))

    @_alone
    def _run(self, batch, names, fn, fill=None):
        names = list(names)
        rows = {k: len(v) for k, v in batch.items() if torch.is_tensor(v) and v.dim()}
        if not names or rows and len(names) not in rows.values():
            raise DoesNotFit(f"{len(names)} names for a batch of {' or '.join(map(str, sorted(set(rows.values()))))} rows. "
                             "Give one name a row, None for the base model.")
        errors, outs = {}, None
        for i, name in enumerate(names):
            if name is not None and name not in self.adapters:
                errors[i] = UnknownName(f"no adapter is called {name!r}. {nearest(name, self.adapters)} load() it first.")
        flags = [m for m in self.model.modules() if m.training] if self.model.training else []
        self.model.eval() if flags else None               # nothing is dropped while serving
        try:
            with torch.no_grad():
                while outs is None and len(errors) < len(names):
                    outs = self._try(batch, names, errors, fn)
        finally:
            for m in flags:
                m.training = True
        self.stats["rows"] += len(names)
        return (None if outs is None else _joined(outs, len(names), sorted(errors), fill)), errors

    def _try(self, batch, names, errors, fn):
        """[(rows, their outputs)], or None where something was learned on the way: it is noted, and the batch runs anew."""
        use = [None if i in errors else n for i, n in enumerate(names)]
        try:
            return [(at, self._part(kind, [use[i] for i in at], _rows_of(batch, at, len(names)), fn))
                    for kind, at in self._parts(use, set(errors))]
        except _Lost as lost:                               # a state that could not be read: its rows fail
            errors |= {i: lost.error for i, n in enumerate(names) if n == lost.name}
        except _Again:
            pass

    def _parts(self, names, failed):
        """[(kind or None for the base, rows)]: what can run at once. Rows that failed ride along as base rows."""
        groups = {}
        for i, n in enumerate(names):
            groups.setdefault(self.adapters[n].kind if n is not None else None, []).append(i)
        base, parts = groups.pop(None, []), []
        for kind, at in groups.items():
            alone = [i for i in base] if len(groups) == 1 and not (kind.why or kind.no_base) else []
            base = [] if alone else base
            at = sorted(at + alone)
            by = {}
            for i in at:
                by.setdefault(names[i], []).append(i)
            if len(by) == 1 or not kind.why:
                parts += self._chunks(kind, by)
            else:
                parts += [(kind, rows) for rows in by.values()]
        base = [i for i in base if i not in failed]
        return parts + ([(None, base)] if base else [])

    def _chunks(self, kind, by):
        """As many adapters at a time as memory holds; equal names side by side where that makes fewer, larger groups."""
        whole = [i for rows in by.values() for i in rows]
        together = math.gcd(*map(len, by.values()))
        if len(by) == 1:
            return [(kind, sorted(whole))]
        if 2 * kind.row_bytes() * (len(whole) // together + len(by)) <= self.memory:
            return [(kind, whole if together > 1 else sorted(whole))]
        half = list(by.items())
        middle = len(half) // 2
        return [p for part in (half[:middle], half[middle:]) for p in self._chunks(kind, dict(part))]

    def _part(self, kind, names, batch, fn):
        """One run of the model: one state, or one for each group of rows."""
        if kind is None or set(names) == {None}:
            return fn(batch)
        distinct = list(dict.fromkeys(names))
        if len(distinct) == 1:
            with self._serving(kind, self._resident(distinct[0])):
                return fn(batch)
        first = next(n for n in distinct if n is not None)
        try:
            if not kind.learned:
                self._learn(kind, first, _rows_of(batch, [0], len(names), spare=True), fn)
            g = math.gcd(*(len(r) for r in _runs(names)))
            mixed = self._mixed(kind, names[::g])
            with self._serving(kind, self._resident(first), mixed):
                mixed.met = {}
                out = fn(batch)
            if kind.learned is not True:
                self._see(kind, mixed, len(names))
            return out
        except NotWithBase as e:
            kind.no_base = str(e)
        except NotByRow as e:
            kind.why = str(e)
        except Refold:
            self._drop_rows(kind)
        except Unlearned:
            kind.tries, kind.learned = kind.tries + 1, False
            if kind.tries > 2:
                kind.why = "The model's path through its modules differs from run to run."
            self._drop_rows(kind)
        raise _Again

    def _resident(self, name, keep=()):
        try:
            return self.resident(name, keep)
        except BadState as e:
            self.stats["lost"] += 1
            raise _Lost(name, e) from e

    def _drop_rows(self, kind):
        for key in [k for k, item in self.items.items() if k[0] == "rows" and item.kind is kind]:
            self._evict(key)
        for item in self.items.values():
            if isinstance(item, Resident) and item.adapter.kind is kind:
                self.used -= item.bytes - item.adapter.bytes
                item.folded, item.bytes = {}, item.adapter.bytes

    @contextmanager
    def _serving(self, kind, resident, rows=None):
        """Within, the model runs with one state, or with one a row."""
        if kind.owner not in self._host_owners():
            for k in self.kinds:
                if k.owner in self._host_owners():
                    self._lift(k)
            kind.put()
        host = Host.of(self.model)
        if [o for o in host.owners if o.active] != kind.under:
            raise WrongBase(f"What is on under this rack has changed: its adapters stand on "
                            f"{' and '.join(kind.recipe['on']) or 'the bare base'}. Switch that, and nothing else, on again.")
        kind.bind(resident)
        try:
            kind.owner.active, host.rows = True, rows
            host.refresh()
            yield self.model
        finally:
            kind.owner.active, host.rows = False, None
            host.refresh()

    def _learn(self, kind, name, batch, fn):
        """One row, one state: which verbs compute what from the state alone, and how many of everything a row has."""
        resident = self._resident(name)
        runs = Learning(kind, 1)
        runs.held = resident
        with self._serving(kind, resident, runs), torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            fn(batch, first=True)                          # what is sampled is the same the first time and later
        kind.seen, kind.learned = runs.met, kind.learned or "once"

    @staticmethod
    def _see(kind, mixed, rows):
        """Every place had as many times more of everything as there are rows, or one for all: rows come first there."""
        for place, n in mixed.met.items():
            one = kind.seen.get(place)
            if one is not None and n != one * rows and not n == one == 1:
                name = type(getattr(place, "module", None) or place.site.module).__name__
                raise NotByRow(f"{name} is called with {one} of something for one row and {n} for {rows}: rows are not its "
                               "first dimension.")
        kind.learned = True

    # -- what it costs ----------------------------------------------------------------------------------------------------
    def cost(self):
        """What the rack holds and how it serves: plain numbers and words."""
        def kind(k):
            differ = {i: sorted(v) for i, v in k.varying.items() if v}
            return dict(chain=repr(k.chain), adapters=k.n, numbers_that_differ=differ,
                        bytes_each=max(a.bytes for a in self.adapters.values() if a.kind is k), shared_bytes=k.fixed_bytes,
                        served="adapter by adapter" if k.why else "row by row", why=k.why, base_apart=k.no_base,
                        looped=sorted(set(k.looped.values())), traces=sum(t is not None for t in k.frozen.made.values()))

        return dict(adapters=len(self), memory=self.memory, used=self.used,
                    in_memory=sum(k[0] == "state" for k in self.items), compositions=sum(k[0] == "rows" for k in self.items),
                    bytes_on_disk=sum(a.bytes for a in self.adapters.values()), counts=dict(self.stats),
                    kinds=[kind(k) for k in self.kinds])


class _Lost(Exception):
    def __init__(self, name, error):
        self.name, self.error = name, error


class _Again(Exception):
    """Something was learned about a kind: the same batch is divided anew."""


def _runs(names):
    """Maximal runs of equal names."""
    out = []
    for n in names:
        if out and out[-1][-1] == n:
            out[-1].append(n)
        else:
            out.append([n])
    return out


def _rows_of(batch, at, n, spare=False):
    """The rows `at` of n in a model's arguments, also where they lie in tuples (an encoder's outputs). A KV cache, which the run
    writes to, is not divided; `spare`: a copy will do."""
    if at == list(range(n)):
        return batch
    def rows(v):
        if torch.is_tensor(v) and v.dim() and len(v) == n:
            return v[torch.tensor(at, device=v.device)]
        if isinstance(v, dict):
            return type(v)(**{k: rows(x) for k, x in v.items()})
        if type(v) in (tuple, list) and any(torch.is_tensor(x) for x in v):
            return type(v)(map(rows, v))
        if hasattr(v, "batch_select_indices"):
            if not spare:
                raise DoesNotFit("These rows run in parts, and a cache of keys and values goes with all of them at once. Use "
                                 "rack.generate(...), or put rows together whose adapters are of one kind.")
            v = copy.deepcopy(v)
            v.batch_select_indices(torch.tensor(at))
        return v

    return {k: v if k == "cache_position" else rows(v) for k, v in batch.items()}


def _joined(outs, n, failed, fill=None):
    """The outputs of several runs as one, in the rows' order; rows that failed are blanked. What has no rows (a loss, a cache)
    is left out when there was more than one run."""
    whole = len(outs) == 1 and outs[0][0] == list(range(n))
    if whole and not failed:
        return outs[0][1]

    def join(parts):
        x = parts[0]
        if torch.is_tensor(x) and x.dim() and all(torch.is_tensor(y) and y.dim() and len(y) % len(at) == 0
                                                  for y, (at, _) in zip(parts, outs, strict=True)):
            k = len(x) // len(outs[0][0])
            wide = tuple(max(y.shape[d] for y in parts) for d in range(1, x.dim()))
            blank = fill if fill is not None else float("nan") if x.dtype.is_floating_point else 0
            out = x.new_full((n * k, *wide), blank)
            for y, (at, _) in zip(parts, outs, strict=True):
                rows = (torch.tensor(at)[:, None] * k + torch.arange(k)).flatten().to(x.device)
                out[(rows, *(slice(0, d) for d in y.shape[1:]))] = y
            for i in failed:
                out[i * k:(i + 1) * k] = blank
            return out
        if isinstance(x, tuple) and x and all(isinstance(y, tuple) and len(y) == len(x) for y in parts):
            made = [join(list(column)) for column in zip(*parts, strict=True)]
            return type(x)(*made) if hasattr(x, "_fields") else tuple(made)
        return x if whole and not torch.is_tensor(x) else None

    first = outs[0][1]
    if isinstance(first, dict):                             # a transformers output keeps its class
        keys = [k for k in first if all(k in o for _, o in outs)]
        made = {k: join([o[k] for _, o in outs]) for k in keys}
        return type(first)(**{k: v for k, v in made.items() if v is not None})
    return join([o for _, o in outs])


class View:
    """A rack as a model whose rows belong to a data set: what `task.predict` runs. A row that fails is noted in `errors`."""

    training = False

    def __init__(self, rack, names):
        self.rack, self.names, self.rows, self.errors = rack, names, range(len(names)), {}

    def serve_rows(self, rows):
        self.rows = list(rows)

    def __call__(self, **batch):
        out, errors = self.rack.run(batch, names=[self.names[i] for i in self.rows])
        self.errors |= {self.rows[i]: e for i, e in errors.items()}
        return out if out is not None else self.rack.model(**batch)

    def generate(self, **kwargs):
        try:
            return self.rack.generate(names=[self.names[i] for i in self.rows], **kwargs)
        except RowsFailed as e:
            self.errors |= {self.rows[i]: why for i, why in e.errors.items()}
            return kwargs["input_ids"] if e.outputs is None else e.outputs

    def train(self, mode=True):
        return self

    eval = train

    def parameters(self):
        return self.rack.model.parameters()


def _human(n, text=False):
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1024 or unit == "TB":
            return f"{math.ceil(n)}{unit}" if text else f"{n:.3g} {unit}"
        n /= 1024
