"""Train, val and test: what the data brings is kept; what it lacks is drawn with a seed, each class in proportion."""

from collections import Counter

import torch


def shares(labels, n, seed):
    """n of the indices (sorted), in proportion to the classes; every class that can keeps at least one."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator).tolist()
    if n >= len(labels):
        return sorted(order)
    groups = {}
    for i in order:
        groups.setdefault(labels[i], []).append(i)
    # each member stands at its quantile within its class; the n smallest quantiles hold every class in proportion
    place = sorted(((k + 0.5) / len(g), i) for g in groups.values() for k, i in enumerate(g))
    chosen = {i for _, i in place[:n]}
    for g in groups.values():
        if not chosen.intersection(g) and n >= len(groups):
            chosen.add(g[0])
            chosen.remove(next(i for _, i in reversed(place) if i in chosen and len(chosen.intersection(groups[labels[i]])) > 1))
    return sorted(chosen)


def divide(tables, labels_of, seed, notes):
    """{"train", "val", "test"} out of what the data has. labels_of(table) -> one hashable a row, for the proportions."""
    tables = dict(tables)

    def carve(name, source, fraction, most):
        whole = tables[source]
        labels = labels_of(whole)
        count = Counter(labels)                      # a class of one row stays where it can be learned
        able = [i for i, label in enumerate(labels) if count[label] > 1]
        n = min(most, max(1, round(fraction * len(whole))))
        part = [able[k] for k in shares([labels[i] for i in able], n, seed)]
        rest = sorted(set(range(len(whole))) - set(part))
        tables[source], tables[name] = whole.take(rest), whole.take(part)
        notes.append(f"{name}: {n:,} rows drawn from {source} (seed {seed})")

    if "all" in tables:
        tables["train"] = tables.pop("all")
        carve("test", "train", 0.2, 5000)
    elif "test" not in tables and "val" in tables:
        tables["test"] = tables.pop("val")
        notes.append("test: the validation part, for there is no test part")
    elif "test" not in tables:
        carve("test", "train", 0.2, 5000)
    if "val" not in tables:
        carve("val", "train", 0.1, 2000)
    return {name: tables[name] for name in ("train", "val", "test")}


def order(n, size, seed, epoch, shuffle, length=None):
    """Batches of indices. Shuffled: a permutation that depends on (seed, epoch) only; with `length` (a function of the index),
    neighbours of similar length are put together within windows of 16 batches, so that little padding is needed."""
    if not shuffle:
        return [list(range(i, min(i + size, n))) for i in range(0, n, size)]
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    index = torch.randperm(n, generator=generator).tolist()
    if length is None:
        return [index[i:i + size] for i in range(0, n, size)]
    batches = []
    for w in range(0, n, 16 * size):
        window = sorted(index[w:w + 16 * size], key=length)
        batches += [window[i:i + size] for i in range(0, len(window), size)]
    mixed = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return sorted(mixed, key=lambda b: len(b) < size)                # what does not fill a batch comes last
