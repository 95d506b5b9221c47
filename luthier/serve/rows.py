"""A state for each row of a batch: a method's own verbs, mapped over the rows. No method knows of it.

Verbs are pure in their state, so `vmap(verb)` over states with a leading row axis is the mixed batch: row i meets state i and
nothing else. Two things make it cheap, and follow from purity too:

    fold     what a verb computes from its state alone (DoRA's norm, a prefix's MLP) is computed once per state and kept
    freeze   a verb that has met the same shapes often is traced once, and the plain tensor program is run from then on

A verb that cannot be mapped (it looks at values, or calls what has no batching rule) runs once for each distinct state.
"""

import copy
from dataclasses import is_dataclass, replace

import torch
from torch.func import vmap

from ..errors import DoesNotFit
from ..host import Entry
from ..host.patch import put, take
from ..method import call
from ..save import _plain
from ..state import Overlay
from .fold import Numbering, Program, Refold, blank, flat, flat_tensors, rebuilt

SMALL = 1 << 18                          # entries of a weight up to which it is made for all rows at once; else state by state


class NotByRow(DoesNotFit):
    """This place cannot have a state for each row: the rack serves the batch adapter by adapter instead."""


class NotWithBase(NotByRow):
    """Adapters can share a batch here, but not with rows of the base model."""


class Unlearned(Exception):
    """A verb that the first run of this kind did not meet."""


class Held:
    """A state as verbs see it, without a module's weight."""

    training = False

    def __init__(self, tensors, key="", site_name=""):
        self.__dict__.update(tensors)
        self.key, self.site_name = key, site_name


class RowEntry(Entry):
    """An entry of a rack: it runs with one state, or, while the host has rows, with a state for each of them."""

    def __init__(self, e, host, where):
        self.__dict__.update(e.__dict__)
        self.host, self.where, self.step = host, where, int(e.state.key.split(":")[0])
        self.key, self.site_name, self.plain = e.state.key, e.state.site_name, dict(_plain(e.state))

    def act(self, verb, **have):
        rows = self.host.rows
        return super().act(verb, **have) if rows is None else getattr(rows, verb)(self, **have)

    def bound(self, tensors, hyper):
        """This entry with other state and hyperparameters; what it binds may be mapped over rows."""
        new = copy.copy(self)
        new.shared = {}
        new.state = Held({**self.plain, **tensors}, self.key, self.site_name)
        if hyper:
            new.method = copy.copy(self.method)
            for name, value in hyper.items():
                object.__setattr__(new.method, name, value)
        if self.method.has("produce"):
            new.state = Overlay(new.state, new.method.produce({}, new.state))
        return new


def _memory(x):
    """The dict that side networks write to, of a Tokens or of an Attention's Tokens."""
    t = x if hasattr(x, "memory") else getattr(x, "t", None)
    return None if t is None else t.memory


# -- the runs ---------------------------------------------------------------------------------------------------------
class Runs:
    """What the host asks while a rack runs: the weights of a patch, a stream, an attention core."""

    def __init__(self, kind, n):
        self.kind, self.n, self.met = kind, n, {}

    def weights(self, patch, args, kwargs):
        x = args[0] if args else next(iter(kwargs.values()), None)
        self._meet(patch, x)
        if patch.picky and patch.quick and not patch.worth(args, kwargs, self.n):
            with patch.whole():
                return self.weights(patch, args, kwargs)
        if any(isinstance(e, RowEntry) for e in patch.slow):
            y = self.slow(patch, args, kwargs)
        else:
            y = patch._slow(args, kwargs) if patch.slow else patch._base(*args, **kwargs)
        for e in patch.quick:
            have = {}
            if e.fast_wants_weight:
                P, b = patch.tensors(e.param, patch.slow)
                have = {"W": e.site.read(P), "b": None if b is None else e.site.read_b(b)}
            ys = y if e.site.rows is None else take(y, e.site.rows)
            new = self.fast(e, x, ys, have) if isinstance(e, RowEntry) else call(e.method, "fast", x=x, y=ys, p=e.p, **have)
            y = new.to(y.dtype) if e.site.rows is None else put(y, e.site.rows, new)
        return y

    def _meet(self, place, x):
        if not isinstance(x, torch.Tensor) or not x.dim():
            raise NotByRow(f"{type(getattr(place, 'module', place)).__name__} is not called with a tensor of rows.")
        self.met.setdefault(place, x.shape[0])

    def whole(self, x, where):
        if x.shape[0] % self.n:
            raise NotByRow(f"{where} meets {x.shape[0]} rows of something, which is not a whole number for each of {self.n}.")

    def split(self, x, where):
        """(rows * k, ...) -> (rows, k, ...)"""
        self.whole(x, where)
        return x.unflatten(0, (self.n, x.shape[0] // self.n))

    def alone(self, patch, args, kwargs):
        if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor):
            raise NotByRow(f"{type(patch.module).__name__} takes more than one tensor, so its weights cannot differ by row.")
        return args[0]


class Learning(Runs):
    """One row, one state: where the rows are, and what every verb computes from its state alone."""

    def _program(self, e, verb, shared, fn):
        """Record fn(entry) with the entry bound to the state; fold until what is kept is small."""
        values, hyper = self.kind.leaves_of(self.held, e)
        names = [*values, *(f"h.{h}" for h in hyper), *(f"w.{w}" for w in shared)]
        leaves = [*values.values(), *hyper.values(), *shared.values()]
        own = sum(t.nbytes for n, t in values.items() if (e, n) not in self.kind.fixed_leaves)
        own -= sum(p.bytes() for (other, v), p in self.kind.programs.items() if other is e and v != verb)
        program = Program(names, own)
        while True:
            with Numbering(program, dict(enumerate(leaves))) as mode:
                try:
                    out = fn(e.bound(values, hyper))
                except Refold:
                    program = Program(names, own, fold=False)
                    continue
                for t in flat_tensors(out):
                    if id(t) in mode.known:
                        program.used(mode.known[id(t)])
            if not program.fold or not program.settle():
                break
        if program.fold and not self._same(e, program, names, leaves, fn, out):
            program = Program(names, own, fold=False)
        self.kind.programs[e, verb] = program
        return out

    def _same(self, e, program, names, leaves, fn, out):
        """Whether the verb says the same when it gets what was kept, and NaN for all that it is said not to need: whatever does
        not pass through torch's own functions (an autograd.Function) is not seen by the numbering."""
        def seen(n, t):
            return t if n in program.live else blank(t.dtype, t.device).expand(t.shape)

        given = {n: t for n, t in zip(names, leaves, strict=True) if n in program.live and n[:2] != "w."} | program.run(leaves)
        shared = {n[2:]: seen(n, t) for n, t in zip(names, leaves, strict=True) if n[:2] == "w."}
        try:
            again = _within(e, program, given, shared, fn, self.kind)
        except Refold:
            return False
        pairs = zip(flat_tensors(out), flat_tensors(again), strict=True)
        return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)

    def fast(self, e, x, y, have):
        shared = {k: v for k, v in have.items() if v is not None}
        return self._program(e, "fast", shared, lambda b: call(b.method, "fast", x=x, y=y, p=b.state, **have | b.shared))

    def output(self, e, x, y, **have):
        if have:
            raise NotByRow(f"{type(e.method).__name__} reads the weight of {e.site.name}, which other rows may have changed.")
        return self._program(e, "output", {}, lambda b: call(b.method, "output", x=x, y=y, p=b.state))

    def slow(self, patch, args, kwargs):
        self.alone(patch, args, kwargs)
        mine = [e for e in patch.slow if isinstance(e, RowEntry)]
        for e in mine:
            self._program(e, "weight", {}, lambda b, e=e: _swapped(patch, {e: b}, args))
        return patch._slow(args, kwargs)

    def stream(self, e, t):
        self._meet(e.where, t.h)
        return self._program(e, "stream", {}, lambda b: call(b.method, "stream", t=t, p=b.state))

    def attend(self, e, a):
        self._meet(e.where, a.q)
        return self._program(e, "attend", {}, lambda b: call(b.method, "attend", a=a, p=b.state))


def _swapped(patch, bound, args):
    """patch._slow with some entries bound to other states for the time of the call."""
    before = patch.slow
    try:
        patch.slow = [bound.get(e, e) for e in before]
        return patch._slow(args, {})
    finally:
        patch.slow = before


class Mixed(Runs):
    """Several states at once. names: one a group of rows, None for the base model."""

    def __init__(self, kind, names, states, device):
        super().__init__(kind, len(names))
        self.names, self.states = names, states            # states: (entry, verb) -> [(leaf or number, tensor, in_dim)]
        self.first = {name: names.index(name) for name in dict.fromkeys(names)}
        base = [n is None for n in names]
        self.direct = {}                                   # (entry, shapes of its inputs) -> (its trace, its states)
        self.base = torch.tensor(base, device=device) if any(base) else None

    def program(self, e, verb):
        if (e, verb) not in self.states:
            raise Unlearned
        return self.kind.programs[e, verb]

    # -- mapping one verb -----------------------------------------------------------------------------------------
    def map(self, e, verb, inputs, dims, fn, shared=None, pure=False):
        """vmap of fn(entry, *inputs) over rows, with the entry bound to each row's state; fn returns a tuple of tensors."""
        shared = shared or {}
        if pure:
            met = (e, *((t.shape, t.stride(), t.dtype) for t in inputs))
            if met in self.direct:
                run, held = self.direct[met]
                return run(*held, *shared.values(), *inputs)
        program, mine = self.program(e, verb), self.states[e, verb]
        if program in self.kind.looped:
            return self.loop(e, verb, inputs, dims, fn, shared)
        held, where = [t for _, t, _ in mine], [n for n, _, _ in mine]

        def one(values, shared, *row):
            return _within(e, program, dict(zip(where, values, strict=True)), shared, lambda b: fn(b, *row), self.kind)

        spec = ([d for _, _, d in mine], dict.fromkeys(shared), *dims)
        try:
            if pure:
                shape = tuple((t.shape, t.dtype, t.stride()) for t in (*inputs, *held, *shared.values()))
                key = (repr(e.method), str(e.plain), program.hash, tuple(where), tuple(spec[0]), tuple(shared), shape)
                run = self.kind.frozen(key, lambda: vmap(one, spec), (held, shared, *inputs))
                if run is not None:
                    self.direct[met] = run, held
                    return run(*held, *shared.values(), *inputs)
            return vmap(one, spec)(held, shared, *inputs)
        except Refold:
            self.kind.plainly(e, verb)
            raise
        except NotByRow:
            raise
        except (RuntimeError, TypeError, NotImplementedError, ValueError) as error:
            out = self.loop(e, verb, inputs, dims, fn, shared)       # raises itself where the verb is at fault
            self.kind.looped[program] = f"{type(e.method).__name__}.{verb}: {' '.join(str(error).split())[:120]}"
            return out

    def loop(self, e, verb, inputs, dims, fn, shared):
        """The same, one distinct state after the other."""
        program, mine = self.kind.programs[e, verb], self.states[e, verb]
        whole, done = None, []
        for name, i in self.first.items():
            rows = [k for k, n in enumerate(self.names) if n == name]
            index = torch.tensor(rows, device=inputs[0].device)
            values = {n: t if d is None else t.select(d, i) for n, t, d in mine}
            outs = []
            for k in rows:                                  # fn sees one row, as under vmap
                row = [x if d is None else x.select(0, k) for x, d in zip(inputs, dims, strict=True)]
                outs.append(_within(e, program, values, shared, lambda b, row=row: fn(b, *row), self.kind))
            done.append((index, [torch.stack(column) for column in zip(*outs, strict=True)]))
        for index, outs in done:
            whole = [o.new_empty(self.n, *o.shape[1:]) for o in outs] if whole is None else whole
            for w, o in zip(whole, outs, strict=True):
                w.index_copy_(0, index, o)
        return tuple(whole)

    # -- what the host asks -------------------------------------------------------------------------------------------
    def output(self, e, x, y):
        return self.fast(e, x, y, {}, "output")

    def fast(self, e, x, y, have, verb="fast"):
        if x.shape[0] == 1 and self.n > 1:
            x, y = x.expand(self.n, *x.shape[1:]), y.expand(self.n, *y.shape[1:])
        self.whole(x, e.site.name)
        xr, yr = x.reshape(self.n, -1, x.shape[-1]), y.reshape(self.n, -1, y.shape[-1])    # (rows, N, d)
        none = {k: None for k, v in have.items() if v is None}
        shared = {k: v for k, v in have.items() if v is not None}

        def one(b, x, y):
            given = {**none, **{k: b.shared[k] for k in shared}}
            return (call(b.method, verb, x=x, y=y, p=b.state, **given),)

        new, = self.map(e, verb, (xr, yr), (0, 0), one, shared, pure=True)
        if self.base is not None:
            new = torch.where(self.base[:, None, None], yr, new)
        return new.reshape(y.shape)

    def slow(self, patch, args, kwargs):
        """Weights made for each row: at once where they are small, else state by state."""
        x = self.alone(patch, args, kwargs)
        mine = [e for e in patch.slow if isinstance(e, RowEntry)]
        if x.shape[0] == 1 and self.n > 1:
            x = x.expand(self.n, *x.shape[1:])
        xr = self.split(x, mine[0].site.name)               # (rows, k, ...)
        programs = [self.program(e, "weight") for e in mine]
        small = max(e.site.d_out * e.site.d_in for e in mine) <= SMALL and not any(p in self.kind.looped for p in programs)
        y = None
        if small:
            def one(values, x):
                bound = {e: _bind(e, p, dict(zip(where, v, strict=True)), self.kind)
                         for e, p, where, v in zip(mine, programs, names, values, strict=True)}
                modes = [m for _, m in bound.values()]
                with _all(modes):
                    out = _swapped(patch, {e: b for e, (b, _) in bound.items()}, (x,))
                if not isinstance(out, torch.Tensor):
                    raise NotByRow(f"{type(patch.module).__name__} returns more than one tensor.")
                return out

            states = [self.states[e, "weight"] for e in mine]
            names = [[n for n, _, _ in s] for s in states]
            try:
                y = vmap(one, ([[d for _, _, d in s] for s in states], 0))([[t for _, t, _ in s] for s in states], xr)
            except Refold:
                for e in mine:
                    self.kind.plainly(e, "weight")
                raise
            except NotByRow:
                raise
            except (RuntimeError, TypeError, NotImplementedError, ValueError) as error:
                for e, p in zip(mine, programs, strict=True):
                    self.kind.looped[p] = f"{type(e.method).__name__}.weight: {' '.join(str(error).split())[:120]}"
        if y is None:
            for name, i in self.first.items():
                rows = torch.tensor([k for k, n in enumerate(self.names) if n == name], device=x.device)
                if name is None:
                    continue
                bound, modes = {}, []
                for e, p in zip(mine, programs, strict=True):
                    values = {n: t if d is None else t.select(d, i) for n, t, d in self.states[e, "weight"]}
                    bound[e], mode = _bind(e, p, values, self.kind)
                    modes.append(mode)
                with _all(modes):
                    out = _swapped(patch, bound, (xr[rows].flatten(0, 1),))
                if not isinstance(out, torch.Tensor):
                    raise NotByRow(f"{type(patch.module).__name__} returns more than one tensor.")
                out = out.unflatten(0, (len(rows), -1))
                y = out.new_zeros(self.n, *out.shape[1:]) if y is None else y
                y = y.index_copy(0, rows, out)
        if self.base is not None:
            before, patch.slow = patch.slow, [e for e in patch.slow if not isinstance(e, RowEntry)]
            try:
                plain = patch._slow((x,), {}) if patch.slow else patch._base(x)
            finally:
                patch.slow = before
            y = torch.where(self.base.view(-1, *[1] * (y.dim() - 1)), plain.unflatten(0, y.shape[:2]), y)
        return y.flatten(0, 1)

    def stream(self, e, t):
        self._meet(e.where, t.h)
        new = self._tree(e, "stream", t, t.h)
        if self.base is not None:
            if new.h.shape != t.h.shape:
                raise NotWithBase(f"{type(e.method).__name__} changes the number of tokens at {e.site.name}, and rows of the "
                                  "base model in the same batch do not.")
            new = replace(new, h=torch.where(self._base_rows(t.h), t.h, new.h))
        return new

    def attend(self, e, a):
        self._meet(e.where, a.q)
        new = self._tree(e, "attend", a, a.q)
        if self.base is not None:
            if self.kind.last_attend(e) is not e or not isinstance(new, torch.Tensor) and new.t is not a.t:
                raise NotWithBase(f"{type(e.method).__name__} does not act alone on {e.site.name}, so rows of the base model "
                                  "cannot share a batch with it.")
            run = new if isinstance(new, torch.Tensor) else new.run()
            return torch.where(self._base_rows(run), a.run(), run)
        return new

    def _base_rows(self, x):
        return self.base.repeat_interleave(x.shape[0] // self.n).view(-1, *[1] * (x.dim() - 1))

    def _tree(self, e, verb, tree, lead):
        """A verb over a Tokens or an Attention: what has as many rows as `lead` is mapped, the rest is the same for all."""
        self.split(lead, e.site.name)
        tensors, k = [], lead.shape[0] // self.n
        memory = _memory(tree)
        spec = flat(tree, tensors)
        dims = [0 if t.dim() and t.shape[0] == lead.shape[0] else None for t in tensors]
        rows = [self.split(t, e.site.name) if d == 0 else t for t, d in zip(tensors, dims, strict=True)]
        made = {}

        def one(b, *row):
            given = rebuilt(spec, row)
            out, result = [], call(b.method, verb, **{"t" if verb == "stream" else "a": given, "p": b.state})
            if verb == "attend" and is_dataclass(result) and result.mask is not None:      # one mask for all rows, made anew
                result = replace(result, mask=result.mask[(None,) * (4 - result.mask.dim())])
            told = _memory(given)
            made["spec"] = flat((result, told), out)
            same = {id(t): i for i, t in enumerate(row)}
            made["from"] = [same.get(id(t)) for t in out]
            return tuple(t for t, i in zip(out, made["from"], strict=True) if i is None)

        new = iter(self.map(e, verb, rows, dims, one))

        def back(t):
            t = t.expand(t.shape[0], k, *t.shape[2:]) if t.dim() > 1 and t.shape[1] == 1 != k else t
            return t.flatten(0, 1) if t.dim() > 1 else t

        result, told = rebuilt(made["spec"], [back(next(new)) if i is None else tensors[i] for i in made["from"]])
        if memory is not None:
            memory.update(told or {})
            inner = result.t if verb == "attend" and not isinstance(result, torch.Tensor) else result
            if not isinstance(inner, torch.Tensor) and inner is not None:
                inner = replace(inner, memory=memory)
                result = inner if verb == "stream" else replace(result, t=inner)
        if verb == "attend" and not isinstance(result, torch.Tensor) and result.t is not None and _alike(result.t, tree.t):
            result = replace(result, t=tree.t)
        return result


def _alike(a, b):
    return b is not None and all(x is y for x, y in zip(flat_tensors(a), flat_tensors(b), strict=False)) and a.spans == b.spans


class _all:
    def __init__(self, modes):
        self.modes = modes

    def __enter__(self):
        for m in self.modes:
            m.__enter__()

    def __exit__(self, *what):
        for m in reversed(self.modes):
            m.__exit__(*what)


def _bind(e, program, values, kind, shared=None):
    """The entry bound to one row's values, and the numbering that hands out what was kept."""
    mode, leaves, kept = Numbering(program, {}, {}), {}, {}
    for n, t in values.items():
        (leaves if isinstance(n, str) else kept)[n] = t
    for w, t in (shared or {}).items():
        leaves[f"w.{w}"] = t
    for n, name in enumerate(program.leaves):
        if name not in leaves:
            leaves[name] = mode.hollow(kind.hollow(e, name), n)
        else:
            mode.known[id(leaves[name])] = n
    for n, t in kept.items():
        mode.known[id(t)] = n
    mode.values = kept
    mode.alive += [*leaves.values(), *kept.values()]
    own = {n: t for n, t in leaves.items() if not n.startswith(("h.", "w."))}
    bound = e.bound(own, {n[2:]: t for n, t in leaves.items() if n.startswith("h.")})
    bound.shared = {n[2:]: t for n, t in leaves.items() if n.startswith("w.")}
    return bound, mode


def _within(e, program, values, shared, fn, kind):
    bound, mode = _bind(e, program, values, kind, shared)
    with mode:
        return fn(bound)
