"""The entries of a comparison: plain dicts in, plain dicts out, so that they run here, in other processes or on other machines.

    job     {"kind": "score" | "search", "chain", "seed", "lr", "epochs", "batch_size", "precision", "split", "task": {...}}
    result  {"score", "metrics", "trained", "stored", "steps", "seconds", "tried": what it says to the task's samples, where the
            task has any}  or  {"failed": why}
"""

import contextlib
import functools
import json
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from .. import method
from ..errors import LuthierError, RunStopped
from .fit import fit

GIVEN = {}                               # tasks handed over in Python, by name: they live in this process only
NEWS = 8                                 # steps between a worker's words to the progress bar


def task_of(reference):
    """The Task that a JSON reference describes: made once a process."""
    return GIVEN[reference["given"]] if "given" in reference else _open(json.dumps(reference, sort_keys=True))


@functools.lru_cache(maxsize=2)
def _open(text):
    from .. import tasks

    reference = json.loads(text)
    return tasks.open(reference.pop("source"), **reference)


def do(job, tell=lambda steps: None):
    """Train and evaluate one entry; `tell(n)` hears that n more steps are done."""
    import torch

    task, done = task_of(job["task"]), 0

    def progress(k, total, loss):
        nonlocal done
        if k == total or k % NEWS == 0:
            tell(k - done)
            done = k

    torch.manual_seed(job["seed"])
    try:
        tuned, history = fit(task, job["chain"], seed=job["seed"], batch_size=job["batch_size"], epochs=job["epochs"],
                             lr=job["lr"],
                             precision=job["precision"], progress=progress)
    except RunStopped as stop:
        if stop.interrupted:
            raise
        return {"failed": str(stop).split(" No folder")[0]}
    metrics = task.evaluate(tuned, job["split"])
    result = {"score": metrics[task.metric], "metrics": metrics, "steps": history["steps"], "seconds": history["seconds"],
              "trained": sum(p.numel() for _, p in tuned.trainable())}
    if job["kind"] == "score" and (shown := task.samples()):
        result["tried"] = task.tried(tuned, shown)
    with tempfile.TemporaryDirectory() as folder:
        tuned.save(Path(folder) / "state")
        result["stored"] = sum(f.stat().st_size for f in (Path(folder) / "state").rglob("*") if f.is_file())
    return result


# -- where they run -----------------------------------------------------------------------------------------------------


def run(jobs, n=1, ray=None, tell=lambda steps: None):
    """Yield (place in `jobs`, result) as they finish: here, in n processes, or on a Ray cluster."""
    if (n > 1 or ray) and any("given" in job["task"] for job in jobs):
        raise LuthierError("A task or module given in Python lives in this process only: leave out jobs and ray, or name the "
                           "data and the model instead.")
    if ray:
        yield from _on_ray(jobs, ray, tell)
    elif n > 1 and len(jobs) > 1:
        yield from _in_processes(jobs, n, tell)
    else:
        for i, job in enumerate(jobs):
            yield i, do(job, tell)


def _in_processes(jobs, n, tell):
    context = multiprocessing.get_context("spawn")
    news, threads = context.Queue(), max(1, (os.cpu_count() or 1) // n)
    with ProcessPoolExecutor(n, context, _begin, (threads, news, list(method.INCLUDED))) as pool:
        places = {pool.submit(_do, job): i for i, job in enumerate(jobs)}
        try:
            while places:
                finished, _ = wait(places, timeout=0.2, return_when=FIRST_COMPLETED)
                with contextlib.suppress(queue.Empty):
                    while True:
                        tell(news.get_nowait())
                for future in finished:
                    yield places.pop(future), future.result()
        except BrokenProcessPool as e:
            raise LuthierError(f"One of the {n} processes died, most likely for want of memory. Try fewer --jobs. What was "
                               "finished is kept: the same command goes on from there.") from e
        finally:                                           # also when the reader stops early
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children() if places else ():
                child.terminate()


def _begin(threads, news, files):
    import torch

    _include(files)

    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)           # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _do.news = news


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _do(job):
    return do(job, _do.news.put)


def _include(files):
    for file in files:
        if file not in method.INCLUDED:
            method.include(file)


def _far(job, files):
    """An entry on another machine, which sees the same files under the same absolute paths."""
    _include(files)
    return do(job)


def _absolute(reference):
    there = {k: os.path.abspath(v) for k, v in reference.items() if k in ("source", "model") and v and os.path.exists(v)}
    return reference | there


def _on_ray(jobs, address, tell):
    try:
        import ray
    except ImportError as e:
        raise LuthierError("--ray needs the package ray. pip install \"luthier[ray]\"") from e
    mine = not ray.is_initialized()
    if mine:
        try:
            ray.init(address=None if address == "local" else address, include_dashboard=False, log_to_driver=False,
                     logging_level="error",
                     runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}} if address == "local" else None)
        except (ConnectionError, ValueError, RuntimeError) as e:
            raise LuthierError(f"No Ray cluster answers at {address!r}: {str(e).splitlines()[0]} Start one with `ray start "
                               "--head`, or use --ray local.") from e
    try:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0           # Ray hides the GPUs from whoever asks for none
        remote, files = ray.remote(num_cpus=1, num_gpus=gpus)(_far), list(method.INCLUDED)
        places = {remote.remote(job | {"task": _absolute(job["task"])}, files): i for i, job in enumerate(jobs)}
        while places:
            finished, _ = ray.wait(list(places), num_returns=1)
            for reference in finished:
                i = places.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayTaskError as e:
                    raise e.cause if isinstance(e.cause, LuthierError) else e from None
                except ray.exceptions.RayError as e:       # a worker or a machine was lost, again and again
                    raise LuthierError(f"Ray gave an entry up: {' '.join(str(e).split())[:300]} What was finished is kept: the "
                                       "same command goes on from there.") from e
                tell(result.get("steps", 0))
                yield i, result
    finally:
        if mine:
            ray.shutdown()
