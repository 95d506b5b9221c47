"""What attaches: a Method is frozen hyperparameters plus verbs; everything else about it is derived.

The verbs are pure functions of the state `p`, and each takes, by name, only what it needs:

    observe(x[, g])          additive statistic of a weight site's input x: (N, d_in) [and output gradient g: (N, d_out), one
                             sample at a time]; over calibration batches, at the sites of `watch`
    init(site, seen, model)  state at one site: Parameter trains, Tensor is frozen, site.fixed(...) is recomputed; None skips it;
                             seen: the statistic of this site, or {site name: statistic} of the watched ones; with `rows`,
                             a slice: the state for site.part(rows) alone, and weight() is then given no more of W and b (so a
                             merged model can be written a few rows at a time: see luthier.merging)
    weight(W, p[, b])        new weight, (d_out, d_in) -> same; with `b`, (weight, bias); without `W` the base is not needed
    low_rank(p[, W])         the same change as thin factors, dict(A=, B=, scale=, dropout=, gain=): W' = gain ⊙ (W + scale·B A),
                             gain: (d_out,), the rest but A and B optional; fast() follows from it
    fast(x, y, p[, W, b])    the same change, cheaper: the layer's input x and output so far y -> new y; checked against weight
    worth(n, d_in, d_out)    whether fast() is cheaper than weight() for n tokens; without this verb it always is
    output(x, y, p[, W])     what no weight can do: a linear layer's input x and output y, after all changes of its weight W
                             -> new y. At linear layers it takes the place of weight(), which a method may have for others
    stream(t, p)             change of a token stream, Tokens -> Tokens
    around(f, t, p)          a module with a stream in and out (a block, an MLP): f(t) runs it, Tokens -> Tokens; may run it
                             twice, on another stream, in the backward pass, or not at all. f.trained(): what its gradient goes to
    attend(a, p)             change of an attention core, Attention -> Attention (or the output itself, a Tensor)
    loss(run)                extra training term
    step(run)                schedule, after every optimizer step while the gradients are still there
    produce(ctx, p)          state produced from a context, laid over p: tuned.context, and what the model itself offers in the
                             running forward as its attribute `context`, a dict (a classifier by names: {"image": its features});
                             within ctx["asleep"]() the model runs bare. A method whose state depends on the task has a field
                             `tasks`, filled with the names of the data's tasks where it is empty; the context then names one
                             under "task", see `chosen`
"""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import math
import sys
import types
import typing
from pathlib import Path

from . import thin
from .errors import BadChain, UnknownName, nearest

VERBS = ("observe", "init", "weight", "low_rank", "fast", "worth", "output", "stream", "around", "attend", "loss", "step",
         "produce")
REGISTRY: dict[str, object] = {}        # name -> Method subclass, or a recipe: a function that returns a Chain
INCLUDED: dict[str, None] = {}          # files of the user's own methods: other processes must read them, too


class Declared:
    """Frozen hyperparameters, checked, and written as text: what methods and bridges are."""
    limits: typing.ClassVar[dict] = {}  # hyperparameter -> (lowest, highest); else: positive where the default is positive

    def __post_init__(self):
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _fit(type(self), f, getattr(self, f.name)))

    def __repr__(self):                 # only what differs from the defaults; parses back to an equal one
        said = [f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(said)})"


class Method(Declared):
    at = ""                             # which sites: a selector, see luthier.site.find
    watch = None                        # which sites observe() looks at; None: those it acts on; "": none, so no data is needed
    exempt: typing.ClassVar[dict] = {}  # contract -> why this method cannot keep it; strict: a needless exemption fails
    example: typing.ClassVar[dict] = {}  # hyperparameters for checks on tiny models, where the defaults do not suit

    def __rshift__(self, other):
        return Chain((self,)) >> other

    @classmethod
    def has(cls, verb):
        return hasattr(cls, verb)

    def __init_subclass__(cls):
        if hasattr(cls, "low_rank") and not hasattr(cls, "fast"):
            cls.fast = _beside_weight if "W" in inspect.signature(cls.low_rank).parameters else _beside
        cls._wants = {v: tuple(n for n in inspect.signature(getattr(cls, v)).parameters if n != "self")
                      for v in VERBS if hasattr(cls, v)}

    @classmethod
    def wants(cls, verb):
        """The names of the arguments that a verb asks for."""
        return cls._wants[verb]

    @classmethod
    def is_thin(cls):
        """Whether fast() is the one that follows from low_rank(): a fast() of its own comes first."""
        return cls.has("low_rank") and cls.fast in (_beside, _beside_weight)

    @property
    def observes(self):
        return self.has("observe") and self.watch != ""

    @classmethod
    def discards(cls):
        """Whether the base weight is not needed once the state is there: derived from the signature, never declared."""
        return cls.has("weight") and "W" not in cls.wants("weight")


def _beside(self, x, y, p):
    return thin.plain(x, y, **self.low_rank(p), training=p.training)


def _beside_weight(self, x, y, p, W, b):
    return thin.plain(x, y, **self.low_rank(p, W), b=b, training=p.training)


def call(method, verb, **have):
    """Run a verb with the arguments it names."""
    return getattr(method, verb)(**{n: have[n] for n in method.wants(verb)})


def chosen(ctx, key, names):
    """For `produce`: the place among `names` of the name that the context holds under `key`; a list of places where it holds one
    for each row. A state that is the same for all (no names) is at 0."""
    said = ctx.get(key) if names else None
    for name in said if isinstance(said, list | tuple) else [said]:
        if names and name not in names:
            near = f"{name!r}. {nearest(name, names)}" if name is not None else "none."
            raise UnknownName(f"This state is for the {key}s {', '.join(names)}, and the context names {near} "
                              f"Set tuned.context = {{{key!r}: {names[0]!r}}}, or a list with one for each row.")
    return [names.index(name) for name in said] if isinstance(said, list | tuple) else names.index(said) if names else 0


def _fit(cls, f, value):
    """The value of one hyperparameter, checked against its annotation and limits."""
    def bad(why):
        return BadChain(f"{cls.__name__}({f.name}={value!r}): {why}. The default is {f.default!r}."
                        if f.default is not dataclasses.MISSING else f"{cls.__name__}({f.name}={value!r}): {why}.")

    kind = f.type if not isinstance(f.type, str) else _annotation(cls, f.name)
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union else (kind,)
    if typing.get_origin(kind) is typing.Literal:
        if value not in (words := typing.get_args(kind)):
            raise bad(f"must be one of {', '.join(map(repr, words))}")
        return value
    names = [getattr(k, "__name__", str(k)) for k in kinds]
    if float in kinds and type(value) is int and int not in kinds:
        value = float(value)
    if tuple in [typing.get_origin(k) or k for k in kinds] and isinstance(value, list | str):
        value = (value,) if isinstance(value, str) else tuple(value)
    if not any(k is object or type(value) is (typing.get_origin(k) or k) or (value is None and k is type(None)) for k in kinds):
        raise bad(f"must be {' or '.join(names)}, not {type(value).__name__}")
    if type(value) in (int, float):
        number = isinstance(f.default, int | float) and not isinstance(f.default, bool)
        low = 0 if number and f.default >= 0 else -math.inf
        low = 1 if number and type(f.default) is int and f.default >= 1 else low
        low, high = cls.limits.get(f.name, (low, math.inf))
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        if not math.isfinite(value) or not low <= value <= high:
            raise bad(f"must lie in [{low}, {high}]")
    return value


def _annotation(cls, name):
    return typing.get_type_hints(cls)[name]


class Chain(tuple):
    """`a >> b`: what is attached, in order; the same text in Python, on the command line, in a checkpoint and in `repr`."""

    def __rshift__(self, other):
        return Chain(tuple(self) + (tuple(other) if isinstance(other, tuple) else (other,)))

    def __rrshift__(self, other):
        return Chain((other,)) >> self

    def __repr__(self):
        return " >> ".join(map(repr, self)) or "none"       # the model as it is: zero-shot, a baseline beside those that train


# -- the registry ---------------------------------------------------------------------------------------------


def method(cls):
    """Register a method under its file's own name: file = class = registry key = command-line word = docs page = test id."""
    return _register(dataclasses.dataclass(frozen=True, repr=False)(cls))


def recipe(fn):
    """Register a function that returns a Chain, under its file's own name: a published combination as the chain it is."""
    return _register(fn)


def _register(thing):
    name, home = thing.__name__, thing.__module__.rsplit(".", 1)[-1]
    if name != home and thing.__module__ != "__main__":
        raise BadChain(f"{thing.__module__} must define a method named after the file, {home!r}, not {name!r}.")
    known = REGISTRY.setdefault(name, thing)
    if known is not thing and _source(known) != _source(thing):
        raise BadChain(f"Two methods are named {name!r}: {_source(known)} and {_source(thing)}. Rename one file.")
    REGISTRY[name] = thing
    return thing


def _source(thing):
    return getattr(sys.modules.get(thing.__module__), "__file__", thing.__module__)


@functools.cache
def _discover():
    from . import methods

    root = Path(methods.__file__).parent
    for f in sorted(root.rglob("*.py")):                   # folders by what is changed; a file that starts with _ is a helper
        if not f.name.startswith("_"):
            importlib.import_module(".".join([methods.__name__, *f.relative_to(root).with_suffix("").parts]))


def discover():
    """name -> Method subclass or recipe, of every file under luthier/methods and every file imported by `include`."""
    _discover()
    return REGISTRY


def include(path):
    """Import a method file of the user's own (`--import my_method.py`); returns the names it registered."""
    path, known = Path(path), set(discover())
    if not path.is_file() or path.suffix != ".py":
        raise BadChain(f"--import {path}: no such Python file. Give the path of one file that defines a @method class.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    new = sorted(set(REGISTRY) - known) or [n for n, m in REGISTRY.items() if m.__module__ == path.stem]
    if not new:
        raise BadChain(f"--import {path}: the file defines no @method class. See `luthier methods` for examples.")
    INCLUDED[str(path.resolve())] = None
    return new


def lookup(name):
    found = discover().get(name)
    if found is None:
        raise UnknownName(f"No method is named {name!r}. {nearest(name, REGISTRY)} List them with `luthier methods`.")
    return found


# -- the text of a chain --------------------------------------------------------------------------------------


def parse(text):
    """`"lora(rank=8) >> ssf()"` -> Chain. Literals only: nothing in the text is ever executed."""
    if isinstance(text, Method):
        return Chain((text,))
    if isinstance(text, tuple):
        return Chain(text)
    return _chain(tree(text), text)


def split(text):
    """`"probe, full, lora(rank=8) >> ssf()"` -> a list of chains."""
    node = tree(text)
    return [_chain(e, text) for e in (node.elts if isinstance(node, ast.Tuple) else [node])]


def tree(text):
    if not isinstance(text, str) or not text.strip():
        raise BadChain(f"{text!r} is not a chain. Write for example \"lora(rank=8) >> ssf()\".")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise BadChain(f"{text!r} does not parse as a chain ({getattr(e, 'msg', e)}). "
                       "Write for example \"lora(rank=8) >> ssf()\".") from None


def _chain(node, text):
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.RShift):
        return _chain(node.left, text) >> _chain(node.right, text)
    if isinstance(node, ast.Name) and node.id == "none":
        return Chain(())
    made = declared(node, text, lookup)
    return made if isinstance(made, Chain) else Chain((made,))


def declared(node, text, lookup):
    """What one `name(key=value)` of a text says, its name looked up by `lookup`."""
    name = node.func if isinstance(node, ast.Call) else node
    if not isinstance(name, ast.Name):
        raise BadChain(f"{ast.unparse(node)!r} in {text!r} is not a method. Chains are method(key=value) joined by >>.")
    found = lookup(name.id)
    if isinstance(node, ast.Call) and node.args:
        raise BadChain(f"{ast.unparse(node)!r}: hyperparameters are given by name, as in {name.id}({_fields(found)[0]}=...).")
    known, given = _fields(found), {}
    for k in node.keywords if isinstance(node, ast.Call) else ():
        if k.arg not in known:
            raise BadChain(f"{name.id} has no hyperparameter {k.arg!r}. {nearest(k.arg, known)}")
        if k.arg in given:
            raise BadChain(f"{name.id}({k.arg}=...) is given twice in {text!r}.")
        try:
            given[k.arg] = ast.literal_eval(k.value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise BadChain(f"{name.id}({k.arg}={ast.unparse(k.value)}): values are plain numbers, strings, "
                           "True, False, None or tuples of them.") from None
    need = [p.name for p in inspect.signature(found).parameters.values() if p.default is p.empty and p.name not in given]
    if need:
        raise BadChain(f"{name.id} needs {', '.join(need)}: write {name.id}({', '.join(n + '=...' for n in need)}).")
    return found(**given)


def _fields(found):
    return [*inspect.signature(found).parameters]
