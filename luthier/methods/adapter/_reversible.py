"""y1 = λ x1 + F(x2),  y2 = β x2 + G(y1), whose backward pass makes x1 and x2 again from y1 and y2 instead of keeping them.

    x2 = (y2 - G(y1)) / β,    x1 = (y1 - F(x2)) / λ

A run of such blocks keeps what its last one puts out, and nothing else: each block hands what it made again to the one before it,
which knows that the next one took its outputs unchanged as they carry its cell. Outputs that were changed on the way are kept.
"""

import torch


class Cell:
    """Where a block finds its outputs in the backward pass."""

    def __init__(self):
        self.held = None


def again(f, device, drawn):
    """f with the autocast of now and, where it draws, the same random numbers each time it runs."""
    kind, seed = device.type, int(torch.randint(2**62, ())) if drawn else 0
    dtype, on = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    def run(x):
        with torch.autocast(kind, dtype=dtype, enabled=on):
            if not drawn:
                return f(x)
            with torch.random.fork_rng([device] if kind == "cuda" else []):
                torch.manual_seed(seed)
                return f(x)
    return run


class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, F, G, lam, beta, cell, before, last, x1, x2, *params):
        y1 = lam * x1 + F(x2)
        y2 = beta * x2 + G(y1)
        ctx.parts, ctx.params = (F, G, lam, beta, cell, before), params
        if last:
            ctx.save_for_backward(y1, y2)
        else:
            cell.held = y1.detach(), y2.detach()
        return y1, y2

    @staticmethod
    def backward(ctx, dy1, dy2):
        F, G, lam, beta, cell, before = ctx.parts
        (y1, y2), cell.held = ctx.saved_tensors or cell.held, None
        y1, g, (more, *first) = Step.through(G, y1, dy2, ctx.params)
        x2, dy1 = (y2 - g) / beta, dy1 + more
        x2, f, (more, *second) = Step.through(F, x2, dy1, ctx.params)
        if before is not None:
            before.held = before.turn((y1.detach() - f) / lam, x2.detach())
        both = [a if b is None else b if a is None else a + b for a, b in zip(first, second, strict=True)]
        return (None,) * 7 + (lam * dy1, beta * dy2 + more, *both)

    @staticmethod
    def through(f, x, d, params):
        """-> x as a leaf, f(x), gradients of x and of the parameters."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = f(x)
        found = torch.autograd.grad(y, (x, *params), d.to(y.dtype), allow_unused=True)
        return x, y.detach(), (torch.zeros_like(x) if found[0] is None else found[0], *found[1:])


def plain(F, G, lam, beta, x1, x2, swap):
    """The same with autograd's own backward pass."""
    y1 = lam * x1 + F(x2)
    y2 = beta * x2 + G(y1)
    return (y2, y1) if swap else (y1, y2)


def step(F, G, lam, beta, x1, x2, params, last, swap):
    """One block; the outputs as the next block's (x1, x2)."""
    cell, before = Cell(), getattr(x2, "_cell", None)
    cell.turn = (lambda x1, x2: (x2, x1)) if swap else (lambda x1, x2: (x1, x2))
    if before is None or getattr(x1, "_cell", None) is not before or before.seen != (x1._version, x2._version):
        before = None
    else:
        before.held = None                                  # they can be made again from this block's outputs
    y = cell.turn(*Step.apply(F, G, lam, beta, cell, before, last, x1, x2, *params))
    for z in y:
        z._cell = cell
    cell.seen = y[0]._version, y[1]._version
    return y
