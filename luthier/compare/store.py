"""What a comparison keeps: results.json, written anew (whole or not at all) after every finished entry.

    {"format", "setting", "command", "task", "machine", "versions", "plan": [key], "entries": {key: {"job", "result"}}}

An entry's key is a hash of all that determines it (chain, seed, learning rate, data, model, budget), so the same command goes on
where it was stopped, and a command with more methods or seeds uses what is there. `plan` says which entries the rows are made of.
"""

import contextlib
import hashlib
import json
import os
import platform
from pathlib import Path

from ..errors import BadState, RunStopped

FORMAT = 1


class Store:
    def __init__(self, out, setting, task, command):
        self.path, self.mark = Path(out) / "results.json" if out else None, _mark(task)
        self.document = dict(format=FORMAT, setting=setting, command=command, task=task.describe(), machine=machine(),
                             versions=versions(), plan=[], entries=read(self.path)["entries"] if self.path and self.path.exists()
                             else {})

    def key(self, job):
        plain = {k: v for k, v in job.items() if k != "task"} | {"data": self.mark}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:24]

    def result(self, job):
        entry = self.document["entries"].get(self.key(job))
        return entry and entry["result"]

    def plan(self, jobs):
        self.document["plan"] += [self.key(j) for j in jobs]

    def keep(self, job, result):
        self.document["entries"][self.key(job)] = {"job": job, "result": result}
        self.write()

    def write(self):
        if not self.path:
            return
        partial = self.path.with_name(f".results-{os.getpid()}.json")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "w", encoding="utf-8") as f:
                json.dump(self.document, f, indent=1, ensure_ascii=False)
                f.flush()
                os.fsync(f.fileno())
            os.replace(partial, self.path)
        except OSError as e:
            stop = RunStopped(f"{self.path} could not be written ({e.strerror or e}). What was written before is whole; free "
                              "some space, and the same command goes on from there.")
            stop.interrupted = False
            raise stop from e
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def read(path):
    """The document in a results.json."""
    try:
        found = json.loads(Path(path).read_text("utf-8"))
        whole = isinstance(found["setting"], dict) and isinstance(found["plan"], list)
        if found["format"] == FORMAT and whole and all({"job", "result"} <= e.keys() for e in found["entries"].values()):
            return found
        why = f"its format is {found['format']!r}, not {FORMAT}"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
        why = f"{type(e).__name__}: {e}"
    raise BadState(f"{path} is not a results file of this version ({why}). Move it away, or choose another --out.")


def _mark(task):
    """What the data and model are, in few bytes: the task's description and a few of its examples."""
    facts = {k: v for k, v in task.describe().items() if k not in ("notes", "each")}
    h = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name in ("train", "test"):
        for key, v in sorted(next(iter(task.batches(name, 8, shuffle=False))).items()):
            h.update(f"{key}{tuple(v.shape)}".encode() + v.numpy().tobytes())
    return h.hexdigest()[:24]


def machine():
    import torch

    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        name = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), name)
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return dict(processor=name, cores=os.cpu_count(), threads=torch.get_num_threads(), gpu=gpu, system=platform.system())


def versions():
    from importlib.metadata import PackageNotFoundError, version

    from .. import __version__

    found = {"python": platform.python_version(), "luthier": __version__}
    for package in ("torch", "transformers", "accelerate", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
