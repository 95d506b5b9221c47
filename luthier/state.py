"""The tensors of one step at one site: what trains, what is frozen, and what can be recomputed and so is never stored."""

import torch
from torch import nn

from .site import Fixed


class Noted(dict):
    """Tensors of one training forward. They are in a graph, so no copy takes them along."""

    def __deepcopy__(self, memo):
        return Noted()


class State(nn.Module):
    """p: what init returned, as attributes. `key` names the step, `site_name` the site."""

    def __init__(self, tensors, key, site_name):
        super().__init__()
        self.key, self.site_name, self.fixed_names, self.moved, self._noted = key, site_name, set(), {}, Noted()
        for name, v in tensors.items():
            if isinstance(v, nn.Parameter):
                self.register_parameter(name, v)
            elif isinstance(v, Fixed):
                self.fixed_names.add(name)
                self.register_buffer(name, v.value.detach() if v.value.requires_grad else v.value, persistent=False)
            elif isinstance(v, torch.Tensor):
                self.register_buffer(name, v.detach() if v.requires_grad else v)
            else:
                setattr(self, name, v)

    @property
    def noted(self):
        """What `stream` and `around` leave here for `loss` in a training forward; empty again before the next one."""
        return self._noted

    def resize(self, name, new, kept):
        """Give parameter `name` the values `new`; kept[i] is the old place along dim 0 of new entry i, or -1 for a newborn.
        The Parameter object stays the same, so optimizers keep hold of it; `Tuned.step` carries their state over by `kept`."""
        p = getattr(self, name)
        before = self.moved[name][1] if name in self.moved else None
        if before is not None:                             # resized twice before the optimizer heard of it
            kept = torch.where(kept >= 0, before.to(kept.device)[kept.clamp(min=0)], -1)
        self.moved[name] = (p, kept)
        new, p.grad = new.detach().to(p.dtype), None
        if new.shape != p.shape:                           # a loss that the caller still holds keeps the old shape alive in
            other = torch.float32 if p.dtype == torch.float64 else torch.float64
            p.data = new.new_empty(0, dtype=other)         # autograd, until it meets another type (and loses others' hooks)
        p.data = new

    def stored(self):
        """name -> tensor of everything a file must hold."""
        return {**dict(self.named_parameters()), **{n: b for n, b in self.named_buffers() if n not in self.fixed_names}}


def follow(optimizer, moved):
    """Carry an optimizer's state over for parameters that were resized: survivors keep theirs, newborn entries get zeros."""
    for p, kept in moved:
        for name, v in optimizer.state.get(p, {}).items():
            if torch.is_tensor(v) and v.dim() and v.shape[1:] == p.shape[1:]:
                kept = kept.to(v.device)
                alive = (kept >= 0).view(-1, *[1] * (v.dim() - 1))
                optimizer.state[p][name] = torch.where(alive, v[kept.clamp(min=0)], 0) if len(v) else v.new_zeros(p.shape)


def newborn(optimizer, k, age):
    """The factor by which an update of step k must be multiplied for entries of `age` steps (an optimizer's state of theirs began
    at zero) to move as they would under an optimizer that began with them: Adam's bias correction counts the steps of the whole
    parameter, and would let them leap to several times the learning rate."""
    b1, b2 = next((g["betas"] for g in optimizer.param_groups if "betas" in g), (0, 0)) if optimizer is not None else (0, 0)
    return (1 - b1**k) / (1 - b1**age) * ((1 - b2**age) / (1 - b2**k)) ** 0.5


class Overlay:
    """A state with produced tensors laid over it (see the verb `produce`)."""

    def __init__(self, state, over):
        self.__dict__.update(over)
        self._state = state

    def __getattr__(self, name):
        return getattr(self._state, name)
