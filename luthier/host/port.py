"""A place of a token stream: a hook at the input or the output of a module, or between attention and MLP of a block."""

from dataclasses import replace

import torch

from ..errors import DoesNotFit
from ..tokens import Tokens


class Port:
    """A place of a token stream: the input or the output of a module, with the entries that act there, in chain order."""

    def __init__(self, host, site):
        self.host, self.site, self.entries, self.live, self.saved, self.ready = host, site, [], [], None, None
        self.handles = [site.module.register_forward_pre_hook(self.enter, with_kwargs=True) if site.layout == "in"
                        else site.module.register_forward_hook(self.leave)]
        for key, hook in list(site.module._forward_hooks.items()):          # transformers' recorders of hidden states only look:
            if getattr(hook, "__module__", "") == "transformers.utils.output_capturing":    # after us, whichever came first
                site.module._forward_hooks.move_to_end(key)

    def remove(self):
        for h in self.handles:
            h.remove()

    def refresh(self):
        self.live = [e for e in self.entries if e.owner.active]

    def enter(self, module, args, kwargs):
        if not self.live:
            return None
        if args:
            return (self.through(args[0]), *args[1:]), kwargs
        name = next(k for k, v in kwargs.items() if torch.is_tensor(v) and v.is_floating_point())
        return args, {**kwargs, name: self.through(kwargs[name])}

    def leave(self, module, args, out):
        if not self.live:
            return None
        stack = self.host.run(self.site.stack)
        if stack is not None and stack.stack.embed == "ids" and module is stack.stack.embed_module:
            return None                                     # a decoder's embedding is run by its stack
        if stack is not None and module is stack.stack.words_module:
            ready, self.ready = self.ready, None            # as are texts; None: it is the stack that asks
            return ready
        if isinstance(out, tuple):
            return (self.through(out[0]), *out[1:])
        if torch.is_tensor(out):
            return self.through(out)
        out["last_hidden_state"] = self.through(out["last_hidden_state"])
        return out

    def through(self, x):
        """x: (B, T, D), (N, D), or a feature map (B, D, H, W) or (B, H, W, D), which is read as H·W tokens."""
        h, back = _as_tokens(x, self.site.d_out)
        stack = self.host.run(self.site.stack)
        t = stack.take(h) if stack is not None else Tokens(h)
        if stack is not None and _recomputing():            # gradient checkpointing runs this block again:
            if stack.again != self.site.block and self.saved is not None:
                t = replace(self.saved, h=h)                # its first port starts with the lanes it had, the others go on
            stack.again = self.site.block
        elif stack is not None and t.lanes and stack.checkpointed():
            self.saved = replace(t, h=h[:0], given=None)    # also without grad: reentrant checkpointing's first pass
        for e in self.live:
            t = e.act("stream", t=t)
        if stack is not None:
            stack.tokens = t
        if t.h.shape[1] != h.shape[1] and back is not None:
            raise DoesNotFit(f"{type(self.live[-1].method).__name__} changed the number of tokens at {self.site.name}, "
                             "a feature map that must keep its shape.")
        return t.h if back is None else back(t.h)


def _recomputing():
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _as_tokens(x, d):
    if x.dim() == 4 and x.shape[1] == d:
        B, D, H, W = x.shape
        return x.flatten(2).mT, lambda h: h.mT.reshape(B, D, H, W)
    if x.dim() == 4:
        shape = x.shape
        return x.flatten(1, 2), lambda h: h.view(shape)
    if x.dim() == 2:
        return x[None], lambda h: h[0]
    return x, None


class Mid(Port):
    """Between attention and MLP of a pre-norm block, where the residual is the block's own business and no hook can reach it.

    Let M average tokens into groups and U copy a group's value back to its tokens, so M U = 1. Merging before the MLP would give
    M h + f(M h). The block computes h + f(·); feeding f with M h and returning U f(M h) from it leaves h + U f(M h), and merging
    the block's output gives M h + M U f(M h) = M h + f(M h): exact, with the MLP run on the merged tokens only.
    """

    def __init__(self, host, site):
        super().__init__(host, replace(site, layout="in", module=site.mid[0]))
        norm, mlp, block = site.mid
        self.block, self.merged, self.weight = block, None, None
        self.handles += [mlp.register_forward_hook(self.spread),
                         block.register_forward_hook(self.shrink, prepend=True)]

    def through(self, x):
        stack = self.host.run(self.site.stack)
        t = stack.take(x).marked()
        size = t.size
        for e in self.live:
            t = e.act("stream", t=t)
        stack.tokens, self.merged = t, None
        if t.h.shape[1] != x.shape[1]:
            if self.site.stack.insert:
                raise DoesNotFit(f"{type(self.live[-1].method).__name__} changes the number of tokens at {self.site.name}: "
                                 f"{self.site.stack.insert}.")
            self.merged, self.weight = t, size
        return t.h

    def last(self):
        """Spreading comes after whatever else acts on the MLP's output: that still meets the merged tokens."""
        self.handles[1].remove()
        self.handles[1] = self.site.mid[1].register_forward_hook(self.spread)

    def spread(self, module, args, out):
        if self.merged is None:
            return None
        group = self.merged.group
        y = out.gather(1, group.clamp(min=0)[..., None].expand(*group.shape, out.shape[-1]))
        return y.masked_fill((group < 0)[..., None], 0)

    def shrink(self, module, args, out):
        t, self.merged = self.merged, None
        if t is None:
            return None
        h = out[0] if isinstance(out, tuple) else out
        w = self.weight.to(h.dtype) * (t.group >= 0)[..., None].to(h.dtype)
        index, B, T, D = t.group.clamp(min=0)[..., None], *t.h.shape
        total = h.new_zeros(B, T, D).scatter_add(1, index.expand_as(h), h * w)
        h = total / h.new_zeros(B, T, 1).scatter_add(1, index, w)
        stack = self.host.run(self.site.stack)
        stack.tokens = replace(t, h=h, group=None)
        return (h, *out[1:]) if isinstance(out, tuple) else h
