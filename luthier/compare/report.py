"""report.html (self-contained: table, plots, answer, settings, how to run it again) and pareto.png."""

import base64
import html
import io
import json
import os
from dataclasses import fields
from math import floor, log10
from pathlib import Path

from ..errors import LuthierError
from ..method import parse
from .rows import COSTS, answer, brief, rows, short
from .table import COLUMNS, cells, figure, ordered, parts, score

AXES = (("trained", "trained parameters", 1, True), ("memory", "peak training memory, MB", 1e-6, False),
        ("step", "step time / full", 1, False))
INK, GREY, FRONT, PICK = "#1f2430", "#8a93a3", "#2f6f8f", "#c8553d"
MANY = 12                                                  # methods: more are numbered in a plot, with a key beside it


def write(document, out):
    """Write both files into the folder `out`; returns their paths."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    found, said = ordered(document), answer(document)
    picture = plot(document, found, said)
    text = page(document, found, said, picture)
    for name, data in (("pareto.png", picture), ("report.html", text.encode())):
        partial = out / f".{name}-{os.getpid()}"
        partial.write_bytes(data)
        os.replace(partial, out / name)
    return out / "report.html", out / "pareto.png"


# -- the picture ----------------------------------------------------------------------------------------------------------


def plot(document, found=None, said=None):
    """PNG bytes: the score against each cost, one panel a cost; the Pareto front is a line, the pick is red. Names stand beside
    the points; those of many methods in a key, in the table's order."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found, said = found or ordered(document, rows(document)), said or answer(document)
    axes = [a for a in AXES if any(r["mean"] is not None and r[a[0]] is not None for r in found)]
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 10, "axes.edgecolor": GREY, "text.color": INK,
                                "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}):
        names, many, n = named(r["chain"] for r in found), len(found) > MANY, max(1, len(axes))
        figure = Figure(figsize=(4.3 * (n + 0.8 * many), 4.7), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, n, sharey=True, squeeze=False)[0]
        figure.get_layout_engine().set(rect=(0, 0, n / (n + 0.8 * many), 1))
        for panel, axis in zip(panels, axes, strict=False):
            _panel(panel, axis, [r for r in found if r["mean"] is not None and r[axis[0]] is not None], said)
        panels[0].set_ylabel(f"{document['task']['metric']} (mean, 95% interval)")
        for panel in panels:
            panel.label_outer()
            panel.margins(x=0.12 if many else 0.28)
        figure.canvas.draw()
        if many:
            _key(figure, found, said, names, n / (n + 0.8))
            names = {r["chain"]: str(k) for k, r in enumerate(found, 1)}
        for panel in panels:
            _labels(figure, panel, said, names)
        setting = document["setting"]
        figure.suptitle(f"{short(setting['model'])} on {short(setting['data'])}: what each way of tuning buys", x=0.01, ha="left",
                        fontsize=13,
                        fontweight="bold")
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


def _panel(panel, axis, found, said):
    from matplotlib.ticker import LogFormatterSciNotation

    key, title, unit, log = axis
    panel.set_xlabel(title)
    at = {r["chain"]: r[key] * unit for r in found}
    if log:
        panel.set_xscale("log")
        if not all(at.values()):                           # where nothing trains: left of all others, as 0
            zero = 10.0 ** (floor(log10(min((x for x in at.values() if x), default=1))) - 1)
            at, plain = {c: x or zero for c, x in at.items()}, LogFormatterSciNotation()
            panel.xaxis.set_major_formatter(lambda x, k: "" if x < zero / 2 else "0" if x < 2 * zero else plain(x, k))
    panel.grid(True, color="#e6e9ee", linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    front = sorted((r for r in found if key in r["front"]), key=lambda r: r[key])
    panel.plot([at[r["chain"]] for r in front], [r["mean"] for r in front], color=FRONT, linewidth=1.6, alpha=0.8, zorder=2)
    scores = [r["mean"] for r in found]
    low, high = min(scores), max(scores)
    room = max(high - low, 1e-3)
    for r in found:
        colour = PICK if r["chain"] == said["pick"] else FRONT if key in r["front"] else GREY
        if r["half"] is not None:
            panel.errorbar(at[r["chain"]], r["mean"], r["half"], color=colour, alpha=0.35, linewidth=1.2, capsize=0, zorder=1)
        panel.scatter(at[r["chain"]], r["mean"], s=52, color=colour, edgecolor="white", linewidth=0.9, zorder=3)
    panel.set_ylim(low - 0.25 * room, high + 0.25 * room)
    panel.points = [(r["chain"], at[r["chain"]], r["mean"], key in r["front"]) for r in found]


def named(chains):
    """{chain: a name for a plot}: without the hyperparameters that all chains with the same method share, long words as dots."""
    chains, found = list(chains), {}
    try:
        parsed = {c: list(parse(c)) for c in chains}
    except LuthierError:                                   # a method of one's own that is not imported here
        return {c: brief(c) for c in chains}
    alike = {}
    for m in (m for methods in parsed.values() for m in methods):
        mine = _said_of(m)
        alike[type(m)] = mine if type(m) not in alike else {k: v for k, v in alike[type(m)].items() if mine.get(k) == v}
    for c, methods in parsed.items():
        parts = []
        for m in methods:
            more = [f"{k}={v if len(v) < 14 else '…'}" for k, v in _said_of(m).items()
                    if k not in alike[type(m)] or sum(type(x) is type(m) for p in parsed.values() for x in p) == 1]
            parts.append(type(m).__name__ + (f"({', '.join(more)})" if more else ""))
        found[c] = " >> ".join(parts) or brief(c)
    return {c: name if list(found.values()).count(name) == 1 else brief(c) for c, name in found.items()}


def _said_of(m):
    return {f.name: repr(v) for f in fields(m) if (v := getattr(m, f.name)) != f.default}


def _key(figure, found, said, names, left):
    """The numbers of a plot and whose they are, right of its panels."""
    step = min(0.055, 0.9 / len(found))
    for k, r in enumerate(found, 1):
        text, y, pick = names[r["chain"]], 0.9 - step * k, r["chain"] == said["pick"]
        text = text if len(text) <= 46 else text[:45] + "…"
        colour = PICK if pick else INK if r["front"] else "#5d6675"
        figure.text(left + 0.025, y, str(k), ha="right", fontsize=8.2, color=colour, fontweight="bold")
        figure.text(left + 0.03, y, text, fontsize=8.2, color=colour, fontweight="bold" if pick else "normal")


def _labels(figure, panel, said, names):
    """Names beside the points, moved apart in height until none covers another; a thin line leads to those that moved."""
    from matplotlib.patheffects import withStroke

    points, gap = getattr(panel, "points", []), 13.0 * figure.dpi / 100
    box = panel.get_window_extent()
    placed = []
    for chain, x, y, front in sorted(points, key=lambda p: -p[2]):
        px, py = panel.transData.transform((x, y))
        text = names[chain]
        text = text if len(text) <= 30 else text[:29] + "…"
        width = (len(text) * 5.6 + 6) * figure.dpi / 100
        right = px + 10 + width < box.x1 + 4 or px - box.x0 < width
        left_edge = px + 10 if right else px - 10 - width
        top = py
        while any(abs(top - q) < gap and left_edge < e and left_edge + width > s for q, s, e in placed):
            top -= 2.0
        placed.append((top, left_edge, left_edge + width))
        pick = chain == said["pick"]
        name = panel.annotate(text, (x, y), xytext=((10 if right else -10) * 72 / figure.dpi, (top - py) * 72 / figure.dpi),
                       textcoords="offset points", ha="left" if right else "right", va="center", fontsize=8.2,
                       color=PICK if pick else INK if front else "#5d6675", fontweight="bold" if pick else "normal", zorder=4,
                       arrowprops=dict(arrowstyle="-", color="#c3c9d2", linewidth=0.7, shrinkA=0, shrinkB=3) if py - top > 4
                       else None)
        name.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


# -- the page -------------------------------------------------------------------------------------------------------------


STYLE = """
:root { --ink: #1f2430; --soft: #5d6675; --line: #e3e7ec; --pick: #c8553d; --front: #2f6f8f; --wash: #f6f7f9 }
* { box-sizing: border-box }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif }
main { max-width: 1280px; margin: 0 auto; padding: 40px 24px 64px }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px } h2 { font-size: 18px; margin: 40px 0 10px }
p { margin: 0 0 10px; max-width: 76ch } .soft { color: var(--soft) }
.answer { background: var(--wash); border-left: 4px solid var(--pick); padding: 16px 20px; margin: 24px 0 }
.answer p:first-child { font-size: 20px; font-weight: 650 } .answer p:last-child { margin: 0 }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: 7px 10px; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-weight: 600; color: var(--soft); border-bottom: 2px solid var(--ink) }
th:first-child, td:first-child { text-align: left }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 200px }
td:first-child, code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 13.5px }
tr.pick td { background: #fdf3f0 } tr.pick td:first-child { color: var(--pick); font-weight: 700 }
td.front { color: var(--front); font-weight: 650 } td.front::after { content: " ◆"; font-size: 9px; vertical-align: 2px }
td:not(.front)::after { content: " ◆"; font-size: 9px; visibility: hidden } td:nth-child(-n+2)::after { content: "" !important }
img { width: 100%; height: auto; display: block; margin: 8px 0 }
pre { background: var(--wash); padding: 12px 16px; border-radius: 6px; overflow-x: auto; margin: 0 0 10px }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 0; font-size: 14.5px }
dt { color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere }
.cards { align-items: start; display: grid; grid-template-columns: repeat(auto-fill, minmax(460px, 1fr)); gap: 14px }
.card { display: grid; grid-template-columns: max-content 1fr; gap: 10px 14px; border: 1px solid var(--line); border-radius: 6px;
padding: 12px } .card.several { grid-template-columns: 1fr }
.images { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 4px }
.images img { width: 88px; margin: 0; image-rendering: pixelated; border-radius: 3px } .several .images img { width: 68px }
.card dl { gap: 2px 12px; font-size: 13.5px } .card p { margin: 0 0 6px; font-size: 14.5px }
.right { color: #23774a; font-weight: 600 }
summary { color: var(--soft); font-size: 13px; cursor: pointer; margin-top: 6px } details dl { margin-top: 4px }
th small { display: block; font-weight: 400 }
"""


def page(document, found, said, picture):
    e = html.escape
    task, setting, n = document["task"], document["setting"], max((len(r["scores"]) for r in found), default=0)
    sizes = task["sizes"]
    body = "".join(_row(r, said, parts(document)) for r in found)
    image = base64.b64encode(picture).decode()
    facts = {"Model": setting["model"], "Data": setting["data"], "Task": f"{task['kind']}; " + ", ".join(
                 f"{split} {k:,}" for split, k in sizes.items()),
             "Score": f"{task['metric']} on the test split, {'higher' if task['higher'] else 'lower'} is better",
             "Budget": f"the same for all: {setting['epochs']} epochs, batches of {setting['batch_size']}, AdamW, warm-up then "
                       "linear decay",
             "Learning rate": _rates(document, found), "Seeds": ", ".join(map(str, setting["seeds"])),
             "Machine": _machine(document["machine"]), "Versions": ", ".join(f"{k} {v}" for k, v in document["versions"].items())}
    if task.get("notes"):
        facts["Data notes"] = "; ".join(task["notes"])
    listed = _list({e(k): e(str(v)) for k, v in facts.items()})
    each = parts(document)
    titles = ["method", f"{task['metric']} (n={n})", *each.values(), *(title for _, title, _ in COLUMNS)]
    heads = "".join(f"<th>{e(t)}</th>" for t in titles).replace(" (", "<small>(").replace(")</th>", ")</small></th>")
    again = f"<h2>Run it again</h2><pre>{e(document['command'])}</pre>" if document["command"] else ""
    raw = [{k: r[k] for k in ("chain", "scores", "seeds", "mean", "half", "each", "lr", *COSTS)} for r in found]
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{e(short(setting['model']))} on {e(short(setting['data']))}: which way of tuning?</title><style>{STYLE}</style>
<main>
<h1>Which way of tuning {e(short(setting['model']))}?</h1>
<p class="soft">{len(found)} ways on {e(short(setting['data']))}, {n} seed{'s'[: n != 1]}, equal budget, every cost
measured.</p>
<div class="answer">{''.join(f'<p>{e(t)}</p>' for t in said['text'])}</div>
<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>
<p class="soft" style="margin-top:10px">± is the half width of the 95% t-interval over seeds. ◆: no other way is both better
and cheaper in that cost (Pareto front).</p>
<h2>Score against cost</h2>
<img alt="Score against trained parameters, peak memory and step time; the Pareto front is drawn as a line"
src="data:image/png;base64,{image}">
{looks(document, found, said)}<h2>How the figures were taken</h2>
<dl>
<dt>trained</dt><dd>numbers that the optimizer changes, the new head included</dd>
<dt>stored</dt><dd>bytes of the saved folder, on disk, after training</dd>
<dt>peak memory</dt><dd>most bytes alive at once in one train step, counted over all tensors that the step touches: weights,
states, gradients, optimizer, activations. Weights that the step never reads are not counted</dd>
<dt>step / full</dt><dd>median time of a train step relative to tuning everything, the two run in turns in one process</dd>
<dt>latency / base</dt><dd>median time of one input relative to the untouched model, in turns; merged into the weights where the
method can be merged ({e(_merged(found))})</dd>
</dl>
<h2>Settings</h2><dl>{listed}</dl>
{again}
<script type="application/json" id="results">{json.dumps(raw).replace('<', chr(92) + 'u003c')}</script>
</main></html>
"""


def looks(document, found, said):
    """Rows of the test split with what the model says to them: untuned, tuned the way that was picked, and tuned each way."""
    entry = document["entries"].get(document.get("samples", ""))
    tried = {e["job"]["chain"]: e["result"]["tried"] for k in reversed(document["plan"])
             if (e := document["entries"].get(k)) and "tried" in e["result"]}           # of the first seed
    if not entry or not tried:
        return ""
    e, pick = html.escape, said["pick"] if said["pick"] in tried else next(iter(tried))
    cards = []
    for i, row in enumerate(entry["result"]["rows"]):
        images = "".join(f'<img alt="" src="data:image/png;base64,{x}">' for x in row["images"])
        asked = " ".join(filter(None, (f"<b>{e(row['kind'])}</b>" if row["kind"] else "", e(row["prompt"] or ""))))
        here = {"right": e(" / ".join(row["answers"][:3])), "untuned": _said(entry["result"]["tried"][i]),
                e(brief(pick)): _said(tried[pick][i])}
        every = {e(brief(r["chain"])): _said(tried[r["chain"]][i]) for r in found if r["chain"] in tried}
        cards.append(f"""<div class="card{' several' * (len(row['images']) > 1)}"><div class="images">{images}</div>
<div><p>{asked}</p><dl>{_list(here)}</dl><details><summary>every way</summary><dl>{_list(every)}</dl></details></div></div>""")
    return f"""<h2>What tuning changed</h2>
<p class="soft">Rows of the test split and what the model answers before and after (the first seed). ✓: right.</p>
<div class="cards">{"".join(cards)}</div>"""


def _list(items):
    return "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in items.items())


def _said(answer):
    text, right = answer
    text = text if len(text) <= 200 else text[:199] + "…"
    return f"<span class={'right' if right else 'wrong'}>{html.escape(text) or '(nothing)'}{' ✓' if right else ''}</span>"


def _row(r, said, each=()):
    shown = cells(r)
    tds = [f"<td>{html.escape(brief(r['chain']))}</td>", f"<td>{shown[0]}</td>"]
    told = {k: figure(*r["each"][k]) for k in each if k in r["each"]}
    apart = [f"<td title=\"{told[k]}\">{told[k].partition(' ')[0]}</td>" if k in told else "<td>–</td>" for k in each]
    if r["failed"]:
        tds[1] = f"<td title=\"{html.escape(r['failed'])}\">{score(r)}{'' if r['mean'] is None else ' (a run stopped)'}</td>"
    tds += apart + [f"<td{' class=front' if key in r['front'] else ''}>{text}</td>" for (key, _, _),
            text in zip(COLUMNS, shown[1:], strict=True)]
    return f"<tr{' class=pick' if r['chain'] == said['pick'] else ''}>{''.join(tds)}</tr>"


def _rates(document, found):
    grid = document["setting"]["grid"]
    rates = {r["chain"]: r["lr"] for r in found if r["lr"] is not None}
    if grid:
        return (f"searched alike for every method over {', '.join(f'{g:g}' for g in grid)} on the validation split; found: "
                + ", ".join(f"{brief(c)} {v:g}" for c, v in rates.items()))
    if len(set(rates.values())) == 1:
        return f"{next(iter(rates.values())):g} for all; --tune-lr searches one for each"
    return "given for each: " + ", ".join(f"{brief(c)} {v:g}" for c, v in rates.items())


def _machine(m):
    return f"{m['processor']}, {m['cores']} cores, {m['threads']} threads" + (f", {m['gpu']}" if m["gpu"]
                                                                              else "") + f", {m['system']}"


def _merged(found):
    names = [brief(r["chain"]) for r in found if r["merged"]]
    return ("here: " + ", ".join(names)) if names else "here: none"
