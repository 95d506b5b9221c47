"""Which blocks a task can do without: a k-armed bandit over modules, while adapters that stand in for them are trained.
Wu et al., DAS, NeurIPS 2023. arXiv:2309.01479 §3.3, algorithm 1, and the authors' code. r: a preference a module, 0 at first;
π = σ(r). Each training step draws k of the n modules with weights π, without replacement, and skips them: their adapters train.
After a warm-up, every `turn` steps, m different draws are tried on a batch of the validation split, without training:

    v_h = exp(-L_h),    r_i <- r_i + rate · Σ_{h: i skipped in h} (v_h - mean v) π_i (1 - π_i)

The k modules of the highest r are the most redundant. They are skipped for good: train the chain that comes back from the start.
"""

import dataclasses
import itertools
import math
from dataclasses import dataclass

import torch

from luthier.attach import attach
from luthier.compare.fit import Calibration, dress
from luthier.errors import DoesNotFit
from luthier.method import Chain, lookup, parse
from luthier.site import find
from luthier.train import train


class Bandit:
    """n arms, of which k are pulled together."""

    def __init__(self, n, k, rate=1.0, seed=0):
        self.r, self.k, self.rate, self.source = torch.zeros(n), k, rate, torch.Generator().manual_seed(seed)

    @property
    def policy(self):
        return self.r.sigmoid()

    def draw(self):
        return tuple(torch.multinomial(self.policy, self.k, generator=self.source).sort()[0].tolist())

    def draws(self, m):
        """m different ones, or as many as there are."""
        found = {}
        while len(found) < min(m, math.comb(len(self.r), self.k)):
            found[self.draw()] = None
        return list(found)

    def learn(self, draws, losses):
        v, p = [math.exp(-x) for x in losses], self.policy
        mean = sum(v) / len(v)
        for chosen, reward in zip(draws, v, strict=True):
            for i in chosen:
                self.r[i] += self.rate * (reward - mean) * p[i] * (1 - p[i])

    def best(self):
        return sorted(self.r.sort(stable=True, descending=True)[1][:self.k].tolist())


@dataclass(frozen=True)
class Found:
    """chain: what to train; skipped: names of sites; preferences: {name: r}; tried: how many subnetworks gave rewards."""
    chain: Chain
    skipped: tuple
    preferences: dict
    tried: int


def das(task, skip, *, at="block.*.out", width=96, beside="", steps=300, warmup=0.2, turn=10, samples=3, rate=1.0, lr=1e-3,
        batch_size=16, seed=0):
    """The `skip` of the blocks `at` that this task's model needs least, and the chain that skips them.

    beside   methods for the blocks that stay; their sites inside skipped blocks are left out of the chain that comes back
    steps    of training with a random subnetwork each; the first `warmup` share of them gives no rewards
    turn     steps between two rounds of rewards, of `samples` subnetworks each
    """
    model = task.build(seed)
    names = [s.name for s in find(model, at)]
    if not 0 < skip < len(names):
        raise DoesNotFit(f"das(skip={skip}): {at!r} names {len(names)} blocks. Skip at least one, and not all of them.")
    chain = parse(_skip(names, width)) >> (parse(beside) if beside else Chain())
    tuned = attach(model, dress(model, chain), Calibration(task, batch_size, seed), seed=seed, loss=task.loss)
    states = [next(p for k, p in tuned.states.items() if p.site_name == n and hasattr(p, "skips")) for n in names]
    bandit, tried = Bandit(len(names), skip, rate, seed), 0
    held = (b for epoch in itertools.count() for b in task.batches("val", batch_size, seed, epoch, shuffle=True))

    def only(chosen):
        for i, p in enumerate(states):
            p.skips = i in chosen

    def after(k, total, loss):
        nonlocal tried
        if k > warmup * total and k % turn == 0:
            batch, draws, losses = next(held), bandit.draws(samples), []
            tuned.eval()
            with torch.no_grad():
                for chosen in draws:
                    only(chosen)
                    losses.append(float(task.loss(tuned, batch)))
            tuned.train()
            bandit.learn(draws, losses)
            tried += len(draws)
        only(bandit.draw())

    only(bandit.draw())
    train(tuned, task, steps=steps, lr=lr, batch_size=batch_size, seed=seed, progress=after, log=False)
    skipped = tuple(names[i] for i in bandit.best())
    return Found(skipping(model, skipped, width, beside), skipped, dict(zip(names, bandit.r.tolist(), strict=True)), tried)


def skipping(model, skipped, width=96, beside=""):
    """The chain that skips these blocks, with `beside` in all others."""
    gone = {(s.tower, s.block) for s in find(model, " ".join(skipped))}
    rest = Chain()
    for m in parse(beside) if beside else ():
        drop = [f"-{s.name}" for s in find(model, m.at) if s.block is not None and (s.tower, s.block) in gone]
        rest >>= dataclasses.replace(m, at=" ".join([m.at, *drop]))
    return parse(_skip(skipped, width)) >> rest


def _skip(names, width):
    return Chain((lookup("das")(at=" ".join(names), width=width),))
