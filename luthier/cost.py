"""What a chain costs: counted and predicted without weights, measured when they are there.

    cost(model, "lora(rank=8)", batch)            -> Cost; print(c.table())
    cost(shape("shape:llama-7b"), "lora(rank=8)") -> the same for a model that exists only as shapes

Prediction runs the very train step on fake tensors: they have shapes, dtypes and storages but no memory, so the storages that
autograd keeps, and the most bytes alive at once, are counted rather than modelled. Measurement runs it on the real ones.
"""

import contextlib
import dataclasses
import statistics
import time
import weakref
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .errors import DoesNotFit, UnknownName, nearest


# -- meters -----------------------------------------------------------------------------------------------------------------------
class Live:
    """Bytes of the distinct storages that were added and are still alive; `peak` is the most there ever were."""

    def __init__(self, ignore=()):
        self.sizes, self.now, self.peak = {}, 0, 0
        for t in ignore:
            self.add(t, count=False)

    def add(self, t, count=True):
        for storage in map(torch.Tensor.untyped_storage, _parts(t)):
            key, size = storage._cdata, storage.nbytes()
            if key not in self.sizes:                                    # a storage's Python face lives as long as the storage
                weakref.finalize(storage, self._gone, key).atexit = False
                self.sizes[key] = 0 if count else None
            old = self.sizes[key]
            if old is not None and size > old:                           # new, or grown in place
                self.sizes[key], self.now = size, self.now + size - old
                self.peak = max(self.peak, self.now)

    def _gone(self, key):
        self.now -= self.sizes.pop(key) or 0


def _parts(t):
    """The dense tensors that `t` consists of: itself, or the indices and values of a sparse one."""
    return (t,) if t.layout is torch.strided else (t._indices(), t._values()) if t.layout is torch.sparse_coo else ()


class _Watch(TorchDispatchMode):
    """Adds what every operator returns, in the backward pass too; what an operator is given was there before."""

    def __init__(self, live):
        super().__init__()
        self.live = live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for t in tree_iter((args, kwargs)):
            if isinstance(t, torch.Tensor) and t.layout is torch.strided and t.untyped_storage()._cdata not in self.live.sizes:
                self.live.add(t, count=False)
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, torch.Tensor):
                self.live.add(t)
        return out


def peak(fn, held=()):
    """Most bytes alive at once while `fn()` runs: of the storages its operators make, plus those of `held` (weights, inputs).
    Deterministic: counts storages, not an allocator's blocks; scratch memory inside one kernel is not seen."""
    held = list(held)
    live = Live(held)
    with _Watch(live):
        fn()
    return live.peak + nbytes(held)


def saved(fn, ignore=()):
    """Bytes that autograd holds for the backward pass when `fn()` (a forward pass) has returned: distinct storages,
    without those of `ignore` (weights and inputs, which are there anyway)."""
    live = Live(ignore)

    def pack(t):
        live.add(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = fn()
    held = live.now
    del out
    return held


def nbytes(tensors):
    """Bytes of the distinct storages under `tensors`."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _flash(q, k, v, *rest, out_shape=None, **kw):                        # torch counts the CUDA kernels only
    return sdpa_flop_count(q, k, v)


def flops(fn):
    """Floating-point operations of `fn()`, as torch counts them: matrix products, convolutions and attention."""
    cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash}
    with FlopCounterMode(display=False, custom_mapping=cpu) as counter, torch.no_grad():
        fn()
    return counter.get_total_flops()


def latency(fns, rounds=7):
    """Median seconds of each of `fns`, run in turns A B A B after one warm-up each, so that drift hits all alike."""
    def clock(fn):
        sync = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
        sync()
        start = time.perf_counter()
        fn()
        sync()
        return time.perf_counter() - start

    for fn in fns:
        fn()
    times = [[clock(fn) for fn in fns] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]
