"""A token stream with lanes, and an attention core: what the `stream` and `attend` verbs receive and return.

Whatever inserts, drops or merges tokens moves every lane (mask, sizes, side-network state) with them.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

_TOGETHER = [1]


@contextmanager
def together(n):
    """Within, every n rows of a stream in turn belong together: the frames of one clip, the images of one example. Whoever
    flattens (B, n, ...) to (B n, ...) says so; methods read it as `Tokens.frames`."""
    before, _TOGETHER[0] = _TOGETHER[0], n
    try:
        yield
    finally:
        _TOGETHER[0] = before


def rows_together():
    return _TOGETHER[0]


@dataclass(frozen=True)
class Tokens:
    """h: (B, T, D). lanes: name -> (B, T, *), aligned with h; spans: name -> (start, stop) of inserted tokens, which live in
    the first `fixed` places, after the special tokens; those never merge."""

    h: torch.Tensor
    lanes: dict = field(default_factory=dict)
    spans: dict = field(default_factory=dict)
    fixed: int = 0
    causal: bool = False
    decoding: bool = False               # earlier tokens are in a KV cache: nothing is inserted again
    group: torch.Tensor | None = None    # (B, T at the last mark) -> place of each marked token now, -1: dropped
    memory: dict | None = None           # per KV cache: what side networks remember of earlier tokens
    keymask: torch.Tensor | None = None  # (B, S) validity of all keys, cached ones included; None: all valid
    frames: int = 1                      # so many rows in turn belong together: see `together`
    given: torch.Tensor | None = None    # what the run of blocks was called with: ids or pixels; None where it is made again

    # -- reading ----------------------------------------------------------------------------------------------
    @property
    def size(self):
        """(B, T, 1): how many original tokens each token stands for."""
        return self.lanes.get("size", torch.ones_like(self.h[..., :1]))

    @property
    def mask(self):
        """(B, T) bool, True where a token is real and not padding; None: all real."""
        return self.lanes["mask"][..., 0] if "mask" in self.lanes else None

    def recall(self, key, *new):
        """In generation: these (B, H, T, d) behind those of earlier tokens, remembered under `key` beside the KV cache."""
        if self.memory is not None:
            if key in self.memory:
                new = tuple(torch.cat([old, n], 2) for old, n in zip(self.memory[key], new, strict=True))
            self.memory[key] = new
        return new

    def sees(self, S):
        """(B or 1, 1 or T, S) bool: which of S tokens, earlier ones included, each token of this stream may see; None: all."""
        T, device = self.h.shape[1], self.h.device
        mask = torch.ones(1, T, S, dtype=torch.bool, device=device).tril(S - T) if self.causal and T > 1 else None
        valid = self.keymask if self.keymask is not None and self.keymask.shape[1] == S else self.mask if T == S else None
        if valid is not None:
            keys = valid.bool()[:, None, :]
            mask = keys if mask is None else mask & keys
            mask = mask | torch.eye(T, S, dtype=torch.bool, device=device) if T == S else mask     # a padding row sees itself
        return mask

    def attend(self, q, k, v, key, bias=None):
        """Masked (and causal) attention over this stream's own tokens, for networks beside the model. q, k, v: (B, H, T, Dh)."""
        k, v = self.recall(key, k, v)
        mask = self.sees(k.shape[2])
        mask = None if mask is None else mask[:, None]
        if bias is not None:
            mask = bias if mask is None else torch.where(mask, bias, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    # -- changing ---------------------------------------------------------------------------------------------
    def map_h(self, f):
        return replace(self, h=f(self.h))

    def lane(self, name, value):
        return replace(self, lanes={**self.lanes, name: value})

    def _map(self, f):                                     # the same move along T of h and of every lane
        return replace(self, h=f(self.h), lanes={k: f(v) for k, v in self.lanes.items()})

    def insert(self, rows, name):
        """rows: (n, D) or (B, n, D), put behind the special tokens and whatever was inserted before; never twice in a cache."""
        if self.decoding:
            return self
        at, B = self.fixed, len(self.h)
        rows = rows if rows.dim() == 3 else rows.expand(B, *rows.shape)
        n = rows.shape[1]

        def put(v, mid):
            return torch.cat([v[:, :at], mid.expand(B, n, *v.shape[2:]).to(v.dtype), v[:, at:]], 1)

        lanes = {k: put(v, v.new_full((1, 1, 1), k in ("size", "mask"))) for k, v in self.lanes.items()}
        group = self.group if self.group is None else self.group + n * (self.group >= at)
        keymask = self.keymask if self.keymask is None else put(self.keymask[..., None], self.keymask.new_ones(1, 1, 1))[..., 0]
        return replace(self, h=put(self.h, rows), lanes=lanes, group=group, keymask=keymask, fixed=at + n,
                       spans={**self.spans, name: (at, at + n)})

    def drop(self, name):
        """Take an inserted span out again (nothing happens if it is not there)."""
        if name not in self.spans or self.decoding:
            return self
        lo, hi = self.spans[name]

        def left(i):
            return i - (hi - lo) if i >= hi else i

        t = self._map(lambda v: torch.cat([v[:, :lo], v[:, hi:]], 1))
        group = self.group
        if group is not None:
            group = torch.where(group >= hi, group - (hi - lo), torch.where(group >= lo, -1, group))
        keymask = self.keymask if self.keymask is None else torch.cat([self.keymask[:, :lo], self.keymask[:, hi:]], 1)
        spans = {k: (left(a), left(b)) for k, (a, b) in self.spans.items() if k != name}
        return replace(t, spans=spans, group=group, keymask=keymask, fixed=left(self.fixed))

    def times(self, n):
        """n copies of all rows, one after the other: (n B, T, D)."""
        keymask = self.keymask if self.keymask is None else self.keymask.repeat(n, 1)
        t = replace(self, h=self.h.repeat(n, 1, 1), lanes={k: v.repeat(n, 1, 1) for k, v in self.lanes.items()})
        return replace(t, keymask=keymask, group=None)

    def keep(self, index):
        """index: (B, k): only these tokens stay, in this order."""
        T = self.h.shape[1]
        t = self._map(lambda v: v.gather(1, _wide(index, v)))
        place = torch.full((len(index), T), -1, device=index.device)
        place = place.scatter(1, index, torch.arange(index.shape[1], device=index.device).expand_as(index))
        return replace(t, group=_follow(self.group, place), keymask=None)

    def merge(self, src, dst):
        """src, dst: (B, r) places; dst absorbs src, as a mean weighted by size; sizes add, and B, T-r, D is left."""
        t, T, w = self.lane("size", self.size), self.h.shape[1], self.size
        order = torch.ones(len(src), T, device=src.device).scatter(1, src, 0.0).argsort(dim=1, descending=True, stable=True)
        order = order[:, : T - src.shape[1]].sort(1).values

        def gather(v):
            return v.scatter_add(1, _wide(dst, v), v.gather(1, _wide(src, v)))

        def mean(v):
            return (gather(v * w.to(v.dtype)) / gather(w.to(v.dtype))).gather(1, _wide(order, v))

        def lane(k, v):
            if k == "mask":
                return (gather(v.long()) > 0).gather(1, _wide(order, v))
            return gather(v).gather(1, _wide(order, v)) if k == "size" else mean(v)

        place = torch.full((len(src), T), -1, device=src.device)
        place = place.scatter(1, order, torch.arange(order.shape[1], device=src.device).expand_as(order))
        place = place.scatter(1, src, place.gather(1, dst))
        return replace(t, h=mean(t.h), lanes={k: lane(k, v) for k, v in t.lanes.items()},
                       group=_follow(self.group, place), keymask=None)

    def marked(self):
        """From here on `group` says where each present token went."""
        B, T = self.h.shape[:2]
        return replace(self, group=torch.arange(T, device=self.h.device).expand(B, T))


def _wide(index, v):                                       # (B, k) -> (B, k, *) to gather v along T
    return index.view(*index.shape, *[1] * (v.dim() - 2)).expand(*index.shape, *v.shape[2:])


def _follow(group, place):
    return group if group is None else torch.where(group < 0, -1, place.gather(1, group.clamp(min=0)))


@dataclass(frozen=True)
class Attention:
    """An attention core as it is about to run. q: (B, H, T, Dh); k, v: (B, Hkv or H, S, Dh); mask: bool (True: may attend) or
    additive, broadcastable to (B, H, T, S); `causal` only while there is no mask; t: the stack's Tokens."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    t: Tokens | None = None
    mask: torch.Tensor | None = None
    causal: bool = False
    scale: float | None = None
    dropout: float = 0.0
    grouped: bool = False                                  # k and v have fewer heads than q

    def explicit(self):
        """The same, with causality written into the mask."""
        if not self.causal:
            return self
        T, S = self.q.shape[-2], self.k.shape[-2]
        return replace(self, causal=False, mask=torch.ones(T, S, dtype=torch.bool, device=self.q.device).tril())

    def prepend(self, k, v):
        """k, v: (n, Hkv, Dh), further keys and values that every query may attend to."""
        a, n = self.explicit(), len(k)

        def put(old, new):
            new = new.transpose(0, 1).to(old.dtype)
            new = new.repeat_interleave(old.shape[1] // new.shape[0], 0) if new.shape[0] != old.shape[1] else new
            return torch.cat([new.expand(len(old), *new.shape), old], 2)

        mask = a.mask
        if mask is not None:
            mask = mask.expand(*mask.shape[:-1], a.k.shape[-2])
            mask = torch.cat([mask.new_full((*mask.shape[:-1], n), mask.dtype == torch.bool), mask], -1)
        return replace(a, k=put(a.k, k), v=put(a.v, v), mask=mask)

    def bias(self, b):
        """b: additive, broadcastable to (B, H, T, S)."""
        a = self.explicit()
        if a.mask is None:
            return replace(a, mask=b.to(a.q.dtype))
        b = torch.where(a.mask, b, -torch.inf) if a.mask.dtype == torch.bool else a.mask + b
        return replace(a, mask=b.to(a.q.dtype))

    def lane(self, name, value):
        return replace(self, t=self.t.lane(name, value))

    def weights(self):
        """softmax(q kᵀ · scale + mask): (B, H, T, S); a row that may see nothing (padding) sees all alike."""
        a = self.explicit()
        k = a.k.repeat_interleave(a.q.shape[1] // a.k.shape[1], 1) if a.q.shape[1] != a.k.shape[1] else a.k
        s = a.q @ k.mT * (a.scale or 1 / math.sqrt(a.q.shape[-1]))
        if a.mask is not None:
            s = s.masked_fill(~a.mask, torch.finfo(s.dtype).min) if a.mask.dtype == torch.bool else s + a.mask
        return s.softmax(-1)

    def run(self):
        return F.scaled_dot_product_attention(self.q, self.k, self.v, attn_mask=self.mask, dropout_p=self.dropout,
                                              is_causal=self.causal, scale=self.scale, enable_gqa=self.grouped)
