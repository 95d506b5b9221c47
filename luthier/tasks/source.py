"""From what the user names (file, folder, arrays, data set) to splits: {"train": Table, "val": ..., "test": ...}, or {"all"}."""

import os
import re
from pathlib import Path

from ..errors import BadData, UnknownName, named, nearest
from . import arrays, audio, pictures
from .read import MOST_ROWS, SUFFIXES, Data, Table, suffix, table
from .roles import NAMES

SPLITS = {"train": ("train", "training", "trn"), "val": ("val", "valid", "validation", "dev", "devel"),
          "test": ("test", "testing", "tst", "eval", "all")}
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_SPLIT = re.compile(r"^(?:(?P<base>.*?)[_.-])?(?P<split>" + "|".join(w for words in SPLITS.values() for w in words) +
                    r")(?:-\d+-of-\d+)?$", re.I)


# What some sets of $LUTHIER_DATA mean, where their column names do not say it.
MEANING = {
    "cola": dict(metric="matthews"),
    "e2e_nlg": dict(columns={"prompt": "mr", "response": "ref"}),
    "multi30k": dict(columns={"prompt": "en", "response": "de"}),
    "java_to_cs": dict(columns={"prompt": "java", "response": "cs"}),
    "mts_dialog": dict(columns={"prompt": "dialogue", "response": "section_text"}),
    "humaneval": dict(columns={"prompt": "prompt", "response": "canonical_solution"}),
    "trec": dict(classes=["DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM"]),
}


def find(source, seed=0):
    """Data for whatever `source` names."""
    if isinstance(source, dict):
        return arrays.tables(source, "arrays")
    source = named(source, "data", UnknownName)
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, seed)
    if path.is_file():
        return arrays.npz(path) if suffix(path) == ".npz" else _beside(path, seed)
    built_in = arrays.BUILT_IN | pictures.BUILT_IN | audio.BUILT_IN
    if (name := source if source in built_in else source.replace("scenes-", "scenes:", 1)) in built_in:
        return built_in[name](seed)
    if (found := _named(source, seed)) is not None:
        return found
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source) and not re.search(r"\.[a-zA-Z]\w*$", source)
    if hub and not path.parent.is_dir() or source.startswith("hub:"):
        return _hub(source.removeprefix("hub:"), seed)
    if os.sep in source or suffix(source):
        here = path.parent if path.parent.is_dir() else Path(".")
        near = [str(here / n) if here != Path(".") else n for n in os.listdir(here)]
        raise BadData(f"There is no file or folder {source}. {nearest(source, near)} Check the path (from {Path.cwd()}).")
    root = os.environ.get("LUTHIER_DATA")
    hint = "" if root else " Data sets of a folder of yours are found by name when LUTHIER_DATA names it."
    raise UnknownName(f"No data set is called {source!r}, and there is no such file. {nearest(source, known())} Give a file, a "
                      f"folder, a hub id OWNER/NAME, or a built-in name.{hint}")


def known():
    """Built-in names and those that $LUTHIER_DATA offers."""
    return [*arrays.BUILT_IN, *pictures.BUILT_IN, *audio.BUILT_IN] + sorted(_shelf())


def _shelf():
    """name -> files, of the folder $LUTHIER_DATA: data.npz folders and the stems of tables, underscores and hyphens alike."""
    root = os.environ.get("LUTHIER_DATA")
    found = {}
    for path in sorted(Path(root).glob("*/*")) if root and Path(root).is_dir() else ():
        if path.name == "data.npz":
            found[path.parent.name.replace("-", "_")] = [path]
        elif suffix(path) in SUFFIXES and path.name.lower() not in ("readme.txt",):
            base, _ = _stem(path)
            found.setdefault((base or path.parent.name).replace("-", "_"), []).append(path)
    return found


def _named(name, seed):
    shelf, key = _shelf(), name.replace("-", "_")
    hits = [k for k in shelf if k == key] or [k for k in shelf if k.startswith(key + "_") and shelf[k][0].name == "data.npz"]
    if not hits:
        return None
    paths = shelf[hits[0]]
    data = arrays.npz(paths[0]) if paths[0].name == "data.npz" else _tables(paths, str(paths[0].parent / hits[0]), seed)
    for field_name, value in MEANING.get(hits[0], {}).items():
        setattr(data, field_name, value)
    return data


def _stem(path):
    """(name without split word, split or None) of a file name: foo_train.csv.gz -> ("foo", "train")."""
    name = path.name
    while (end := Path(name).suffix.lower()) and end in (*SUFFIXES, ".gz"):
        name = name[:-len(end)]
    match = _SPLIT.match(name)
    if not match:
        return name, None
    word = match["split"].lower()
    return match["base"] or "", next(s for s, words in SPLITS.items() if word in words)


def _beside(path, seed):
    """A file, with the other splits beside it when its name says that it is one."""
    base, split = _stem(path)
    if split is None:
        return Data(str(path), {"all": table(path, seed, notes := [])}, notes)
    mates = [p for p in sorted(path.parent.iterdir()) if p.is_file() and suffix(p) in SUFFIXES and _stem(p)[0] == base
             and _stem(p)[1] not in (None, split)]
    return _tables([path, *mates], str(path), seed)


def _tables(paths, source, seed):
    splits, notes = {}, []
    for path in paths:
        split = _stem(path)[1] or "all"
        if path.name.lower().startswith("all") or re.search(r"[_.-]all\.", path.name, re.I):
            split = "all"
        one = table(path, seed, notes)
        if split in splits:                          # shards of one split
            one = _join(splits[split], one)
        splits[split] = one
        notes.append(f"{split}: {path.name}")
    if "train" not in splits:                        # a lone test file is split like any other
        rest = list(splits.values())
        splits = {"all": rest[0]}
        for more in rest[1:]:
            splits["all"] = _join(splits["all"], more)
    else:
        splits.pop("all", None)
    return Data(source, splits, notes)


def _join(a, b):
    names = list(dict.fromkeys([*a.columns, *b.columns]))
    columns = {n: (a.columns.get(n) or [None] * len(a)) + (b.columns.get(n) or [None] * len(b)) for n in names}
    return Table(columns, a.source, [*a.lines, *(f"{x} of {Path(b.source).name}" for x in b.lines)], a.unit)


def _folder(path, seed):
    """data.npz; tables with split names; one table; or images by class, in split folders or not."""
    if (path / "data.npz").is_file():
        return arrays.npz(path / "data.npz")
    files = [p for p in sorted(path.iterdir())
             if p.is_file() and suffix(p) in SUFFIXES and not p.name.lower().startswith("readme")]
    inner = [p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    if not files and [p.name for p in inner] == ["data"]:            # a data set's snapshot keeps its shards in data/
        return _folder(path / "data", seed)
    if files:
        bases = sorted({_stem(p)[0] for p in files})
        if len(bases) > 1:
            raise BadData(f"The folder {path} holds several tables ({', '.join(b or files[0].name for b in bases[:5])}). "
                          "Give one file instead.")
        return _tables(files, str(path), seed)
    splits = {s: p for p in inner for s, words in SPLITS.items() if p.name.lower() in words}
    if "train" in splits:
        return Data(str(path), {s: _images(p) for s, p in splits.items()}, [f"{s}: {p.name}/" for s, p in splits.items()])
    return Data(str(path), {"all": _images(path)})


def _images(path):
    """Images of a folder with one folder a class."""
    classes = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    seen = {}
    for c in classes:
        key = c.name.strip().lower()
        if key in seen:
            raise BadData(f"{path}: the class folders {seen[key]!r} and {c.name!r} differ in case or spaces only. Merge or "
                          "rename them.")
        seen[key] = c.name
    files = [(p, c.name) for c in classes for p in sorted(c.rglob("*")) if p.suffix.lower() in IMAGES]
    if not files:
        raise BadData(f"The folder {path} holds neither a table ({' '.join(SUFFIXES)}, data.npz) nor images in one folder a "
                      "class. "
                      f"It holds: {', '.join(sorted(os.listdir(path))[:5]) or 'nothing'}. Put each class's images in a folder "
                      "named for it.")
    empty = [c.name for c in classes if c.name not in {name for _, name in files}]
    if empty:
        raise BadData(f"{path}: the class folder {empty[0]!r} holds no image ({' '.join(IMAGES)}). Fill or remove it.")
    return Table({"image": [str(p) for p, _ in files], "label": [name for _, name in files]}, str(path),
                 [str(p.relative_to(path)) for p, _ in files], "file")


def _hub(name, seed):
    """OWNER/NAME of the hub, or OWNER/NAME:CONFIGURATION."""
    try:
        import datasets
    except ImportError as error:
        raise BadData(f"{name} reads as a hub data set, and the package datasets is not installed. pip install datasets, or give "
                      "a file or folder.") from error
    try:
        found = datasets.load_dataset(*name.split(":", 1))
    except Exception as error:
        raise BadData(f"The hub data set {name} could not be loaded: {str(error).splitlines()[0][:200]} Check the name and the "
                      "network, or download its files and give their folder.") from error
    splits = {}
    for split, part in found.items():
        key = next((s for s, words in SPLITS.items() if split.lower() in words), None)
        if key is None or key in splits:
            continue
        part = part.shuffle(seed=seed).select(range(MOST_ROWS)) if len(part) > MOST_ROWS else part
        columns = {n: _spelled(list(part[n]), part.features.get(n)) for n in part.column_names}
        if not any(n in NAMES["label"] and all(v is None for v in values) for n, values in columns.items()):     # kept secret
            splits[key] = Table(columns, f"{name} ({split})", None, "row")
    if not splits:
        raise BadData(f"The hub data set {name} has no split called train, validation or test: {', '.join(found)}. Download its "
                      "files and give one.")
    if "train" not in splits:
        splits = {"all": next(iter(splits.values()))}
    return Data(name, splits)


def _spelled(values, feature):
    """Numbers of classes as their names; -1, which stands for a label that is kept secret, as None."""
    names = getattr(feature, "names", None)
    if names:
        return [names[v] if v is not None and v >= 0 else None for v in values]
    inner = getattr(getattr(feature, "feature", None), "names", None)
    return [[inner[v] for v in row] for row in values] if inner else values
