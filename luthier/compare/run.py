"""The comparison: every chain over every seed at equal budget, then what each costs. Finished entries are kept (see store.py)."""

import contextlib
import json
import os
import sys

from ..errors import LuthierError, RunStopped
from ..method import parse, split
from ..save import writable
from . import work
from .store import Store, machine

GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
SEARCH_SEED = 1000                       # of the learning-rate search: none of the seeds that are reported


def compare(data, model=None, methods="probe, full, lora(rank=8)", seeds=3, out=None, *, epochs=3, batch_size=32, lr=1e-3,
            tune_lr=False, grid=GRID, jobs=1, ray=None, precision="no", measure=True, progress=None, command="", **task_options):
    """Train every chain of `methods` on `data` over `seeds`, measure it, and return the document that results.json holds.

    data, model   as in luthier.tasks.open; or `data` a Task made in Python
    methods       "probe, full, lora() >> ssf()", or a list of chains
    seeds         how many, or which
    lr            one learning rate for all, or {chain: rate}; with tune_lr, the best of `grid` on the validation split, searched
                  in the same way for every chain, baselines included, with one seed that is not reported
    jobs, ray     run entries in that many processes, or on the Ray cluster at that address ("local" starts one)
    out           folder for results.json; None: nothing is written
    measure       whether to measure memory, step time and latency after the training
    """
    chains = split(methods) if isinstance(methods, str) else [parse(m) for m in methods]
    chains = {repr(c): c for c in chains}
    seeds = list(range(seeds)) if type(seeds) is int else list(seeds)
    rates = {repr(parse(c)): v for c, v in lr.items()} if isinstance(lr, dict) else dict.fromkeys(chains, lr)
    _check(chains, seeds, jobs, [*rates.values(), *grid], epochs, batch_size)
    if out:
        writable(out)
    reference, task = _task(data, model, task_options)
    _fits(task, chains.values())
    setting = dict(data=str(task.source), model=_name(task), methods=list(chains), seeds=seeds, epochs=epochs,
                   batch_size=batch_size,
                   precision=precision, lr=None if tune_lr else rates, grid=list(grid) if tune_lr else None)
    budget = dict(epochs=epochs, batch_size=batch_size, precision=precision, task=reference)
    store = Store(out, setting, task, command)
    with _stoppable(store), _bar(progress) as bar:
        def train(jobs_, what):
            todo = [j for j in jobs_ if store.result(j) is None]
            bar.begin(len(todo) * task.n_batches("train", batch_size) * epochs, what)
            for i, result in work.run(todo, jobs, ray, bar.tell):
                store.keep(todo[i], result)
                bar.done(todo[i], result)

        if tune_lr:
            search = {c: [dict(budget, kind="search", chain=c, seed=SEARCH_SEED, lr=r, split="val") for r in grid]
                      for c in chains}
            train([j for js in search.values() for j in js], "learning rates")
            rates = {c: _best(store, js, task.higher) for c, js in search.items()}
        score = [dict(budget, kind="score", chain=c, seed=s, lr=rates.get(c, 1e-3), split="test") for s in seeds for c in chains]
        store.plan(score)
        train(score, "training")
        _look(store, task, reference)
        if measure:
            costs = [dict(kind="cost", chain=c, batch_size=batch_size, task=reference, machine=machine()) for c in chains]
            store.plan(costs)
            _measure(store, costs, task, batch_size, bar)
        store.write()
    return store.document


def _check(chains, seeds, jobs, rates, epochs, batch_size):
    if not chains:
        raise LuthierError("There is nothing to compare: name at least one method, such as \"probe, full, lora(rank=8)\".")
    if not seeds or any(type(s) is not int or s < 0 for s in seeds) or len(set(seeds)) < len(seeds):
        raise LuthierError(f"seeds={seeds!r}: give a number of seeds of at least 1, or distinct whole numbers.")
    for name, v in (("jobs", jobs), ("epochs", epochs), ("batch_size", batch_size)):
        if type(v) is not int or v < 1:
            raise LuthierError(f"{name}={v!r}: must be a whole number of at least 1.")
    for v in rates:
        if type(v) not in (int, float) or not 0 < v < float("inf"):
            raise LuthierError(f"The learning rate {v!r} must be a number above 0.")


def _task(data, model, options):
    """(a JSON reference from which any process opens the task, the Task)"""
    from .. import tasks

    if not isinstance(data, tasks.Task):
        reference = dict(source=os.fspath(data) if not isinstance(data, dict) else data, model=model,
                         **{k: v for k, v in options.items() if v is not None})
        with contextlib.suppress(TypeError):               # arrays or a module cannot be named
            json.dumps(reference)
            return reference, work.task_of(reference)
        data = tasks.open(data, model=model, **options)
    name = f"given-{id(data)}"
    work.GIVEN[name] = data
    return {"given": name}, data


def _name(task):
    return task.model if isinstance(task.model, str) else type(task.model).__name__


def _fits(task, chains):
    """Refuse what cannot be attached before anything is trained."""
    from .fit import dress

    model = task.build(seed=0)
    for chain in chains:
        dress(model, chain)


def _best(store, jobs, higher):
    """The learning rate with the best score; the grid's middle where every one of them failed."""
    done = [(store.result(j)["score"], j["lr"]) for j in jobs if "score" in store.result(j)]
    return (max if higher else min)(done, key=lambda d: d[0])[1] if done else jobs[len(jobs) // 2]["lr"]


def _look(store, task, reference):
    """Rows of the test split that a person can look at, and what the untuned model says to them."""
    job = dict(kind="samples", task=reference)
    if store.result(job) is None and (shown := task.samples()):
        store.keep(job, {"rows": shown, "tried": task.tried(task.build(seed=0), shown)})
    if store.result(job) is not None:
        store.document["samples"] = store.key(job)


def _measure(store, costs, task, batch_size, bar):
    from .measure import Meter

    todo, meter = [j for j in costs if store.result(j) is None], None
    bar.begin(len(todo), "measuring")
    for job in todo:
        meter = meter or Meter(task, batch_size)
        store.keep(job, meter(job["chain"]))
        bar.tell(1)


@contextlib.contextmanager
def _stoppable(store):
    try:
        yield
    except (KeyboardInterrupt, RunStopped) as e:
        if not getattr(e, "interrupted", True):
            raise
        stop = RunStopped("Stopped by Ctrl-C. " + (f"The finished entries are in {store.path}; the same command goes on from "
                                                   "there."
                                                   if store.path else "No folder was given, so nothing is kept."))
        stop.interrupted = True
        raise stop from e


# -- the bar --------------------------------------------------------------------------------------------------------------


class _Bar:
    """A live bar on a terminal; elsewhere one line a finished entry; nothing when `show` is False."""

    def __init__(self, show):
        self.show, self.live, self.bar = show, show is not False and sys.stderr.isatty(), None

    def begin(self, total, what):
        from tqdm import tqdm

        self.close()
        self.what = what
        self.bar = tqdm(total=total, desc=what, unit="step", disable=not self.live, leave=False, dynamic_ncols=True)

    def tell(self, steps):
        self.bar.update(steps)

    def done(self, job, result):
        text = f"{job['chain']}  seed {job['seed']}  " + (f"{result['score']:.4f}" if "score" in result else "stopped")
        if self.live:
            self.bar.set_description_str(f"{self.what}: {text}")
        elif self.show is not False:
            print(f"{self.what}: {text}", file=sys.stderr, flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()


@contextlib.contextmanager
def _bar(progress):
    bar = _Bar(progress)
    try:
        yield bar
    finally:
        bar.close()
