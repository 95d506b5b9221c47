"""A thin update beside a layer, with no pass over a tall tensor that the arithmetic does not need.

    h = x Aᵀ,   y ← y + s h Bᵀ          x: (N, d_in), A: (r, d_in), B: (d_out, r), y: (N, d_out)
    with a gain c: (d_out,) of the new weight, and the bias b left out of it:     y ← c (y - b + s h Bᵀ) + b

Several updates that are given the same x (q, k and v; gate and up) make their h in one product, keep one x, and give x its
gradient in one product. y, which the layer has just made, is added to in place. Dropout acts on the x they share, as in the
authors' merged layers, and keeps a seed, not a mask.
"""

import torch
from torch.autograd import Function
from torch.nn.functional import dropout as dropped
from torch.nn.functional import pad


def plain(x, y, A, B, scale=1.0, dropout=0.0, gain=None, b=None, training=False):
    """The formula itself, for any leading shape: what torch.compile and torch.func see."""
    change = dropped(x, dropout, training) @ A.T @ (scale * B).T
    if gain is None:
        return y + change
    return y + (gain - 1) * (y if b is None else y - b) + gain * change                 # a gain of 1 changes no bit


def down(x, As, dropout=0.0):
    """x, and h of each A: (N, r). The x that comes back is for the layer itself: so the gradients of both meet in one product."""
    A = As[0] if len(As) == 1 else torch.cat(As)
    if dropout or x.requires_grad and torch.is_grad_enabled():
        x, h = _Down.apply(x, A, dropout, _seed() if dropout else 0)
    else:
        h = x @ A.T
    return x, (h,) if len(As) == 1 else h.split([len(A) for A in As], 1)


def up(y, h, B, scale=1.0, rows=None, gain=None, b=None):
    """y with s h Bᵀ added, in place, to its columns `rows` (all where None); with a gain, y is kept and must stay as it is."""
    Bt = B.T if rows is None else pad(B.T, (rows[0], y.shape[1] - rows[1]))
    if gain is None:                                        # a thin product is quick with its long side along memory
        return y.addmm_(h, Bt.contiguous() if torch.is_grad_enabled() else Bt, alpha=scale)
    if rows is not None:
        gain = pad(gain, (rows[0], y.shape[1] - rows[1]), value=1.0)
        b = None if b is None else pad(b, (rows[0], y.shape[1] - rows[1]))
    return _Gained.apply(y, h, Bt, scale, gain, b)


def _seed():
    return int(torch.empty((), dtype=torch.int64).random_())                # from torch's generator: checkpointing replays it


def _dropping(x, p, seed):
    """A function that zeroes a share p of the numbers of any tensor like x, each time the same: 16 random bits decide each."""
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    bits.random_(-2**63, None, generator=torch.Generator(x.device).manual_seed(seed))
    bits, least = bits.view(torch.int16)[:x.numel()].view(x.shape), min(round(p * 2**16), 2**16 - 1) - 2**15
    return lambda t: torch.ge(bits, least, out=torch.empty_like(t)).mul_(t)


class _Down(Function):
    """x, A -> x, drop(x) Aᵀ. The gradient of x is added to in place: none but the layer reads the x that is handed out."""

    @staticmethod
    def forward(ctx, x, A, p, seed):                        # one with a setup_context would cost four times as much a call
        ctx.save_for_backward(x, A)
        ctx.set_materialize_grads(False)
        ctx.how = p, seed
        if not p:
            return x.view_as(x), x @ A.T
        return x.view_as(x), _dropping(x, p, seed)(x) @ (_grown(p) * A).T          # those that stay make up for the others

    @staticmethod
    def backward(ctx, gx, gh):
        (x, A), p, gA = ctx.saved_tensors, ctx.how[0], None
        if gh is None:
            return gx, None, None, None
        drop = _dropping(x, *ctx.how) if p else None
        if ctx.needs_input_grad[1]:
            gA = _grown(p) * (gh.T @ drop(x)) if p else gh.T @ x
        if ctx.needs_input_grad[0] and p:
            through = drop(gh @ (_grown(p) * A))
            gx = through if gx is None else through.add_(gx)
        elif ctx.needs_input_grad[0]:
            add = torch.addmm if torch.is_grad_enabled() else torch.Tensor.addmm_
            gx = gh @ A if gx is None else add(gx, gh, A)
        return gx, gA, None, None


def _grown(p):
    return 1 / (1 - p) if p < 1 else 0.0


class _Gained(Function):
    @staticmethod
    def forward(ctx, y, h, Bt, scale, gain, b):
        y.mul_(gain)
        if b is not None:
            y.add_(b * (1 - gain))                          # a gain of 1 changes no bit
        y.addmm_(h, gain * Bt, alpha=scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(y, h, Bt, gain, b)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, g):
        y, h, Bt, gain, b = ctx.saved_tensors
        gy = gh = gB = gc = None
        if ctx.needs_input_grad[0]:
            gy = g * gain
        if ctx.needs_input_grad[1]:
            gh = g @ (ctx.scale * gain * Bt).contiguous().T
        if ctx.needs_input_grad[2]:
            gB = h.T @ g * (ctx.scale * gain)
        if ctx.needs_input_grad[4]:                         # wants y before the gain: read off the one after it
            after = (g * y).sum(0) if b is None else (g * y).sum(0) - b * g.sum(0)
            gc = torch.where(gain == 0, 0, after / gain)
        return gy, gh, gB, None, gc, None
