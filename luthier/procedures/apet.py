"""Tuning modules thrown at random sites until a count is spent: the other reading of "arbitrary positions".
Su et al., 2023. arXiv:2306.02320 §3.2 and the authors' code: half of the count goes to modules (a LoRA pair, an adapter of one
site are one unit), half to tensors of the model itself; units are shuffled, and each that still fits is taken.
"""

import dataclasses
import random

from luthier.attach import attach
from luthier.errors import DoesNotFit
from luthier.method import Chain, parse


def apet(model, count, modules=("lora(rank=8)", "houlsby(width=8, norms=False)"), inner=0.5, seed=0):
    """A chain with at most `count` trained numbers, ready for `attach`.

    modules  methods whose sites are drawn from; () for none
    inner    share of the count that goes to the model's own tensors, trained whole (with their biases)
    """
    draw = random.Random(f"{seed}/{count}")
    own, rest = round(inner * count), count - round(inner * count)
    chain = Chain()
    for budget, pool in ((own, ("full(at='all -head')",)), (rest, modules)):
        units = [(m, name, n) for text in pool for m in parse(text) for name, n in sizes(model, m).items()]
        draw.shuffle(units)
        taken = {}
        for m, name, n in units:
            if n <= budget:
                budget -= n
                taken.setdefault(m, []).append(name)
        chain += Chain(dataclasses.replace(m, at=" ".join(names)) for m, names in taken.items())
    if not chain:
        raise DoesNotFit(f"apet(count={count}): not even one unit of {modules} or tensor fits into it. Give a larger count.")
    return Chain(chain)


def sizes(model, m):
    """site name -> numbers that the method trains there."""
    tuned = attach(model, m)
    found = {p.site_name: sum(q.numel() for q in p.parameters()) for p in tuned.states.values()}
    tuned.detach()
    return {name: n for name, n in found.items() if n}
