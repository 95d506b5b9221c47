"""Modules where training them stores little, and 4-bit activations for what has no parameters.
S2A: A Unified Framework for Parameter and Memory Efficient Transfer Learning, 2025. arXiv:2503.08154. Off at False or 0:
    bias     y + b behind every linear and convolution: its gradient needs no activation, and a frozen linear stores none
    prompt   `prompt` tokens P = A B of rank r in front: (n, r), (r, D)
    side     h' = block(h) + U gelu(D pool(h)): pool averages runs of `reduce` channels, so that a reduce-th of h is stored
    bits     pointwise functions, softmax, layer norm and attention keep their derivatives in 4 bits for backward: see _lean
The parts are the paper's; forms and sizes of the prompt and the side module are this file's own (the text was not to be had).
"""

from contextlib import nullcontext

import torch
from torch.nn.functional import gelu

from luthier.errors import BadChain
from luthier.method import Method, method
from luthier.methods.activation._lean import Lean


@method
class s2a(Method):
    at: str = "linear conv embed block.*.out"
    bias: bool = True
    prompt: int = 4                        # tokens; 0: none
    rank: int = 2                          # r
    side: int = 8                          # hidden width; 0: no side module
    reduce: int = 8                        # channels that are pooled into one
    bits: int = 4                          # 4, or 0: activations as they are
    limits = {"prompt": (0, None), "side": (0, None), "bits": (0, 4)}
    exempt = {"identity_at_init": "prompt tokens are attended to from the start",
              "checkpointing": "under checkpointing activations are made again exactly, without it they are kept in 4 bits"}

    def __post_init__(self):
        super().__post_init__()
        if self.bits not in (0, 4):
            raise BadChain(f"{self}: activations are kept in 4 bits, or as they are with bits=0.")

    def init(self, site):                  # trains d_out a linear, r (n + D) a tower, side (D / reduce + D + 1) a block
        if site.kind == "weight":
            return dict(b=site.zeros(site.d_out)) if self.bias and site.layout != "stack" else None
        if site.role == "embed":
            fits = self.prompt and not site.stack.insert
            return dict(A=site.normal(self.prompt, self.rank), B=site.normal(self.rank, site.d_out, std=0.1)) if fits else None
        if not self.side or "attn" not in site.peers or site.d_out % self.reduce:
            return {}
        few = site.d_out // self.reduce
        return dict(D=site.normal(self.side, few, std=few**-0.5), d=site.zeros(self.side), U=site.zeros(site.d_out, self.side))

    def weight(self, W, p, b):             # (d_out, d_in), (d_out,)
        return W, b + p.b

    def fast(self, x, y, p):
        return y + p.b

    def stream(self, t, p):                # in front of the tokens
        return t.insert((p.A[:, :, None] * p.B).sum(1), p.key)

    def around(self, f, t, p):             # t.h: (B, T, D)
        lean = self.bits and torch.is_grad_enabled() and not f.checkpointed
        with Lean() if lean else nullcontext():
            h = t.h
            t = f(t)
            if not hasattr(p, "D"):
                return t
            pooled = h.unflatten(-1, (-1, self.reduce)).mean(-1)
            return t.map_h(lambda y: y + gelu(pooled @ p.D.T + p.d) @ p.U.T)
