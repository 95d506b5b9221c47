"""Towers that a model itself runs without gradients (CLIPSeg its CLIP): what is attached inside them learns all the same.

Turning gradients on again inside the tower would not do: what the model computes with the tower's output, still under its
`no_grad`, would cut the graph. So it is that `no_grad` which does nothing, for the length of a training forward. Byte code tells
which one it is, and a mode meets it as it is entered: nothing of the model is written, and every other `no_grad`, of methods, of
losses or of torch itself, is what it was. Where nothing in the tower trains, autograd keeps nothing there either way. What trains
under `inference_mode`, which no one can undo, is refused in the first training forward."""

import functools
import inspect
import sys

import torch
from torch.overrides import TorchFunctionMode

_SWITCHES = {torch.autograd.grad_mode.__file__, torch.overrides.__file__, __file__}


@functools.lru_cache(None)
def _own(cls):
    """(code, names in it, whether it is decorated with no_grad) of cls.forward and the methods of cls that it calls, directly or
    through one another."""
    found, todo, seen = [], ["forward"], set()
    while todo:
        name = todo.pop()
        f = getattr(cls, name, None)
        if name in seen or not inspect.isfunction(f):
            continue
        seen.add(name)
        decorated = False
        while hasattr(f, "__wrapped__"):
            decorated, f = decorated or f.__code__.co_name == "decorate_context", f.__wrapped__
        if code := getattr(f, "__code__", None):
            found.append((code, frozenset(code.co_names), decorated))
            todo += code.co_names
    return found


def frozen(model, stacks):
    """The code that runs blocks of these stacks without gradients: a forward, or a method that it calls, which names both no_grad
    and a child with blocks in it."""
    blocks, found = {id(b) for s in stacks for b in s.blocks}, set()
    for m in model.modules():
        for code, names, decorated in _own(type(m)):
            if decorated or "no_grad" in names:
                held = [kid for name, kid in m._modules.items() if name in names and kid is not None]
                if any(id(x) in blocks for kid in held for x in kid.modules()):
                    found.add(code)
    return frozenset(found)


class Thawed(TorchFunctionMode):
    """Within, `no_grad` in this code does nothing."""

    def __init__(self, codes):
        super().__init__()
        self.codes = codes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch._C._set_grad_enabled and not any(args) and _asker() in self.codes:
            return None
        return func(*args, **(kwargs or {}))


def _asker():
    """The code that stands at `with no_grad()`, or that is decorated with it."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename in _SWITCHES:
        frame = frame.f_back
    if frame.f_code.co_name == "decorate_context":
        return getattr(inspect.unwrap(frame.f_locals["func"]), "__code__", None)
    return frame.f_code
