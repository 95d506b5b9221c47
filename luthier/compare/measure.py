"""What a chain costs on this machine, each figure beside its reference: memory, step time against tuning everything, latency
against the untouched model. The two sides run in turns, so that what else the machine does hits both."""

import statistics
from itertools import islice

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..cost import peak, turns
from ..errors import BadOrder, LuthierError, NotMergeable
from .fit import WHOLE, ready

ROUNDS = 9


class Meter:
    """Measures chains on one task. The reference (everything trains) and the bare model are made once and kept."""

    def __init__(self, task, batch_size, seed=0):
        self.task, self.seed, self.size = task, seed, batch_size
        self.bare = task.build(seed=seed)                  # before its rows: it says how long they may be
        first = list(islice(task.batches("train", batch_size, seed=seed), 8 if len(getattr(task, "kinds", ())) > 1 else 1))
        self.place = max(range(len(first)), key=lambda i: sum(v.numel() for v in first[i].values()))     # the largest kind of row
        self.batch = first[self.place]
        self.one = next(iter(task.batches("train", 1, seed=seed)))
        try:
            self.reference = self._step(self._ready(WHOLE))
        except LuthierError:                               # a model with places where not everything can train
            self.reference = None

    def _ready(self, chain):
        return ready(self.task, chain, self.seed, len(next(iter(self.batch.values()))))

    def _fed(self, tuned):
        """The batch as training feeds it: what frozen eyes saw in place of pixels."""
        if not hasattr(self.task, "seeing"):
            return self.batch
        with self.task.seeing(tuned):
            return next(islice(self.task.batches("train", self.size, seed=self.seed), self.place, None))

    def _step(self, tuned):
        """A function that does one whole train step."""
        batch = self._fed(tuned)
        if not tuned.chain:                                # nothing trains: a step is a look at the batch
            step = torch.no_grad()(lambda: self.task.logits(tuned, batch))
            step.holds = lambda: [*tuned.parameters(), *tuned.buffers(), *batch.values()]
            return step
        tuned.train()
        tuned.total_steps = 1000
        optimizer = torch.optim.AdamW([p for _, p in tuned.trainable()], lr=1e-5)

        def step():
            (self.task.loss(tuned, batch) + tuned.penalty()).backward()
            optimizer.step()
            tuned.step(optimizer)
            optimizer.zero_grad()

        step.holds = lambda: [*tuned.parameters(), *tuned.buffers(), *batch.values(),
                              *(v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v))]
        return step

    def __call__(self, chain):
        """{"memory": bytes, "step": ratio or None, "step_seconds", "latency": ratio, "latency_seconds", "merged", "threads"}"""
        tuned = self._ready(chain)
        step = self._step(tuned)
        step()                                             # the optimizer's memory is there from the second step on
        memory = peak(step, touched(step, step.holds()))
        mine, ratio = against(step, self.reference, ROUNDS)
        tuned.eval()
        merged = True
        try:
            tuned.merge()
        except (NotMergeable, BadOrder):
            merged = False
        with torch.no_grad():
            ours, slower = against(lambda: self.task.logits(tuned, self.one), lambda: self.task.logits(self.bare, self.one),
                                   3 * ROUNDS)
        return {"memory": memory, "step": ratio, "step_seconds": mine, "latency": slower, "latency_seconds": ours,
                "merged": merged, "threads": torch.get_num_threads()}


def against(a, b, rounds):
    """(median seconds of a, median of a's time over b's in the same round); b may be None."""
    times = turns([a, b] if b else [a], rounds)
    return statistics.median(t[0] for t in times), statistics.median(x / y for x, y in times) if b else None


class _Touch(TorchDispatchMode):
    """Collects the storages whose values operators read or write; views and new_zeros(...) look at shapes only."""

    def __init__(self):
        super().__init__()
        self.storages = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        given, made = (
            {t.untyped_storage()._cdata for t in tree_iter(x) if isinstance(t, torch.Tensor)} for x in ((args, kwargs), out))
        if func._schema.is_mutable or not (given & made or name.startswith("new_") or name.endswith("_like")):
            self.storages |= given
        return out


def touched(fn, tensors):
    """Those of `tensors` that some operator of fn() is given. The rest need not be in memory: where a method has put a copy in a
    weight's place, the base weight is not counted against it."""
    with _Touch() as touch:
        fn()
    return [t for t in tensors if t.untyped_storage()._cdata in touch.storages]
