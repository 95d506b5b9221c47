"""Learning-rate schedules as text: `linear`, `cosine(floor=0.1)`, `step(at=(0.5, 0.75), by=0.1)`, `uba(phi=5)`.

A schedule is a pure function of x, the share of the step budget that is spent after warmup: 1 at x = 0, 0 at x = 1 (but
`constant` and `step`). `floor`, which each of them takes, is the share of the rate that the end keeps: floor + (1 - floor) f(x).
"""

import ast
import functools
import inspect
import math

from .errors import BadChain, UnknownName, nearest


def constant(x):
    return 1.0


def linear(x):
    return 1 - x


def cosine(x):
    return (1 + math.cos(math.pi * x)) / 2


def step(x, at=(0.5, 0.75), by=0.1):
    """Times `by` at each share of the budget in `at`."""
    return by ** sum(x >= a for a in at)


def uba(x, phi):
    """Unified budget-aware: 2c / (2φ + (2 - φ) c), c = 1 + cos πx. Tang et al., Stepsize anything, 2025. arXiv:2505.24452 §3.
    φ = 2 is the cosine; a smaller φ keeps the rate high for longer, a larger one (a worse condition number) lets it fall.
    Checked against one implementation by others only, not against the paper's own text."""
    c = 1 + math.cos(math.pi * x)
    return 2 * c / (2 * phi + (2 - phi) * c)


SCHEDULES = {f.__name__: f for f in (constant, linear, cosine, step, uba)}


@functools.cache
def schedule(text):
    """Text -> f(x). Literals only: nothing in the text is ever executed."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        name = node.func if isinstance(node, ast.Call) else node
        given = {k.arg: ast.literal_eval(k.value) for k in node.keywords} if isinstance(node, ast.Call) else {}
    except (SyntaxError, ValueError, TypeError, AttributeError, RecursionError, MemoryError):
        raise BadChain(f"schedule={text!r} does not parse. Write for example \"cosine\" or \"uba(phi=5)\".") from None
    if not isinstance(name, ast.Name) or isinstance(node, ast.Call) and node.args:
        raise BadChain(f"schedule={text!r}: a name, and options by name, as in \"uba(phi=5)\".")
    if name.id not in SCHEDULES:
        raise UnknownName(f"No schedule is named {name.id!r}. {nearest(name.id, SCHEDULES)} There are {', '.join(SCHEDULES)}.")
    fn, floor = SCHEDULES[name.id], given.pop("floor", 0.0)
    options = dict(list(inspect.signature(fn).parameters.items())[1:])
    for k in given:
        if k not in options:
            raise BadChain(f"The schedule {name.id} has no option {k!r}. {nearest(k, [*options, 'floor'])}")
    for k, p in options.items():
        if p.default is p.empty and k not in given:
            raise BadChain(f"The schedule {name.id} needs {k}: write \"{name.id}({k}=...)\".")
    numbers = [floor, *(v for g in given.values() for v in (g if isinstance(g, tuple) else (g,)))]
    if not all(type(v) in (int, float) and math.isfinite(v) and v >= 0 for v in numbers) or floor > 1 or given.get("phi") == 0:
        raise BadChain(f"schedule={text!r}: options are numbers, none below 0; floor is at most 1 and phi above 0.")
    return lambda x: floor + (1 - floor) * fn(x, **given)
