"""What a verb computes from its state alone is computed once; what repeats at the same shapes is traced once.

Verbs are pure in their state, so the operations of a verb fall into those that see the batch and those that see only the state.
A verb is run once under `Numbering`, which gives a number to everything of the second kind; a `Program` is the list of them,
with the few whose values are needed. From then on, an operation of the list hands out the value that was kept for it.
"""

from collections import OrderedDict
from dataclasses import fields, is_dataclass, replace

import torch
from torch.overrides import TorchFunctionMode

OFTEN, KEPT = 64, 128                    # a verb is traced once it has met the same shapes this often; how many traces are kept


class Refold(Exception):
    """A verb took another way than when it was folded: it is served without folding from now on."""


class Ref(int):
    """The number of a value that depends on the state alone."""


LOOKS = {"__get__", "__len__", "size", "dim", "numel", "stride", "is_floating_point", "is_complex", "element_size",
         "is_contiguous"}
NEVER = ("rand", "dropout", "bernoulli", "multinomial", "normal", "uniform", "exponential", "empty")


class Program:
    """What one verb at one site computes from its state: a table from operation to number, the numbers whose values are kept,
    at most `own` bytes of them, and the leaves that are needed beside them."""

    def __init__(self, leaves, own, fold=True):
        self.leaves, self.own, self.fold = tuple(leaves), own, fold
        self.table, self.ops, self.views, self.shapes, self.banned = {}, [], {}, {}, set()
        self.kept, self.live = set(), set(self.leaves) if not fold else set()
        self.hash = hash(self.leaves)

    def number(self, leaf):
        return Ref(self.leaves.index(leaf))

    def used(self, n):
        """Number n is needed at run time: keep it, or what it is a view of."""
        if n < len(self.leaves):
            self.live.add(self.leaves[n])
        elif n in self.views:
            for source in self.views[n]:
                self.used(source)
        else:
            self.kept.add(n)

    def bytes(self, n=None):
        """Of what is kept, or of one number."""
        return sum(map(self.bytes, self.kept)) if n is None else self.shapes[n][0].numel() * self.shapes[n][1].itemsize

    def settle(self):
        """Keep no more than `own`; returns whether anything had to be given up."""
        worst = max(self.kept, key=self.bytes, default=None)
        if worst is None or self.bytes() <= self.own:
            self.hash = hash((tuple(self.table), tuple(sorted(self.kept)), tuple(sorted(self.live))))
            return False
        self.banned.add(next(k for k, (first, count) in self.table.items() if first <= worst < first + count))
        self.table, self.ops, self.views, self.shapes, self.kept, self.live = {}, [], {}, {}, set(), set()
        return True

    def run(self, leaves):
        """number -> value for the numbers kept, of one state."""
        need, env = set(self.kept), dict(enumerate(leaves))
        steps = []
        for first, count, func, args, kwargs in reversed(self.ops):
            if need & set(range(first, first + count)):
                steps.append((first, count, func, args, kwargs))
                need |= {r for r in _refs((args, kwargs))}
        for first, count, func, args, kwargs in reversed(steps):
            out = func(*_fill(args, env), **_fill(kwargs, env))
            env.update(zip(range(first, first + count), (out,) if torch.is_tensor(out) else out, strict=True))
        return {n: env[n].clone() for n in self.kept}


def _refs(x):
    if isinstance(x, Ref):
        yield int(x)
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from _refs(y)
    elif isinstance(x, dict):
        yield from _refs(tuple(x.values()))


def _fill(x, env):
    if isinstance(x, Ref):
        return env[int(x)]
    if isinstance(x, dict):
        return {k: _fill(v, env) for k, v in x.items()}
    if type(x) in (list, tuple):
        return type(x)(_fill(y, env) for y in x)
    return x


class Numbering(TorchFunctionMode):
    """Gives numbers to what depends on the state alone. While recording it learns them; later it hands out what was kept, and
    for what only led there an empty tensor of the right shape."""

    def __init__(self, program, known, values=None):
        super().__init__()
        self.program, self.values, self.recording = program, values, values is None
        self.known, self.dummies, self.alive = {id(t): n for n, t in known.items()}, set(), list(known.values())

    def hollow(self, t, n):
        self.known[id(t)] = n
        self.dummies.add(id(t))
        self.alive.append(t)
        return t

    def _template(self, x):
        """x with numbers for tensors, and a hashable key of it; None where it depends on more than the state."""
        if isinstance(x, torch.Tensor):
            n = self.known.get(id(x))
            return None if n is None else (Ref(n), ("#", int(n)))
        if type(x) in (list, tuple):
            parts = [self._template(y) for y in x]
            return None if None in parts else (type(x)(p[0] for p in parts), tuple(p[1] for p in parts))
        if isinstance(x, slice):
            return x, ("slice", x.start, x.stop, x.step)
        if x is None or x is Ellipsis or isinstance(x, (bool, int, float, str, torch.dtype, torch.device, torch.Size)):
            return x, (type(x).__name__, x)
        return None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.program.fold:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        inside = [t for t in _tensors((args, kwargs)) if id(t) in self.known]
        if not inside:
            return func(*args, **kwargs)
        if name in LOOKS:
            out = func(*args, **kwargs)
            if not any(True for _ in _tensors(out)):
                return out
        changes = name.endswith("_") and not name.endswith("__") or name in ("__setitem__", "__set__") or "out" in kwargs
        if changes and isinstance(args[0], torch.Tensor) and id(args[0]) in self.known:
            raise Refold
        made = None if changes or name.startswith("__i") and name != "__invert__" or any(w in name for w in NEVER) else \
            self._template([list(args), list(kwargs.values())])
        key = made and (func, made[1], tuple(kwargs))
        if key is None or key in self.program.banned:
            return self._plain(func, args, kwargs, inside)
        if self.recording:
            return self._record(func, args, kwargs, key, made[0], inside)
        found = self.program.table.get(key)
        if found is None:
            return self._plain(func, args, kwargs, inside)
        first, count = found
        if first in self.program.views:
            out = func(*args, **kwargs)
            for n, t in zip(range(first, first + count), (out,) if torch.is_tensor(out) else out, strict=True):
                self.known[id(t)] = n
                self.alive.append(t)
                if all(id(s) in self.dummies for s in inside):
                    self.dummies.add(id(t))
            return out
        outs = [self.values[n] if n in self.values else self.hollow(self._empty(n), n) for n in range(first, first + count)]
        return outs[0] if count == 1 and not self.program.shapes[first][2] else self.program.shapes[first][2](outs)

    def _plain(self, func, args, kwargs, inside):
        for t in inside:
            if self.recording:
                self.program.used(self.known[id(t)])
            elif id(t) in self.dummies:
                raise Refold
        return func(*args, **kwargs)

    def _empty(self, n):
        shape, dtype, _, device = self.program.shapes[n]
        return blank(dtype, device).expand(shape)

    def _record(self, func, args, kwargs, key, template, inside):
        out = func(*args, **kwargs)
        outs = (out,) if torch.is_tensor(out) else tuple(out) if isinstance(out, (tuple, list)) else ()
        if not outs or not all(torch.is_tensor(t) for t in outs):
            return self._plain(lambda *a, **k: out, args, kwargs, inside)
        if key in self.program.table:
            first = self.program.table[key][0]
        else:
            first = len(self.program.leaves) + sum(c for _, c in self.program.table.values())
            self.program.table[key] = (first, len(outs))
            names = list(kwargs)
            self.program.ops.append((first, len(outs), func, tuple(template[0]), dict(zip(names, template[1], strict=True))))
            for n, t in enumerate(outs, first):
                self.program.shapes[n] = (t.shape, t.dtype, None if torch.is_tensor(out) else type(out), t.device)
                sources = [self.known[id(s)] for s in inside if s.untyped_storage()._cdata == t.untyped_storage()._cdata]
                if sources:
                    self.program.views[n] = sources
        for n, t in enumerate(outs, first):
            self.known[id(t)] = n
            self.alive.append(t)
        return out


def blank(dtype, device):
    """What nobody should read: NaN, so that it shows if somebody does."""
    return torch.full((), float("nan") if dtype.is_floating_point else 1, dtype=dtype, device=device)


def _tensors(x):
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from _tensors(y)
    elif isinstance(x, dict):
        for y in x.values():
            yield from _tensors(y)


# -- streams and attention cores as lists of tensors ----------------------------------------------------------------
def mapped(fn, kind, x):
    """fn on every `kind` in a dataclass, dict, tuple or list, in order; the rest stays."""
    if isinstance(x, kind):
        return fn(x)
    if is_dataclass(x):
        return replace(x, **{f.name: mapped(fn, kind, getattr(x, f.name)) for f in fields(x)})
    if type(x) is dict:
        return {k: mapped(fn, kind, v) for k, v in x.items()}
    if type(x) in (tuple, list):
        return type(x)(mapped(fn, kind, v) for v in x)
    return x


def flat(x, out):
    """Append every tensor in x to `out`; returns what `rebuilt` needs."""
    def number(t):
        out.append(t)
        return Ref(len(out) - 1)
    return mapped(number, torch.Tensor, x)


def rebuilt(x, tensors):
    return mapped(lambda ref: tensors[int(ref)], Ref, x)


def flat_tensors(x):
    out = []
    flat(x, out)
    return out


# -- freezing ---------------------------------------------------------------------------------------------------------
class Frozen:
    """Traces of verbs by shape: the same operations without Python's part of vmap and of the method."""

    def __init__(self):
        self.seen, self.made = OrderedDict(), OrderedDict()

    def __call__(self, key, make, args):
        """The trace of make() at these arguments, flat, once it has been asked for often; None until then."""
        if key in self.made:
            self.made.move_to_end(key)
            return self.made[key]
        self.seen[key] = self.seen.pop(key, 0) + 1
        while len(self.seen) > 8 * KEPT:
            self.seen.popitem(last=False)
        if self.seen[key] < OFTEN:
            return None
        try:
            self.made[key] = traced(make(), args)
        except Exception:                                   # it runs untraced, and whoever runs it hears of its own faults
            self.made[key] = None
        while len(self.made) > KEPT:
            self.made.popitem(last=False)
        return self.made[key]


def traced(fn, args):
    """fn as one list of tensor operations over its arguments laid flat, without those that change nothing at these shapes."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._pytree import tree_flatten, tree_unflatten

    leaves, spec = tree_flatten(args)
    graph = make_fx(lambda *flat_args: fn(*tree_unflatten(list(flat_args), spec)))(*leaves)
    idle = {torch.ops.aten.view.default, torch.ops.aten.expand.default, torch.ops.aten._unsafe_view.default,
            torch.ops.aten.detach.default}
    for node in list(graph.graph.nodes):
        if node.target in idle:
            a, b = _shape(node.args[0]), _shape(node)
            if a is not None and a == b:
                node.replace_all_uses_with(node.args[0])
                graph.graph.erase_node(node)
        elif node.target is torch.ops.aten.add.Tensor and len(node.args) == 2 and not node.kwargs:
            y, h = node.args                                # y + P Q in one operation
            if getattr(h, "target", None) is torch.ops.aten.bmm.default and len(h.users) == 1 and _shape(y) == _shape(h):
                with graph.graph.inserting_before(node):
                    node.replace_all_uses_with(graph.graph.call_function(torch.ops.aten.baddbmm.default, (y, *h.args)))
                graph.graph.erase_node(node)
                graph.graph.erase_node(h)
    graph.graph.lint()
    graph.recompile()
    return graph.forward


def _shape(node):
    meta = getattr(node, "meta", {})
    t = meta.get("val", meta.get("tensor_meta"))
    return None if t is None else tuple(t.shape)
