"""How a base model carries attachments: one Patch per touched module, one Port per touched place of a token stream.

Nothing here writes a base tensor. A patch is a callable put in a module's own __dict__ as `forward`; a port is a hook. Both are
plain objects, so copy.deepcopy copies them with the model they serve, and taking them away leaves the objects that were there.

    patch.py    weights, biases and outputs of one module, fast paths included; the tensors of a module by name
    core.py     the attention core of a module: what its scaled_dot_product_attention is given
    stack.py    one run of blocks: starts its Tokens, keeps masks, positions and caches right for inserted tokens
    port.py     a place of its stream: the input or output of a module, or between attention and MLP
    around.py   a whole module whose run the methods themselves decide on
"""

from collections import defaultdict
from contextlib import contextmanager

import torch

from ..method import call
from ..state import Overlay
from .around import Around
from .patch import Patch
from .port import Mid, Port
from .stack import StackPort

__all__ = ["Entry", "Host", "Owner"]

KEY = "_luthier_host"


class Host:
    """What a base model carries. Made by the first attachment, gone with the last."""

    def __init__(self, model):
        self.model, self.owners, self.context = model, [], {}
        self.patches, self.ports, self.stacks, self.towers = {}, {}, {}, []
        self.frozen = frozenset()                           # the model's own code that would cut gradients off: see thaw
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
        return self.stacks.get(stack.module) if stack is not None else None


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
