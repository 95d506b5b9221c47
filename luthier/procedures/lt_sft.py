"""Lottery-ticket sparse fine-tuning: which few parameters to train is learned by training them all once.
    1. tune every parameter:  θ_full      2. keep the K that moved most, over the whole model: M = top_K |θ_full - θ₀|
    3. rewind to θ₀               4. tune again, only where M:  φ = θ - θ₀, K numbers and their places
Ansell et al., Composable Sparse Fine-Tuning, 2022. arXiv:2110.07560 §3, Alg. 1 (one selection; head rewound and trained in full).
Two such φ, say of a task and of a language, compose by being attached together: θ₀ + φ_task + φ_language.
"""

from pathlib import Path

from luthier.attach import attach
from luthier.method import parse
from luthier.train import train


def lt_sft(model, task, out, density=0.01, at="all -head", beside="probe()", seed=0, name=None, **options):
    """The model with φ attached, trained; `options` go to both phases' `train` (steps, lr, batch_size, ...).

    out      folder: out/full holds the full fine-tune that chose the places (dense; delete it when done), out/phi the result
    beside   what is trained in full in both phases and not counted in K: the task's head; "" for none
    """
    def tune(chain, folder):
        tuned = attach(model, parse(f"{chain} >> {beside}" if beside else chain), seed=seed, name=name)
        try:
            train(tuned, task, seed=seed, **options)
            tuned.save(Path(out) / folder)
        except BaseException:
            tuned.detach()
            raise
        return tuned

    tune(f"full(at={at!r})", "full").detach()
    return tune(f"sparse(at={at!r}, density={density}, change={str(Path(out) / 'full')!r})", "phi")
