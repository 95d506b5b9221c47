"""Tables from files: CSV, TSV, JSON lines, JSON, plain text (each also .gz) and Parquet, row by row, so that a file larger than
memory costs no more than the rows that are kept. Whatever cannot be read is refused with the file, the line and the remedy."""

import contextlib
import csv
import gzip
import io
import itertools
import json
import random
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import BadData, nearest

MOST_ROWS = 1_000_000          # kept in memory; of more, a seeded sample
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".txt", ".parquet")


@dataclass
class Table:
    """Columns of equal length; `lines[i]` says where row i stands in `source`."""
    columns: dict
    source: str
    lines: list = None
    unit: str = "line"

    def __len__(self):
        return len(next(iter(self.columns.values()), ()))

    def where(self, i):
        return f"{self.source}, {self.unit} {self.lines[i] if self.lines is not None else i}"

    def take(self, index):
        lines = self.lines if self.lines is not None else range(len(self))
        columns = {k: [v[i] for i in index] for k, v in self.columns.items()}
        return Table(columns, self.source, [lines[i] for i in index], self.unit)


@dataclass
class Data:
    source: str
    splits: dict                                     # name -> Table
    notes: list = field(default_factory=list)        # what was found, done and left out, for describe()
    classes: list = None                             # names of integer labels
    columns: dict = field(default_factory=dict)      # roles that the source itself fixes
    task: str = None
    metric: str = None


def suffix(path):
    """The suffix that says the format: `.csv` of a.csv and of a.csv.gz."""
    parts = [s.lower() for s in Path(path).suffixes]
    return (parts[-2] if len(parts) > 1 and parts[-1] == ".gz" else parts[-1] if parts else "")


def table(path, seed=0, notes=None):
    """The rows of one file."""
    path, kind = Path(path), suffix(path)
    if kind not in SUFFIXES:
        raise BadData(f"{path}: the suffix {kind or '(none)'} is not one that can be read. {nearest(kind, SUFFIXES)} "
                      f"Use one of {' '.join(SUFFIXES)}, also with .gz.")
    try:
        if path.stat().st_size == 0:
            raise BadData(f"{path} is empty. Give a file with at least a few rows of each class.")
        rows = _parquet(path) if kind == ".parquet" else _text(path, kind)
        kept, seen = _sample(rows, seed)
    except OSError as error:
        raise BadData(f"{path} cannot be read: {error.strerror or error}. Check the path and its permissions.") from error
    if not kept:
        raise BadData(f"{path} has a header but no rows, or only blank lines. Give at least a few rows of each class.")
    if seen > len(kept) and notes is not None:
        notes.append(f"{path.name}: {seen:,} rows, of which a seeded sample of {len(kept):,} is used")
    if kind in (".json", ".jsonl", ".ndjson") and (n := sum([mended(row) for _, row in kept])) and notes is not None:
        notes.append(f"{path.name}: {n:,} rows hold half of a character (a surrogate without its mate), which is replaced")
    names = list(dict.fromkeys(itertools.chain.from_iterable(row for _, row in kept[:1000])))
    return Table({n: [row.get(n) for _, row in kept] for n in names}, str(path), [line for line, _ in kept],
                 "row" if kind in (".parquet", ".json") else "line")


def mended(row):
    """Whether a row of JSON holds half characters, which no tokenizer and no file takes; they are replaced in place."""
    was = False
    for key, value in row.items() if isinstance(row, dict) else enumerate(row):
        if isinstance(value, str) and not value.isascii():
            row[key] = whole(value)
            was |= row[key] != value
        elif isinstance(value, dict | list):
            was |= mended(value)
    return was


def whole(text):
    """The text with each half character (a surrogate without its mate) replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _sample(rows, seed):
    """Reservoir sample of at most MOST_ROWS rows, in file order. -> (rows, number seen)"""
    kept, draw, seen = [], random.Random(seed), 0
    for seen, row in enumerate(rows, 1):             # noqa: B007 (the last value is the count)
        if len(kept) < MOST_ROWS:
            kept.append(row)
        elif (i := draw.randrange(seen)) < MOST_ROWS:
            kept[i] = row
    return sorted(kept, key=lambda r: r[0]) if seen > len(kept) else kept, seen


def _text(path, kind):
    """Yield (line number, dict) of a text format."""
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb"))
        reader = {".csv": _csv, ".tsv": _csv, ".json": _json, ".txt": _plain}.get(kind, _jsonl)
        try:
            if raw.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise BadData(f"{path} is UTF-16. Save it as UTF-8.")
            yield from reader(stack.enter_context(io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")), path)
        except UnicodeDecodeError as error:
            raise BadData(f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x} cannot be decoded. It is another "
                          "format or another encoding. Save it as UTF-8.") from error
        except EOFError as error:
            raise BadData(f"{path} is a truncated gzip file. Copy or download it again.") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise BadData(f"{path} is not a sound gzip file ({error}). Copy it again, or drop the .gz of an uncompressed "
                          "file.") from error


def _csv(stream, path):
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    first = stream.readline()
    if "\0" in first:
        raise BadData(f"{path}, line 1 holds NUL bytes: it is not a text table. Save it as CSV in UTF-8.")
    if suffix(path) == ".tsv":
        form = dict(delimiter="\t", quoting=csv.QUOTE_NONE)      # TSV files rarely quote, and often hold a lone quote
    else:
        form = dict(delimiter=max(",;\t|", key=first.count), strict=True)
    rows = csv.reader(itertools.chain([first], stream), **form)
    try:
        header = [name.strip() for name in next(rows)]
        if len(set(header)) < len(header) or "" in header:
            bad = next(n for i, n in enumerate(header) if n in header[:i] or not n)
            raise BadData(f"{path}, line 1: the column {bad!r} stands twice. Name every column once." if bad else
                          f"{path}, line 1: a column has no name. Name every column in the first line.")
        for row in rows:
            if not row:
                continue                             # a blank line
            if len(row) != len(header):
                raise BadData(f"{path}, line {rows.line_num}: {len(row)} fields, but the header names {len(header)} "
                              f"({', '.join(header)}). Quote a field that holds the delimiter, or mend the row.")
            yield rows.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise BadData(f"{path}, line {rows.line_num}: {error}. Quotes must be closed, and doubled inside a field.") from error


def _jsonl(stream, path):
    for n, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadData(f"{path}, line {n} is not valid JSON: {str(error)[:200]}. Each line must be one object.") from error
        if not isinstance(row, dict):
            raise BadData(f"{path}, line {n} is a JSON {type(row).__name__}, not an object. Each line must be like "
                          '{"text": "...", "label": "..."}.')
        yield n, row


def _json(stream, path):
    try:
        rows = json.load(stream)
    except (RecursionError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise BadData(f"{path} is not valid JSON: {str(error)[:200]}. For one object a line, name it .jsonl.") from error
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise BadData(f"{path} must be a JSON list of objects, like [{{\"text\": \"...\", \"label\": \"...\"}}].")
    yield from enumerate(rows)


def _plain(stream, path):
    """A text file is one document."""
    text = stream.read()
    if "\0" in text:
        raise BadData(f"{path} holds NUL bytes: it is not text. Save it as UTF-8 text.")
    if text.strip():
        yield 1, {"text": text}


def _parquet(path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BadData(f"{path}: reading Parquet needs pyarrow. pip install pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            n = 0
            for batch in file.iter_batches(4096):
                for row in batch.to_pylist():
                    yield n, row
                    n += 1
    except pyarrow.ArrowException as error:
        raise BadData(f"{path} is not a sound Parquet file: {str(error).splitlines()[0][:200]}. Write it again.") from error
