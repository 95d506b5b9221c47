"""One way of tuning, fitted once: build the model, attach the chain, train. `luthier tune` does it, and every entry here."""

from ..attach import attach, plan
from ..errors import DoesNotFit
from ..method import parse
from ..train import train

HEAD, WHOLE = "probe()", "full()"                # the two baselines: the head alone, and everything
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
    """The chain, and the probe behind it where the task gave the model a new head that no method of the chain touches."""
    chain = parse(chain)
    head = _new_head(model)
    touched = head is None or any(s.module is head for step in plan(model, chain).steps for s in step.sites)
    return chain if touched else chain >> parse(HEAD)


def _new_head(model):
    """The head that the task made (luthier.tasks.Headed), if it made one."""
    from ..tasks import Headed

    return model.head if isinstance(model, Headed) else None


def ready(task, chain, seed=0, batch_size=32, model=None):
    """A fresh model with the chain (and a head that trains) attached."""
    model = task.build(seed=seed) if model is None else model
    tuned = attach(model, dress(model, chain), Calibration(task, batch_size, seed), seed=seed, loss=task.loss)
    head = _new_head(model)
    if head is not None and not any(p.requires_grad for e in _entries(tuned, head) for p in e.state.parameters()):
        raise DoesNotFit(f"In {parse(chain)!r} nothing trains the new head, though a method changes it. Leave the head out with "
                         "at=\"... -head\", or end the chain with >> probe().")
    return tuned


def _entries(tuned, module):
    patch = tuned._host.patches.get(module)
    return [e for e in patch.entries if e.owner is tuned._owner] if patch else []


def fit(task, chain, *, seed=0, batch_size=32, **training):
    """-> (tuned, history); the keyword arguments are luthier.train.train's."""
    tuned = ready(task, chain, seed, batch_size)
    return tuned, train(tuned, task, seed=seed, batch_size=batch_size, **training)
