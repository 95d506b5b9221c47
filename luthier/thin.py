"""A thin update beside a layer, with no pass over a tall tensor that the arithmetic does not need.

    h = x Aᵀ,   y ← y + s h Bᵀ          x: (..., d_in), A: (r, d_in), B: (d_out, r), y: (..., d_out)

Several updates that are given the same x (q, k and v; gate and up) make their h in one product, keep one x, and give x its gradient
in one product. y, which the layer has just made, is added to in place. Dropout keeps a seed, not a mask.
"""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import dropout as dropped


def plain(x, y, A, B, scale=1.0, dropout=0.0, training=False):
    """The formula itself: what torch.compile, vmap and second derivatives see."""
    return y + dropped(x, dropout, training) @ A.T @ (scale * B).T


def down(x, As, dropout=0.0):
    """h of each A: (N, r)."""
    if torch.is_grad_enabled():
        return _Down.apply(x, dropout, *As)
    rows, A = x.reshape(-1, x.shape[-1]), As[0] if len(As) == 1 else torch.cat(As)
    return (_mask(rows, _seed(), dropout) if dropout else rows).matmul(A.T).split([len(A) for A in As], 1)


def up(y, h, B, scale, rows):
    """y with s h Bᵀ added, in place, to its columns `rows` (all where None)."""
    if torch.is_grad_enabled():
        return _Up.apply(y, h, B, scale, rows)
    _columns(y.view(-1, y.shape[-1]), rows).addmm_(h, B.T, alpha=scale)
    return y


def _columns(y, rows):
    return y if rows is None else y[:, rows[0]:rows[1]]


def _seed():
    return int(torch.empty((), dtype=torch.int64).random_())                # from torch's generator: checkpointing replays it


def _mask(x, seed, p):
    keep = torch.empty_like(x).bernoulli_(1 - p, generator=torch.Generator(x.device).manual_seed(seed))
    return keep.mul_(x).div_(1 - p) if p < 1 else keep


class _Down(Function):
    @staticmethod
    def forward(ctx, x, p, *As):
        rows, A = x.reshape(-1, x.shape[-1]), As[0] if len(As) == 1 else torch.cat(As)
        ctx.save_for_backward(x, *As)
        ctx.p, ctx.seed = p, _seed() if p else 0
        return (_mask(rows, ctx.seed, p) if p else rows).matmul(A.T).split([len(A) for A in As], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gs):
        x, *As = ctx.saved_tensors
        n, sizes = len(x.reshape(-1, x.shape[-1])), [len(A) for A in As]
        gs = [x.new_zeros(n, r) if g is None else g for g, r in zip(gs, sizes, strict=True)]
        g, gx, gA = gs[0] if len(gs) == 1 else torch.cat(gs, 1), None, [None] * len(As)
        if any(ctx.needs_input_grad[2:]):
            rows = x.reshape(n, -1)
            gA = (g.T @ (_mask(rows, ctx.seed, ctx.p) if ctx.p else rows)).split(sizes)
        if ctx.needs_input_grad[0]:
            gx = (g @ (As[0] if len(As) == 1 else torch.cat(As))).view_as(x)
            gx = _mask(gx.view(n, -1), ctx.seed, ctx.p).view_as(x) if ctx.p else gx
        return gx, None, *gA


class _Up(Function):
    @staticmethod
    def forward(ctx, y, h, B, scale, rows):
        _columns(y.view(-1, y.shape[-1]), rows).addmm_(h, B.T, alpha=scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(h, B)
        ctx.scale, ctx.rows = scale, rows
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (h, B), gh, gB = ctx.saved_tensors, None, None
        rows = _columns(g.reshape(-1, g.shape[-1]), ctx.rows)
        if ctx.needs_input_grad[1]:
            gh = rows @ (ctx.scale * B).T.contiguous().T                    # thin products are quick with their long side along memory
        if ctx.needs_input_grad[2]:
            gB = (h.T @ rows).mul_(ctx.scale).T
        return g, gh, gB, None, None
