"""How a base model carries attachments: one Patch per touched module, one Port per touched place of a token stream.

Nothing here writes a base tensor. A patch is a callable put in a module's own __dict__ as `forward`; a port is a hook. Both are
plain objects, so copy.deepcopy copies them with the model they serve, and taking them away leaves the objects that were there.
"""

import functools
import weakref
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from . import thin
from .errors import DoesNotFit
from .method import call
from .state import Overlay
from .tokens import _TOGETHER, Attention, Tokens

KEY = "_luthier_host"


class Host:
    """What a base model carries. Made by the first attachment, gone with the last."""

    def __init__(self, model):
        self.model, self.owners, self.context = model, [], {}
        self.patches, self.ports, self.stacks, self.towers = {}, {}, {}, []
        self.flags = [(p, p.requires_grad) for p in model.parameters()]
        self.fast = True
        self.rows = None                                    # while a rack runs rows with different states: serve.rows.Runs

    @staticmethod
    def of(model, make=False):
        host = model.__dict__.get(KEY)
        if host is None and make:
            host = model.__dict__[KEY] = Host(model)
        return host

    # -- adding and removing ------------------------------------------------------------------------------------
    def add(self, entry):
        s = entry.site
        if s.kind == "stream":
            self._port(s, entry.method.has("around") and s.layout == "out" and s.block is not None).entries.append(entry)
        else:
            self.patch(entry.module).add(entry)
        if s.stack is not None and s.kind != "weight":
            self._stack(s.stack)

    def patch(self, module):
        if module not in self.patches:
            self.patches[module] = Patch(self, module)
        return self.patches[module]

    def _port(self, s, around=False):
        key = (s.module, "around" if around else s.layout, s.tower)         # an embedding may serve two towers
        if key not in self.ports:
            self.ports[key] = (Around if around else Mid if s.layout == "mid" else Port)(self, s)
            for port in self.ports.values():
                if isinstance(port, Mid):
                    port.last()
        return self.ports[key]

    def _stack(self, stack):
        for s in [stack] + ([o for o in self.towers if o.cross] if stack.name == "encoder" else []):
            if s.module not in self.stacks:                 # a decoder's port lengthens the mask over its encoder's tokens
                self.stacks[s.module] = StackPort(self, s)

    def drop(self, owner):
        """Take one attachment out; with the last one, every trace of the host."""
        for table in (self.patches, self.ports):
            for key, place in list(table.items()):
                place.entries = [e for e in place.entries if e.owner is not owner]
                if not place.entries:
                    place.remove()
                    del table[key]
        self.owners = [o for o in self.owners if o is not owner]
        if not any(e.site.kind != "weight" for place in [*self.patches.values(), *self.ports.values()] for e in place.entries):
            for s in self.stacks.values():
                s.remove()
            self.stacks = {}
        self.refresh()
        if not self.owners:
            for p, flag in self.flags:
                p.requires_grad_(flag)
            self.model.__dict__.pop(KEY, None)

    def refresh(self):
        """After anything was added, removed or switched: who acts now."""
        for place in [*self.patches.values(), *self.ports.values()]:
            place.refresh()
        groups = defaultdict(list)
        for patch in self.patches.values():
            if patch.thin and (family := patch.thin[0].site.family):
                groups[family].append(patch)
        for group in groups.values():
            for patch in group:
                patch.mates = [m for m in group if m is not patch]
        for s in self.stacks.values():
            s.inserted = None

    def touches(self, modules):
        """Whether anything that acts is at one of these modules."""
        places = [*self.patches.values(), *self.ports.values()]
        return any(e.owner.active and (e.module in modules or e.site.module in modules) for p in places for e in p.entries)

    @contextmanager
    def asleep(self):
        """Within, the model runs bare, also in the middle of a forward: what ports and stacks hold is put back afterwards."""
        places = [*self.patches.values(), *self.ports.values(), *self.stacks.values()]
        held, awake = [(x, dict(x.__dict__)) for x in places], [o for o in self.owners if o.active]
        try:
            for o in awake:
                o.active = False
            self.refresh()
            yield
        finally:
            for o in awake:
                o.active = True
            self.refresh()
            for x, before in held:
                x.__dict__.update(before)

    # -- the tokens of the running forward ------------------------------------------------------------------------
    def run(self, stack):
        s = self.stacks.get(stack.module) if stack is not None else None
        return s


class Owner:
    """One attachment's switch."""

    def __init__(self, name):
        self.name, self.active, self.context, self.states, self.base = name, True, {}, None, None


class Entry:
    """One method at one site: who (owner), what (method), where (site; module may differ for a tied twin), with which state."""

    def __init__(self, owner, method, site, state, module=None, param=None):
        self.owner, self.method, self.site, self.state = owner, method, site, state
        self.module, self.param = module or site.module, param or site.param
        self.twin = module is not None and module is not site.module
        self.sets_bias = site.kind == "weight" and method.has("weight") and "b" in method.wants("weight")
        linear = site.kind == "weight" and site.layout in ("linear", "conv1d")
        self.output = linear and method.has("output")
        self.fast = linear and method.has("fast") and not self.twin and not self.output
        self.thin = self.fast and method.is_thin() and not isinstance(site.rows, torch.Tensor)
        self.fast_wants_weight = self.fast and bool({"W", "b"} & set(method.wants("fast")))
        self.plain = self.thin and site.rows is None and not (self.fast_wants_weight or method.has("produce"))

    @property
    def p(self):
        if self.method.has("produce"):
            offered = getattr(self.owner.base, "context", None)             # what the model itself knows in this forward
            offered = offered if isinstance(offered, dict) else {}
            ctx = {**offered, "asleep": Host.of(self.owner.base).asleep, **self.owner.context}
            return Overlay(self.state, self.method.produce(ctx, self.state))
        return self.state

    def act(self, verb, **have):
        return call(self.method, verb, p=self.p, **have)


# -- weights and attention cores ----------------------------------------------------------------------------------


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
        seen = _Intercept(self.attends, self.host)
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
            new = e.act("output", x=x, y=y if rows is None else _take(y, rows), **have)
            y = new if rows is None else _put(y, rows, new)
        return y

    def _weights(self, *args, **kwargs):
        if self.host.rows is not None:
            return self.host.rows.weights(self, args, kwargs)
        if self.picky and not self.worth(args, kwargs):
            with self.whole():
                return self._slow(args, kwargs)
        if self.thin and len(args) == 1 and not kwargs and not torch.compiler.is_compiling():
            return self._thin(args[0])
        y = self._slow(args, kwargs) if self.slow else self._base(*args, **kwargs)
        if not self.quick:
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        for e in self.quick:
            rows, have = e.site.rows, dict(zip(("W", "b"), self._so_far(e), strict=True)) | {"x": x, "p": e.p}
            if rows is None:
                y = call(e.method, "fast", y=y, **have)
            else:
                y = _put(y, rows, call(e.method, "fast", y=_take(y, rows), **have))
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
        first that is called with an x makes every h in one product and leaves the others ready for that very x."""
        ready, self.ready = self.ready, _Ready()
        if ready.fits(x):
            return ready.rows, ready.products
        if not torch.is_grad_enabled():                     # alone: the same bits whatever else there is
            return rows, [((e, f), thin.down(rows, [f["A"].to(rows.dtype)], e.state.training and f.get("dropout"))[1][0])
                          for e, f in self._factors()]
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
            full = b if b is not None else P.new_zeros(s.whole(P).shape[0])
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


def _take(y, rows):
    return y[..., rows[0]:rows[1]] if isinstance(rows, tuple) else y.index_select(-1, rows.to(y.device))


def _put(y, rows, new):
    if isinstance(rows, tuple):
        return torch.cat([y[..., :rows[0]], new.to(y.dtype), y[..., rows[1]:]], -1)
    return y.index_copy(-1, rows.to(y.device), new.to(y.dtype))


class _Intercept(TorchFunctionMode):
    """Hands every scaled_dot_product_attention inside to the attend entries first."""

    def __init__(self, entries, host):
        super().__init__()
        self.entries, self.host, self.calls = entries, host, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._attend(*args, **(kwargs or {}))

    def _attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        H, K, _ = self.entries[0].site.heads or (0, 0, 0)
        if query.shape[1] == K != H and query.shape[2] == H // K:     # transformers folds the groups of a single query to tokens
            return self._attend(query.reshape(len(query), H, 1, -1), key, value, attn_mask, dropout_p, is_causal, scale,
                                True).reshape(query.shape)
        stack = self.host.run(self.entries[0].site.stack)
        t = stack.tokens if stack is not None else None
        if stack is not None and t is None:                 # no stream was touched before this block: the stream starts here
            t = stack.take(query.new_empty(len(query), query.shape[-2], 0))
        if t is not None and attn_mask is not None and attn_mask.shape[-1] not in (1, key.shape[-2]):
            attn_mask = self._recut(t, attn_mask, key)
        a = Attention(query, key, value, t, attn_mask, is_causal, scale, dropout_p, enable_gqa)
        for e in self.entries:
            a = e.act("attend", a=a)
            if isinstance(a, torch.Tensor):
                return a
        if stack is not None:
            stack.tokens = a.t
        return a.run()


    def _recut(self, t, mask, key):
        """The model's mask was made before tokens merged: padding is read from the lane that moved with them."""
        if mask.shape[1] != 1 or t.causal or key.shape[-2] != t.h.shape[1]:
            raise DoesNotFit(f"{self.entries[0].site.name} adds a bias per pair of positions ({tuple(mask.shape)}), which no "
                             f"longer fits {key.shape[-2]} merged tokens. Use the method on a model without such biases.")
        return None if t.mask is None else t.mask[:, None, None, :]


# -- token streams ------------------------------------------------------------------------------------------------


class _Remembering:
    """A KV cache whose rows and tokens move together with what side networks remember beside it (beams, candidates, drafts)."""

    def _move(self, how):
        for key, tensors in self._luthier_memory.items():
            self._luthier_memory[key] = tuple(map(how, tensors))

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._move(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self._move(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._move(lambda t: t[indices])

    def crop(self, tokens):
        super().crop(tokens)
        self._move(lambda t: t[:, :, :self.get_seq_length()])


@functools.cache
def _with_memory(cls):
    return type(cls.__name__, (_Remembering, cls), {})


def remembering(past):
    """The memory of a KV cache: name -> (k, v), each (B, H, S, Dh)."""
    if "_luthier_memory" not in past.__dict__:
        past._luthier_memory = {}
        if hasattr(past, "reorder_cache"):
            past.__class__ = _with_memory(type(past))
    return past._luthier_memory


class StackPort:
    """Around one run of blocks: starts its Tokens, keeps masks and positions right for inserted tokens, takes them out again."""

    def __init__(self, host, stack):
        self.host, self.stack, self.tokens, self.inserted, self.spans, self.frames = host, stack, None, None, {}, 1
        self.handles = [stack.module.register_forward_pre_hook(self.before, with_kwargs=True),
                        stack.module.register_forward_hook(self.after, with_kwargs=True)]
        if stack.embed == "out":                            # heads inside the stack must not see inserted tokens
            end = stack.final_module if stack.final_module is not None else stack.blocks[-1] if stack.blocks else None
            if end is not None:
                self.handles.append(end.register_forward_hook(self.leave))
        self.proto = self.again = None

    def remove(self):
        for h in self.handles:
            h.remove()
        self.tokens = self.proto = None

    def checkpointed(self):
        return any(getattr(b, "gradient_checkpointing", False) for b in self.stack.blocks)

    def embed_port(self):
        return self.host.ports.get((self.stack.embed_module, "out", self.stack.name))

    def length(self):
        """How many tokens the methods at the embedding insert; found once by running them on a dummy stream."""
        if self.inserted is None:
            port, s = self.embed_port(), self.stack
            self.inserted, self.spans = 0, {}
            if port is not None and port.live:
                like = next(s.module.parameters())
                t = Tokens(like.new_zeros(1, s.fixed + 8, port.site.d_out), fixed=s.fixed, causal=s.causal)
                with torch.no_grad():
                    for e in port.live:
                        t = call(e.method, "stream", t=t, p=e.p)
                self.inserted, self.spans = t.h.shape[1] - s.fixed - 8, t.spans
                if self.inserted and s.insert:
                    raise DoesNotFit(f"{type(port.live[0].method).__name__} inserts tokens at {port.site.name}, which cannot "
                                     f"hold them: {s.insert}. Use a method that changes weights or streams in place.")
        return self.inserted

    def _words(self, port, args, kwargs):
        """Texts before positions are added: looked up and changed here. Ids and mask go along as lanes, so the model itself adds
        the positions and finds the end of each text; what is inserted has the id 0. Padding gives way to what is inserted where
        the positions end, and takes the place of what goes where there is no mask (SigLIP reads a text at its last padding)."""
        s, port.ready, ids = self.stack, None, kwargs.pop("input_ids", None)
        if ids is None:
            ids, args = args[0], args[1:]
        mask, most = kwargs.get("attention_mask"), getattr(s.module.config, "max_position_embeddings", None) or 10**9
        lanes = {"ids": ids[..., None]} | ({} if mask is None else {"mask": mask.bool()[..., None]})
        t = Tokens(s.words_module(ids), lanes, fixed=1 if s.causal else s.fixed, causal=s.causal)
        for e in port.live:
            t = e.act("stream", t=t)
        if mask is None and (short := ids.shape[1] - t.h.shape[1]) > 0:
            pad = t.lanes["ids"][:, -1:].expand(-1, short, 1)
            t = replace(t, h=torch.cat([t.h, s.words_module(pad[..., 0])], 1), lanes={"ids": torch.cat([t.lanes["ids"], pad], 1)})
        ids = t.lanes["ids"][..., 0]
        if ids.shape[1] > most and not (ids[:, most - 1:] == ids[:, -1:]).all():
            raise DoesNotFit(f"{type(port.live[-1].method).__name__} makes texts of {ids.shape[1]} tokens at {port.site.name}, "
                             f"and the model has {most} positions. Insert fewer tokens, or give shorter texts.")
        port.ready, kwargs["input_ids"] = t.h[:, :most], ids[:, :most]
        if mask is not None:
            kwargs["attention_mask"] = t.lanes["mask"][:, :most, 0].to(mask.dtype)
        return args, kwargs

    def before(self, module, args, kwargs):
        s, n = self.stack, self.length()
        words = self.host.ports.get((s.words_module, "out", s.name)) if s.words_module is not None else None
        if words is not None and words.live:
            args, kwargs = self._words(words, args, kwargs)
        past = kwargs.get("past_key_values")
        seen = _length(past)
        cached = getattr(past, "_luthier_inserted", 0) if seen else 0
        if seen and cached != n:
            raise DoesNotFit(f"This KV cache holds {cached} inserted tokens, the chain inserts {n}. Start generation afresh "
                             "after attaching, detaching or switching.")
        mask = kwargs.get("attention_mask")
        if n:
            if mask is None and s.embed == "ids":
                pass                                        # the model makes its mask from the longer stream itself
            elif torch.is_tensor(mask) and mask.dim() == 2:
                at = 0 if seen else s.fixed
                kwargs["attention_mask"] = mask = torch.cat([mask[:, :at], mask.new_ones(len(mask), n), mask[:, at:]], 1)
            elif mask is not None:
                raise DoesNotFit(f"{s.name or 'the model'} was given an attention mask that is not (batch, tokens); "
                                 "with inserted tokens pass the padding mask itself.")
            if s.embed == "ids":
                for name in ("position_ids", "cache_position"):
                    pos = kwargs.get(name)
                    if torch.is_tensor(pos):
                        new = torch.arange(n, device=pos.device).expand(*pos.shape[:-1], n)
                        kwargs[name] = pos + n if seen else torch.cat([new.to(pos.dtype), pos + n], -1)
        if torch.is_tensor(kwargs.get("encoder_attention_mask")) and torch.is_tensor(kwargs.get("encoder_hidden_states")):
            em, states = kwargs["encoder_attention_mask"], kwargs["encoder_hidden_states"]
            if em.dim() == 2 and states.shape[1] > em.shape[1]:   # tokens inserted into the encoder are seen by the decoder
                kwargs["encoder_attention_mask"] = torch.cat([em.new_ones(len(em), states.shape[1] - em.shape[1]), em], 1)
        keymask = mask.bool() if torch.is_tensor(mask) and mask.dim() == 2 else None
        memory = None                                       # a cache, or a decoder that may be about to make one
        if past is not None or (s.embed == "ids" and not torch.is_grad_enabled()):
            memory = remembering(past) if past is not None else {}
            if not seen:
                memory.clear()
        given = next((v for v in (*args, *kwargs.values()) if torch.is_tensor(v)), None)
        self.proto = dict(fixed=s.fixed, causal=s.causal, decoding=bool(seen), memory=memory, keymask=keymask, given=given)
        self.tokens = self.again = None
        if s.embed == "ids" and (port := self.embed_port()) is not None and port.live:
            args, kwargs = self._embed(port, module, args, kwargs, n)
        return args, kwargs

    def _embed(self, port, module, args, kwargs, n):
        """A decoder's embedding: run it here and hand the stream over as inputs_embeds, so that the model itself builds
        positions and causal masks for the tokens that were inserted."""
        h = kwargs.get("inputs_embeds")
        if h is None:
            ids = kwargs.pop("input_ids", None)
            if ids is None:
                ids, args = args[0], args[1:]
            h = self.stack.embed_module(ids)
        if n and self.proto["keymask"] is not None and not self.proto["decoding"]:
            full = self.proto["keymask"]                    # insert() lengthens it itself
            self.proto["keymask"] = torch.cat([full[:, :self.stack.fixed], full[:, self.stack.fixed + n:]], 1)
        kwargs.pop("input_ids", None)
        kwargs["inputs_embeds"] = port.through(h)
        return args, kwargs

    def take(self, h):
        """The running Tokens with stream h; fresh ones where none run or the stream has been re-cut since."""
        t = self.tokens
        if t is not None and t.h is not None and t.h.shape[:2] == h.shape[:2]:
            return replace(t, h=h)
        proto = dict(self.proto or dict(fixed=self.stack.fixed, causal=self.stack.causal))
        self.frames = proto["frames"] = _TOGETHER[0] if self.proto else self.frames        # as it was, where blocks run again
        mask, lanes = proto.get("keymask"), {}
        if mask is not None and mask.shape[1] >= h.shape[1]:
            lanes["mask"] = mask[:, mask.shape[1] - h.shape[1]:, None]
        return Tokens(h, lanes, **proto)

    def leave(self, module, args, out):
        """Inserted tokens leave before heads that must not see them."""
        t = self.tokens
        if t is None or not t.spans or self.keeps():
            return out
        h = out[0] if isinstance(out, tuple) else out
        if h.shape[1] != t.h.shape[1]:
            return out
        t = replace(t, h=h)
        for name in list(t.spans):
            t = t.drop(name)
        self.tokens = t
        return (t.h, *out[1:]) if isinstance(out, tuple) else t.h

    def keeps(self):
        """An encoder whose decoder attends to it hands its inserted tokens on."""
        return self.stack.name == "encoder" and any(s.cross for s in self.host.towers)

    def after(self, module, args, kwargs, out):
        past = out.get("past_key_values") if hasattr(out, "get") else kwargs.get("past_key_values")
        if past is not None and hasattr(past, "__dict__"):
            past._luthier_inserted = self.inserted
            if self.proto["memory"] is not None and self.proto["memory"] is not past.__dict__.get("_luthier_memory"):
                remembering(past).update(self.proto["memory"])
        t = self.tokens
        if self.stack.embed == "ids" and t is not None and t.spans and not t.decoding and not self.keeps():
            lo = self.stack.fixed

            def cut(h):
                return torch.cat([h[:, :lo], h[:, lo + self.inserted:]], 1)

            if isinstance(out, tuple):
                out = (cut(out[0]), *out[1:])
            elif torch.is_tensor(out):
                out = cut(out)
            else:
                out["last_hidden_state"] = cut(out["last_hidden_state"])
        self.tokens = self.proto = None
        return out


def _length(past):
    if past is None or not hasattr(past, "get_seq_length"):
        return 0
    return int(past.get_seq_length())


class Port:
    """A place of a token stream: the input or the output of a module, with the entries that act there, in chain order."""

    def __init__(self, host, site):
        self.host, self.site, self.entries, self.live, self.saved, self.ready = host, site, [], [], None, None
        self.handles = [site.module.register_forward_pre_hook(self.enter, with_kwargs=True) if site.layout == "in"
                        else site.module.register_forward_hook(self.leave)]

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
        x, args, whole = args[0] if args else kwargs.pop(name), args[1:], []        # what runs again must not keep x alive
        stack = self.host.run(self.site.stack) if x.dim() == 3 else None

        def run(t):
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
        if whole and torch.is_grad_enabled() and not any(torch.is_tensor(v) and v.requires_grad for v in whole[0]):
            for e in self._here():                          # T5's bias of positions: the first block makes it for the others
                if e.site.layout == "embedding" and any(p.requires_grad for p in e.state.parameters()):
                    raise DoesNotFit(f"{type(self.live[0].method).__name__} runs {self.site.name} without a graph, and "
                                     f"{e.site.name} trains through what that block returns beside its stream: it would get no "
                                     f"gradient. Leave it out: {type(e.method).__name__}(at=\"{e.method.at} -{e.site.name}\").")
        return (t.h, *whole[0]) if whole else t.h

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
        if v.get_seq_length():
            raise DoesNotFit(f"{type(self.live[0].method).__name__} runs {self.site.name} itself, with gradients and a KV cache "
                             "that is not empty. Use torch.no_grad(), or start without a cache.")
        return None
