"""Clips with a name: in which direction does the shape move? Frames come from `scenes.clip`, its first half, in which one shape
moves and another waits. Paths are centred, so the average over frames says nothing of the sense of a direction."""

import inspect

import torch
from torch.nn import functional as F

from luthier import scenes, zoo
from luthier._compat import torchvision
from luthier.clips import framed
from luthier.evidence import _bench
from luthier.site import sites
from luthier.tasks.headed import Headed, head

WAYS = list(scenes.DIRECTIONS)
TEXTS = [f"the shape moves {w}" for w in WAYS]
SIZES = {"train": 320, "val": 160, "test": 320}


class Directions:
    """A task of clips (B, N, 3, side, side) with four classes, on the vision tower of a model; frames are averaged before the
    head."""
    metric, higher, kind = "accuracy", True, "clips"

    def __init__(self, model, frames=4, side=64, sizes=SIZES, seed=0):
        self.model, self.frames, self.side, self.tables, start = model, frames, side, {}, 0
        for split, n in sizes.items():                       # no clip is in two parts
            found = [scenes.clip(i, seed, side, 2 * frames) for i in range(start, start + n)]
            x = torch.stack([torch.from_numpy(c.video()[:frames]) for c in found]).permute(0, 1, 4, 2, 3)      # uint8
            self.tables[split] = x, torch.tensor([WAYS.index(c.directions[0]) for c in found])
            start += n
        facts = zoo.about(model).image if isinstance(model, str) else {}
        self.mean, self.std = (torch.tensor(facts.get(k) or (0.5,) * 3).view(3, 1, 1) for k in ("mean", "std"))

    def pixels(self, x):
        return (x / 255 - self.mean) / self.std

    def n_batches(self, split, size):
        return -(-len(self.tables[split][1]) // size)

    def batches(self, split, size, seed=0, epoch=0, shuffle=None, start=0):
        x, y = self.tables[split]
        g = torch.Generator().manual_seed(1000 * seed + epoch)
        mixed = split == "train" if shuffle is None else shuffle
        order = torch.randperm(len(y), generator=g) if mixed else torch.arange(len(y))
        for at in list(order.split(size))[start:]:
            yield {"pixel_values": self.pixels(x[at]), "labels": y[at]}

    def build(self, seed=0):
        torchvision()
        model = zoo.load(self.model) if isinstance(self.model, str) else self.model()
        eyes = getattr(model, "vision_model", model)
        own, able = getattr(eyes.config, "image_size", self.side), inspect.signature(eyes.forward).parameters
        more = {"interpolate_pos_encoding": True} if own != self.side and "interpolate_pos_encoding" in able else {}
        pool = "own" if eyes is not model else "cls+mean"
        return framed(Headed(eyes, pool, head(eyes.config.hidden_size * (1 + (pool == "cls+mean")), 4, seed), more)).eval()

    def loss(self, model, batch):
        return model(**batch).loss

    def evaluate(self, model, split="test"):
        return {self.metric: right(lambda b: _bench.logits(model, b), self, split)}


@torch.no_grad()
def right(logits, task, split="test"):
    found = [logits(b).argmax(-1) == b["labels"] for b in task.batches(split, 32, shuffle=False)]
    return float(torch.cat(found).float().mean())


def in_graph(tuned, task, batch):
    """How many linear layers in blocks put out what is part of the autograd graph, how many of the model's own weights got a
    gradient."""
    touched = []
    hooks = [m.register_forward_hook(lambda m, a, o: touched.append(m) if o.requires_grad else None)
             for s in sites(tuned).stacks for b in s.blocks for m in b.modules() if isinstance(m, torch.nn.Linear)]
    tuned.train()
    task.loss(tuned, batch).backward()
    for h in hooks:
        h.remove()
    graded = sum(p.grad is not None for p in tuned.base.parameters())
    for p in tuned.parameters():
        p.grad = None
    tuned.eval()
    return [len(touched), graded]


def reverse(batch):
    """The same clips played backwards."""
    return dict(batch, pixel_values=batch["pixel_values"].flip(1))


def text(tokenizer, sentences):
    found = tokenizer(sentences, padding=True, return_tensors="pt")
    return {"input_ids": found["input_ids"], "attention_mask": found.get("attention_mask", torch.ones_like(found["input_ids"]))}


def objects(n, side, seed=0):
    """Still pictures of one novel pair of shape and colour -> (n, 3, side, side) uint8, which name, the names."""
    names = [f"a {c} {s}" for c in scenes.COLOURS for s in scenes.SHAPES if scenes.novel(s, c)]
    found = [scenes.scene(i, seed, side, 1, 1, "novel") for i in range(n)]
    x = torch.stack([torch.from_numpy(s.image()) for s in found]).permute(0, 3, 1, 2)
    return x, torch.tensor([names.index(f"a {s.shapes[0].colour} {s.shapes[0].shape}") for s in found]), names


def unit(x):
    return F.normalize(getattr(x, "pooler_output", x), dim=-1)
