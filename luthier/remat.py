"""What is cheap to make again is not kept for the backward pass.

Autograd keeps what each operator needs. Some of that is the output of a norm, an activation, a product or a cast, whose own
inputs are kept too: instead of it, a recipe over those is kept, read off the graph (`grad_fn` and its `_saved_*`), and followed
in the backward pass. Values, and gradients but for rounding, stay as they were. Used by Tuned.forward while gradients are on;
hooks that others put around it (offloading, meters) still see all that is really kept.
"""

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import gelu, silu

LEAST = 4096                                                # numbers; less is not worth a recipe


def _product(f):
    (a, _), (b, _) = f.next_functions
    if a and b:
        return lambda: f._saved_self * f._saved_other
    factor = recipe(a or b)                                 # the other one trains not, so this one was not kept
    return factor and (lambda: factor() * (f._saved_other if a else f._saved_self))


def _cast(f):
    source = recipe(f.next_functions[0][0])
    return source and (lambda: source().to(f._input_metadata[0].dtype))


def _view(f):
    source = recipe(f.next_functions[0][0])
    return source and (lambda: source().view(f._input_metadata[0].shape))


def _layer_norm(f):
    def again():
        y = (f._saved_input - f._saved_result1) * f._saved_result2
        y = y if f._saved_weight is None else y * f._saved_weight
        return y if f._saved_bias is None else y + f._saved_bias
    return again


RULES = {"MulBackward0": _product, "ViewBackward0": _view, "ToCopyBackward0": _cast, "NativeLayerNormBackward0": _layer_norm,
         "SiluBackward0": lambda f: lambda: silu(f._saved_self),
         "GeluBackward0": lambda f: lambda: gelu(f._saved_self, approximate=f._saved_approximate)}


def recipe(f):
    """A function that makes the output of graph node `f` anew from what is kept anyway, or None."""
    rule = RULES.get(f.name()) if f is not None else None
    return rule and rule(f)


def lean():
    """A context in which autograd keeps recipes instead of what is cheap to make again."""
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if outer and getattr(outer[0], "lean", False):
        return saved_tensors_hooks(*outer)                  # one Tuned inside another

    nested, depth = [None, None], [0]                       # the last recipe that another one used, and what it gave

    def pack(t):
        again = recipe(t.grad_fn) if t.numel() >= LEAST else None
        if again:
            return again
        return outer[0](t) if outer else (t.detach(), t._version)           # detached: no circle through its own graph

    def unpack(kept):
        if callable(kept):
            return follow(kept)
        if outer:
            return outer[1](kept)
        t, version = kept
        if t._version != version:
            raise RuntimeError("A tensor needed for the gradient was changed in place after the forward pass that used it. If "
                               "the model itself does so to a layer's output (an activation in place), set tuned.fast = False.")
        return t

    def follow(again):
        if nested[0] is again:                              # an activation: first for the product with it, then for its own sake
            value, nested[:] = nested[1], (None, None)
            return value
        depth[0] += 1
        try:
            with torch.no_grad():
                value = again()
        finally:
            depth[0] -= 1
        if depth[0]:
            nested[:] = again, value
        return value

    pack.lean = True
    return saved_tensors_hooks(pack, unpack)
