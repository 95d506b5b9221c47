"""Merging models and quantising one: peak memory and time."""

import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

import luthier
from luthier import cost, zoo
from luthier.methods.merge import _experts, ties
from luthier.methods.quantize import gptq as module
from luthier.state import State

from .common import row, timed


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


def merge(name="smollm2-135m", rounds=5):
    """TIES of three models of one base, from three files into a folder.

    Memory: what a process of its own has above what it had with the base loaded, as the system counts its anonymous pages
    while it merges (RssAnon, asked every few milliseconds from outside; nothing that is read or written is mapped, so
    nothing hides in file-backed pages: their growth is recorded beside it), over the largest layer, the embedding; the
    bytes of a transformer block stand beside it. The bound, one layer above the output, allows for the output too: that is
    written as it is made, so it is not allowed for here. Our own count of live tensors (cost.peak) stands beside it.

    Time: over reading the three files and writing one model through the same file system, 1 MiB at a time and synced to the
    disk, as the merge syncs its file. Both find the experts in the page cache, where writing them left them, and both write a
    file that was not there: so writing is nearly all of the disk's time, and with a cold cache the merge, which reads the
    experts twice (one pass for the cut, one to merge), would do so at the price of one reading more. The base is in memory for
    both. "Near the disk's" gives no number; we read it as at most twice: one pass for the bytes and as much again for arithmetic.
    """
    base = zoo.load(name)
    sites = [s for s in luthier.sites(base) if s.kind == "weight" and s.block == 0]
    block = sum({id(s.parameter): s.parameter.nbytes for s in sites}.values())
    largest, n = max(p.nbytes for p in base.parameters()), base.num_parameters()
    with tempfile.TemporaryDirectory() as folder:
        paths = tuple(f"{folder}/{k}.safetensors" for k in range(3))
        for k, path in enumerate(paths):
            g = torch.Generator().manual_seed(k)
            save_file({n: p + 0.01 * torch.randn(p.shape, generator=g) for n, p in base.named_parameters()}, path)
        chain, out = luthier.parse(f"ties(experts={paths!r})"), f"{folder}/out"
        watched = _watched(name, chain, out)
        shutil.rmtree(out)
        held = [*base.parameters(), *base.buffers()]
        ours = cost.peak(lambda: luthier.merge(base, chain, out), held) - cost.nbytes(held)
        shutil.rmtree(out)
        searched, whole = _search(lambda: luthier.merge(base, chain, out))
        times = {"merge": [], "disk": []}
        for turn in range(rounds):
            for what in sorted(times, reverse=bool(turn % 2)):
                shutil.rmtree(out)
                times[what].append(cost.clock(lambda: luthier.merge(base, chain, out) if what == "merge"          # noqa: B023
                                              else _disk(paths, out)))
    return [row(f"TIES of three {name}: peak above the base, over its largest layer", watched["anonymous"] / largest, 1.0,
                bytes=dict(watched, block=block, largest=largest, live=ours)),
            timed(f"TIES of three {name}: seconds over reading three and writing one", times, "merge", "disk", 2.0,
                  note=f"in a run of {whole:.1f} s finding how much of each whole expert stays took {searched:.1f} s; nearly all "
                       f"of the rest is arithmetic, number by number, on three times {n / 1e6:.0f} million")]


def _search(run):
    """(seconds of run() in which the cuts are found, all of its seconds)"""
    seconds, cut = [], _experts.cut

    def clocked(*given):
        start = time.perf_counter()
        found = cut(*given)
        seconds.append(time.perf_counter() - start)
        return found

    with mock.patch.object(ties, "cut", clocked):
        whole = cost.clock(run)
    return sum(seconds), whole


def _watched(name, chain, out):
    """Bytes above those of the loaded base while a process of its own merges: anonymous and file-backed, the most of each."""
    code = f"""if True:
        import luthier, sys
        from luthier import zoo
        base = zoo.load({name!r})
        sum(float(p.sum()) for p in base.parameters())              # every page of the base is there before we look
        print("ready", flush=True)
        sys.stdin.readline()
        luthier.merge(base, {repr(chain)!r}, {out!r})
        print("done", flush=True)"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        if child.stdout.readline() != "ready\n":
            raise RuntimeError("the process that merges did not start")
        before = most = _pages(child.pid)
        child.stdin.write("go\n")
        child.stdin.flush()
        while not select.select([child.stdout], [], [], 0.002)[0]:
            most = {k: max(v, most[k]) for k, v in _pages(child.pid).items()}
        if child.stdout.readline() != "done\n":
            raise RuntimeError("the process that merges failed")
    return {k: most[k] - before[k] for k in most}


def _pages(pid):
    lines = dict(line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {k: 1024 * int(lines[name].split()[0]) for k, name in dict(anonymous="RssAnon", file="RssFile").items()}


def _disk(paths, out):
    """What a merge of these files cannot do without: read each once, write one as large, sync it."""
    Path(out).mkdir()
    buffer = bytearray(1 << 20)
    with open(f"{out}/model.safetensors", "wb", buffering=0) as to:
        for path in paths:
            with open(path, "rb", buffering=0) as f:
                while n := f.readinto(buffer):
                    if path == paths[0]:
                        to.write(memoryview(buffer)[:n])
        os.fsync(to.fileno())
