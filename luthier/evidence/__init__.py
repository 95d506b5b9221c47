"""Evidence: one small file a system that runs what the system *works when*, and a record of what came out.

A runner (`luthier/evidence/b105.py`, named by the id) states `SYSTEM CLAIM BASELINE MODEL DATA MINUTES SEEDS METHODS` and
    run(seeds)       -> {"per_seed": {name: [one number a seed]}, "facts": {name: anything JSON holds}}
    verdict(figures) -> (verdict, reasons), from these figures and thresholds written in the file, and from nothing else.
`run(name)` here adds seeds, versions, cores, time and command, and writes `evidence/ID.json` whole or not at all. Because a
verdict is a function of stored figures, a test derives every stored verdict anew: nobody can type one.
"""

import contextlib
import importlib
import json
import math
import os
import platform
import re
import time
from pathlib import Path

from luthier.errors import BadState, LuthierError, UnknownName, nearest
from luthier.systems import STATES, row, store

FIELDS = {"schema": int, "system": str, "name": str, "claim": str, "baseline": str, "model": str, "data": str, "command": str,
          "seeds": list, "figures": dict, "intervals": dict, "verdict": str, "reasons": list, "versions": dict, "machine": dict,
          "minutes": float}
LEAST_SEEDS = 3


def names():
    """System ids that have a runner, from the files of this folder (nothing is imported)."""
    return sorted(p.stem.upper() for p in Path(__file__).parent.glob("[a-z][0-9][0-9][0-9].py"))


def runner(name):
    """The runner's module for an id, the system's other id, or its name."""
    r = row(name)
    for id in (r["id"], r.get("same_as")):
        if id in names():
            return importlib.import_module(f"luthier.evidence.{id.lower()}")
    raise UnknownName(f"{r['id']} ({r['name']}) has no runner yet. {nearest(r['id'], names())} "
                      "`luthier evidence --list` shows all.")


def parse_seeds(text):
    """`"0,1,2"` or `"5"` (that many, from 0) -> distinct whole numbers >= 0."""
    if not isinstance(text, str):
        return list(text)
    if not re.fullmatch(r"\s*\d{1,9}(\s*,\s*\d{1,9})*\s*", text):
        raise LuthierError(f"--seeds takes whole numbers with commas (0,1,2) or one count (5), not {text[:60]!r}.")
    seeds = [int(s) for s in text.split(",")]
    seeds = list(range(seeds[0])) if len(seeds) == 1 else seeds
    if not 1 <= len(set(seeds)) == len(seeds) <= 100:
        raise LuthierError(f"--seeds {text[:60]!r} names {len(seeds)} seeds, some of them twice, none, or over 100. Try 0,1,2.")
    return seeds


def run(name, seeds=None, out=None):
    """Run one system's *works when* and write its record; returns the record."""
    from luthier.compare.stats import interval

    module, began, spent = runner(name), time.time(), time.process_time()
    seeds = list(module.SEEDS) if seeds is None else parse_seeds(seeds)
    if len(seeds) < LEAST_SEEDS:
        raise LuthierError(f"{module.SYSTEM} needs {LEAST_SEEDS} seeds or more for an interval, not {len(seeds)}. Add seeds.")
    figures = _plain(module.run(seeds))
    (verdict, reasons), id = module.verdict(figures), module.SYSTEM
    found = dict(
        schema=1, system=id, name=row(id)["name"], claim=module.CLAIM, baseline=module.BASELINE, model=module.MODEL,
        data=module.DATA, command=f"luthier evidence {id} --seeds {','.join(map(str, seeds))}", seeds=seeds,
        figures=figures, intervals={k: _plain(interval(v)) for k, v in figures["per_seed"].items()},
        verdict=verdict, reasons=list(reasons),
        versions=_versions(), machine=_machine(), minutes=round((time.time() - began) / 60, 2),
        cpu_minutes=round((time.process_time() - spent) / 60, 2))
    problems = faults(found)
    if problems:
        raise BadState(f"The runner of {module.SYSTEM} made a record that is not whole: {'; '.join(problems)}.")
    _write(found, Path(out or store()))
    return found


def faults(found):
    """What is wrong with a record, as sentences; an empty list for a good one."""
    bad = [f"{k} is missing or no {t.__name__}" for k, t in FIELDS.items() if not isinstance(found.get(k), t)]
    if bad:
        return bad
    seeds, per_seed = found["seeds"], found["figures"].get("per_seed", {})
    bad += [f"unknown verdict {found['verdict']!r}"] if found["verdict"] not in STATES else []
    bad += [f"only {len(seeds)} seeds"] if len(set(seeds)) < LEAST_SEEDS else []
    bad += ["no figure a seed"] if not per_seed else []
    bad += [f"{k} has {len(v)} values for {len(seeds)} seeds" for k, v in per_seed.items() if len(v) != len(seeds)]
    bad += [f"{k} holds what is no finite number" for k, v in per_seed.items() if not all(_finite(x) for x in v)]
    bad += [f"{k} has no interval" for k in per_seed if k not in found["intervals"]]
    bad += ["no reasons"] if not found["reasons"] else []
    command = f"luthier evidence {found['system']} --seeds {','.join(map(str, seeds))}"
    bad += [f"its command is {found['command']!r}, not {command!r}"] if found["command"] != command else []
    return bad


def _finite(x):
    return isinstance(x, int | float) and math.isfinite(x)


# -- verdicts: every claim is a pair (met, sentence with the figures in it) ----------------------------------

def beats(figures, a, b, what="", by=0.0):
    """a exceeds b, paired over seeds: the 95% interval of the difference lies above `by`."""
    from luthier.compare.stats import paired

    mean, low, high = paired(figures["per_seed"][a], figures["per_seed"][b])
    what = what or f"{a} beats {b}"
    return low > by, f"{what}: difference {_words(mean, low, high)}, interval needed above {by:g}"


def not_below(figures, a, b, margin=0.0, what=""):
    """a is no worse than b: the mean paired difference is at least -margin."""
    from luthier.compare.stats import paired

    mean, low, high = paired(figures["per_seed"][a], figures["per_seed"][b])
    what = what or f"{a} no worse than {b}"
    return mean >= -margin - 1e-9, f"{what}: difference {_words(mean, low, high)}, mean needed at {-margin:g} or more"


def _words(mean, low, high):
    mean, low, high = (round(v, 6) + 0.0 for v in (mean, low, high))
    return f"{mean:+.4g} (95% {low:+.4g} to {high:+.4g})"


def fact(met, sentence):
    return bool(met), sentence


def judge(main, also=()):
    """All claims met: reproduced. No main claim met: not reproduced. Else partly. `main`: comparisons, `also`: mechanics."""
    main, also = list(main), list(also)
    reasons = [f"{'met' if ok else 'NOT met'}: {text}" for ok, text in main + also]
    if all(ok for ok, _ in main + also):
        return "reproduced", reasons
    return ("partly" if any(ok for ok, _ in main) else "not reproduced"), reasons


# -- writing -------------------------------------------------------------------------------------------------

def _plain(value):
    """Tensors and numpy numbers to plain JSON values, floats to 6 significant digits."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _versions():
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("luthier", "torch", "transformers", "timm", "scikit-learn", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def _machine():
    import torch

    return {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.system(), "arch": platform.machine(),
            "device": "cuda" if torch.cuda.is_available() else "cpu"}


def _write(found, folder):
    path = folder / f"{found['system']}.json"
    partial = path.with_suffix(f".{os.getpid()}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(_text(found), encoding="utf-8")
        os.replace(partial, path)
    except OSError as e:
        raise LuthierError(f"{path} cannot be written ({e.strerror or e}). Give another folder with --out.") from e
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _text(found):
    """JSON with a line for each figure: readable, and a change shows as one line."""
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda m: " ".join(m[0].split()), text) + "\n"
