"""A merged model on disk, made and written site by site.

    merge(model, chain, out)         out: a new folder, as the model's own library saves it; returns the names of its files
    written(model, chain, out, put)  the same, where put(folder, save_file) says which files there are

In memory there is, beside the base, never more than the state and the new tensor of one site; where every method of the chain can
make the state of some rows alone (its init names `rows`), of SIZE entries. The states of a whole model need not fit at once. What
cannot be had so (a method that calibrates or produces its state, a tie that comes apart, a library that converts what it writes)
is attached, merged and saved instead: the result is the same to the bit. A folder is there complete or not at all.
"""

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from . import save
from .attach import attach, mergeable, plan
from .errors import BadOrder, BadState
from .host import Entry, Host, Owner
from .host.patch import composed, fetch
from .method import call
from .state import State

SIZE = 1 << 20                             # entries of a site that are made and written at a time
AHEAD = 16                                 # bytes an entry that may wait for the disk while the next are made


def merge(model, chain, out, *, seed=0, data=(), loss=None):
    """Write `model` with `chain` merged into it, without attaching anything where that is possible."""
    return written(model, chain, out, lambda folder, save_file: plain(model, folder, save_file), seed=seed, data=data, loss=loss)


def plain(body, folder, save_file):
    """Save a module as its library does, through our save_file; returns the line of Python that loads it."""
    if hasattr(body, "write"):                              # a bridged model
        return body.write(folder, save_file)
    if hasattr(body, "save_pretrained"):
        from transformers import modeling_utils

        with _instead(modeling_utils, "safe_save_file", save_file):
            body.save_pretrained(folder)
        return f"transformers.{type(body).__name__}.from_pretrained(\"{{}}\")"
    config = getattr(body, "pretrained_cfg", None)
    save_file(body.state_dict(), Path(folder) / "model.safetensors")
    if config:
        name = config.get("architecture") or type(body).__name__
        return f"timm.create_model(\"{name}\", num_classes=0, checkpoint_path=\"{{}}/model.safetensors\")"
    return "model.load_state_dict(safetensors.torch.load_file(\"model.safetensors\"))"


@contextlib.contextmanager
def _instead(module, name, function):
    before = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, before)


def written(model, chain, out, put, *, seed=0, state=None, data=(), loss=None):
    """Fill the folder `out` with what put(folder, save_file) saves of the model's tensors: they are merged on their way.
    state: what hands each site its state, as in attach()."""
    out = Path(out)
    if out.is_dir() and any(out.iterdir()):
        raise BadState(f"{out} is not empty. Give a new folder for the merged model.")
    try:
        lean = Merged(model, chain, seed, state)

        def fill(folder):
            put(folder, lean.save_file)
            lean.check()
        save.write(out, fill)
    except NeedsAll:
        tuned = attach(model, chain, data, seed=seed, loss=loss, state=state)
        try:
            tuned.merge()
            save.write(out, lambda folder: put(folder, _save_file))
        finally:
            tuned.detach()
    return sorted(p.name for p in out.iterdir())


def _save_file(tensors, path, metadata=None):
    from safetensors.torch import save_file

    seen, own = set(), {}
    for name, t in tensors.items():                         # a file holds no two names for one memory
        t, at = t.contiguous(), t.untyped_storage().data_ptr()
        own[name] = t.clone() if at in seen else t
        seen.add(at)
    save_file(own, path, metadata)


class NeedsAll(Exception):
    """This merge cannot be made site by site."""


class Merged:
    """What a model's tensors become when a chain is merged into it, made when they are written."""

    def __init__(self, model, chain, seed=0, state=None, size=None):
        self.todo, self.size = plan(model, chain), size or SIZE
        mergeable(self.todo.chain)
        host = Host.of(self.todo.model)
        if host is not None and (host.patches or host.ports):
            raise BadOrder("Something is attached to this model already. merge() or detach() it first.")
        if any(m.has("produce") or m.observes and state is None for m in self.todo.chain):
            raise NeedsAll
        self.state, self.owner, self.acted, self.done = state, Owner("merged"), set(), set()
        self.groups, self.biases, self.later = {}, {}, {}   # id of a parameter -> [(step, site)]; of a bias -> its parameter's id
        for step in self.todo.steps:
            names, pool, first = {s.name for s in step.sites}, {}, {}
            bound = {s: s.bound(seed=seed, step=step.number, pool=pool, n_sites=len(step.sites), rank=r)
                     for r, s in enumerate(step.sites)}
            pool["sites"] = [bound[s] for s in step.sites if s not in step.twins]
            for s in step.sites:
                i, bias = id(s.parameter), self._bias(s)
                alone = first.setdefault(i, s).module is s.module and s not in step.twins
                if set(s.tied) - names or not alone and (s not in step.twins or bias):
                    raise NeedsAll                          # it comes apart from its twin, or has a bias of its own
                if alone:
                    self.groups.setdefault(i, []).append((step, bound[s]))
                    if (there := self.groups[i][0][1]).module is not s.module or there.param != s.param:
                        raise NeedsAll
                    if bias and "b" in step.method.wants("weight") and self.biases.setdefault(
                            id(fetch(s.module, bias)), i) != i:
                        raise NeedsAll
        if self.biases.keys() & self.groups.keys():
            raise NeedsAll

    @staticmethod
    def _bias(s):
        return s.bias or ("bias" if s.module._parameters.get("bias") is not None else "")

    def check(self):
        """A step that found nothing to change is refused, in the words of attach()."""
        if {step.number for step in self.todo.steps} - self.acted:
            raise NeedsAll

    def save_file(self, tensors, path, metadata=None):
        """safetensors.torch.save_file for tensors of the model: each is written as what it becomes."""
        model, names = self.todo.model, {}
        own = {_place(t): t for t in [*model.parameters(), *model.buffers()]}
        for name, t in tensors.items():
            if _place(t) not in own or not t.is_contiguous() or t.dtype not in save.CODES:
                raise NeedsAll                              # made of the model's tensors: nobody knows how
            names.setdefault(id(own[_place(t)]), []).append(name)
        with _File(path, tensors, metadata) as file:
            for i in self.groups:
                for which, row, t in self._made(self.groups[i]) if i in names else ():
                    for name in names.get(which, ()):
                        file.put(name, row, t)
                    if which not in names:                  # a bias that comes into another file
                        self.later.setdefault(which, []).append((row, t))
            for i in names:
                if i in self.done:
                    raise NeedsAll
                if i in self.later:
                    for row, t in self.later.pop(i):
                        file.put(names[i][0], row, t)
                elif i in self.biases and self.biases[i] not in names:
                    raise NeedsAll                          # a bias that comes into a file before its weight
                elif i not in self.groups and i not in self.biases:
                    for name in names[i]:
                        file.put(name, 0, own[_place(tensors[name])].detach())
            self.done |= names.keys()

    @torch.no_grad()
    def _made(self, group):
        """(id of the parameter or its bias, first row, the rows that take its place there), all of them, in order."""
        s = group[0][1]
        P, bias = s.parameter.detach(), self._bias(s)
        B = fetch(s.module, bias).detach() if bias else None
        alone = self.state is None and all(t is s or t.name == s.name for _, t in group) and s.sliced and all(
            "rows" in step.method.wants("init") for step, _ in group)
        n = max(1, self.size * len(P) // max(P.numel(), 1)) if alone else 1
        for rows in [slice(k, min(k + n, len(P))) for k in range(0, len(P), n)] if alone else [slice(None)]:
            entries = [Entry(self.owner, step.method, t, p) for step, t in group
                       if (p := self._init(step, t, rows)) is not None]
            W, b = composed(P[rows] if alone else P, B if B is None or not alone else B[rows], entries)
            if B is not None and b is None or B is None and b is not None and (
                    "bias" in s.module._parameters or b.count_nonzero()):
                raise NeedsAll                              # a bias comes or goes
            yield id(s.parameter), rows.start or 0, W
            if B is not None and id(fetch(s.module, bias)) in self.biases:
                yield id(fetch(s.module, bias)), rows.start or 0, b

    def _init(self, step, s, rows):
        def init():
            return call(step.method, "init", site=s, seen=None, rows=rows, model=self.todo.model)
        kind = f"{step.number}:{type(step.method).__name__}"
        made = init() if self.state is None else self.state(f"{kind}@{s.name}".replace(".", "/"), init)
        if made is None:
            return None
        self.acted.add(step.number)
        return State(made, kind, s.name).eval()


def _place(t):
    return t.data_ptr(), t.dtype, tuple(t.shape), t.stride()


class _File:
    """A safetensors file whose tensors come in any order, some rows at a time. The first eight bytes, without which nothing
    reads it, are written when all the rest is there. What is small is written while the next is made."""

    def __init__(self, path, tensors, metadata):
        header, self.where, at = {"__metadata__": metadata} if metadata else {}, {}, 0
        for name, t in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
            header[name] = {"dtype": save.CODES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
            self.where[name], at = (at, t), at + t.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        self.text, self.size = text + b" " * (-len(text) % 8), at
        self.file, self.disk, self.waiting = open(path, "wb", buffering=0), ThreadPoolExecutor(1), []

    def __enter__(self):
        self._write(memoryview(self.text), 8)
        return self

    def put(self, name, row, t):
        """Rows of a tensor, from `row` on."""
        at, like = self.where[name]
        at += 8 + len(self.text) + (row * (like.nbytes // max(len(like), 1)) if like.dim() else 0)
        data = memoryview(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        self.waiting.append((self.disk.submit(self._write, data, at), len(data)))
        while sum(n for _, n in self.waiting) > AHEAD * SIZE:
            self.waiting.pop(0)[0].result()

    def _write(self, data, at):
        self.file.seek(at)
        while data:
            data = data[self.file.write(data):]

    def __exit__(self, kind, *_):
        try:
            for job, _ in self.waiting:
                job.result()
            if kind is None:
                self.file.truncate(8 + len(self.text) + self.size)
                self._write(memoryview(len(self.text).to_bytes(8, "little")), 0)
        finally:
            self.disk.shutdown()
            self.file.close()
