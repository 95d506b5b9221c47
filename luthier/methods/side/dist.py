"""Space from a frozen model, time from a small network on the pixels, and a branch that brings them together. Block by block,
    x ← σ(x + S * σ(τ * LN x))                     temporal network: τ over 3 frames, S over 3 x 3 patches, σ = QuickGELU
    m = D_l h_l + r,     n = m + [c_t; F x],     x ← x + A m         both ways; c_t: a learned token a frame
    r = W₂ σ(W₁ LN n) + V₂ σ(V * V₁ LN' n)         integration: an MLP and one that sees 3 frames
from x = stem(video), a convolution of 5 frames and one patch, and r = 0. r + n of the last block is pooled `pool` times:
    s_t ← s_t + Att(s_t; r + n of frame t),  s_t ← s_t + MLP(LN s_t);   v ← v + Att(v; s_1 + e_1, ..),  v ← v + MLP(LN v)
    h' = h_L + U LN(v + P · mean_t CLS_t(h_L)) + u,   the same for all tokens and frames of the clip, U = 0 at init
Qing et al., DiST, 2023. arXiv:2309.07911 §3; formulas and sizes from the authors' code, models/module_zoo/branches/dist.py
(integration D/2, temporal D/8). h_l are detached: the frozen model builds no graph and keeps no activation.

The authors put out LN(..) U alone (`residual=False`, U ~ N(0, 1/w)), and can give the temporal network more frames than the ViT
(their alpha = 2): here both see every frame. Weights ~ N(0, 0.15 / fan-in), their N(0, 0.02²) at their width 384, so that narrow
branches start alike; learned tokens and places ~ N(0, 0.02²). Keys have no bias, the softmax would cancel it.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from luthier.errors import DoesNotFit
from luthier.method import Method, method
from luthier.methods.adapter._time import clips, grid, over_space, over_time


@method
class dist(Method):
    at: str = "embed block.*.out final"
    reduce: int = 2                        # D / width of the integration branch, 4 times that of the temporal network
    frames: int = 8                        # at most
    pool: int = 4
    residual: bool = True
    exempt = {"only_declared_train": "a single image has no time to attend over, and no frames beside it"}
    example = {"pool": 1, "frames": 2}

    def init(self, site):
        d, w, stack = site.d_out, max(4, site.d_out // self.reduce), site.stack
        v, s = w // 4, _Fresh(site)
        convs = (m for m in stack.module.modules() if isinstance(m, nn.Conv2d))
        patch = next((m for m in convs if m.kernel_size == m.stride != (1, 1)), None)
        if patch is None:
            return None                    # no tower that looks at patches
        if site.role == "embed":
            return s.layer("stem", v, patch.in_channels, 5, *patch.kernel_size).all(patch=patch.kernel_size)
        if site.role != "final":
            s.layer("D", w, d).layer("F", w, v).norm("x", v).layer("T", 3, v, v, bias=v).layer("S", v, v, 3, 3)
            s.norm("n", w).layer("W1", w, w).layer("W2", w, w)
            s.norm("m", w).layer("V1", v, w).layer("V", 3, v, v, bias=v).layer("V2", w, v)
            s.all(**dict(c=s.draw(self.frames, 1, w)) if stack.fixed else {})
            return s if site.block == stack.n_blocks - 1 else s.layer("A", v, w)
        for i in range(self.pool):
            for n in (f"s{i}", f"v{i}"):
                s.norm(n, w).layer(n + "q", w, w).layer(n + "v", w, w).layer(n + "o", w, w).layer(n + "k", w, w).less(n + "k_b")
                s.norm(n + "n", w).layer(n + "1", 4 * w, w).layer(n + "2", w, 4 * w)
            s.all(**{f"e{i}": s.draw(self.frames, w)})
        U = site.zeros(d, w) if self.residual else site.normal(d, w, std=w**-0.5)
        return s.layer("P", w, d).norm("end", w).all(U=U, u=site.zeros(d), s=s.draw(w), v=s.draw(w))

    def stream(self, t, p):                # lanes: x (B N, T, D/8), r (B N, T, D/2)
        x, r, f = p.key + "x", p.key + "r", t.fixed
        if t.frames > self.frames:
            raise DoesNotFit(f"{self!r} knows {self.frames} places in time, and this clip has {t.frames} frames. "
                             f"Use dist(frames={t.frames}).")
        if hasattr(p, "stem"):
            return t if t.given is None or t.given.dim() < 4 else t.lane(x, F.pad(self.started(t, p), (0, 0, f, 0)))
        if (r if hasattr(p, "U") else x) not in t.lanes:
            raise DoesNotFit(f"dist finds no pixels, or no patches that stay in place, at {p.site_name}. Use it on a vision "
                             "transformer.")
        if hasattr(p, "U"):
            new = self.pooled(t, clips(t, t.lanes[r]), p) @ p.U.T + p.u                    # (B, D)
            new = new.repeat_interleave(t.frames, 0)[:, None]
            return t.map_h(lambda h: h + new if self.residual else new.expand_as(h).to(h.dtype))
        now, size = t.lanes[x][:, f:], grid(t, "dist")
        step = quick(over_time(clips(t, norm(now, p, "x")), p.T, p.T_b)).flatten(0, 1)
        now = quick(now + over_space(step, p.S, p.S_b, size))
        m = linear(t.h.detach(), p, "D") + t.lanes.get(r, 0)
        into = linear(now, p, "F")
        if f:
            into = torch.cat([p.c[:t.frames].repeat(len(m) // t.frames, f, 1), into], 1)
        n = m + into
        seen = quick(over_time(clips(t, linear(norm(n, p, "m"), p, "V1")), p.V, p.V_b)).flatten(0, 1)
        out = linear(quick(linear(norm(n, p, "n"), p, "W1")), p, "W2") + linear(seen, p, "V2")
        if not hasattr(p, "A"):            # the last block
            return t.lane(r, out + n)
        return t.lane(r, out).lane(x, F.pad(now + linear(m[:, f:], p, "A"), (0, 0, f, 0)))

    def started(self, t, p):               # pixels -> (B N, h w, D/8)
        x = t.given.flatten(0, -4).to(p.stem.dtype)
        y = F.conv3d(clips(t, x).transpose(1, 2), p.stem, p.stem_b, (1, *p.patch), (2, 0, 0))
        return y.permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1)

    def pooled(self, t, z, p):             # (B, N, T, w) -> (B, w)
        s, v = p.s.expand(*z.shape[:2], 1, -1), p.v.expand(len(z), 1, -1)
        for i in range(self.pool):
            s = looked(s, z, p, f"s{i}")                                                   # (B, N, 1, w)
            v = looked(v, s[:, :, 0] + getattr(p, f"e{i}")[:t.frames], p, f"v{i}")      # (B, 1, w)
        cls = t.h.detach()[:, 0] if t.fixed else t.h.detach().mean(1)
        return norm(v[:, 0] + linear(clips(t, cls).mean(1), p, "P"), p, "end")


def looked(x, z, p, n):
    """x: (..., 1, w) attends to z: (..., S, w), then an MLP."""
    q, w = norm(x, p, n), x.shape[-1]
    z, heads = norm(z, p, n), max(1, w // 64)
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(-2, -3) for y in (
        linear(q, p, n + "q"), z @ getattr(p, n + "k").T, linear(z, p, n + "v")))
    x = x + linear(F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2), p, n + "o")
    return x + linear(quick(linear(norm(x, p, n + "n"), p, n + "1")), p, n + "2")


def linear(x, p, n):
    return x @ getattr(p, n).T + getattr(p, n + "_b")


def norm(x, p, n):
    return F.layer_norm(x, x.shape[-1:], getattr(p, n + "_g"), getattr(p, n + "_s"))


def quick(x):
    return x * torch.sigmoid(1.702 * x)


class _Fresh(dict):
    """The state of one site as it grows."""

    def __init__(self, site):
        self.site = site

    def all(self, **more):
        self.update(more)
        return self

    def less(self, n):
        del self[n]
        return self

    def draw(self, *shape):
        return self.site.normal(*shape, std=0.02)

    def layer(self, n, *shape, bias=None):
        fan = math.prod(shape[1:]) if bias is None else shape[0] * shape[2]              # (k, out, in) of a kernel over time
        return self.all(**{n: self.site.normal(*shape, std=(0.15 / fan)**0.5), n + "_b": self.site.zeros(bias or shape[0])})

    def norm(self, n, w):
        return self.all(**{n + "_g": self.site.ones(w), n + "_s": self.site.zeros(w)})
