"""A sound as soft prompts that heed the instruction.
    [q; t] = [q; t] + SelfAttention(norm [q; t]),  q = q + CrossAttention(norm q, a),  q = q + FFN(norm q),  t = t + FFN'(norm t)
Liang et al., Acoustic Prompt Tuning: Empowering Large Language Models with Audition Capabilities, 2023. arXiv:2312.00249: q are n
learned queries, t the instruction, a the states of a frozen audio encoder; after the last layer a linear map takes q to the
language model's width, and the prompts stand between the words, where a sound is spoken of (image_places).

Of the paper its abstract and its reviews were read (a Q-Former of 32 queries, first trained alone by matching, contrasting and
captioning, which is not done here; then by the text's loss); the authors' repository leaves the aligner out. So the layer is
InstructBLIP's, as in transformers' InstructBlipQFormerLayer: cross-attention in every other layer from the first, an FFN each for
queries and words, words with places. Ours: norms in front (it starts from noise, not from BERT), t is the language model's own
word embeddings, mapped, plus sines of their places, a has learned places. Whisper hears 30 seconds, silence behind a shorter
sound: `frames` of it are read, and `every` so many of them averaged. heed=False: queries see no instruction.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .way import Way, way


def ffn(w):
    return nn.Sequential(nn.LayerNorm(w), nn.Linear(w, 4 * w), nn.GELU(), nn.Linear(4 * w, w))


class Layer(nn.Module):
    def __init__(self, w, heads, crosses):
        super().__init__()
        self.norm, self.own = nn.LayerNorm(w), nn.MultiheadAttention(w, heads, batch_first=True)
        if crosses:
            self.ask, self.cross = nn.LayerNorm(w), nn.MultiheadAttention(w, heads, batch_first=True)
        self.crosses, self.queries, self.words = crosses, ffn(w), ffn(w)

    def forward(self, q, t, a, padding):
        n, h = q.shape[1], torch.cat([q, t], 1)
        x = self.norm(h)
        q, t = (h + self.own(x, x, x, key_padding_mask=padding, need_weights=False)[0]).split([n, t.shape[1]], 1)
        if self.crosses:
            q = q + self.cross(self.ask(q), a, a, need_weights=False)[0]
        return q + self.queries(q), t + self.words(t)


def sines(mask, w):                                       # (N, L) -> (N, L, w)
    turns = (mask.cumsum(1) - 1).clamp(min=0)[..., None] * 1e4 ** (torch.arange(0, w, 2, device=mask.device) / -w)
    return torch.cat([turns.sin(), turns.cos()], -1)[..., :w]


class Aligner(nn.Module):
    def __init__(self, d, frames, D, n, w, layers, heads):
        super().__init__()
        self.query, self.place = nn.Parameter(torch.randn(n, w) * 0.02), nn.Parameter(torch.randn(frames, w) * 0.02)
        self.sound, self.text = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, w)), nn.Sequential(nn.LayerNorm(D), nn.Linear(D, w))
        self.layers = nn.ModuleList(Layer(w, heads, i % 2 == 0) for i in range(layers))
        self.norm, self.proj = nn.LayerNorm(w), nn.Linear(w, D)

    def forward(self, x, text, mask):                       # (N, S, d), (N, L, D), (N, L) -> (N, n, D)
        q, t, a = self.query.expand(len(x), -1, -1), self.text(text), self.sound(x) + self.place
        t = t + sines(mask, t.shape[2]).to(t)
        padding = torch.cat([mask.new_ones(q.shape[:2]), mask], 1) == 0
        for layer in self.layers:
            q, t = layer(q, t, a, padding)
        return self.proj(self.norm(q))


@way
class apt(Way):
    tokens: int = 32                                        # n
    width: int = 256
    layers_of: int = 4
    heads: int = 4
    frames: int = 0                                         # the first so many are read, of Whisper 50 a second; 0: all
    every: int = 10                                         # so many are averaged
    heed: bool = True
    makes, sees, heeds = "audio-text", ("audio", "other"), True

    def states(self, seen):                                 # (N, frames / every, d)
        return F.avg_pool1d(seen.tokens[:, :self.frames or None].mT, self.every, ceil_mode=True).mT

    def connector(self, fit):
        frames, d = fit.states
        return Aligner(d, frames, fit.width, self.tokens, self.width, self.layers_of, self.heads)

    def prompt(self, connector, states, text, mask):
        return connector(states, text, mask if self.heed else torch.zeros_like(mask))
