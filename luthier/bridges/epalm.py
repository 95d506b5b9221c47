"""The class tokens of late vision layers, each seen by its own late layers of the decoder, and a soft prompt.
    h_i = [W CLS_k(i) + b; h_i] at the decoder's layers i of the last two fifths;  in front of all: n learned tokens
Shukor et al., eP-ALM: Efficient Perceptual Augmentation of Language Models, 2023. arXiv:2303.11403 §3: the last K normed [CLS]
states share one linear map; each takes the one token's place anew at as many layers as share them out evenly; the last layer
gets none and sees what became of the last. No layer before sees the image: here the place is masked there, so that every layer's
KV cache is as long.
"""

import inspect
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import DoesNotFit
from .way import Way, way


class Soft(nn.Module):
    def __init__(self, n, table):
        super().__init__()
        self.P = nn.Parameter(torch.randn(n, table.shape[1]) * table.float().std())

    def forward(self):
        return self.P


class Late(nn.Module):
    def __init__(self, d, D, n, table):
        super().__init__()
        self.map, self.soft, self.width = nn.Linear(d, D), Soft(n, table) if n else None, table.shape[1]


@way
class epalm(Way):
    states_of: int = 6                                      # K; 1: the last layer's alone
    soft: int = 1                                           # n; 0: no soft prompt
    start: float = 0.6                                      # of the decoder's depth
    limits = dict(soft=(0, 1000), start=(0, 0.99))
    layers, hidden = True, 1

    def states(self, seen):                                 # (N, K, d)
        return torch.stack([h[:, 0] if seen.fixed else h.mean(1) for h in seen.layers[-self.states_of:]], 1)

    def connector(self, fit):
        if fit.pen.name or not fit.pen.causal:
            raise DoesNotFit(f"epalm shows images to late layers of a decoder, and {type(fit.language).__name__} is none: bridge "
                             "to one such as smollm2-135m, or use limber().")
        return Late(fit.states[-1], fit.pen.dim, self.soft, fit.language.get_input_embeddings().weight.detach())

    def prompt(self, c, states):                            # a place for the class tokens, then the soft prompt
        place = states.new_zeros(len(states), 1, c.width)
        return torch.cat([place, c.soft().expand(len(states), -1, -1)], 1) if c.soft is not None else place

    def layers_of(self, n, K):
        """{layer: which of the K it is given}, from the first that sees the image; None at the last."""
        first = min(int(self.start * n), n - 1)
        last = max(n - 1, first + 1)
        step = max(1, (last - first) // K)
        return {i: min((i - first) // step, K - 1) if i < last else None for i in range(first, n)}

    @contextmanager
    def within(self, run):
        B, N = run.shown.shape
        if run.made is None:
            run.made = run.model.connector.map(run.states)
        tokens, blocks = run.made, run.model.pen.blocks                                            # (B, N, K, D)
        at = torch.arange(N, device=run.shown.device) * (1 + self.soft)

        def enter(k):
            def hook(block, args, kwargs):
                places, h = at + run.offset, args[0]
                times = len(h) // B                         # beams
                if run.filling and k is not None:
                    h = h.index_copy(1, places, tokens[:, :, k].repeat_interleave(times, 0).to(h.dtype))
                args, kwargs = _shown(block, (h, *args[1:]), dict(kwargs), places, run.shown.repeat_interleave(times, 0).bool())
                return args, kwargs
            return hook
        handles = [blocks[i].register_forward_pre_hook(enter(k), with_kwargs=True)
                   for i, k in self.layers_of(len(blocks), tokens.shape[2]).items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _shown(block, args, kwargs, places, shown):
    """The block's arguments with these places of its attention mask opened, (B, N) of them."""
    at = [*inspect.signature(block.forward).parameters].index("attention_mask") if "attention_mask" not in kwargs else None
    mask = kwargs["attention_mask"] if at is None else args[at]
    if not torch.is_tensor(mask) or mask.dim() != 4:
        raise DoesNotFit("epalm opens its tokens' places in the attention mask, and this attention makes none. Load the language "
                         "model with attn_implementation=\"sdpa\".")
    shown, seen = shown[:, None, None], mask.index_select(3, places)
    rows = torch.arange(mask.shape[3] - mask.shape[2], mask.shape[3], device=mask.device)[:, None] >= places      # (Q, N): causal
    seen = seen | (shown & rows) if mask.dtype == torch.bool else seen.masked_fill(shown & rows, 0)
    mask = mask.expand(len(shown), *mask.shape[1:]).index_copy(3, places, seen.expand(len(shown), *mask.shape[1:3], -1))
    if at is None:
        return args, kwargs | {"attention_mask": mask}
    return (*args[:at], mask, *args[at + 1:]), kwargs
