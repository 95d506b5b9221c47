"""Reading a model without running it: its modules in the order forward calls them, and the leaves that hold parameters."""

import dis
import inspect
from collections import defaultdict
from functools import lru_cache

from torch import nn

LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
ZIPPED = (("resnets", "attentions"),)                               # sibling lists that forward walks in step


@lru_cache(None)
def calls(cls):
    """How cls.forward uses its attributes, its own methods read in their place.

    order: {name: (first, last)} by when each is first called, a(b(x)) calling b first; for what is never called, such as a list
    of blocks, when it is first and last looked at. reads: names whose `.weight` forward takes, beside asking for its dtype."""
    events, reads, busy = [], set(), set()                          # events: (name, called)

    def read(function):
        code = getattr(inspect.unwrap(function), "__code__", function if inspect.iscode(function) else None)
        if code is None or code in busy:
            return
        busy.add(code)
        ops, ends, used, loads = list(dis.get_instructions(code)), defaultdict(list), [], defaultdict(list)
        at = {op.offset: op.positions and (op.positions.lineno, op.positions.col_offset) for op in ops}
        for op in ops:
            if op.opname.startswith("CALL"):
                ends[at[op.offset]].append(op.offset)
            elif op.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                loads[at[op.offset]].append(op.offset)
        for op, then, after, last in zip(ops, ops[1:] + ops[:1], ops[2:] + ops[:2], ops[3:] + ops[:3], strict=True):
            if op.opname in ("LOAD_ATTR", "LOAD_METHOD") or inspect.iscode(op.argval):      # a.b(x) begins at a and calls b
                call = min((e for e in ends[at[op.offset]] if e > op.offset), default=None)
                if call is not None and any(op.offset < o < call for o in loads[at[op.offset]]):
                    call = None
                used.append((op.offset if call is None else call, op.argval, call is not None))
                asked = after.argval in ("dtype", "device", "shape", "size", "ndim") or last.argval == "Tensor"
                reads.update([op.argval] if then.argval == "weight" and not asked else [])
        for _, name, called in sorted(used, key=lambda u: u[0]):
            own = name if inspect.iscode(name) else getattr(cls, name, None)
            if inspect.iscode(own) or inspect.isfunction(own):      # a comprehension, a method
                read(own)
            else:
                events.append((name, called))
    read(cls.forward)
    order = {}
    for i, (name, _) in enumerate(events):
        order[name] = order.get(name, (i,))[0], i
    return order | {name: (i, i) for i, (name, called) in reversed([*enumerate(events)]) if called}, reads


@lru_cache(None)
def _arguments(cls):
    return frozenset(inspect.signature(inspect.unwrap(cls.forward)).parameters)


def arguments(module):
    return _arguments(type(module))


def walk(model):
    """({path: module} in data order, each module once; {path: place of its last descendant})."""
    modules, ends, seen = {}, {}, set()

    def visit(path, module):
        if module is None or id(module) in seen:
            return
        seen.add(id(module))
        modules[path] = module
        kids, dot = dict(module._modules), path + "." if path else ""
        for pair in ZIPPED:
            if kids.keys() >= set(pair):
                for i in kids[pair[0]]._modules:
                    for name in pair:
                        visit(f"{dot}{name}.{i}", kids[name]._modules.get(i))
        if len(kids) > 1 and not isinstance(module, LISTS):         # a child that forward never names stays beside its elder
            rank, last, keyed = calls(type(module))[0], -1, []
            for name, kid in kids.items():
                last = rank[name][isinstance(kid, LISTS)] if name in rank else last
                keyed.append((last, name))
            kids = {name: kids[name] for _, name in sorted(keyed, key=lambda k: k[0])}
        for name, kid in kids.items():
            visit(dot + name, kid)
        ends[path] = len(modules) - 1
    visit("", model)
    return modules, ends


class Leaf:
    """A module with parameters of its own."""

    def __init__(self, path, module):
        self.path, self.module, self.name = path, module, path.rpartition(".")[2]
        self.own = {k: p for k, p in module._parameters.items() if p is not None}
        w, name, self.kind = self.own.get("weight"), type(module).__name__, "raw"
        if w is not None and w.dim() == 1:
            self.kind = "norm" if "norm" in name.lower() or hasattr(module, "eps") else "raw"
        elif w is not None and isinstance(module, nn.modules.conv._ConvNd):
            self.kind = "raw" if module.transposed else "conv"
        elif w is not None and w.dim() == 2:
            self.kind = "embedding" if isinstance(module, nn.Embedding) else "conv1d" if name == "Conv1D" else (
                "linear" if isinstance(module, nn.Linear) or hasattr(module, "in_features") else "raw")
        self.bias = "bias" if self.kind != "raw" and "bias" in self.own else ""
        self.params = [k for k in self.own if k != self.bias]
        self.matrix = self.kind in ("linear", "conv1d", "conv")
        if self.matrix:
            self.d_out, self.d_in = w.shape[::-1] if self.kind == "conv1d" else (w.shape[0], w[0].numel())
        self.wide = self.kind == "conv" and (w[0, 0].numel() > 1 or module.groups > 1)          # looks beyond one position


def under(path, root):
    return root == "" or path == root or path.startswith(root + ".")


def up(path):
    return path.rpartition(".")[0]


def chain(path):
    """The path and its ancestors, innermost first; the root's "" last."""
    yield path
    while path:
        yield (path := up(path))


def within(path, roots):
    """The innermost of roots that holds path, or None."""
    return next((a for a in chain(path) if a in roots), None)


def common(paths):
    """The deepest module that properly holds all of them."""
    split, n = [p.split(".")[:-1] for p in paths], 0
    while all(len(s) > n for s in split) and len({s[n] for s in split}) == 1:
        n += 1
    return ".".join(split[0][:n])


def word(path):
    """The last part of a path that says something: "output.dense" -> output, "to_out.0" -> to_out."""
    parts = path.split(".")
    while len(parts) > 1 and (parts[-1] in ("dense", "linear") or parts[-1] == "0" and "out" in parts[-2]):
        parts.pop()
    return parts[-1]
