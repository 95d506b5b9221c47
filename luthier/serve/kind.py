"""Adapters that share a batch: what is checked of a state before it is served, how it lies in memory, how states stack."""

import math
import os
import weakref
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.nn import functional as F

from .. import save
from ..errors import BadState, LuthierError
from ..host import Host
from ..method import call, parse
from ..site import Fixed
from ..tokens import Attention, Tokens
from .fold import Frozen, Program, blank
from .rows import Held, Mixed, RowEntry


class Adapter:
    """One tuned state on disk: where, of which kind, and how to see that the file is still the one that was checked."""

    def __init__(self, name, folder, recipe):
        self.name, self.folder, self.chain, self.seed = name, Path(folder), parse(recipe["chain"]), recipe["seed"]
        self.extra, self.sha256, self.kind = recipe["extra"], recipe["sha256"], None
        self.shapes = {k: tuple(t["shape"]) for s in recipe["steps"] for k, t in s["tensors"].items()}
        self.path = self.folder / save.STATE
        self.stamp, self.bytes = self._stamp(), sum(self._bytes(t) for s in recipe["steps"] for t in s["tensors"].values())

    @staticmethod
    def _bytes(t):
        return math.prod(t["shape"]) * (1 if t["shared"] else len(t["of"])) * save.DTYPES[t["dtype"]].itemsize

    def _stamp(self):
        s = os.stat(self.path)
        return s.st_size, s.st_mtime_ns, s.st_ino

    def tensors(self, device):
        """Out of the memory-mapped file into memory."""
        try:
            if self._stamp() != self.stamp:
                if save._sha256(self.path) != self.sha256:
                    raise BadState(f"{self.path} has changed since it was loaded as {self.name!r}. Unload it and load it anew.")
                self.stamp = self._stamp()
            with safe_open(self.path, "pt") as f:
                return {k: f.get_tensor(k).clone().to(device) for k in f.keys()}
        except SafetensorError as e:
            raise BadState(f"{self.path}, loaded as {self.name!r}, is corrupt now ({str(e)[:100]}). Unload it, and load a "
                           "whole one.") from None
        except OSError as e:
            raise BadState(f"{self.path}, loaded as {self.name!r}, cannot be read any more ({e.strerror or e}). Unload it, "
                           "or put it back.") from None


class Resident:
    """An adapter in memory: its tensors, and what its verbs keep of them."""

    def __init__(self, adapter, tensors, fixed):
        self.adapter, self.tensors, self.fixed = adapter, tensors, fixed
        self.states, self.folded, self.bytes = {}, {}, adapter.bytes


class Fixings(dict):
    """(step, site) -> fixed tensors by name."""


class Kind:
    """Adapters that share a batch: one attachment whose entries take their states from the rack."""

    def __init__(self, rack, folder, recipe):
        self.rack, self.recipe = rack, recipe
        tuned = save.load(rack.model, folder, name=f"rack/{len(rack.kinds)}")
        self.owner, host, self.towers = tuned._owner, tuned._host, tuned._plan.stacks
        self.chain, self.pools, self.plan = tuned.chain, tuned._pools, tuned._plan
        self.entries, self.order = [], {}
        try:                                               # a rack has no context: a state that needs one is refused at the door
            [e.p for place in [*host.patches.values(), *host.ports.values()] for e in place.entries if e.owner is self.owner]
        except LuthierError:
            tuned.detach()
            raise
        for place in [*host.patches.values(), *host.ports.values()]:
            place.entries = [e if e.owner is not self.owner else RowEntry(e, host, place) for e in place.entries]
            self.entries += [e for e in place.entries if e.owner is self.owner]
        fixed = {(e.step, e.site_name): {n: getattr(e.state, n) for n in e.state.fixed_names} for e in self.entries}
        self.fixed, self.others = Fixings(fixed), weakref.WeakValueDictionary()
        self.fixed_bytes = sum({id(t): t.nbytes for d in fixed.values() for t in d.values()}.values())
        self.under = [o for o in host.owners if o.active and o is not self.owner]
        self.drawn = any(k[0] == "calls" for pool in self.pools.values() for k in pool)
        self.fixed_leaves = {(e, n) for e in self.entries for n in fixed[e.step, e.site_name]}
        self.keys = {}                                     # (step, site) -> {leaf: (key in the file, place in it or None)}
        for i, step in enumerate(recipe["steps"]):
            for key, t in step["tensors"].items():
                for at, j in enumerate(t["of"]):
                    self.keys.setdefault((i, step["sites"][j]), {})[t["name"]] = (key, None if t["shared"] else at)
        self.most = {k: tuple(t["shape"]) for s in recipe["steps"] for k, t in s["tensors"].items()}
        self.varying = {i: {} for i in range(len(self.chain))}       # step -> {hyperparameter that differs within the kind}
        self.why = self.no_base = None
        self.many_bases = False
        self.n, self.learned, self.tries, self.frame = 0, False, 0, frame(recipe)
        self.frozen, self.looped, self.programs, self.exact = Frozen(), {}, {}, set()
        for st in tuned.states.values():                   # the tensors themselves are the rack's business from here on
            for n in [*st._parameters, *st._buffers]:
                delattr(st, n)
        self.owner.active = False
        if rack.owner not in host.owners:
            host.owners.append(rack.owner)
        host.drop(self.owner)

    # -- on and off ---------------------------------------------------------------------------------------------------
    def put(self):
        host = Host.of(self.rack.model, make=True)
        host.towers = self.towers
        host.owners.append(self.owner)
        for e in self.entries:
            e.host = host
            host.add(e)
            e.where = next(p for p in [*host.patches.values(), *host.ports.values()] if e in p.entries)

    def bind(self, resident):
        chain = resident.adapter.chain
        for e in self.entries:
            e.state, e.method = self.state_of(resident, e), chain[e.step]

    # -- states ---------------------------------------------------------------------------------------------------------
    def raw(self, resident, e):
        """leaf -> tensor at this entry, as the file has it, and what init makes again."""
        found = {n: resident.tensors[k] if at is None else resident.tensors[k][at]
                 for n, (k, at) in self.keys.get((e.step, e.site_name), {}).items()}
        return found | resident.fixed[e.step, e.site_name]

    def state_of(self, resident, e):
        if e not in resident.states:
            resident.states[e] = Held({**e.plain, **self.raw(resident, e)}, e.key, e.site_name)
        return resident.states[e]

    def leaves_of(self, resident, e):
        """The same, padded to the largest of the kind; and the hyperparameters that differ within it, as tensors."""
        keys = self.keys.get((e.step, e.site_name), {})
        values = {n: pad(t, self.most[keys[n][0]]) if n in keys else t for n, t in self.raw(resident, e).items()}
        return values, hyper(resident.adapter.chain[e.step], self.varying[e.step])

    def row_bytes(self):
        """Of the states of one row: padded, with bases of its own where some adapter has them, and numbers that differ."""
        tables = {k: t for s in self.recipe["steps"] for k, t in s["tensors"].items()}
        held = sum(save.DTYPES[t["dtype"]].itemsize * math.prod(self.most[k]) * (1 if t["shared"] else len(t["of"]))
                   for k, t in tables.items())
        return held + self.fixed_bytes * self.many_bases + 8 * sum(len(self.varying[e.step]) for e in self.entries)

    def hollow(self, e, name):
        """A leaf that nobody needs: its shape and type alone."""
        if name.startswith("h."):
            return blank(torch.float64, self.rack.device).clone()
        if (e, name) in self.fixed_leaves:
            t = self.fixed[e.step, e.site_name][name]
            return blank(t.dtype, t.device).expand(t.shape)
        key, _ = self.keys[e.step, e.site_name][name]
        step = self.recipe["steps"][e.step]
        return blank(save.DTYPES[step["tensors"][key]["dtype"]], self.rack.device).expand(self.most[key])

    def plainly(self, e, verb):
        old = self.programs[e, verb]
        self.programs[e, verb] = Program(old.leaves, old.own, fold=False)

    def last_attend(self, e):
        return e.where.attends[-1]

    def own_bases(self, seed):
        """Whether a state of this seed has fixed tensors of its own: where init draws at random, and the seed is another."""
        return bool(self.fixed_leaves) and self.drawn and seed != self.recipe["seed"]

    def fixed_of(self, seed):
        """What init makes again from a seed; it stays for as long as an adapter in memory uses it."""
        if not self.own_bases(seed):
            return self.fixed
        if seed in self.others:
            return self.others[seed]
        wanted, made = {(e.step, e.site_name) for e, _ in self.fixed_leaves}, {}
        for step in self.plan.steps:
            pool = {}
            bound = {s: s.bound(seed=seed, step=step.number, pool=pool, n_sites=len(step.sites), rank=r)
                     for r, s in enumerate(step.sites)}
            pool["sites"] = [bound[s] for s in step.sites if s not in step.twins]
            for s in pool["sites"]:
                if (step.number, s.name) in wanted:
                    new = call(step.method, "init", site=s, seen=None, rows=slice(None), model=self.plan.model)
                    made[step.number, s.name] = {n: v.value.detach() for n, v in new.items() if isinstance(v, Fixed)}
        self.others[seed] = found = Fixings({k: made.get(k, {}) for k in self.fixed})
        return found

    # -- who belongs --------------------------------------------------------------------------------------------------------
    def admits(self, adapter, recipe):
        """Whether an adapter can share batches with this kind; makes room for it (larger states) if so."""
        if self.frame != frame(recipe):
            return False
        numbers = {i: {n: None for n in vars(m) if vars(m)[n] != vars(a)[n]}
                   for i, (m, a) in enumerate(zip(self.chain, adapter.chain, strict=True))}
        most = {k: tuple(map(max, s, adapter.shapes[k])) for k, s in self.most.items()}
        grown = {i: {**self.varying[i], **numbers[i]} for i in numbers}
        if grown == self.varying and most == self.most:
            if adapter.shapes == self.most or repr(adapter.chain) in self.exact:
                return True
        if not self._exact(adapter.chain, adapter.shapes, most, grown):
            return False
        if (grown, most) != (self.varying, self.most):
            self.varying, self.most = grown, most
            self.programs, self.learned, self.looped = {}, False, {}
            self.rack.forget(self)
        self.exact |= {repr(self.chain), repr(adapter.chain)}
        return True

    def _exact(self, chain, shapes, most, varying):
        """Tried on random states: padded with zeros and with its numbers as tensors, each chain says what it says alone."""
        first = {k: tuple(t["shape"]) for s in self.recipe["steps"] for k, t in s["tensors"].items()}
        done = set()
        for e in self.entries:
            keys = self.keys.get((e.step, e.site_name), {})
            kind = (e.step, e.site.kind, e.site.role, e.site.d_in, e.site.d_out, tuple(keys))
            if kind in done:
                continue
            done.add(kind)
            for methods, these in ((self.chain, first), (chain, shapes)):
                method, g = methods[e.step], torch.Generator().manual_seed(len(done))
                table = self.recipe["steps"][e.step]["tensors"]
                fixed = self.fixed[e.step, e.site_name]
                own = {n: _random(these[k], save.DTYPES[table[k]["dtype"]], g).to(self.rack.device)
                       for n, (k, _) in keys.items()}
                wide = {n: pad(t, most[keys[n][0]]) for n, t in own.items()}
                e.method = method
                try:
                    a = _try(e.bound({**own, **fixed}, {}), e)
                    b = _try(e.bound({**wide, **fixed}, hyper(method, varying[e.step])), e)
                    for x, y in zip(a, b, strict=True):
                        torch.testing.assert_close(x, y)
                except (AssertionError, RuntimeError, TypeError, ValueError, IndexError):
                    return False
        return True

    # -- stacking -----------------------------------------------------------------------------------------------------------
    def compose(self, names, residents):
        """The states of these rows, side by side. residents: name -> Resident; a base row borrows somebody's."""
        some = next(iter(residents.values()))
        rows, stacks, states = [residents.get(n, some) for n in names], {}, {}
        for (e, verb), program in self.programs.items():
            mine, keys = [], self.keys.get((e.step, e.site_name), {})
            for name in program.leaves:
                if name not in program.live or name.startswith("w."):
                    continue
                if name.startswith("h."):
                    h = [hyper(r.adapter.chain[e.step], {name[2:]: None})[name[2:]] for r in rows]
                    mine.append((name, torch.stack(h).to(self.rack.device), 0))
                elif name in keys:
                    key, at = keys[name]
                    if key not in stacks:
                        stacks[key] = self._stack([r.tensors[key] for r in rows], self.most[key])
                    mine.append((name, stacks[key] if at is None else stacks[key][:, at], 0))
                else:
                    fixed = [r.fixed[e.step, e.site_name][name] for r in rows]
                    same = all(t is fixed[0] for t in fixed)
                    mine.append((name, fixed[0] if same else torch.stack(fixed), None if same else 0))
            if program.kept:
                kept = [self.fold(r, e, verb, program) for r in rows]
                mine += [(n, torch.stack([k[n] for k in kept]), 0) for n in sorted(program.kept)]
            states[e, verb] = mine
        return Mixed(self, names, states, self.rack.device)

    @staticmethod
    def _stack(tensors, most):
        """(rows, [sites,] *most), smaller ones padded with zeros."""
        n = tensors[0].dim() - len(most)
        if all(t.shape[n:] == most for t in tensors):
            return torch.stack(tensors)
        out = tensors[0].new_zeros(len(tensors), *tensors[0].shape[:n], *most)
        for o, t in zip(out, tensors, strict=True):
            o[tuple(slice(0, d) for d in t.shape)] = t
        return out

    def fold(self, resident, e, verb, program):
        """What the verb keeps of one state: worked out once while the state is in memory."""
        if (e, verb) not in resident.folded:
            values, numbers = self.leaves_of(resident, e)
            shared = {}
            if any(n.startswith("w.") for n in program.leaves):
                P, b = e.where.tensors(e.param, e.where.slow)
                shared = {"W": e.site.read(P), "b": None if b is None else e.site.read_b(b)}
            leaves = [shared[n[2:]] if n.startswith("w.") else numbers[n[2:]] if n.startswith("h.") else values[n]
                      for n in program.leaves]
            resident.folded[e, verb] = program.run(leaves)
            more = sum(t.nbytes for t in resident.folded[e, verb].values())
            resident.bytes += more
            self.rack.used += more
        return resident.folded[e, verb]


def pad(t, shape):
    return t if tuple(t.shape) == tuple(shape) else F.pad(t, [p for n, m in zip(reversed(t.shape), reversed(shape), strict=True)
                                                             for p in (0, m - n)])


def hyper(method, names):
    """Numbers of a method as tensors, so that they can differ by row."""
    return {n: torch.tensor(float(getattr(method, n)), dtype=torch.float64) for n in names}


def frame(recipe):
    """All that must agree for states to be stacked: methods, words among hyperparameters, sites, tensors but for sizes."""
    def word(v):
        return v if not isinstance(v, int | float) or isinstance(v, bool) else "number"

    chain = parse(recipe["chain"])
    return ([(type(m).__name__, {n: word(v) for n, v in vars(m).items()}) for m in chain], recipe["on"],
            [(s["sites"], s["plain"], s["init"],
              {k: (t["name"], t["shared"], t["of"], t["dtype"], len(t["shape"])) for k, t in s["tensors"].items()})
             for s in recipe["steps"]])


def _random(shape, dtype, g):
    return torch.randn(shape, generator=g).to(dtype) * 0.3 if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)


def _try(bound, e):
    """What the bound entry's verbs say on random input: a list of tensors."""
    m, p, s, g = bound.method, bound.state, e.site, torch.Generator().manual_seed(0)
    like = s.like

    def draw(*shape):
        return torch.randn(shape, generator=g).to(like.device, like.dtype)

    if s.kind == "stream":
        t = call(m, "stream", t=Tokens(draw(2, (s.stack.fixed if s.stack else 0) + 8, s.d_out),
                                       fixed=s.stack.fixed if s.stack else 0), p=p)
        return [t.h]
    if s.kind == "attend":
        H, K, D = s.heads
        a = Attention(draw(2, H, 6, D), draw(2, K, 6, D), draw(2, K, 6, D), grouped=H != K)
        a = call(m, "attend", a=a, p=p)
        return [a if torch.is_tensor(a) else a.run()]
    W, b = s.W, s.b
    if e.output:
        x = draw(3, s.d_in)
        return [call(m, "output", x=x, y=F.linear(x, W, b), p=p, W=W)]
    out = call(m, "weight", W=W, p=p, b=W.new_zeros(W.shape[0]) if b is None else b)
    out = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
    if e.fast:
        x = draw(3, s.d_in)
        out.append(call(m, "fast", x=x, y=F.linear(x, W, b), p=p, W=W, b=b))
    return out
