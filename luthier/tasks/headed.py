"""A backbone with a new head: logits = head(pool(backbone(input))).

Pools of last_hidden_state h (B, T, D), mask (B, T):
  cls        h[:, 0]                                    (B, D)
  mean       mean of h over the mask                    (B, D)
  cls+mean   [h[:, 0], mean of h[:, 1:]]                (B, 2D), the linear probe of DINOv2 (2304.07193 §A)
  last       h at the last token that is not padding    (B, D), for decoders
  tokens     h, one output a token                      (B, T, D)
  own        the backbone's pooler_output               (B, D)
  vector     the backbone already gives (B, D)
Maps (B, C, H, W) are averaged over their positions whatever the pool, vectors (B, D) stay as they are.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

POOLS = ("cls", "mean", "cls+mean", "last", "tokens", "own", "vector")


class Output(NamedTuple):
    """A tuple, so that DDP and FSDP see the tensors in it and Trainer finds the loss first."""
    loss: torch.Tensor | None
    logits: torch.Tensor


def pooled(out, pool, mask=None):
    """Features of a backbone's output (a tensor, tuple, or object with last_hidden_state)."""
    h, own = getattr(out, "last_hidden_state", out), getattr(out, "pooler_output", None)
    h = h[0] if isinstance(h, (tuple, list)) else h
    if own is not None and (pool == "own" or h.dim() == 4):      # ConvNeXt and its like norm after their average
        return own.flatten(1)
    if pool in ("vector", "tokens") or h.dim() == 2:
        return h
    if h.dim() == 4:
        return h.mean((2, 3))
    if pool == "cls":
        return h[:, 0]
    if pool == "cls+mean":
        return torch.cat([h[:, 0], h[:, 1:].mean(1)], -1)
    if mask is None or mask.shape[1] != h.shape[1]:              # images have no mask; merged tokens no longer match one
        return h.mean(1) if pool == "mean" else h[:, -1]
    if pool == "mean":
        m = mask.unsqueeze(-1).to(h.dtype)
        return (h * m).sum(1) / m.sum(1).clamp(min=1)
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return h[torch.arange(len(h), device=h.device), last]


class Headed(nn.Module):
    def __init__(self, backbone, pool, head, extra=None):
        super().__init__()
        self.backbone, self.pool, self.head = backbone, pool, head
        self.extra = dict(extra or {})               # constant arguments of the backbone, e.g. interpolate_pos_encoding

    @property
    def config(self):
        return self.backbone.config

    @property
    def fresh(self):
        """What starts untrained, and the chain that trains it where no other does."""
        return self.head, "probe()"

    def features(self, pixel_values=None, **inputs):
        if pixel_values is not None:
            pixel_values = pixel_values.to(next(self.backbone.parameters()).dtype)
        if pixel_values is None:
            out = self.backbone(**inputs, **self.extra)
        elif hasattr(self.backbone, "config"):       # transformers
            out = self.backbone(pixel_values=pixel_values, **inputs, **self.extra)
        else:                                        # timm, or any module over images
            out = self.backbone(pixel_values)
        return pooled(out, self.pool, inputs.get("attention_mask"))

    def forward(self, labels=None, **inputs):
        logits = self.head(self.features(**inputs))
        loss = None
        if labels is not None:
            one = logits.shape[-1] == 1 and labels.is_floating_point()
            loss = F.mse_loss(logits.float().squeeze(-1), labels) if one else \
                F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())
        return Output(loss, logits)


def head(d_in, d_out, seed, dtype=torch.float32):
    """A linear head that depends on the seed only: weights normal(0, 0.02), bias 0."""
    linear = nn.utils.skip_init(nn.Linear, d_in, d_out, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed)) * 0.02)
        linear.bias.zero_()
    return linear
