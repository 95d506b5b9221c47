"""Backward passes that keep 4 bits a number: what is stored is not the input of an operation but its derivative, rounded.

    pointwise   dx = dy · q(f'(x))              layer norm   dx = r (g - mean g - q(x̂) mean(g q(x̂))),  g = γ dy
    softmax     dx = s (dy - Σ dy s), s = q(s)  attention    its own gradient at q(Q), q(K), q(V), with the same dropout
    dropout     a bit a number

q rounds to 16 levels between the least and the largest of each 128 numbers: an error of at most a thirtieth of their range.
"""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

GROUP = 128


class Packed:
    """A tensor in 4 bits a number."""

    def __init__(self, x):
        flat = F.pad(x.detach().reshape(-1), (0, -x.numel() % GROUP), mode="constant").float().view(-1, GROUP)
        ends = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
        self.low, self.high = (end.clamp(-6e4, 6e4).half() for end in ends)
        wide = (self.high.float() - self.low.float()).clamp(min=1e-12)
        codes = ((flat - self.low.float()) / wide * 15).round().clamp(0, 15).to(torch.uint8)
        self.shape, self.codes = x.shape, codes[:, ::2] | codes[:, 1::2] << 4

    def parts(self):
        return self.codes, self.low, self.high

    @staticmethod
    def unpack(parts, shape, dtype):
        codes, low, high = (part.float() if i else part for i, part in enumerate(parts))
        both = torch.stack([codes & 15, codes >> 4], -1).flatten(1) / 15 * (high - low) + low
        return both.flatten()[:shape.numel()].view(shape).to(dtype)


def keep(ctx, *tensors):
    """Save them packed, as tensors that autograd's own hooks (and meters) see."""
    packed = [Packed(t) for t in tensors]
    ctx.kept = [(p.shape, t.dtype) for p, t in zip(packed, tensors, strict=True)]
    return [part for p in packed for part in p.parts()]


def kept(ctx, saved):
    return [Packed.unpack(saved[3 * i:3 * i + 3], *about) for i, about in enumerate(ctx.kept)]


class Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = f(x)
        ctx.save_for_backward(*keep(ctx, torch.autograd.grad(y, x, torch.ones_like(y))[0]))
        return y.detach()

    @staticmethod
    def backward(ctx, dy):
        return None, dy * kept(ctx, ctx.saved_tensors)[0]


class Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f, x, dim):
        y = f(x)
        ctx.dim, ctx.type = dim, x.dtype
        ctx.save_for_backward(*keep(ctx, y))
        return y

    @staticmethod
    def backward(ctx, dy):
        s = kept(ctx, ctx.saved_tensors)[0]
        return None, (s * (dy - (dy * s).sum(ctx.dim, keepdim=True))).to(ctx.type), None


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shape, weight, bias, eps):
        dims = tuple(range(-len(shape), 0))
        y = F.layer_norm(x, shape, weight, bias, eps)
        r = (x.float().var(dims, unbiased=False, keepdim=True) + eps).rsqrt()
        ctx.dims = dims
        ctx.save_for_backward(r, weight, *keep(ctx, (x.float() - x.float().mean(dims, keepdim=True)) * r))
        return y

    @staticmethod
    def backward(ctx, dy):
        r, weight, *saved = ctx.saved_tensors
        (n,), dims, d = kept(ctx, saved), ctx.dims, dy.float()
        g = d if weight is None else d * weight
        dx = r * (g - g.mean(dims, keepdim=True) - n * (g * n).mean(dims, keepdim=True))
        rows = tuple(range(dy.dim() - len(dims)))
        return (dx.to(dy.dtype), None, (d * n).sum(rows).to(weight.dtype) if ctx.needs_input_grad[2] else None,
                d.sum(rows).to(dy.dtype) if ctx.needs_input_grad[3] else None, None)


class Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        mask = torch.rand_like(x, dtype=torch.float32) >= p
        bits = F.pad(mask.view(-1), (0, -mask.numel() % 8)).view(-1, 8) << torch.arange(8, device=x.device)
        ctx.scale = 0.0 if p == 1 else 1 / (1 - p)
        ctx.save_for_backward(bits.sum(1).to(torch.uint8))
        return x * mask * ctx.scale

    @staticmethod
    def backward(ctx, dy):
        bits = ctx.saved_tensors[0][:, None] >> torch.arange(8, device=dy.device) & 1
        return dy * bits.flatten()[:dy.numel()].view(dy.shape) * ctx.scale, None


def again(f, device):
    """f with the same random numbers each time it runs."""
    seed = int(torch.randint(2**62, ()))

    def run(*args):
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return f(*args)
    return run


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f, q, k, v):
        ctx.f = f
        ctx.save_for_backward(*keep(ctx, q, k, v))
        return f(q, k, v)

    @staticmethod
    def backward(ctx, dy):
        with torch.enable_grad():
            inputs = [x.requires_grad_() for x in kept(ctx, ctx.saved_tensors)]
            y = ctx.f(*inputs)
        return None, *torch.autograd.grad(y, inputs, dy)


POINTWISE = {F.gelu, F.relu, torch.relu, F.silu, F.mish, F.elu, F.hardswish, F.leaky_relu, F.softplus, torch.tanh, torch.sigmoid}


class Lean(TorchFunctionMode):
    """Within, these operations keep 4 bits a number for the backward pass; all others are as they were."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        x = args[0] if args else None
        if not (torch.is_tensor(x) and torch.is_grad_enabled() and x.requires_grad and x.is_floating_point()):
            return func(*args, **kwargs)
        if func in POINTWISE and not kwargs.pop("inplace", False):
            return Pointwise.apply(lambda x: func(x, *args[1:], **kwargs), x)
        if func in (F.softmax, torch.softmax, torch.Tensor.softmax):
            dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
            return Softmax.apply(lambda x: func(x, *args[1:], **kwargs), x, dim)
        if func is F.layer_norm:
            return LayerNorm.apply(x, *_layer_norm(*args[1:], **kwargs))
        if func is F.dropout:
            p, training = _dropout(*args[1:], **kwargs)
            return Dropout.apply(x, p) if training and p else x
        if func is F.scaled_dot_product_attention:
            qkv, rest, p = _attention(*args, **kwargs)
            if not any(torch.is_tensor(v) and v.requires_grad for v in rest):
                def attend(q, k, v):
                    return func(q, k, v, *rest[:3], **rest[3])
                return Attention.apply(again(attend, x.device) if p else attend, *qkv)
        return func(*args, **kwargs)


def _layer_norm(normalized_shape, weight=None, bias=None, eps=1e-5):
    return tuple(normalized_shape), weight, bias, eps


def _dropout(p=0.5, training=True, inplace=False):
    return p, training


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
    return (query, key, value), (attn_mask, dropout_p, is_causal, more), dropout_p
