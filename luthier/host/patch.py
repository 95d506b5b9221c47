"""What stands in a module's forward: weights, biases and outputs changed on the way, nothing written."""

import weakref
from collections import defaultdict
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from .. import thin
from ..errors import DoesNotFit
from ..method import call
from .core import Intercept


class Patch:
    """Stands in a module's forward. Weight entries compose weight() over the base tensor, then the longest suffix that has fast()
    is added to the output; attend entries see the module's scaled_dot_product_attention before it runs."""

    def __init__(self, host, module):
        self.host, self.module, self.entries = host, module, []
        self.inner = module.__dict__.get("forward")         # somebody else's instance forward is kept and called
        module.forward = self
        self.slow, self.quick, self.attends, self.thin, self.picky, self.outputs = [], [], [], [], [], []
        self.mates, self.ready, self.lone = [], _Ready(), False

    def remove(self):
        if self.inner is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.forward = self.inner

    def add(self, entry):
        self.entries.append(entry)

    def refresh(self):
        live = [e for e in self.entries if e.owner.active]
        self.attends = [e for e in live if e.site.kind == "attend"]
        self.outputs = [e for e in live if e.output]
        weights, n = [e for e in live if e.site.kind == "weight" and not e.output], 0
        while self.host.fast and n < len(weights) and weights[-1 - n].fast:
            n += 1
            if weights[-n].fast_wants_weight:               # it reads the weight so far: nothing fast may come before it
                break
        self.slow, self.quick = weights[: len(weights) - n], weights[len(weights) - n:]
        own = self.inner is None and (type(self.module).forward is nn.Linear.forward or n and weights[-1].site.layout == "conv1d")
        self.thin = self.quick if own and all(e.thin for e in self.quick) else []
        self.mates, self.ready = [], _Ready()
        self.lone = len(self.thin) == 1 and self.thin[0].plain
        self.picky = [e for e in self.quick if e.method.has("worth")]

    def __call__(self, *args, **kwargs):
        if self.outputs:
            return self._outputs(args[0] if args else next(iter(kwargs.values())), self._weights(*args, **kwargs))
        if not self.attends:
            return self._weights(*args, **kwargs)
        seen = Intercept(self.attends, self.host)
        with seen:
            out = self._weights(*args, **kwargs)
        if not seen.calls:
            e, ours = self.attends[0], isinstance(self.module, nn.MultiheadAttention | nn.TransformerEncoderLayer)
            raise DoesNotFit(f"{type(e.method).__name__} works on the attention core of {e.site.name}, but "
                             f"{type(self.module).__name__} ran without torch's scaled_dot_product_attention. "
                             + ("Call torch.backends.mha.set_fastpath_enabled(False) first." if ours else
                                "Load the model with attn_implementation=\"sdpa\"."))
        return out

    def _base(self, *args, **kwargs):
        return self.inner(*args, **kwargs) if self.inner is not None else type(self.module).forward(self.module, *args, **kwargs)

    def _outputs(self, x, y):
        """What acts on a linear layer's output, after all that changes its weight."""
        for e in self.outputs:
            rows, have = e.site.rows, {}
            if "W" in e.method.wants("output"):
                by_row = self.host.rows is not None
                have["W"] = None if by_row else e.site.read(self.tensors(e.param, self.slow + self.quick)[0])
            new = e.act("output", x=x, y=y if rows is None else take(y, rows), **have)
            y = new if rows is None else put(y, rows, new)
        return y

    def _weights(self, *args, **kwargs):
        if self.host.rows is not None:
            return self.host.rows.weights(self, args, kwargs)
        if self.picky and not self.worth(args, kwargs):
            with self.whole():
                return self._slow(args, kwargs)
        if self.thin and len(args) == 1 and not kwargs and not (
                torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):       # these see the formula
            return self._thin(args[0])
        y = self._slow(args, kwargs) if self.slow else self._base(*args, **kwargs)
        if not self.quick:
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        for e in self.quick:
            rows, have = e.site.rows, dict(zip(("W", "b"), self._so_far(e), strict=True)) | {"x": x, "p": e.p}
            if rows is None:
                y = call(e.method, "fast", y=y, **have).to(y.dtype)                # under autocast: the layer's own, as weight()
            else:
                y = put(y, rows, call(e.method, "fast", y=take(y, rows), **have))
        return y

    def _thin(self, x):
        """The layer on x as rows, and its thin updates added to what it has just made."""
        rows, e, own = x.reshape(-1, x.shape[-1]), self.thin[0], self.module._parameters
        P, b = self.tensors(e.param, self.slow) if self.slow else (own["weight"], own["bias"])
        if self.lone and not torch.is_grad_enabled() and not e.state.training:      # a token at a time must be quick
            y = _rows(e.site, rows, P, b)
            f = e.method.low_rank(e.state)
            A, B = f["A"].to(y.dtype), f["B"].to(y.dtype)
            return y.addmm_(F.linear(rows, A), B.T, alpha=f.get("scale", 1.0)).view(*x.shape[:-1], y.shape[-1])
        cast = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else P.dtype
        passed, downs = self._downs(x, rows.to(cast))
        y, kept = _rows(e.site, rows if P.requires_grad else passed, P, b), False
        for (e, f), h in downs:
            f = {k: v.to(cast) if isinstance(v, torch.Tensor) else v for k, v in f.items() if k not in ("A", "dropout")}
            y = thin.up(y.clone() if kept else y, h, **f, rows=e.site.rows)
            kept = "gain" in f                              # its gradient is read off y
        return y.view(*x.shape[:-1], y.shape[-1])

    def _downs(self, x, rows):
        """The rows to give the layer itself; (entry, its factors) and its h = x Aᵀ for each. Of mates (q, k, v; gate, up) the
        first that is called with an x makes every h in one product and leaves the others ready for that very x. Served, each is
        alone, the same bits whatever else there is; in training a pass without gradients draws as the one with them will."""
        ready, self.ready = self.ready, _Ready()
        if ready.fits(x):
            return ready.rows, ready.products
        if not torch.is_grad_enabled() and not any(e.state.training for e in self.thin):
            return rows, [((e, f), thin.down(rows, [f["A"].to(rows.dtype)])[1][0]) for e, f in self._factors()]
        groups = {m: m._factors() for m in [self, *self.mates]}
        kinds = defaultdict(list)                           # those with a dropout of their own are made on their own
        for e, f in (pair for pairs in groups.values() for pair in pairs):
            kinds[f.get("dropout", 0.0) if e.state.training else 0.0].append((e, f))
        made = {}
        for p, pairs in kinds.items():
            rows, products = thin.down(rows, [f["A"].to(rows.dtype) for _, f in pairs], p)
            made |= {e: ((e, f), h) for (e, f), h in zip(pairs, products, strict=True)}
        for m in self.mates:
            m.ready = _Ready(x, rows, [made[e] for e, _ in groups[m]])
        return rows, [made[e] for e, _ in groups[self]]

    def _factors(self):
        """(entry, what its low_rank says and the bias that a gain leaves out) of every thin entry."""
        return [(e, call(e.method, "low_rank", p=e.p, W=W) | ({} if W is None else {"b": b}))
                for e in self.thin for W, b in [self._so_far(e)]]

    def _so_far(self, e):
        """The weight and bias that an entry's fast verb is to change, (None, None) where it does not ask for them."""
        if not e.fast_wants_weight:
            return None, None
        P, b = self.tensors(e.param, self.slow)
        return e.site.read(P), None if b is None else e.site.read_b(b)

    def worth(self, args, kwargs, n=1):
        """Whether every fast verb that can tell pays for the tokens of this call; each n-th part of them has its own state."""
        x = args[0] if args else next(iter(kwargs.values()))
        return all(e.method.worth(x.numel() // x.shape[-1] / n, e.site.d_in, e.site.d_out) for e in self.picky)

    @contextmanager
    def whole(self):
        """Within, nothing is fast."""
        before = self.slow, self.quick
        self.slow, self.quick = self.slow + self.quick, []
        try:
            yield
        finally:
            self.slow, self.quick = before

    def tensors(self, param, entries):
        """The module's parameter `param` and its bias (None stays None unless a method sets one) after these entries."""
        bias = self.bias(param)
        return composed(fetch(self.module, param), fetch(self.module, bias) if bias else None,
                        [e for e in entries if e.param == param])

    def bias(self, param):
        """The name of the bias that belongs to a parameter of this module, "" where there is none."""
        return next((e.site.bias for e in self.entries if e.site.kind == "weight" and e.param == param and not e.twin),
                    "bias" if self.module._parameters.get("bias") is not None else "")

    def _slow(self, args, kwargs):
        m, cls, new, extra = self.module, type(self.module), {}, None
        for name in dict.fromkeys(e.param for e in self.slow):
            new[name], b = self.tensors(name, self.slow)
            if b is not None and (bias := self.bias(name) or ("bias" if "bias" in m._parameters else "")):
                new[bias] = b
            elif b is not None:
                extra = b                                   # a bias on a module that knows none: added to its output
        if new.keys() <= {"weight", "bias"} and "weight" in new and self.inner is None and len(args) == 1 and not kwargs:
            b = new["bias"] if "bias" in new else m._parameters.get("bias")
            if cls.forward is nn.Linear.forward:
                return F.linear(args[0], new["weight"], b if extra is None else extra)
            if cls.forward is nn.Conv2d.forward and extra is None:
                return m._conv_forward(args[0], new["weight"], b)
        with shadowed(m, new):
            y = self._base(*args, **kwargs)
        return y if extra is None else y + extra


def composed(P, b, entries):
    """A stored tensor (or some of its rows) and its bias after the weight verbs of these entries, out of place."""
    for e in entries:
        s, have = e.site, {"p": e.p}
        if not e.method.discards():
            have["W"] = s.read(P)
        if e.sets_bias:
            full = b if b is not None else P.new_zeros(*P.shape[:s.index is not None], s.whole(P).shape[0])    # (experts,) rows
            W, new = call(e.method, "weight", b=s.read_b(full), **have)
            b = None if new is None else s.write_b(full, new)
        else:
            W = call(e.method, "weight", **have)
        P = s.write(P, W)
    return P, b


class _Ready:
    """What was made of an input, for whoever is called with that very tensor next. A copy of a model starts without."""

    def __init__(self, x=None, rows=None, products=()):
        self.x, self.rows, self.products = x is not None and weakref.ref(x), rows, products

    def fits(self, x):
        return self.x and self.x() is x

    def __deepcopy__(self, memo):
        return _Ready()

    def __reduce__(self):
        return _Ready, ()


def _rows(site, x, P, b):
    """A linear layer's own output for rows x: (N, d_in)."""
    return F.linear(x, P, b) if site.layout == "linear" else torch.addmm(b, x, P)


@contextmanager
def shadowed(module, tensors):
    """Within, the module sees these tensors in place of its parameters: an instance attribute comes before nn.Module's own
    lookup, so the registered parameters are never touched."""
    places = [(*place(module, name), t) for name, t in tensors.items()]
    try:
        for home, name, t in places:
            home.__dict__[name] = t
        yield
    finally:
        for home, name, _ in places:
            home.__dict__.pop(name, None)


def place(module, name):
    """The module that holds a (dotted) parameter name, and the last part of the name."""
    *path, last = name.split(".")
    for part in path:
        module = module._modules[part]
    return module, last


def fetch(module, name):
    home, last = place(module, name)
    return home._parameters[last]


def take(y, rows):
    return y[..., rows[0]:rows[1]] if isinstance(rows, tuple) else y.index_select(-1, rows.to(y.device))


def put(y, rows, new):
    if isinstance(rows, tuple):
        return torch.cat([y[..., :rows[0]], new.to(y.dtype), y[..., rows[1]:]], -1)
    return y.index_copy(-1, rows.to(y.device), new.to(y.dtype))
