"""Merging models and quantising one: peak memory and time."""

import copy
import tempfile
import time
from pathlib import Path

import torch

import luthier
from luthier import cost, zoo
from luthier.methods.quantize import gptq as module
from luthier.state import State

from .common import row


def naive(W, H, bits, damp):
    """GPTQ as its paper's equations 2 and 3 read, a column at a time, the remaining inverse Hessian updated after each."""
    W, d = W.clone().float(), W.shape[1]
    H = H.float() + damp * H.diagonal().mean() * torch.eye(d)
    inverse, Q = torch.linalg.inv(H), torch.zeros_like(W)
    low, high = W.amin(1).clamp(max=0), W.amax(1).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    for j in range(d):
        q = scale * (((W[:, j] / scale).round() + zero).clamp(0, 2**bits - 1) - zero)
        Q[:, j] = q
        error = (W[:, j] - q) / inverse[j, j]
        W[:, j:] -= error[:, None] * inverse[j, j:]
        inverse -= inverse[:, j, None] * inverse[j] / inverse[j, j]
    return Q


def quantise(bits=4, layers=4):
    """4-bit GPTQ of `layers` linears of smollm2-135m: the method against the naive column loop, and both errors."""
    base = zoo.load("smollm2-135m").eval()
    picked = [s for s in luthier.sites(base) if s.kind == "weight" and s.block == 14 and s.layout == "linear"][:layers]
    method, ours, theirs, gap = module.gptq(bits=bits), 0.0, 0.0, []
    for s in picked:
        g = torch.Generator().manual_seed(s.d_in)
        x = torch.randn(1024, s.d_in, generator=g) @ torch.randn(s.d_in, s.d_in, generator=g) / s.d_in**0.5
        H = method.observe(x)
        start = time.perf_counter()
        p = State(method.init(s.bound(seed=0, step=0, pool={}, n_sites=1, rank=0), H), "0:gptq", s.name)
        Q = method.weight(p)
        ours, start = ours + time.perf_counter() - start, time.perf_counter()
        N = naive(s.W, H, bits, method.damp)
        theirs += time.perf_counter() - start
        gap.append(float(((s.W - Q) @ x.T).square().sum() / ((s.W - N) @ x.T).square().sum()))
    return [row(f"GPTQ {bits} bits, {len(picked)} layers of smollm2-135m: time over the naive column loop", ours / theirs, 0.2,
                seconds=dict(luthier=ours, naive=theirs)),
            row("GPTQ: layer error over the naive column loop's, the largest", max(gap), 1.01)]


def merge(name="smollm2-135m"):
    """TIES of three models: the most that is alive above the model that comes out, over its largest layer; seconds over the
    seconds that it takes to read the three and to write one."""
    base = zoo.load(name)
    with tempfile.TemporaryDirectory() as folder:
        from safetensors.torch import load_file, save_file

        paths, largest = [], 0
        for k in range(3):
            g = torch.Generator().manual_seed(k)
            state = {n: (p + 0.01 * torch.randn(p.shape, generator=g)).contiguous().clone() for n, p in base.state_dict().items()}
            paths.append(f"{folder}/{k}.safetensors")
            save_file(state, paths[-1])
        largest = max(sum(s.parameter.nbytes for s in luthier.sites(base) if s.kind == "weight" and s.block == b)
                      for b in (None, 0))
        start = time.perf_counter()
        for path in paths:
            save_file(load_file(path), f"{folder}/copy.safetensors")
        disk = time.perf_counter() - start
        made, out = copy.deepcopy(base), Path(folder) / "out"
        held, above = [*made.parameters(), *made.buffers()], 0

        def run():
            tuned = luthier.attach(made, luthier.parse(f"ties(experts={tuple(paths)!r}, at='all')"))
            tuned.merge()
            save_file({k: v.contiguous().clone() for k, v in made.state_dict().items()}, f"{out}.safetensors")
        start = time.perf_counter()
        run()
        spent = time.perf_counter() - start
        made = copy.deepcopy(base)
        held = [*made.parameters(), *made.buffers()]
        above = cost.peak(run, held) - 2 * cost.nbytes(held)
        return [row(f"TIES of three {name}: peak above base and output, over the largest layer", above / largest, 1.0,
                    bytes=dict(above=above, largest=largest)),
                row(f"TIES of three {name}: seconds over reading and writing three", spent / disk, 2.0,
                    seconds=dict(merge=spent, disk=disk))]
