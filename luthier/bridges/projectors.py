"""Projectors over the tokens of two frozen encoders, trained by CLIP's contrastive loss.
    f = mean_i P(x_i) + Q(x_cls),    g = R(mean_j P'(w_j))
    P(x) = A n + C gelu(B n), n = dropout(LN(x)), and so are Q and P';    R(x) = LN(h + dropout(D gelu(h))), h = E x
Maniparambil et al., From Unimodal to Multimodal: Scaling up Projectors to Align Modalities, 2024. arXiv:2409.19425 (in print:
Harnessing Frozen Unimodal Encoders for Flexible Multimodal Alignment), after the authors' code; temperature 0.07 at the start.
Where there is no class token, the mean takes its place. Which encoders: luthier.procedures.matching; which pairs: tasks/balance.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .dual import Heads
from .way import TwoHeads, way


class Token(nn.Module):                                     # P
    def __init__(self, d, D, p):
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(d), nn.Dropout(p)
        self.straight, self.up, self.proj = nn.Linear(d, D), nn.Linear(d, D), nn.Linear(D, D)

    def forward(self, x):
        x = self.dropout(self.norm(x))
        return self.straight(x) + self.proj(F.gelu(self.up(x)))


class Image(nn.Module):
    def __init__(self, d, D, p):
        super().__init__()
        self.patch, self.whole = Token(d, D, p), Token(d, D, p)

    def forward(self, x):                                   # (N, 1 + S, d), the summary first
        return self.patch(x[:, 1:]).mean(1) + self.whole(x[:, 0])


class Text(nn.Module):
    def __init__(self, d, D, p):
        super().__init__()
        self.word, self.enter = Token(d, D, p), nn.Linear(D, D)
        self.proj, self.dropout, self.norm = nn.Linear(D, D), nn.Dropout(p), nn.LayerNorm(D)

    def forward(self, x):                                   # (N, L, d + 1)
        x, there = x[..., :-1], x[..., -1:]
        h = self.enter((self.word(x) * there).sum(1) / there.sum(1))
        return self.norm(h + self.dropout(self.proj(F.gelu(h))))


@way
class projectors(TwoHeads):
    dim: int = 1024                                         # D, of the space both are mapped to
    dropout: float = 0.1
    temperature: float = 0.07                               # at the start
    limits = dict(dropout=(0, 0.9), temperature=(0.01, 1))

    def states(self, seen):
        return torch.cat([seen.summary[:, None], seen.tokens], 1)

    def words(self, heard):
        return torch.cat([heard.tokens, heard.mask[:, :, None].to(heard.tokens)], 2)

    def connector(self, fit):
        return Heads(Image(fit.states[-1], self.dim, self.dropout), Text(fit.width, self.dim, self.dropout), self.dim,
                     1 / self.temperature)
