"""Training: one plain loop for whatever trains in a Tuned model.

    loss = task.loss(tuned, batch) + tuned.penalty();  backward;  clip;  AdamW;  tuned.step(optimizer)

It stands on `accelerate` (device, precision); several processes are one run, see `ranks`. The learning rate is a function of the
step alone, the order of the data of (seed, epoch) alone, and every generator is in the checkpoint, so a run that was killed and
resumed equals one that was not, to the bit, on CPU. A checkpoint of step k is written only once the loss of step k is finite: the
last one is always good.
"""

import contextlib
import copy
import errno
import itertools
import math
import random
import signal
import threading
import time
from pathlib import Path

import torch

from . import checkpoint, ranks
from . import schedule as schedules
from .errors import BadChain, BadState, LuthierError, RunStopped

SECONDS = 60                             # between checkpoints, unless a number of steps is asked for


def train(tuned, task, *, epochs=None, steps=None, lr=1e-3, batch_size=32, seed=0, schedule="linear", warmup=0.06, clip=1.0,
          weight_decay=0.0, precision="no", parallel=None, out=None, resume=False, every=None, progress=None, log=None):
    """Train `tuned` on `task`'s train split for `epochs` or `steps`; returns {"loss": [...], "steps", "seconds", "resumed"}.

    out       folder for checkpoints/ (last two) and logs/; None: nothing is written
    resume    go on from the newest checkpoint in `out`
    every     steps between checkpoints; None: one a minute
    progress  True, False, None (a bar on a terminal only) or a function of (step, total, loss)
    log       "tensorboard", False, or None (TensorBoard when `out` is given and it is installed)
    precision "no", "bf16" or "fp16": mixed precision of the forward pass
    schedule  of the learning rate after warmup, as text: see luthier.schedule
    parallel  where torchrun started several processes: "ddp" (None) or "fsdp", see luthier.ranks
    """
    _check(lr=lr, batch_size=batch_size, warmup=warmup, clip=clip, every=every or 1, schedule=schedule)
    per_epoch = task.n_batches("train", batch_size)
    total = _total(epochs, steps, per_epoch)
    if resume and out is None:
        raise BadState("There is nothing to resume from: name the folder of the earlier run with out=.")
    ranks.join()
    ranks.fit(parallel, precision)
    options = dict(lr=lr, batch_size=batch_size, seed=seed, schedule=schedule, warmup=warmup, clip=clip,
                   weight_decay=weight_decay, precision=precision)
    options |= dict(processes=ranks.world(), parallel=parallel or "ddp") if ranks.world() > 1 else {}
    run = _Run(tuned, task, total, per_epoch, _accelerator(precision), folder=out and Path(out) / "checkpoints", every=every,
               options=options)
    began, first = time.monotonic(), run.start(resume)
    tuned.train()
    try:
        main = ranks.rank() == 0                           # of several processes, only one speaks and writes
        with _bar(main and progress, total, first) as tell, _writer(main and log, out, first) as write, _patience() as asked, \
                getattr(task, "seeing", contextlib.nullcontext)(tuned):
            run.loop(tell, write, asked)
    finally:
        tuned.eval()
    return {"loss": run.losses, "steps": total, "seconds": time.monotonic() - began, "resumed": first}


class _Run:
    """One training run: where it is, and how it stops."""

    def __init__(self, tuned, task, total, per_epoch, accelerator, folder, every, options):
        self.tuned, self.task, self.total, self.per_epoch = tuned, task, total, per_epoch
        self.accelerator, self.folder, self.every, self.options = accelerator, folder, every, options
        self.k, self.losses, self.good, self.good_k, self.saved_k, self.saved_at = 0, [], None, None, None, time.monotonic()

    # -- beginning --------------------------------------------------------------------------------------------------
    def start(self, resume):
        """Place the model, lay the newest checkpoint over it if there is one, make the optimizer. Returns the first step."""
        o, tuned = self.options, self.tuned
        own = o["seed"] + 1_000_003 * ranks.rank()
        random.seed(own)
        _numpy_seed(own)
        torch.manual_seed(own)
        tuned.total_steps = self.total
        found = self.folder and ranks.told(lambda: checkpoint.newest(self.folder))
        if found and not resume:
            raise BadState(f"{self.folder.parent} holds the checkpoints of an earlier run (the newest is {found[2].name}). "
                           "Go on from there with resume (--resume on the command line), or choose another folder.")
        if found:
            self._lay(found)
        if o.get("parallel") == "fsdp":
            ranks.shard(tuned, self.accelerator.device)
        else:
            tuned.to(self.accelerator.device)
        named = tuned.trainable()
        if not named:
            raise BadChain(f"Nothing in {tuned.chain!r} trains: it has no trainable state. "
                           "Add a method that does; `luthier methods` lists them.")
        groups = [[p for _, p in named if not ranks.sharded(p)], [p for _, p in named if ranks.sharded(p)]]
        plain = torch.optim.AdamW([{"params": g} for g in groups if g], lr=o["lr"], weight_decay=o["weight_decay"])
        self.optimizer = self.accelerator.prepare_optimizer(plain)
        self.plain = self.optimizer.optimizer
        if found:
            checkpoint.restore_optimizer(self.plain, named, _under("optimizer/", found[0]))
            checkpoint.restore_rng(_under(f"{_rng(ranks.rank())}/", found[0]), found[1][_rng(ranks.rank())])
        return self.k

    def _lay(self, found):
        tensors, facts, path = found
        for key in ("batch_size", "seed", "schedule", "precision", "processes", "parallel"):
            if (old := facts["options"].get(key)) != (new := self.options.get(key)):
                old, new = ("one process" if v is None else f"{key}={v!r}" for v in (old, new))
                raise BadState(f"{path.name} was made with {old}, and now {new} is asked for, "
                               f"which would be another run. Resume with {old}, or choose another folder.")
        if facts["chain"] != repr(self.tuned.chain):
            raise BadState(f"{path.name} belongs to the chain {facts['chain']}, not to {self.tuned.chain!r}. "
                           "Resume with that chain, or choose another folder.")
        checkpoint.restore(self.tuned.states, _under("state/", tensors), facts["plain"])
        self.k = self.tuned.k = self.tuned.stepped = facts["step"]
        self.losses, self.good, self.good_k, self.saved_k = tensors["history/loss"].tolist(), path, self.k, self.k

    # -- the loop ---------------------------------------------------------------------------------------------------
    def loop(self, tell, write, asked):
        try:
            for batch, *share in self._batches():
                stop, due = ranks.agree(asked, ranks.rank() == 0 and self._due())
                if stop:
                    self._stop(f"Stopped by {(asked or ['a signal'])[0]} before step {self.k + 1} of {self.total}.", now=True,
                               interrupted=True)
                before = checkpoint.rng() if due else None
                loss = self._loss(batch, *share)
                value = ranks.total(loss.detach().float())
                if not math.isfinite(value):
                    self._stop(f"The loss became {value} at step {self.k + 1} of {self.total}.", remedy="a lower learning rate")
                if due:
                    self.save(before)
                self._update(loss)
                del loss                                   # its graph must not outlive a change of the parameters' shapes
                self.losses.append(value)
                self.k += 1
                tell(self.k, value)
                write(self.k, value, self.plain.param_groups[0]["lr"])
            if self.folder and self.k != self.saved_k:
                self.save(checkpoint.rng())
            elif not self.folder:
                self._same()
        except KeyboardInterrupt:                          # a second Ctrl-C, or no handler: the step may be half done
            self._stop(f"Stopped by Ctrl-C in step {self.k + 1} of {self.total}.", interrupted=True)
        except RuntimeError as e:
            if not ranks.lost(e):
                raise
            self._stop(f"Step {min(self.k + 1, self.total)} of {self.total}: {ranks.silence()}", cause=e)

    def _batches(self):
        """The batches of steps k, k+1, ... in the order that (seed, epoch) gives; this process's share of each."""
        size, seed = self.options["batch_size"], self.options["seed"]
        while self.k < self.total:
            epoch, skip = divmod(self.k, self.per_epoch)
            batches = self.task.batches("train", size, seed=seed, epoch=epoch, start=skip)
            for batch in itertools.islice(batches, self.total - self.k):
                mine, *share = ranks.share(batch, getattr(self.task, "counted", _rows))
                mine = copy.copy(mine)                     # which may be more than a dict
                mine.update({key: v.to(self.accelerator.device) for key, v in mine.items() if torch.is_tensor(v)})
                yield mine, *share
            if self.k // self.per_epoch == epoch and self.k < self.total:
                raise RuntimeError(f"{type(self.task).__name__} gave fewer than n_batches('train', {size}) in epoch {epoch}")

    def _loss(self, batch, part, rows):
        with self.accelerator.autocast():
            if ranks.world() == 1:
                return self.task.loss(self.tuned, batch) + self.tuned.penalty(batch=batch)
            return part * self.task.loss(self.tuned, batch) + rows * self.tuned.penalty(batch=batch)

    def _update(self, loss):
        self.accelerator.backward(loss)
        params = [p for _, p in self.tuned.trainable()]
        ranks.sum_gradients(params)
        clip = ranks.clip if any(map(ranks.sharded, params)) else self.accelerator.clip_grad_norm_
        norm = clip(params, self.options["clip"])
        if not math.isfinite(float(norm)) and self.options["precision"] != "fp16":      # fp16's scaler skips such steps itself
            self._stop(f"The gradient became {float(norm)} at step {self.k + 1} of {self.total}.", now=True,
                       remedy="a lower learning rate")
        for group in self.plain.param_groups:
            group["lr"] = rate(self.k, self.total, **{n: self.options[n] for n in ("lr", "schedule", "warmup")})
        self.optimizer.step()
        self.tuned.step(self.plain)
        self.optimizer.zero_grad()

    # -- checkpoints and stopping -----------------------------------------------------------------------------------
    def _same(self):
        if not ranks.same(checkpoint.tensors_of(self.tuned.states).values()):
            self._stop(f"The processes no longer hold the same state after step {self.k}: something in {self.tuned.chain!r} goes "
                       "by what one process alone sees (its rows, or random numbers of its own).", remedy="one process")

    def _due(self):
        if not self.folder or self.k == self.saved_k:
            return False
        if self.good is None:                              # the start is a state to go back to
            return True
        return self.k % self.every == 0 if self.every else time.monotonic() - self.saved_at >= SECONDS

    def save(self, generators):
        self.saved_k, self.saved_at = self.k, time.monotonic()
        self._same()
        states = checkpoint.tensors_of(self.tuned.states)
        named = self.tuned.trainable()
        tensors = {**{f"state/{n}": t for n, t in states.items()},
                   **{f"optimizer/{n}": t for n, t in checkpoint.optimizer_tensors(self.plain, named).items()}}
        tensors = {n: ranks.whole(t.detach()) for n, t in tensors.items()} | {
            "history/loss": torch.tensor(self.losses, dtype=torch.float64)}
        facts = dict(step=self.k, total=self.total, chain=repr(self.tuned.chain), options=self.options)
        for r, (random_tensors, numbers) in enumerate(ranks.everyone(generators)):
            tensors |= {f"{_rng(r)}/{n}": t for n, t in random_tensors.items()}
            facts[_rng(r)] = numbers
        facts["plain"] = checkpoint.plain_of(self.tuned.states)
        try:
            self.good = ranks.told(lambda: checkpoint.write(self.folder, self.k, tensors, facts))
            self.good_k = self.k
        except Exception as e:                             # safetensors wraps the operating system's error in its own
            if not isinstance(e, OSError) and "os error" not in str(e).lower():
                raise
            full = getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "no space" in str(e).lower()
            self._stop(f"The disk is full at step {self.k + 1} of {self.total}." if full else
                       f"The checkpoint of step {self.k} could not be written ({e}).", remedy="more free space", cause=e)

    def _stop(self, what, now=False, remedy="", interrupted=False, cause=None):
        """End the run in a good state and say which: the present one if `now`, else the last checkpoint."""
        if now and self.folder:
            self.save(checkpoint.rng())
        back = self.good and (not now or self.options.get("parallel") == "fsdp")
        if back and ranks.rank() == 0:                     # asking nobody: the others may be gone
            ranks.gather(self.tuned, lambda p: torch.empty(p.shape, dtype=p.dtype))
            tensors, facts, _ = checkpoint.newest(self.folder)
            checkpoint.restore(self.tuned.states, _under("state/", tensors), facts["plain"])
            self.good_k = facts["step"]
        if back:
            self.tuned.k = self.k = self.good_k
        if self.good:
            kept = f"The last good state, after {self.k} steps, is in {self.folder}; go on with --resume"
            kept += f" and {remedy}." if remedy else "."
        else:
            kept = "Nothing was written yet." if self.folder else "No folder (out=) was given, so no state was kept."
            kept += f" Start again with {remedy}." if remedy else ""
        error = RunStopped(f"{what} {kept}")
        error.interrupted, error.step = interrupted, self.k
        raise error from cause


def _rng(r):
    return f"rng{r or ''}"


def _rows(batch):
    return max(len(v) for v in batch.values() if torch.is_tensor(v))


def rate(k, total, lr, schedule="linear", warmup=0.06):
    """Learning rate of step k: a linear rise over the first `warmup` share of the steps, then what the schedule says."""
    rise = math.ceil(warmup * total)
    if k < rise:
        return lr * (k + 1) / rise
    return lr * schedules.schedule(schedule)((k - rise) / max(1, total - rise))


def _total(epochs, steps, per_epoch):
    if not per_epoch:
        raise LuthierError("The train split is empty. Give data with at least one row to train on.")
    for name, v in (("epochs", epochs), ("steps", steps)):
        if v is not None and not (isinstance(v, int | float) and math.isfinite(v) and v > 0):
            raise LuthierError(f"{name}={v!r}: must be a number above 0.")
    return max(1, int(steps)) if steps else max(1, round((epochs or 1) * per_epoch))


def _check(lr, batch_size, warmup, clip, every, schedule):
    schedules.schedule(schedule)
    for name, v, low, high in (("lr", lr, 0, math.inf), ("batch_size", batch_size, 1, math.inf), ("warmup", warmup, 0, 1),
                               ("clip", clip, 0, math.inf), ("every", every, 1, math.inf)):
        if not (isinstance(v, int | float) and math.isfinite(v) and low <= v <= high and (v > 0 or name == "warmup")):
            raise LuthierError(f"{name}={v!r}: must be a number {'above' if low == 0 else 'of at least'} {low}"
                               f"{f' and at most {high}' if high < math.inf else ''}.")


def _under(prefix, tensors):
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _numpy_seed(seed):
    import numpy

    numpy.random.seed(seed % 2**32)


def _accelerator(precision):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if precision not in ("no", "bf16", "fp16"):
        raise LuthierError(f"precision={precision!r}: there are no, bf16 and fp16.")
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()                    # its precision is global, and ours belongs to a run
    try:
        return Accelerator(mixed_precision=precision)
    except (ValueError, RuntimeError) as e:
        raise LuthierError(f"precision={precision!r} does not work here: {e} Use \"no\" or \"bf16\".") from e


# -- what the user sees -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _bar(progress, total, first):
    if callable(progress):
        yield lambda k, loss: progress(k, total, loss)
        return
    from tqdm import tqdm

    hidden = {True: False, False: True}.get(progress)      # None: hidden where there is no terminal
    with tqdm(total=total, initial=first, unit="step", desc="train", disable=hidden, leave=False) as bar:
        def tell(k, loss):
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update(1)
        yield tell


@contextlib.contextmanager
def _writer(log, out, first):
    """A function of (step, loss, lr) that logs, or does nothing."""
    if log not in (None, False, "tensorboard"):
        raise LuthierError(f"log={log!r}: the only logger is tensorboard.")
    writer = None
    if log or (log is None and out):
        try:
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(str(Path(out or ".") / "logs"), purge_step=first)
        except ImportError as e:
            if log:
                raise LuthierError("Logging needs the package tensorboard. pip install \"luthier[tensorboard]\"") from e
    try:
        yield (lambda k, loss, lr: (writer.add_scalar("train/loss", loss, k), writer.add_scalar("train/lr", lr, k))) if writer \
            else lambda k, loss, lr: None
    finally:
        if writer:
            writer.close()


@contextlib.contextmanager
def _patience():
    """Ctrl-C and SIGTERM wait for the end of the step; a second one does not. Yields a list: the signal's name once it came."""
    asked = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number, frame):
        if asked and ranks.launched():
            return                                         # torchrun passes on what the terminal has sent already
        if asked:
            raise KeyboardInterrupt
        asked.append("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN}
    try:
        yield asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler if handler is not None else signal.SIG_DFL)
