"""What the runners share: real tasks cut to size, and chains trained on them under the same small search for a learning rate.

Every arm, the baselines included, climbs the same grid of rates from its middle, on a seed of its own, scored on the validation
split; its best rate is then used for every seed, and only those runs are scored on the test split.
"""

import contextlib
import math
import sys

import torch
from torch import nn

from luthier import attach, cost, tasks
from luthier.attach import base_of
from luthier.compare.fit import Calibration, aware
from luthier.errors import RunStopped
from luthier.evidence import fact
from luthier.site import sites
from luthier.train import train

TUNE = 9001                              # the seed of the search: far from those of the runs
RATES = (1e-4, 5e-4, 3e-3, 2e-2, 1e-1)


def task(data, model, train=400, val=150, test=400, **options):
    """A task whose splits are cut to size, the same rows for every seed."""
    return tasks.open(data, model=model, limit={"train": train, "val": val, "test": test}, **options)


def trained(task, chain, seed, lr, steps, batch=16, head=True):
    """A fresh model with the chain (and the task's head) on it, trained; the seed sets head, state and order of the data."""
    data = Calibration(task, batch, seed)
    tuned = attach(task.build(seed), aware(with_head(chain) if head else chain, task), data, seed=seed, loss=task.loss)
    train(tuned, task, steps=steps, lr=lr, batch_size=batch, seed=seed, progress=False, log=False)
    return tuned.eval()


def with_head(chain):
    """The chain, and `probe` at its end where nothing in it trains the head."""
    return chain if any(m in chain for m in ("probe", "full")) else f"{chain} >> probe()"


def score(tuned, task, split="test"):
    with torch.no_grad():
        return float(task.evaluate(tuned, split)[task.metric])


def search(task, chain, steps, batch, rates=RATES, head=True):
    """The best rate of the grid on the validation split, climbing from its middle; a rate that diverges is out."""
    found, sign = {}, 1 if task.higher else -1

    def worth(i):
        lr = rates[i]
        if lr not in found:
            found[lr] = math.nan
            with contextlib.suppress(RunStopped):
                found[lr] = score(trained(task, chain, TUNE, lr, steps, batch, head), task, "val")
        return sign * found[lr] if math.isfinite(found[lr]) else -math.inf

    return rates[climb(worth, len(rates))], {k: v for k, v in found.items() if math.isfinite(v)}


def climb(worth, n):
    """The place 0..n-1 of a peak of worth(i), from the middle upwards while it rises, else downwards."""
    i = n // 2
    for way in (1, -1):
        while 0 <= i + way < n and worth(i + way) > worth(i):
            i += way
    return i


def arms(task, chains, seeds, steps, batch=16, rates=RATES, after=None, head=True):
    """Train every chain of {name: text} over the seeds. -> per_seed {name: scores}, facts {rates, tried, trained parameters}.
    `after(name, seed, tuned)` may give more figures a seed, stored as `name.key`."""
    per_seed, facts = {}, {"learning_rate": {}, "validation": {}, "trained_parameters": {}, "steps": steps, "batch": batch}
    for name, chain in chains.items():
        lr, tried = search(task, chain, steps, batch, rates, head)
        facts["learning_rate"][name], facts["validation"][name] = lr, {f"{k:g}": v for k, v in tried.items()}
        for seed in seeds:
            tuned = trained(task, chain, seed, lr, steps, batch, head)
            facts["trained_parameters"][name] = sum(p.numel() for _, p in tuned.trainable())
            per_seed.setdefault(name, []).append(score(tuned, task))
            for key, value in (after(name, seed, tuned) if after else {}).items():
                per_seed.setdefault(f"{name}.{key}", []).append(value)
            say(f"{name} seed {seed}: {per_seed[name][-1]:.4f}")
    return per_seed, facts


def body(tuned):
    """Trained parameters but the head's: what the methods themselves spend."""
    return sum(p.numel() for n, p in tuned.trainable() if ":probe@" not in n)


def first(task, split="train", size=8):
    """One batch."""
    return next(iter(task.batches(split, size, seed=0, epoch=0)))


@torch.no_grad()
def logits(model, batch):
    """Logits, or the last hidden state of a model without a head."""
    out = model(**{k: v for k, v in batch.items() if k != "labels"})
    return getattr(out, "logits", getattr(out, "last_hidden_state", out))


@torch.no_grad()
def shake(tuned, seed=0, by=0.02):
    """Move every trained number a little, so that identities are tested away from the start."""
    g = torch.Generator().manual_seed(seed)
    for _, p in tuned.trainable():
        p.add_(by * torch.randn(p.shape, generator=g))
    return tuned


def mechanics(model, batch, chain, seed=0, by=0.02):
    """Largest differences of logits: at init from the base, merged from unmerged; parameters that merging adds."""
    model.eval()
    base, count = logits(model, batch), sum(p.numel() for p in model.parameters())
    tuned = attach(model, chain, seed=seed)
    tuned.eval()
    found = {"init_gap": gap(logits(tuned, batch), base), "trained": sum(p.numel() for _, p in tuned.trainable())}
    moved = logits(shake(tuned, seed, by), batch)
    found["moved"] = gap(moved, base)
    tuned.merge()
    found["merge_gap"] = gap(logits(tuned, batch), moved) / max(1.0, float(moved.abs().max()))
    found["extra_parameters"] = sum(p.numel() for p in tuned.model.parameters()) - count
    tuned.detach()
    found["undo_gap"] = gap(logits(model, batch), base)
    return found


def exact(m, near=1e-5):
    """What `mechanics` found, as claims."""
    start = f"equals the base at init: largest logit difference {m['init_gap']:.1e}, needed below {near:g}"
    merged = (f"merged equals unmerged: relative difference {m['merge_gap']:.1e}, needed below {near:g} "
              f"(the shaken state moved logits by {m['moved']:.2g})")
    return [fact(m["init_gap"] < near, start), fact(m["merge_gap"] < near < m["moved"], merged)]


def gap(a, b):
    return float((a - b).abs().max())


def memory(tuned, task, batch):
    """Bytes of one training step: kept for the backward pass, and the most alive at once, weights and gradients included."""
    def step():
        (task.loss(tuned, batch) + tuned.penalty()).backward()

    held = [*tuned.parameters(), *tuned.buffers(), *(v for v in batch.values() if torch.is_tensor(v))]
    tuned.train()
    found = {"saved": cost.saved(lambda: task.loss(tuned, batch), held), "peak": cost.peak(step, held)}
    for p in tuned.parameters():
        p.grad = None
    tuned.eval()
    return found


def approach(chain, W, delta, seed, lr, steps):
    """Train a chain on one bias-free layer W (d, d) until it computes W + Δ -> (‖W' - W - Δ‖² / ‖Δ‖², the attachment)."""
    model = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], bias=False))
    model[0].weight.data.copy_(W)
    tuned = attach(model, chain, seed=seed)
    optimizer = torch.optim.Adam([p for _, p in tuned.trainable()], lr=lr)
    eye = torch.eye(W.shape[1])
    for k in range(steps):                                   # all unit inputs at once: the expected loss itself
        optimizer.param_groups[0]["lr"] = lr * (1 - k / steps)
        loss = (tuned(eye).T - W - delta).square().sum() / delta.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach()), tuned


def say(text):
    print(text, file=sys.stderr, flush=True)


class Shifted:
    """An image task of which some splits are shifted."""

    def __init__(self, task, *splits):
        self.task, self.splits = task, splits

    def __getattr__(self, name):
        return getattr(self.task, name)

    def batches(self, split, size, seed=0, epoch=0, **more):
        for k, batch in enumerate(self.task.batches(split, size, seed=seed, epoch=epoch, **more)):
            yield dict(batch, pixel_values=shifted(batch["pixel_values"], k + 1000 * epoch)) if split in self.splits else batch

    def evaluate(self, model, split="test"):
        right = [logits(model, b).argmax(-1) == b["labels"] for b in self.batches(split, 64, shuffle=False)]
        return {self.task.metric: float(torch.cat(right).float().mean())}


def shifted(x, seed=0):
    """Half the contrast, Gaussian noise of 0.3, brightness up by 0.2, moved by a sixteenth: on normalised pixels (B, 3, H, W)."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return 0.5 * x.roll((x.shape[2] // 16, x.shape[3] // 16), (2, 3)) + 0.3 * noise + 0.2


# -- several image-text tasks on one model ----------------------------------------------------------------------------

def seeing(model, chain):
    """The chain, with what stands between a vision and a language model trained beside it where there is such a thing."""
    between = "connector" in sites(model).towers and "connector" not in chain
    return f"full(at='connector') >> {chain}" if between else chain


def fits(model, budget, text, widths):
    """The chain `text.format(w)` of the largest of these widths that trains no more than `budget` numbers."""
    counts = {}
    for w in widths:
        tuned = attach(model, seeing(model, text.format(w)))
        counts[w] = sum(p.numel() for _, p in tuned.trainable())
        tuned.detach()
    return text.format(max(w for w in widths if counts[w] <= budget))


def frozen(task, seed, tuned):
    """1.0 if every tensor of the base is, to the bit, what it was before training."""
    before, now = task.build(seed).state_dict(), base_of(tuned).state_dict()
    return float(before.keys() == now.keys() and all(torch.equal(before[k], now[k]) for k in before))
