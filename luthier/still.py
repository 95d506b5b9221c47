"""What nothing tunes is computed once: which modules a part of a model's work runs, whether anything acts on them, and a memory
of what they made. Looked at or read once, a part drops nothing, also while the rest is in training mode."""

from contextlib import contextmanager, nullcontext

import torch

from . import ranks
from .host import Host

KEPT = 2 << 30                 # bytes of what a part that nothing tunes made of rows


def at_hand(model):
    """Whether a model can work in parts: where its tensors are spread over processes, its whole forward alone gathers them."""
    return not any(map(ranks.sharded, model.parameters()))


def reached(model, work):
    """The modules that `work()` runs in the bare `model`, with all that is in them."""
    found, host = set(), Host.of(model)
    handles = [m.register_forward_pre_hook(lambda m, args: found.update(m.modules())) for m in model.modules()]
    try:
        with torch.no_grad(), host.asleep() if host else nullcontext():
            work()
    finally:
        for handle in handles:
            handle.remove()
    return found


def still(model, modules):
    """Whether nothing tunes these modules of a base model."""
    host = Host.of(model)
    return not any(p.requires_grad for m in modules for p in m.parameters(recurse=False)) and not (
        host and host.touches(modules))


@contextmanager
def resting(modules):
    """Within, these modules drop nothing, and nothing makes a graph."""
    awake = [m for m in modules if m.training]
    try:
        for m in awake:
            m.training = False
        with torch.no_grad():
            yield
    finally:
        for m in awake:
            m.training = True


def once(memory, keys, items, make):
    """make([...]) of those items whose keys are not in memory yet; -> one a key."""
    new = {key: item for key, item in zip(keys, items, strict=True) if key not in memory}
    if new:
        with torch.no_grad():
            fresh = dict(zip(new, make(list(new.values())), strict=True))
        if next(iter(fresh.values())).nbytes * (len(memory) + len(fresh)) > KEPT:
            return [memory[key] if key in memory else fresh[key] for key in keys]
        memory.update(fresh)
    return [memory[key] for key in keys]
