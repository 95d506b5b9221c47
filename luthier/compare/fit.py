"""One way of tuning, fitted once: build the model, attach the chain, train. `luthier tune` does it, and every entry here."""

from dataclasses import replace

from ..attach import attach, plan
from ..errors import DoesNotFit
from ..method import Chain, parse
from ..train import train

WHOLE = "full()"                                 # the baseline in which everything trains
BATCHES = 8                                      # of training data that methods which observe get to see


class Calibration:
    """The first batches of the train split, made when a method asks for them; can be gone through again and again."""

    def __init__(self, task, size, seed):
        self.args = task, size, seed

    def __iter__(self):
        task, size, seed = self.args
        for i, batch in enumerate(task.batches("train", size, seed=seed)):
            if i == BATCHES:
                return
            yield batch


def dress(model, chain):
    """The chain, and behind it what trains the part that starts untrained (a task's new head, a bridge's connector) where no
    method of the chain touches that."""
    chain, (fresh, rest) = parse(chain), _fresh(model)
    touched = not fresh or any(s.module in fresh for step in plan(model, chain).steps for s in step.sites)
    return chain if touched else chain >> parse(rest)


def _fresh(model):
    """The modules of a model that start untrained, and the chain that trains them."""
    part, chain = getattr(model, "fresh", None) or (None, "")
    return set(part.modules()) if part is not None else set(), chain


def aware(chain, task):
    """The chain, its methods whose state depends on the task told the names of this data's tasks."""
    names = tuple(getattr(task, "kinds", ()))
    return Chain(replace(m, tasks=names) if names and getattr(m, "tasks", None) == () else m for m in parse(chain))


def ready(task, chain, seed=0, batch_size=32, model=None):
    """A fresh model with the chain (and a head that trains) attached."""
    model, chain = task.build(seed=seed) if model is None else model, aware(chain, task)
    tuned = attach(model, dress(model, chain), Calibration(task, batch_size, seed), seed=seed, loss=task.loss)
    fresh, rest = _fresh(model)
    if fresh and not any(p.requires_grad for m in fresh for e in _entries(tuned, m) for p in e.state.parameters()):
        raise DoesNotFit(f"In {parse(chain)!r} nothing trains the part of {type(model).__name__} that starts untrained, though a "
                         f"method changes it. Leave that out, as with at=\"... -head\", or end the chain with >> {rest}.")
    return tuned


def _entries(tuned, module):
    patch = tuned._host.patches.get(module)
    return [e for e in patch.entries if e.owner is tuned._owner] if patch else []


def fit(task, chain, *, seed=0, batch_size=32, **training):
    """-> (tuned, history); the keyword arguments are luthier.train.train's."""
    tuned = ready(task, chain, seed, batch_size)
    if not tuned.chain:                              # `none`: what the model can do without any tuning
        return tuned.eval(), {"loss": [], "steps": 0, "seconds": 0.0}
    return tuned, train(tuned, task, seed=seed, batch_size=batch_size, **training)
