"""From results.json to what people read: one row a chain, the Pareto front, and an answer in plain words."""

import math

from .stats import interval

# what costs are called, in the order of the columns
COSTS = {"trained": "trained parameters", "memory": "peak training memory", "step": "step time", "latency": "inference latency",
         "stored": "stored bytes"}


def brief(chain):
    """The chain without empty parentheses: still a chain, and easier to read."""
    return chain.replace("()", "")


def short(name):
    """A model, two that are bridged, or a data set by name: the last part of a path."""
    return "+".join(n.rstrip("/").rpartition("/")[2] if n.startswith(("/", ".", "~")) else n for n in name.split("+"))


def rows(document):
    """[{"chain", "seeds", "scores", "mean", "half" (width of the 95% interval), "lr", "trained", "stored", "memory", "step",
    "latency", "failed", "front": the costs on whose Pareto front it lies, "each": {part of the data: (mean, half)}, ...}], None
    where a figure is missing."""
    entries = [document["entries"][k] for k in document["plan"] if k in document["entries"]]
    found = []
    for chain in document["setting"]["methods"]:
        mine = [e for e in entries if e["job"]["chain"] == chain]
        scored = [e for e in mine if "score" in e["result"]]
        row = dict.fromkeys(("mean", "half", "lr", "seconds", "step_seconds", "latency_seconds", "merged", *COSTS)) | {"each": {}}
        row |= {"chain": chain, "seeds": [e["job"]["seed"] for e in scored], "scores": [e["result"]["score"] for e in scored],
                "failed": next((e["result"]["failed"] for e in mine if "failed" in e["result"]), None)}
        if scored:
            row["mean"], row["half"] = _mean(row["scores"])
            row["each"] = {k: _mean(v) for k in document["task"].get("each", {})
                           if len(v := [e["result"]["metrics"][k] for e in scored if k in e["result"]["metrics"]]) == len(scored)}
            row |= {k: scored[0]["result"][k] for k in ("trained", "stored")} | {"lr": scored[0]["job"]["lr"]}
            row["seconds"] = sum(e["result"]["seconds"] for e in scored) / len(scored)
        for e in mine:
            row |= e["result"] if e["job"]["kind"] == "cost" else {}
        found.append(row)
    for row in found:
        row["front"] = [c for c in COSTS if _known(row, c) and not any(
            _beats(other, row, c, document["task"]["higher"]) for other in found if _known(other, c))]
    return found


def _mean(values):
    mean, _, high = interval(values)
    return mean, high - mean if len(values) > 1 else None                          # one seed has no interval


def _known(row, cost):
    return row["mean"] is not None and row[cost] is not None


def _beats(a, b, cost, higher):
    """a is at least as good and as cheap as b, and better in one of the two."""
    gain = (a["mean"] - b["mean"]) * (1 if higher else -1)
    return gain >= 0 and a[cost] <= b[cost] and (gain > 0 or a[cost] < b[cost])


def answer(document, found=None):
    """{"pick", "best", "tied", "text": [sentences]}: which method here? The best score that the seeds can tell apart, then cost.

    A chain counts as equal to the best when its mean lies inside the best one's 95% interval; of the equals the pick is the one
    whose costs (parameters, memory, step time, latency), as shares of the largest, have the smallest geometric mean."""
    every = found or rows(document)
    lost = [f"{brief(r['chain'])} lost a run: {r['failed']}" for r in every if r["failed"]]
    found = [r for r in every if r["mean"] is not None]
    if not found:
        return {"pick": None, "best": None, "tied": [], "text": ["No entry has a result, so there is nothing to say yet.", *lost]}
    higher, metric = document["task"]["higher"], document["task"]["metric"]
    best = (max if higher else min)(found, key=lambda r: r["mean"])
    single = len(best["scores"]) == 1
    tied = [r for r in found if r["mean"] == best["mean"] or not single and abs(r["mean"] - best["mean"]) <= best["half"]]
    measured = [c for c in ("trained", "memory", "step", "latency") if all(_known(r, c) for r in tied)]
    top = {c: max(r[c] for r in tied) or 1 for c in measured}
    pick = min(tied, key=lambda r: (math.prod(r[c] / top[c] for c in measured), r["trained"]))
    text = [f"Use {brief(pick['chain'])}."]
    if pick is best:
        text.append(f"It has the best {metric}, {_score(pick)}" + (", and none of the others comes within its interval."
                    if len(tied) == 1 and not single else ", and costs least of those that the seeds cannot tell from it."
                    if not single else "."))
    else:
        text.append(f"Its {metric}, {_score(pick)}, lies within the 95% interval of the best, {brief(best['chain'])} with "
                    f"{_score(best)}, and it costs less: {_cheaper(pick, best, measured)}.")
    if len(tied) > 2 or len(tied) == 2 and pick is best:
        others = [brief(r["chain"]) for r in tied if r not in (pick, best)]
        if others:
            text.append(f"Equal as far as {len(best['scores'])} seeds can tell: {', '.join(others)}.")
    for cost in ("trained", "memory", "step"):
        least = min((r for r in tied if r[cost] is not None), key=lambda r: r[cost], default=None)
        if least is not None and least is not pick:
            text.append(f"If {COSTS[cost]} alone matters, {brief(least['chain'])} has the least of it among these.")
    if not document["setting"]["grid"] and len(found) > 1 and len({r["lr"] for r in found}) == 1:
        text.append(f"All used one learning rate, {best['lr']:g}, which suits some better than others: --tune-lr searches one "
                    "for each alike.")
    if single:
        text.append("One seed cannot tell skill from luck: run it with --seeds 3 or more before you rely on it.")
    return {"pick": pick["chain"], "best": best["chain"], "tied": [r["chain"] for r in tied], "text": text + lost}


def _score(r):
    return f"{r['mean']:.4g}" + (f" ± {r['half']:.2g}" if r["half"] is not None else "")


def _cheaper(pick, best, measured):
    said = []
    for cost in measured:
        ratio = pick[cost] / best[cost] if best[cost] else 1
        if ratio < 0.95:
            said.append(f"{_share(ratio)} the {COSTS[cost]}")
    return ", ".join(said) or "about the same in every respect"


def _share(ratio):
    return "none of" if ratio == 0 else f"1/{1 / ratio:.0f} of" if ratio < 0.1 else f"{ratio:.0%} of"
