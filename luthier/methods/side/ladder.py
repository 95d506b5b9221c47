"""A thin transformer beside a frozen one.  s_0 = D_0 h_0,  s_i = Block_i(μ_i D_i h_i + (1 - μ_i) s_{i-1}),  h' = h_L + U LN(s_L)
Sung et al., Ladder Side-Tuning, 2022. arXiv:2206.06522 §3.2-3.4. h_i: what frozen block i puts out, detached: the backbone gets
no gradient and saves no activation. μ_i = sigmoid(α_i / 0.1), α_i = 0. Block_i: pre-norm attention and MLP without biases, width
w = D / reduce, heads of width Dh / reduce, m / reduce neurons. `every=2` drops every second rung, keeping the last.
`residual=False`: the head sees U LN(s_L) alone, as in the paper, with U ~ N(0, 1/w) in place of 0.

`start="norm"`: Block_i starts as frozen block i cut down to the residual dimensions, the places in each head and the neurons with
the largest product of weight norms over the matrices they run through; D_i as the choice of those dimensions. `start="fisher"`:
the same, by sums of the empirical Fisher information Σ_samples (∂L/∂W)² over calibration data. `start="random"`: normal values.
The side attention has no positions of its own. In an encoder-decoder the ladder stands beside the decoder.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm, silu

from luthier.errors import DoesNotFit
from luthier.method import Method, method

READS, WRITES = ("q", "k", "v", "up", "gate"), ("o", "down")           # (inner, D) and (D, inner)


def weigh(parts, seen, roles, inner):      # log of the product over matrices, for each inner place or each residual dimension
    over = {r: int(inner != (r in WRITES)) for r in roles if r in parts}
    return sum((seen[parts[r].name][d] if seen else parts[r].W.float().norm(dim=d)).log() for r, d in over.items())


def top(score, k):                         # (..., n) -> places of the k largest, ascending
    return score.topk(max(1, k), -1).indices.sort(-1).values


@method
class ladder(Method):
    at: str = "block.0.in block.*.out final"
    reduce: int = 8
    every: int = 1
    start: Literal["norm", "fisher", "random"] = "norm"
    residual: bool = True
    example = {"reduce": 2}

    @property
    def watch(self):
        return "linear -head" if self.start == "fisher" else ""

    def observe(self, x, g):               # one sample's (N, d_in), (N, d_out) -> Fisher summed over outputs, over inputs
        F = (g.T @ x).float().square()
        return F.sum(0), F.sum(1)

    def init(self, site, seen):
        d, w = site.d_out, max(1, site.d_out // self.reduce)
        if site.tower == "encoder" or site.role == "out" and (site.stack.n_blocks - 1 - site.block) % self.every:
            return None
        if site.role == "final":
            return dict(g=site.ones(w), U=site.zeros(d, w) if self.residual else site.normal(d, w, std=w**-0.5))
        parts = {r.partition(".")[2]: s for r, s in site.peers.items() if r.partition(".")[0] in ("attn", "mlp")}
        if not {"q", "k", "v", "o", "up", "down"} <= parts.keys():
            raise DoesNotFit(f"ladder copies the attention and MLP of every block; at {site.name} they were not found. "
                             "Use another method, or other sites: ladder(at=...).")
        cut = site.shared("cut", lambda: top(weigh(parts, seen, READS + WRITES, inner=False), w), group=site.tower)
        D = nn.Parameter(torch.eye(d)[cut].to(site.like)) if self.start != "random" else site.normal(w, d, std=d**-0.5)
        rung = dict(D=D, d=site.zeros(w))
        if site.role == "out":
            rung |= dict(a=site.zeros(1), g1=site.ones(w), g2=site.ones(w), **self._block(site, parts, seen, cut))
        return rung

    def _block(self, site, parts, seen, cut):
        H, G, Dh = site.peers["attn"].heads                            # query heads, key/value heads, width
        heads = sum(weigh(parts, seen, r, inner=True).view(G, -1, Dh).mean(1) for r in "qkvo")
        places = top(heads, Dh // self.reduce)                         # (G, Dh / reduce)
        neurons = weigh(parts, seen, ("up", "gate", "down"), inner=True)     # (m,)
        kept = dict.fromkeys(("up", "gate", "down"), top(neurons, len(neurons) // self.reduce))
        for r, n in dict(q=H, k=G, v=G, o=H).items():
            here = places.repeat_interleave(n // G, 0)
            kept[r] = (torch.arange(n, device=here.device)[:, None] * Dh + here).flatten()
        made = dict(heads=H)
        for r in (r for r in kept if r in parts):
            W = parts[r].W[cut][:, kept[r]] if r in WRITES else parts[r].W[kept[r]][:, cut]
            made[r] = nn.Parameter(W.to(site.like)) if self.start != "random" else site.normal(*W.shape, std=W.shape[1]**-0.5)
        return made

    def stream(self, t, p):                # lane s: (B, T, w)
        s = t.lanes.get(p.key)
        if s is None and (hasattr(p, "U") or hasattr(p, "q")):
            raise DoesNotFit(f"ladder's side network has no beginning before {p.site_name}. Let at= name what enters the first "
                             "block, as in the default: ladder(at=\"block.0.in block.*.out final\").")
        if hasattr(p, "U"):
            side = layer_norm(s, s.shape[-1:], p.g) @ p.U.T
            return t.map_h(lambda h: h + side if self.residual else side.to(h.dtype))
        x = t.h.detach() @ p.D.T + p.d
        if not hasattr(p, "q"):
            return t.lane(p.key, x)
        s = s + torch.sigmoid(p.a / 0.1) * (x - s)
        n = layer_norm(s, s.shape[-1:], p.g1)
        q, k, v = ((n @ W.T).unflatten(-1, (-1, len(p.q) // p.heads)).transpose(1, 2) for W in (p.q, p.k, p.v))
        k, v = (z.repeat_interleave(p.heads // z.shape[1], 1) for z in (k, v))
        s = s + t.attend(q, k, v, key=p.key + p.site_name).transpose(1, 2).flatten(2) @ p.o.T
        n = layer_norm(s, s.shape[-1:], p.g2)
        n = silu(n @ p.gate.T) * (n @ p.up.T) if hasattr(p, "gate") else gelu(n @ p.up.T)
        return t.lane(p.key, s + n @ p.down.T)
