"""A module that runs when, on what and as often as the methods on it say."""

from dataclasses import replace

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import DoesNotFit
from ..method import call
from ..tokens import Tokens
from .patch import Patch


def _wrappers(top):
    """The patches and arounds in a module's forward, from the top down to what is not ours."""
    found = []
    while isinstance(top, Patch | Around):
        found.append(top)
        top = top.inner
    return found


def _bottom(top):
    return [top, *(w.inner for w in _wrappers(top))][-1]


class Around:
    """Stands in the forward of a module with a stream in and out: the entries' `around(f, t, p)` decide when and on what it runs.
    The first of a chain is the innermost. Other wrappers of the same forward (a Patch) may come and go below and above it."""

    def __init__(self, host, site):
        self.host, self.site, self.module, self.entries, self.live = host, site, site.module, [], []
        self.beside = None                                  # what the module returns beside its stream: see _beside
        self._install()

    def _install(self):
        self.inner, self.module.forward = self.module.__dict__.get("forward"), self

    def remove(self):
        top = self.module.__dict__.get("forward")
        above = next((w for w in _wrappers(top) if w.inner is self), None)
        if above is not None:
            above.inner = self.inner
        elif top is self and self.inner is None:
            self.module.__dict__.pop("forward")
        elif top is self:
            self.module.forward = self.inner

    def refresh(self):
        """Weights change below it, whichever came first: it goes back to the top, also where a Patch that left took it along."""
        self.live = [e for e in self.entries if e.owner.active]
        top = self.module.__dict__.get("forward")
        if not self.entries or top is self:
            return
        known = _wrappers(top)
        if self in known:
            self.remove()
            self._install()
        elif _bottom(top) is _bottom(self):                 # else somebody else's wrapper stands above, and calls it
            self._install()

    def _base(self, *args, **kwargs):
        return self.inner(*args, **kwargs) if self.inner is not None else type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args, **kwargs):
        if not self.live:
            return self._base(*args, **kwargs)
        if torch.is_grad_enabled():                         # as under gradient checkpointing: it may run again
            args, kwargs = tuple(map(self._uncached, args)), {k: self._uncached(v) for k, v in kwargs.items()}
            kwargs |= {"use_cache": False} if kwargs.get("use_cache") else {}
        name = None if args else next(k for k, v in kwargs.items() if torch.is_tensor(v) and v.is_floating_point())
        x, args, whole, ran = args[0] if args else kwargs.pop(name), args[1:], [], []   # what runs again must not keep x alive
        stack = self.host.run(self.site.stack) if x.dim() == 3 else None

        def run(t):
            ran.append(True)
            before = stack.tokens if stack is not None else None
            if stack is not None:
                stack.tokens = t
            out = self._base(t.h, *args, **kwargs) if name is None else self._base(**{**kwargs, name: t.h})
            h = out[0] if isinstance(out, tuple) else out
            whole[:] = [out[1:]] if isinstance(out, tuple) else []
            t = stack.take(h) if stack is not None else replace(t, h=h)
            if stack is not None:
                stack.tokens = before
            return t

        def trained():
            given = [v for v in (*args, *kwargs.values()) if torch.is_tensor(v) and v.requires_grad]
            return [*self._trained(), *given]               # an encoder's states, say
        run.trained = trained
        run.checkpointed = self.module.training and bool(getattr(self.module, "gradient_checkpointing", False))
        for e in self.live:
            run = self._wrapped(e, run)
        t = run(stack.take(x) if stack is not None else Tokens(x))
        if stack is not None:
            stack.tokens = t
        if not ran:
            whole[:] = self._beside(x, args, kwargs, name)
        if whole and torch.is_grad_enabled() and not any(torch.is_tensor(v) and v.requires_grad for v in whole[0]):
            for e in self._here():                          # T5's bias of positions: the first block makes it for the others
                if e.site.layout == "embedding" and any(p.requires_grad for p in e.state.parameters()):
                    raise DoesNotFit(f"{type(self.live[0].method).__name__} runs {self.site.name} without a graph, and "
                                     f"{e.site.name} trains through what that block returns beside its stream: it would get no "
                                     f"gradient. Leave it out: {type(e.method).__name__}(at=\"{e.method.at} -{e.site.name}\").")
        return (t.h, *whole[0]) if whole else t.h

    def _beside(self, x, args, kwargs, name):
        """[what a module that no method ran would return beside its stream], [] where it returns no tuple. Learnt by running it
        once, uncounted: each part is one of the module's own arguments, or nothing."""
        if self.site.role.startswith("mlp"):                # an MLP returns its stream alone
            return []
        who, given = type(self.live[-1].method).__name__, dict(enumerate(args)) | kwargs
        if self.site.block == 0 and any(hasattr(v, "get_seq_length") for v in given.values()):
            raise DoesNotFit(f"{who} skips {self.site.name}, by which a KV cache tells how many tokens it holds. Skip other "
                             "blocks, or generate with use_cache=False.")
        if self.beside is None:
            with torch.no_grad(), _disable_current_modes():
                bare = {k: None if hasattr(v, "get_seq_length") else v for k, v in given.items()}
                rest, named = [bare[i] for i in range(len(args))], {k: v for k, v in bare.items() if isinstance(k, str)}
                out = self._base(x, *rest, **named) if name is None else self._base(**named, **{name: x})
            self.beside = ()
            if isinstance(out, tuple):
                self.beside = [next((k for k, g in given.items() if g is v and v is not None), None) for v in out[1:]]
                if any(k is None and torch.is_tensor(v) for k, v in zip(self.beside, out[1:], strict=True)):
                    raise DoesNotFit(f"{who} skips {self.site.name}, which makes what later blocks need beside the stream "
                                     "(T5's first block the bias of positions). Skip other blocks.")
        return [tuple(None if k is None else given[k] for k in self.beside)] if isinstance(self.beside, list) else []

    def _here(self):
        """The entries in this block."""
        at = self.site.stack, self.site.block
        places = [*self.host.patches.values(), *self.host.ports.values()]
        return [e for place in places for e in place.entries if e.owner.active and (e.site.stack, e.site.block) == at]

    def _trained(self):
        """The parameters that train in this block: what f(t) depends on beside t and the module's other arguments."""
        here = self._here()
        return list(dict.fromkeys(q for e in here for q in e.state.parameters() if q.requires_grad))

    def _wrapped(self, e, f):
        def run(t):
            return call(e.method, "around", f=f, t=t, p=e.p)
        run.trained, run.checkpointed = f.trained, f.checkpointed
        return run

    def _uncached(self, v):
        if not hasattr(v, "get_seq_length"):
            return v
        stack = self.host.run(self.site.stack)
        begun = stack is not None and stack.proto is not None and not stack.proto["decoding"]      # filled in this very forward
        if v.get_seq_length() and not begun:
            raise DoesNotFit(f"{type(self.live[0].method).__name__} runs {self.site.name} itself, with gradients and a KV cache "
                             "that is not empty. Use torch.no_grad(), or start without a cache.")
        return None
