"""docs/benchmarks.md and its plot, from the stored results and nothing else."""

import io

COLUMNS = "| what | Luthier | quartiles | peer | must be at most | |"


def page(results):
    lines = ["# Benchmarks", "", "`make bench` runs them all again. Every figure is a ratio of two contenders that took turns",
             "in one process (or a count of bytes), in float32 where a row names no other; the spread is between quartiles.",
             "Made by `python -m benchmarks`. The peers are those that install beside: `adapters` 1.3.0 asks for transformers",
             "4.57, and Luthier for 5 or newer.", "", "![each figure over what it must not exceed](benchmarks.svg)", ""]
    for name, r in sorted(results.items()):
        m = r["machine"]
        lines += [f"## {name}", "", f"{m['cores']} cores, {m['threads']} threads, {m['device']}, torch {m['torch']}, "
                  f"peft {m['peft']}.", "", COLUMNS, "|---|---|---|---|---|---|"]
        for x in r["rows"]:
            spread = f"{x['low']:.3g} to {x['high']:.3g}" if x["low"] is not None else ""
            peer = "" if x["peer"] is None else f"{x['peer']:.3g}"
            lines.append(f"| {x['what']} | {x['ours']:.3g} | {spread} | {peer} | {x['bound']:.3g} | "
                         f"{'reached' if x['reached'] else 'not reached'} |")
        lines += ["", *(f"- {x['what']}: {x['note']}" for x in r["rows"] if x.get("note")), ""]
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def plot(results):
    """Every figure over its bound, with quartiles, and the peer's: an SVG as text, the same for the same results."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = [x for _, r in sorted(results.items()) for x in r["rows"]][::-1]
    with matplotlib.rc_context({"svg.hashsalt": "luthier", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(10, 0.6 + 0.24 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for y, x in enumerate(rows):
            low, high = (x["low"] or x["ours"], x["high"] or x["ours"])
            axes.plot([low / x["bound"], high / x["bound"]], [y, y], color="#1f6f5c", linewidth=2)
            axes.plot(x["ours"] / x["bound"], y, "o", color="#1f6f5c", label="Luthier" if not y else None)
            if x["peer"] is not None:
                axes.plot(x["peer"] / x["bound"], y, "x", color="#b3541e")
        axes.plot([], [], "x", color="#b3541e", label="peer")
        axes.axvline(1, color="#888888", linewidth=0.8)
        axes.set(xscale="log", xlabel="figure over what it must not exceed (left of 1: reached)", yticks=range(len(rows)),
                 yticklabels=[x["what"] for x in rows], ylim=(-0.7, len(rows) - 0.3))
        axes.legend(loc="upper left")
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
