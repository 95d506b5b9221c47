"""Clips for models of images: (B, N, 3, H, W) goes in as B N images whose rows belong together, and what comes out of an image
is averaged over its clip. Single images (B, 3, H, W) pass as they always did."""

import inspect

import torch

from .errors import DoesNotFit
from .tokens import together


def framed(model):
    """The same model, which takes clips now. Its part that looks at pixels keeps its parameters, hooks and names."""
    from .site import sites

    stacks = [s.module for s in sites(model).stacks]
    towers = [m for m in stacks if {"pixel_values", "x"} & set(inspect.signature(m.forward).parameters)]
    if not towers:
        raise DoesNotFit(f"{type(model).__name__} has no part that takes pixels, so it takes no clips. Use a vision model such "
                         "as dinov2-s, or a dual encoder such as CLIP.")
    for m in towers:
        if not isinstance(m.__dict__.get("forward"), Framed):
            m.forward = Framed(m, m.__dict__.get("forward"))
    return model


class Framed:
    """Stands in the forward of a module whose first argument is pixels."""

    def __init__(self, module, inner):
        self.module, self.inner, self.__signature__ = module, inner, inspect.signature(module.forward)

    def __call__(self, *args, **kwargs):
        run = self.inner or type(self.module).forward.__get__(self.module)
        name = None if args else "pixel_values" if "pixel_values" in kwargs else "x"
        x = kwargs.get(name) if name else args[0]
        if x is None or x.dim() != 5:
            return run(*args, **kwargs)
        B, N = x.shape[:2]
        with together(N):
            out = run(x.flatten(0, 1), *args[1:], **kwargs) if name is None else run(**{**kwargs, name: x.flatten(0, 1)})
        return _averaged(out, B, N)


def _averaged(out, B, N):
    if torch.is_tensor(out):
        return out.unflatten(0, (B, N)).mean(1) if len(out) == B * N and out.is_floating_point() else out
    if isinstance(out, dict):
        for k in list(out):
            out[k] = _averaged(out[k], B, N)
        return out
    return tuple(_averaged(v, B, N) for v in out) if isinstance(out, tuple) else out
