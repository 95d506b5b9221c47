"""Full fine-tuning: every parameter trains.  W' = V, b' = c;  V = W and c = b at init.

What trains is a copy, and the base is not read any more. Against W + Δ that spares the sum in every forward pass (a whole model
kept for backward), loses no small step to rounding against a large W, and lets the base leave memory. The price is honest: every
parameter is trained, kept by the optimizer and stored.
"""

import torch
from torch import nn

from luthier.method import Method, method
from luthier.site import sites


def example(model, folder):                # a mask token is a parameter that only pretraining uses: no gradient reaches it
    return {"at": "all" + " -embed.mask" * ("embed.mask" in sites(model).by_name)}


@method
class full(Method):
    at: str = "all"
    peft = dict(copies=dict(weight="W", bias="b"))
    example = staticmethod(example)

    def init(self, site, seen):
        own = {"W": site.W, "b": site.b}
        return {n: nn.Parameter(t.clone(memory_format=torch.contiguous_format)) for n, t in own.items() if t is not None}

    def weight(self, p, b):                # b in the signature: the bias is set too, where the module has one
        return p.W, getattr(p, "b", None)
