"""Linear probe: only the task's head trains, on frozen features.  W' = V, b' = c;  V = W and c = b at init.
Alain & Bengio, Understanding intermediate layers using linear classifier probes, 2016. arXiv:1610.01644

A trained copy, so detaching gives back the very head that was there; (classes, d) + (classes,) parameters and no more.
"""

import torch
from torch import nn

from luthier.method import Method, method


@method
class probe(Method):
    at: str = "head"
    peft = dict(copies=dict(weight="W", bias="b"))

    def init(self, site, seen):
        own = {"W": site.W, "b": site.b}
        return {n: nn.Parameter(t.clone(memory_format=torch.contiguous_format)) for n, t in own.items() if t is not None}

    def weight(self, p, b):                # b in the signature: the bias is set too, where the module has one
        return p.W, getattr(p, "b", None)
