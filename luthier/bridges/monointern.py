"""Image tokens inside the language model, each block's FFN doubled by one of their own.
    x = MLP(norm [patch + position embeddings, `join` x `join` patches side by side]) in front of the text
    FFN(norm h_t) = FFN_image(norm h_t) for tokens of images, else FFN_text(norm h_t)
Luo et al., Mono-InternVL: Pushing the Boundaries of Monolithic Multimodal Large Language Models with Endogenous Visual
Pre-training, 2024. arXiv:2410.08202. Checked in the authors' code (OpenGVLab/Mono-InternVL, internvl/: modeling_internlm2_ve.py,
modeling_internvl_chat.py, modeling_intern_vit.py, internvl_chat_finetune.py), not in the paper's text, of which the abstract was
read: no vision encoder, the block's norm and attention are shared, which token takes which FFN is fixed, four patches make a
token, the language model is frozen, so that text alone gives its very own logits. The code loads its experts trained; here they
start as copies of the text's FFNs.

Patch and position embeddings are the vision model's, whose blocks never run. The last block has no expert: nothing reads what it
makes of an image. What the code can train at a time are ordinary phases:
    full(at="connector vision.embed.patch vision.embed.position")     embeddings, map, experts (its freeze_llm with unfreeze_ve)
    ... >> full(at="text.attn.q text.attn.k text.attn.v text.attn.o") the attention beside them (unfreeze_attn)
"""

import copy
from contextlib import contextmanager
from math import isqrt

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import DoesNotFit
from .way import Way, way


class Mono(nn.Module):
    def __init__(self, d, D, ffns):
        super().__init__()
        self.map = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, D), nn.GELU(), nn.Linear(D, D))
        self.experts = nn.ModuleList(map(copy.deepcopy, ffns))
        self.ffns = tuple(ffns)                             # the text's own: no part of this module

    def forward(self, x):
        return self.map(x)


def ffns(language):
    """The FFN of every block of a decoder but the last."""
    from ..site import sites

    every = sites(language)
    found = [s.module for s in every if s.role == "mlp.out" and s.tower == "" and not isinstance(s.module, nn.Linear)]
    if not every.stacks or len(found) != every.stacks[-1].n_blocks or not every.stacks[-1].causal:
        raise DoesNotFit(f"monointern doubles the FFN of every block of a decoder, and {type(language).__name__} has not one "
                         "module each that is its FFN. Bridge to a decoder such as smollm2-135m, or use limber().")
    return found[:-1]


def joined(x, k):                                           # (N, S, d) -> (N, S / k k, d k k)
    side = isqrt(x.shape[1])
    if k > 1 and (side * side != x.shape[1] or side % k):
        raise DoesNotFit(f"join={k} makes a token of {k} x {k} patches, and this vision model gives {x.shape[1]} patches, not a "
                         f"square of them whose side {k} divides. Use join=1 or images of another size.")
    return x if k == 1 else F.pixel_unshuffle(x.mT.unflatten(-1, (side, side)), k).flatten(2).mT


@way
class monointern(Way):
    experts: bool = True                                    # False: the patch embeddings alone
    join: int = 2                                           # patches a side of a token
    embedded = True
    limits = dict(join=(1, 8))

    def states(self, seen):
        return joined(seen.tokens, self.join)

    def connector(self, fit):
        return Mono(fit.states[-1], fit.width, ffns(fit.language) if self.experts else ())

    @contextmanager
    def within(self, run):
        n, made, handles, c = run.front.shape[1], {}, [], run.model.connector

        def split(ffn, args):                               # the FFN runs on the text alone, the expert on the images' tokens
            if run.filling:
                h, a = args[0], run.offset
                made[ffn] = c.experts[c.ffns.index(ffn)](h[:, a:a + n].contiguous())
                return torch.cat([h[:, :a], h[:, a + n:]], 1), *args[1:]

        def join(ffn, args, out):
            if run.filling:
                a = run.offset
                return torch.cat([out[:, :a], made.pop(ffn), out[:, a:]], 1)
        for ffn in c.ffns:
            handles += [ffn.register_forward_pre_hook(split), ffn.register_forward_hook(join)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
