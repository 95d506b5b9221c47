"""The 245 published systems and what stored evidence says of each.

`data/systems.json` holds what does not change (id, name, kind, family, fit, when the system counts as working). The *state* is
never typed there: it is read from a record that `luthier evidence ID` wrote. Three systems are listed under two ids; both share
one record.
"""

import json
from functools import cache
from pathlib import Path

from luthier.errors import BadState, UnknownName, nearest

STATES = {"reproduced": "works", "partly": "partly", "not reproduced": "not reproduced"}   # verdict of a record -> state


def store():
    """Folder of the records: `evidence/` of a checkout, else the copy that the wheel carries beside the runners."""
    package = Path(__file__).parent
    checkout = package.parent / "evidence"
    return checkout if (package.parent / "pyproject.toml").exists() else package / "evidence" / "records"


@cache
def _table():
    return json.loads((Path(__file__).parent / "data" / "systems.json").read_text(encoding="utf-8"))


def row(name):
    """The table's entry for an id (`B105`) or a system's name (`GPTQ`), in any case."""
    want = str(name).strip().lower()
    for r in _table():
        if want in (r["id"].lower(), r["name"].lower()):
            return dict(r)
    near = nearest(str(name), [r["id"] for r in _table()] + [r["name"] for r in _table()])
    raise UnknownName(f"No system is called {str(name)[:80]!r}. {near} `luthier systems` lists all {len(_table())}.")


def record(id, folder=None):
    """The stored record of a system or of its other id, as `(file name, dict)`; `(None, None)` when nobody has run it."""
    folder = Path(folder or store())
    for one in (id, row(id).get("same_as")):
        path = folder / f"{one}.json"
        if one and path.is_file():
            try:
                read = json.loads(path.read_text(encoding="utf-8"))
                STATES[read["verdict"]]
            except (ValueError, KeyError, TypeError) as error:
                raise BadState(f"The record {path.name} cannot be read ({type(error).__name__}: {error}). "
                               f"Write it anew with `luthier evidence {one}`.") from None
            return path.name, read
    return None, None


def systems(folder=None):
    """Every system as a dict with `id name kind family fit works_when state record` (record: its file, None while open)."""
    rows = []
    for r in _table():
        name, found = record(r["id"], folder)
        rows.append(dict(r, state=STATES[found["verdict"]] if found else "open", record=f"evidence/{name}" if found else None))
    return rows
