"""Prediction over a folder of tuned states: each row with the adapter that it names."""

import json
from pathlib import Path

from .. import save, tasks
from ..errors import BadData, BadState, LuthierError
from ..tune import each, inputs
from .rack import Rack


def predict(folder, sources, adapter=None, memory="2GB"):
    """-> (inputs, what was found for each, {row: error}). A row is a dict with its adapter's name under "adapter", or takes the
    `adapter` given; "" is the base model. Rows whose adapter is missing or broken have an error, the others a prediction."""
    specs, errors = {}, {}
    folder = Path(folder)
    for path in sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else ():
        try:
            specs[path.name] = save.read(path)["extra"]
        except LuthierError:                                # load_all says why
            pass
    first = next((e for e in specs.values() if "task" in e), None)
    if first is None:
        raise BadState(f"{folder} has no sub-folder that `luthier tune` wrote. Give the folder that holds them.")
    task = tasks.restore(first["task"])
    rack = Rack(task.build(seed=first.get("seed", 0)), memory)
    refused = rack.load_all(folder)
    given = inputs(task, sources)
    names = [(x.get("adapter", adapter) if isinstance(x, dict) else adapter) for x in given]
    for i, name in enumerate(names):
        if name is None:
            raise BadData(f"Input {i} names no adapter. Give rows with a column `adapter`, or --adapter NAME for all of them.")
        if name in refused:
            errors[i] = refused[name]
    found, groups = [None] * len(given), {}
    for i, name in enumerate(names):                        # adapters with other labels or columns read rows in their own way
        if i not in errors:
            spec = specs.get(name, first).get("task", first["task"])
            groups.setdefault(json.dumps(spec, sort_keys=True), []).append(i)
    for spec, rows in groups.items():
        task = tasks.restore(json.loads(spec))

        def some(part, task=task, errors=errors):
            view = rack.view([names[i] or None for i in part])
            said = task.predict(view, [given[i] for i in part])
            errors.update({part[k]: e for k, e in view.errors.items()})
            return said
        said, bad = each(rows, some, alone=len(given) == 1)
        errors |= bad
        for i, y in zip(rows, said, strict=True):
            found[i] = y
    for i, e in errors.items():
        found[i] = {"error": str(e)}
    return given, found, dict(sorted(errors.items()))
