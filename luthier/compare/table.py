"""The comparison as one plain-text table: aligned, without colours, the best first."""

from .rows import answer, brief, rows, short


def count(n):
    """12345678 -> 12.3M"""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= limit:
            return f"{n / limit:.3g}{unit}" if n < 999.5 * limit else f"{n / limit:.0f}{unit}"
    return f"{n:.0f}"


def size(n):
    """Bytes -> 12.3 MB (powers of ten)"""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= limit:
            return f"{n / limit:.3g} {unit}" if n < 999.5 * limit else f"{n / limit:.0f} {unit}"
    return f"{n:.0f} B"


def times(ratio):
    return f"{ratio:.2f}×"


def score(row):
    return figure(row["mean"], row["half"])


def figure(mean, half):
    if mean is None:
        return "no result"
    digits = 1 if abs(mean) >= 100 else 2 if abs(mean) >= 10 else 4
    return f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


COLUMNS = (("trained", "trained", count), ("stored", "stored", size), ("memory", "peak memory", size),
           ("step", "step / full", times),
           ("latency", "latency / base", times))


def ordered(document, found=None):
    """Best first; what has no result last."""
    sign = -1 if document["task"]["higher"] else 1
    return sorted(found or rows(document), key=lambda r: (r["mean"] is None, sign * (r["mean"] or 0)))


def parts(document):
    """The scores of parts of the data, {name: title}."""
    return {k: k if metric == "accuracy" else f"{k} ({metric})" for k, metric in document["task"].get("each", {}).items()}


def cells(row, each=()):
    said = ["–" if k not in row["each"] else figure(*row["each"][k]).partition(" ")[0] for k in each]
    return [score(row), *said, *("–" if row[key] is None else show(row[key]) for key, _, show in COLUMNS)]


def show(document):
    """The table, what its marks mean, and the answer in plain words."""
    found, said = ordered(document), answer(document)
    n = max((len(r["scores"]) for r in found), default=0)
    each = parts(document)
    head = ["", "method", f"{document['task']['metric']} (n={n})", *each.values(), *(title for _, title, _ in COLUMNS)]
    lines = [head] + [["*" if r["chain"] == said["pick"] else "", brief(r["chain"]), *cells(r, each)] for r in found]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    sides = [str.ljust] * 3 + [str.rjust] * (len(head) - 3)
    out = ["  ".join(side(c, w) for c, w, side in zip(line, widths, sides, strict=True)).rstrip() for line in lines]
    out.insert(1, "  ".join("─" * w for w in widths))
    task, setting = document["task"], document["setting"]
    sizes = task["sizes"]
    above = (f"{short(setting['model'])} on {short(setting['data'])}: {task['kind']}, {sizes['train']:,} rows to train, "
             f"{sizes['test']:,} to test, {setting['epochs']} epochs of batches of {setting['batch_size']}; "
             f"mean and 95% interval over {n} seed{'s'[: n != 1]}")
    return "\n".join([above, "", *out, "", "* " + " ".join(said["text"])])
