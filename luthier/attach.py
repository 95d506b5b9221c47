"""plan, attach, Tuned: a chain on a model, and off it again. The base weights are never written."""

import functools
import inspect
import itertools
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from .errors import BadOrder, DoesNotFit, LuthierError, NotMergeable, ScheduleNotStepped
from .host import Entry, Host, Owner
from .host.patch import fetch, place
from .method import Chain, call, parse
from .remat import lean
from .site import find, sites
from .state import Noted, State, follow
from .thaw import Thawed, frozen

NEEDS = {"weight": "weight", "stream": "stream", "attend": "attend"}
PATIENCE = 64                            # training forwards that a schedule may go unstepped


@dataclass(frozen=True)
class Step:
    number: int
    method: object
    sites: tuple
    twins: dict                          # site -> the site whose state and view it shares, for tied weights of one step
    watched: tuple                       # sites that are observed before there is a state


@dataclass(frozen=True)
class Plan:
    """What attaching would do: steps with their sites, and what the user should know (tied weights)."""

    model: nn.Module
    chain: Chain
    steps: tuple
    notes: tuple = ()
    stacks: tuple = ()


@dataclass
class Run:
    """What `loss` and `step` verbs see. states: site name -> p; k: optimizer steps so far; total: planned steps, or None;
    optimizer: the one that just stepped, where `step` was given it; outputs: of the training forward that the loss belongs to;
    batch: what was trained on, labels too, where the training loop says it (luthier.train, or labels given to the model);
    bare(): what the model without this attachment gives for the same inputs, in the same mode, without a graph."""

    states: dict
    k: int = 0
    total: int | None = None
    outputs: object = None
    sites: dict = field(default_factory=dict)
    optimizer: object = None
    bare: object = None
    batch: dict = field(default_factory=dict)


def base_of(model):
    """The model under any number of Tuned wrappers."""
    while isinstance(model, Tuned):
        model = model.model
    return model


def plan(model, chain):
    """Resolve every selector once and refuse what would lose work or cannot run. Touches nothing."""
    chain, base = parse(chain), base_of(model)
    every, host = sites(base), Host.of(base)
    touched = defaultdict(list)
    for patch in host.patches.values() if host else ():
        for e in patch.entries:
            if e.site.kind == "weight" and not e.output:
                touched[id(e.module), e.param].append((e.site, f"{type(e.method).__name__} (attached as {e.owner.name!r})"))
    steps, notes = [], []
    for k, m in enumerate(chain):
        name, found, twins, first = type(m).__name__, find(every, m.at), {}, {}
        for s in found:
            linear = s.kind == "weight" and s.layout in ("linear", "conv1d")
            if not m.has(NEEDS[s.kind]) and not (linear and m.has("output")) and not (
                    s.kind == "stream" and s.layout == "out" and s.block is not None and m.has("around")):
                can = [v for v in ("weight", "output", "stream", "around", "attend") if m.has(v)]
                raise DoesNotFit(f"{name} acts on {' and '.join(can) or 'nothing'}, and {s.name} is a {s.kind} site: "
                                 f"it has no verb for it. Choose other sites with {name}(at=...); `luthier sites` lists them.")
            if s.kind == "weight":
                _weight_fits(m, name, s)
                for other, who in touched[id(s.module), s.param] if m.discards() else ():
                    if _overlap(s, other):
                        raise BadOrder(f"{name} replaces the weight of {s.name}, losing {who}. "
                                       f"Put {name} first, or merge() before it.")
                P = s.parameter
                if id(P) in first and s.tied and s.rows is None and first[id(P)].name in s.tied:
                    twins[s] = first[id(P)]
                first.setdefault(id(P), s)
                if not (linear and m.has("output")):
                    touched[id(s.module), s.param].append((s, name))
            elif s.kind == "attend" and _implementation(s.module) not in (None, "sdpa"):
                raise DoesNotFit(f"{name} works on the attention core of {s.name}, which runs {_implementation(s.module)!r}. "
                                 "Load the model with attn_implementation=\"sdpa\".")
        here = {s.name for s in found}
        for s in found:
            if s.tied and s.kind == "weight":
                what = "they change together" if here & set(s.tied) else "it is untied while attached"
                notes.append(f"{s.name} is tied to {', '.join(s.tied)}: {what}.")
        watched = [] if not m.observes else found if m.watch is None else find(every, m.watch)
        for s in watched:
            if s.kind != "weight" or s.layout not in ("linear", "conv1d", "conv"):
                raise DoesNotFit(f"{name} observes inputs of linear and conv layers; {s.name} is a {s.layout} {s.kind} site. "
                                 f"Choose its sites with {name}(at=...).")
        steps.append(Step(k, m, tuple(found), twins, tuple(watched)))
    return Plan(base, chain, tuple(steps), tuple(dict.fromkeys(notes)), tuple(every.stacks))


def _weight_fits(m, name, s):
    if type(s.module).__name__ == "NonDynamicallyQuantizableLinear":
        raise DoesNotFit(f"{name} cannot reach {s.name}: torch's MultiheadAttention reads this weight without calling the layer.")
    if not torch.is_floating_point(s.parameter) and not m.discards():
        raise DoesNotFit(f"{name} needs a floating-point weight; {s.name} holds {s.parameter.dtype}.")


def _overlap(a, b):
    if a.index is not None and b.index is not None and a.index != b.index:
        return False
    if a.rows is None or b.rows is None:
        return True
    if isinstance(a.rows, tuple) and isinstance(b.rows, tuple):
        return a.rows[0] < b.rows[1] and b.rows[0] < a.rows[1]
    rows = [set(range(*r) if isinstance(r, tuple) else r.tolist()) for r in (a.rows, b.rows)]
    return bool(rows[0] & rows[1])


def _implementation(module):
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def attach(model, chain, data=(), *, seed=0, name=None, loss=None, state=None):
    """Put a chain on a model. `data`: calibration batches (dicts of the model's arguments) for methods that observe;
    `loss(model, batch)` where they need gradients and the model returns none. Nothing changes if anything is refused."""
    todo = plan(model, chain)
    host = Host.of(todo.model, make=True)
    host.towers, host.frozen = todo.stacks, frozen(todo.model, todo.stacks)
    names = {o.name for o in host.owners}
    if name in names:
        raise BadOrder(f"An attachment named {name!r} is on this model already. Choose another name, or detach() it first.")
    name = name or next(n for i in itertools.count() if (n := f"tuned{i or ''}") not in names)
    tuned = Tuned(model, todo, host, Owner(name), seed)
    try:
        tuned._build(data, loss, state)
    except BaseException:
        tuned.detach()
        raise
    return tuned


def _as_inferring(merge):
    """What is merged is what inference computes, whatever mode the model is in."""
    def run(self):
        before = self.states.training
        self.states.eval()
        try:
            return merge(self)
        finally:
            self.states.train(before)
    return functools.wraps(merge)(run)


class Tuned(nn.Module):
    """A model with a chain attached. Call it, generate with it, train it as the model it wraps."""

    def __init__(self, model, todo, host, owner, seed):
        super().__init__()
        self.model, self.states = model, nn.ModuleDict()
        self.chain, self.notes, self.seed, self.k, self.total_steps = todo.chain, todo.notes, seed, 0, None
        self.stepped = self.forwards = 0
        self._last = Noted()                                # inputs and outputs of a training forward, for methods with a loss
        self.lean = True                                    # keep recipes, not what is cheap to make again: see luthier.remat
        self._plan, self._host, self._owner, self._merged, self._gone = todo, host, owner, [], False
        others = [p for o in host.owners for p in o.states.parameters()]
        self._frozen = [(p, p.requires_grad) for p in dict.fromkeys([*model.parameters(), *others])]
        owner.states = self.states
        owner.chain, owner.base = todo.chain, host.model
        host.owners.append(owner)
        for p, _ in self._frozen:
            p.requires_grad_(False)
        self.forward = _Signed(self, inspect.signature(model.forward))

    # -- building ---------------------------------------------------------------------------------------------------
    def _build(self, data, loss, state):
        known, self._states_of, self._pools = {}, {}, {}
        for step in self._plan.steps:
            m, i = step.method, step.number
            self._states_of[i], pool = {}, self._pools.setdefault(i, {})
            bound = {s: s.bound(seed=self.seed, step=i, pool=pool, n_sites=len(step.sites), rank=r)
                     for r, s in enumerate(step.sites)}
            pool["sites"] = [bound[s] for s in step.sites if s not in step.twins]
            observed, own = m.observes and state is None, m.watch is None
            for group in self._groups(step, observed and own):
                seen = self._calibrate(m, group if own else step.watched, data, loss) if observed else {}
                by_name = {s.name: v for s, v in seen.items()}
                for s in group:
                    self._at(step, s, bound[s], seen.get(s) if own else by_name, state, known)
                self._host.refresh()
            if not self._states_of[i]:
                raise DoesNotFit(f"{m!r} finds nothing to change in {type(self.base).__name__}: none of the {len(step.sites)} "
                                 f"sites it was pointed at has what it needs. Choose others with {type(m).__name__}(at=...).")
        for st in self._host.stacks.values():
            st.length()                                     # asked once, now: refuses streams that cannot hold inserted tokens
        self.train(self.model.training)

    def _groups(self, step, observed):
        """Sites that are calibrated together: block by block where the method changes the model as soon as it is there,
        so that every block is calibrated on what the blocks before it really produce (GPTQ); else all at once."""
        acts = "identity_at_init" in step.method.exempt
        if not (observed and acts):
            return [[s for s in step.sites]]
        groups = defaultdict(list)
        for s in step.sites:
            groups[s.tower, -1 if s.block is None else s.block].append(s)
        return list(groups.values())

    def _at(self, step, s, bound, seen, state, known):
        m, i = step.method, step.number
        if s in step.twins:
            twin = step.twins[s]
            if (st := self._states_of[i].get(twin.name)) is not None:
                self._host.add(Entry(self._owner, m, twin, st, module=s.module, param=s.param))
            return
        key = f"{i}:{type(m).__name__}@{s.name}".replace(".", "/")
        def init():
            return call(m, "init", site=bound, seen=seen, rows=slice(None), model=self.base)
        made = init() if state is None else state(key, init)
        if made is None:
            return
        for n, v in made.items():                           # a tensor shared by sites stays one object
            if isinstance(v, nn.Parameter):
                made[n] = known.setdefault(id(v), v)
        p = State(made, f"{i}:{type(m).__name__}", s.name)
        if s.kind == "weight" and s.layout in ("stack", "raw") and not s.bias and m.has("weight") and "b" in m.wants("weight"):
            with torch.no_grad():                           # asked, not declared: merging sets a bias only where there is one
                _, b = call(m, "weight", W=s.W, b=s.W.new_zeros(s.d_out), p=p)
            if b is not None:
                raise DoesNotFit(f"{type(m).__name__} sets a bias, and {s.name} has none and cannot be given one. "
                                 f"Leave it out: {type(m).__name__}(at=\"{m.at} -{s.name}\").")
        self.states[key] = self._states_of[i][s.name] = p
        self._host.add(Entry(self._owner, m, s, p))

    def _calibrate(self, m, group, data, loss):
        """Sum observe() over the batches, at the sites of one group; the run stops once the last of them has been seen."""
        name, batches = type(m).__name__, list(data)
        if "g" in m.wants("observe"):                       # a squared gradient is a sample's own, not a batch's
            batches = [{k: v[i:i + 1] for k, v in b.items()} for b in batches for i in range(len(next(iter(b.values()))))]
        if not batches:
            raise DoesNotFit(f"{name} observes the model's inputs before it starts. Pass calibration batches: "
                             f"attach(model, \"{name}(...)\", data=batches).")
        wants_g, seen, handles, state = "g" in m.wants("observe"), {}, [], {}

        def add(s, x, g=None):
            new = call(m, "observe", x=x, **({"g": g} if wants_g else {}))
            seen[s] = new if s not in seen else _add(seen[s], new)

        def inputs(s):
            def hook(module, args):
                add(s, _rows(s, args[0], state.get("mask")))
                state["left"].discard(s)
                if not state["left"]:
                    raise _Enough
            return hook

        def gradients(s):
            rows = slice(*s.rows) if isinstance(s.rows, tuple) else slice(None) if s.rows is None else s.rows

            def hook(module, args, out):                    # each call of the layer keeps its own input
                x = _rows(s, args[0])
                out.register_hook(lambda g: add(s, x, _rows(s, g, out=True)[:, rows]))
            return hook

        for s in group:
            handles.append(s.module.register_forward_hook(gradients(s)) if wants_g else
                           s.module.register_forward_pre_hook(inputs(s)))
        training = self.model.training
        self.model.eval()
        try:
            for batch in batches:
                state["mask"], state["left"] = batch.get("attention_mask"), set(group)
                with torch.set_grad_enabled(wants_g):
                    try:
                        if not wants_g:
                            self.model(**batch)
                            continue
                        flags = [(s.parameter, s.parameter.requires_grad) for s in group]
                        for P, _ in flags:
                            P.requires_grad_(True)
                        out = loss(self.model, batch) if loss else self.model(**batch)
                        value = out if torch.is_tensor(out) else getattr(out, "loss", None)
                        if value is None:
                            raise DoesNotFit(f"{name} observes gradients, and the model returned no loss. Put labels into "
                                             "the batches, or pass loss=lambda model, batch: ...")
                        torch.autograd.grad(value, list({id(P): P for P, _ in flags}.values()), allow_unused=True)
                        for P, flag in flags:
                            P.requires_grad_(flag)
                    except _Enough:
                        pass
        finally:
            for h in handles:
                h.remove()
            self.model.train(training)
        missing = [s.name for s in group if s not in seen]
        if missing:
            raise DoesNotFit(f"{name} saw no input at {', '.join(missing[:3])}: the calibration batches never reach "
                             f"{'it' if len(missing) == 1 else 'them'}. Use batches of the kind the model runs on.")
        return seen

    # -- being the model --------------------------------------------------------------------------------------------
    def forward(self, *args, **kwargs):
        if self._gone:
            raise DoesNotFit("This attachment was detached. Use the model itself, or attach again.")
        if self.training and torch.is_grad_enabled():
            self.forwards += 1
            for st in self.states.values():
                st.noted.clear()
        elif self.forwards >= PATIENCE:
            self._check_stepped()
        transformed = torch._C._functorch.peek_interpreter_stack() is not None      # torch.func takes no hooks
        keep_all = not (self.lean and torch.is_grad_enabled()) or torch.compiler.is_compiling() or transformed
        thawed = self._host.frozen and torch.is_grad_enabled() and not transformed
        if thawed and torch.compiler.is_compiling():
            raise DoesNotFit(f"{type(self.base).__name__} runs a tower of its own without gradients, and compiled there is no "
                             "way around that. Train it uncompiled; compile it afterwards.")
        first = self.training and self.active and torch.is_grad_enabled() and self.forwards == 1 and not (
            transformed or torch.compiler.is_compiling())
        with nullcontext() if keep_all else lean(), Thawed(self._host.frozen) if thawed else nullcontext(), \
                self._unsealed() if first else nullcontext():
            out = self.model(*args, **kwargs)
        if first and not keep_all:
            self._check_learns(out)
        if self.training and self.active and torch.is_grad_enabled() and any(m.has("loss") for m in self.chain):
            self._last.update(args=args, kwargs=kwargs, out=out)
        if self.training and getattr(out, "loss", None) is not None and any(m.has("loss") for m in self.chain):
            out["loss"] = out["loss"] + self.penalty(out)
        return out

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(super().__getattr__("model"), name)

    @property
    def name(self):
        return self._owner.name

    @property
    def base(self):
        return base_of(self)

    @property
    def active(self):
        return self._owner.active

    @active.setter
    def active(self, flag):
        if self._merged and not flag:
            raise NotMergeable("A merged attachment cannot be switched off. unmerge() it first.")
        self._owner.active = bool(flag)
        self._host.refresh()

    @contextmanager
    def off(self):
        """Within, the model runs as if this were not attached."""
        before, self.active = self.active, False
        try:
            yield self
        finally:
            self.active = before

    @property
    def fast(self):
        """False: weight() alone, the specification."""
        return self._host.fast

    @fast.setter
    def fast(self, flag):
        self._host.fast = flag
        self._host.refresh()

    @property
    def context(self):
        """What `produce` makes states from (a task, a layer, a text): set before a forward."""
        return self._owner.context

    @context.setter
    def context(self, value):
        self._owner.context = value

    # -- training ---------------------------------------------------------------------------------------------------
    def train(self, mode=True):
        """Training mode, except that running statistics (batch norm) stand still: they are tensors of the base."""
        super().train(mode)
        for m in self.base.modules():
            if m._buffers.get("running_mean") is not None:
                m.training = False
        return self

    def trainable(self):
        """(name, Parameter) of the states, each once."""
        return [(n, p) for n, p in self.states.named_parameters() if p.requires_grad]

    def _run(self, number, outputs=None, optimizer=None, batch=None):
        found = {s.name: s for s in self._plan.steps[number].sites}
        outputs = self._last.get("out") if outputs is None else outputs
        bare, given = self._bare if self._last else None, {**self._last.get("kwargs", {}), **(batch or {})}
        return Run(self._states_of[number], self.k, self.total_steps, outputs, found, optimizer, bare, given)

    def _bare(self):
        with torch.no_grad(), self.off():
            return self.model(*self._last["args"], **self._last["kwargs"])

    def penalty(self, outputs=None, batch=None):
        """The sum of the chain's extra loss terms; 0.0 when it has none. `batch`: what was trained on, for terms that need
        labels."""
        try:
            return sum((m.loss(self._run(i, outputs, batch=batch)) for i, m in enumerate(self.chain) if m.has("loss")), 0.0)
        finally:
            self._last.clear()

    def step(self, optimizer=None):
        """Advance the chain's schedules: after optimizer.step(), before zero_grad()."""
        self.k, self.stepped, optimizer = self.k + 1, self.stepped + 1, getattr(optimizer, "optimizer", optimizer)
        for i, m in enumerate(self.chain):
            if m.has("step"):
                with torch.no_grad():
                    m.step(self._run(i, optimizer=optimizer))
        moved = [st.moved.popitem()[1] for st in self.states.values() for _ in range(len(st.moved))]
        if moved and optimizer is not None:
            follow(optimizer, moved)

    def _check_stepped(self):
        late = [type(m).__name__ for m in self.chain if m.has("step")]
        if late and self.forwards and not self.stepped:
            raise ScheduleNotStepped(f"{', '.join(late)} has a schedule, and after {self.forwards} training forwards nobody has "
                                     "advanced it. Call tuned.step(optimizer) after every optimizer.step().")

    @contextmanager
    def _unsealed(self):
        """Within, a forward that runs what trains under inference_mode is refused: no gradient ever gets there, nor past it."""
        def enter(module, args):
            if torch.is_inference_mode_enabled():
                raise DoesNotFit(f"{self.chain!r} cannot learn: {type(self.base).__name__} runs {type(module).__name__}, which "
                                 "it tunes, under torch.inference_mode, and what is computed there has no gradients. Choose "
                                 "sites outside of it (`luthier sites`), or write no_grad there: that Luthier can undo.")
        places = [*self._host.patches.values(), *self._host.ports.values()]
        mine = {e.module for p in places for e in p.entries if e.owner is self._owner
                and any(q.requires_grad for q in e.state.parameters())}
        handles = [m.register_forward_pre_hook(enter, prepend=True) for m in mine]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_learns(self, out):
        found = list(_tensors(out))
        if found and self.trainable() and not any(y.requires_grad for y in found):
            raise DoesNotFit(f"{self.chain!r} would learn nothing: {type(self.base).__name__} ran in training mode, and none of "
                             "its outputs depends on what trains. Either the model turns gradients off where no one can "
                             "reach it, or the chain's sites are not used: choose others (`luthier sites`).")

    # -- merging, undoing, storing ----------------------------------------------------------------------------------
    @torch.no_grad()
    @_as_inferring
    def merge(self):
        """Write the change into new weights that take the base ones' place. The base tensors are kept, so undo stays exact."""
        self._check_stepped()
        mergeable(self.chain)
        mine = [(module, p) for module, p in self._host.patches.items() if any(e.owner is self._owner for e in p.entries)]
        for _, patch in mine:
            for e in patch.entries:
                if e.owner is not self._owner:
                    raise BadOrder(f"{e.owner.name!r} is attached to {e.site.name} too. detach() or merge() it first.")
        new, done = [], {}
        for module, patch in mine:                          # all of it is computed before any of it is set
            for param in dict.fromkeys(e.param for e in patch.entries):
                P, b = patch.tensors(param, patch.entries)
                old, bias = fetch(module, param), patch.bias(param)
                shared = (id(old), tuple(id(e.state) for e in patch.entries))     # tied twins stay one Parameter
                new.append((*place(module, param), old, done.setdefault(shared, _frozen(P))))
                if bias and any(e.sets_bias for e in patch.entries):
                    new.append((*place(module, bias), fetch(module, bias), _frozen(b)))
                elif b is not None and not bias:
                    if "bias" not in module._parameters and b.count_nonzero():
                        raise NotMergeable(f"{type(patch.entries[0].method).__name__} gives {patch.entries[0].site.name} a bias, "
                                           f"and a {type(module).__name__} has none. Keep it attached.")
                    if "bias" in module._parameters:
                        new.append((module, "bias", None, _frozen(b)))
        for home, param, _, made in new:
            home._parameters[param] = made
        for module, patch in mine:
            patch.remove()
            del self._host.patches[module]
        self._merged = self._merged or [(new, mine, self._untie(new))]
        self._host.refresh()
        return self

    def _untie(self, new):
        """A config that says the embeddings are tied must not say so once they differ; returns what to put back."""
        config = getattr(self.base, "config", None)
        loose = any(s.tied and s not in step.twins and not set(s.tied) & {t.name for t in step.sites}
                    for step in self._plan.steps for s in step.sites)
        if not loose or not getattr(config, "tie_word_embeddings", False):
            return None
        config.tie_word_embeddings = False
        return config

    def unmerge(self):
        """Back to the base tensors (the very same objects) with the chain attached."""
        for new, mine, config in self._merged:
            for home, param, old, _ in new:
                home._parameters[param] = old
            for module, patch in mine:
                module.forward = patch
                self._host.patches[module] = patch
            if config is not None:
                config.tie_word_embeddings = True
        self._merged = []
        self._host.refresh()
        return self

    def detach(self):
        """Take the chain off and return the model: the same tensor objects, flags, hooks and forwards as before."""
        if not self._gone:
            self.unmerge()
            self._host.drop(self._owner)
            if self._host.owners:
                for p, flag in self._frozen:
                    p.requires_grad_(flag and id(p) not in {id(q) for q, _ in self._host.flags})
            self._gone = True
            for m in self.base.modules() if not self._host.owners else ():
                if m._buffers.get("running_mean") is not None:
                    m.training = self.training
        return self.model

    def save(self, path, **extra):
        """Write recipe.json and state.safetensors, atomically; see luthier.load."""
        from .save import save

        self._check_stepped()
        return save(self, path, **extra)

    def cost(self, batch=None, **options):
        from .cost import cost

        return cost(self, batch=batch, **options)

    def _apply(self, fn, recurse=True):
        """Moving or casting keeps shared frozen tensors shared."""
        before = defaultdict(list)
        for st in self.states.values():
            for n, b in st._buffers.items():
                before[id(b)].append((st, n))
        super()._apply(fn, recurse)
        for group in before.values():
            for st, n in group[1:]:
                st._buffers[n] = group[0][0]._buffers[group[0][1]]
        return self

    def extra_repr(self):
        return f"{self.chain!r}, name={self.name!r}"


def _tensors(out):
    """The numbers in what a model returned."""
    if torch.is_tensor(out):
        yield from [out] if out.is_floating_point() else []
    elif isinstance(out, dict | list | tuple):
        for v in out.values() if isinstance(out, dict) else out:
            yield from _tensors(v)


def mergeable(chain):
    """Refuses what is no change of weights."""
    for m in chain:
        if not m.has("weight") or any(map(m.has, ("output", "stream", "attend", "around"))):
            raise NotMergeable(f"{type(m).__name__} changes the running model, not a weight; keep it attached.")


def _frozen(tensor):
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)


class _Signed:
    """Tuned.forward under the signature of the model's own, which trainers read to choose the columns they pass."""

    def __init__(self, tuned, signature):
        self.tuned, self.__signature__ = tuned, signature

    def __call__(self, *args, **kwargs):
        return Tuned.forward(self.tuned, *args, **kwargs)


class _Enough(Exception):
    """Calibration has seen the last site of its group."""


def _add(a, b):
    return {k: a[k] + b[k] for k in a} if isinstance(a, dict) else tuple(map(torch.add, a, b)) if isinstance(a, tuple) else a + b


def _rows(s, x, mask=None, out=False):
    """A layer's input (or output gradient) as (N, d): tokens flattened, padding left out, conv patches unfolded."""
    if s.layout == "conv":
        m = s.module
        if m.groups != 1:
            raise DoesNotFit(f"{s.name} is a grouped convolution; it cannot be calibrated as one matrix.")
        if not out:
            x = nn.functional.unfold(x, m.kernel_size, m.dilation, m.padding, m.stride)
        return x.flatten(2).mT.flatten(0, 1).detach()
    if mask is not None and x.dim() == 3 and mask.shape == x.shape[:2]:
        return x[mask.bool()].detach()
    return x.flatten(0, -2).detach()


def attached(model):
    """name -> active, of what is on a model."""
    host = Host.of(base_of(model))
    return {o.name: o.active for o in host.owners} if host else {}


def switch(model, *names):
    """Activate exactly these attachments of a model."""
    host = Host.of(base_of(model))
    known = {o.name: o for o in host.owners} if host else {}
    for n in names:
        if n not in known:
            from .errors import UnknownName, nearest

            raise UnknownName(f"Nothing named {n!r} is attached. {nearest(n, known)}")
    for o in known.values():
        o.active = o.name in names
    if host:
        host.refresh()


__all__ = ["LuthierError", "Plan", "Run", "Tuned", "attach", "attached", "base_of", "plan", "switch"]
