"""Gated heads over two frozen encoders, and a sigmoid for every pair of image and caption.
    f(x) = G (relu6(A LN(x)) ∘ B LN(x)),    A, B: (8d, d);    L = -mean log σ(±(exp(s) cos(f, g) + b)),  + of true pairs
Zhang et al., Assessing and Learning Alignment of Unimodal Vision and Language Models (SAIL), 2024. arXiv:2412.04616, with the
authors' code: x of an image is [CLS; mean of the patches], of a text its sentence's vector; exp(s) starts at 20, b at -10. Each
image has a second positive, a caption more (the task's role `extra`), against which all images of the batch are set, too. With
gated=False the heads are linear: the paper's alignment probe, which says how well two encoders fit.
"""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

from .dual import Heads
from .way import TwoHeads, way


class Gated(nn.Module):
    def __init__(self, d, D, wide):
        super().__init__()
        self.norm, self.gate, self.up = nn.LayerNorm(d), nn.Linear(d, wide * d), nn.Linear(d, wide * d)
        self.proj = nn.Linear(wide * d, D)

    def forward(self, x):
        x = self.norm(x)
        return self.proj(F.relu6(self.gate(x)) * self.up(x))


@way
class sail(TwoHeads):
    gated: bool = True                                      # False: linear, the alignment probe
    dim: int = 1024                                         # D, of the space both are mapped to
    wide: int = 8
    scale: float = 20.0                                     # at the start
    bias: float = -10.0
    limits = dict(scale=(1, 100), bias=(-1000, 1000))

    def states(self, seen):
        return torch.cat([seen.summary, seen.tokens.mean(1)], -1) if seen.fixed else seen.summary

    def words(self, heard):
        return heard.summary

    def connector(self, fit):
        def side(d):
            made = Gated(d, self.dim, self.wide) if self.gated else nn.Sequential(OrderedDict(
                norm=nn.LayerNorm(d), proj=nn.Linear(d, self.dim)))
            for m in made.modules():
                if isinstance(m, nn.Linear):
                    nn.init.xavier_uniform_(m.weight)
                    nn.init.zeros_(m.bias)
            return made
        return Heads(side(fit.states[-1]), side(fit.width), self.dim, self.scale, self.bias)

    def loss(self, logits, same):
        return -F.logsigmoid(logits * (2 * same - 1)).mean()
