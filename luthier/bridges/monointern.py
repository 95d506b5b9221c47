"""Image tokens inside the language model, each block's FFN doubled by one of their own.
    x = MLP(patch + position embeddings) in front of the text;  FFN(h_t) = FFN_image(h_t) for tokens of images, else FFN_text(h_t)
Luo et al., Mono-InternVL: Pushing the Boundaries of Monolithic Multimodal Large Language Models with Endogenous Visual
Pre-training, 2024. arXiv:2410.08202 §3: there is no vision encoder, the experts start as copies of the text's FFNs, and which
token takes which is fixed. The language model is frozen, so that text alone gives its very own logits; patch and position
embeddings are the vision model's, whose blocks never run. The last block has no expert: nothing reads what it makes of an image.
Their stages are ordinary phases: full(at="connector"), again on better data, then with full(at="text.attn.q ...") beside it.
"""

import copy
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import DoesNotFit
from .way import Way, way


class Mono(nn.Module):
    def __init__(self, d, D, ffns):
        super().__init__()
        self.map = nn.Sequential(nn.Linear(d, D), nn.GELU(), nn.Linear(D, D))
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


@way
class monointern(Way):
    experts: bool = True                                    # False: the patch embeddings alone
    embedded = True

    def states(self, seen):
        return seen.tokens

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
