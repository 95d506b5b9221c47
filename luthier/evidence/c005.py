"""Image and caption assigned to word embeddings. Park et al., VLAP, 2024, arXiv:2404.09632.

Retrieval is by the cosine of the two representations that the assignments are made from; a nearest word is relevant where its
piece stands in the image's own caption.
"""

import torch
from torch.nn import functional as F

from luthier.bridges.vlap import read, sinkhorn
from luthier.evidence import _pairs, beats, fact, judge

SYSTEM, METHODS, SEEDS, MINUTES = "C005", ("full",), (0, 1, 2), 10
CLAIM = "Only one linear map trains; the assignment loss raises R@1 over the caption loss alone; marginals balanced; words fit"
BASELINE = "the same map trained by the caption loss alone (LiMBeR), at its own best learning rate"
MODEL, DATA = "dinov2-s + stories260k", "captions of scenes: 300 train, 80 validation, 150 test rows"
STEPS, NEAR = 300, 10


@torch.no_grad()
def seen(tuned, task):
    """R@1 from caption to image among the test rows, and the share of images with a relevant word among the nearest."""
    rows, base, found = task.examples("test"), tuned.base, []
    with task.seeing(tuned):
        for i in range(0, len(rows), 50):
            batch = task.collate(rows[i:i + 50])
            front = base.way.prompt(base.connector, batch["image_states"].flatten(0, 1))
            found.append((front.mean(1), read(base, batch["labels"])))
    image, text = (F.normalize(torch.cat(z), dim=-1) for z in zip(*found, strict=True))
    E = F.normalize(base.language.get_input_embeddings().weight, dim=-1)
    near = (image @ E.T).topk(NEAR).indices
    fits = [bool(set(n.tolist()) & set(row["answer"])) for n, row in zip(near, rows, strict=True)]
    return {"r1": ((text @ image.T).argmax(1) == torch.arange(len(text))).float().mean().item(), "near": sum(fits) / len(fits)}


def run(seeds):
    given = {n: _pairs.captions(f"dinov2-s+stories260k:{way}()") for n, way in (("vlap", "vlap"), ("caption", "limber"))}
    per_seed, facts = _pairs.arms({k: (t, _pairs.CONNECTOR) for k, t in given.items()}, seeds, STEPS,
                                  after=lambda name, seed, tuned, task: seen(tuned, task))
    scores, words = torch.randn(64, 200, generator=torch.Generator().manual_seed(0)), torch.full((200,), 1 / 200)
    Q = sinkhorn(scores, words, 100, 0.5)
    facts["marginals"] = [float((Q.sum(1) - 1).abs().max()), float((Q.sum(0) / 64 - words).abs().max())]
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f, per = figures["facts"], figures["per_seed"]
    near = sum(per["vlap.near"]) / len(per["vlap.near"])
    return judge(
        [beats(figures, "vlap.r1", "caption.r1", "R@1 of retrieval, with the assignment loss against without")],
        [fact(max(f["marginals"]) < 1e-4, f"largest gap of Sinkhorn's marginals {max(f['marginals']):.1e}, needed below 1e-4"),
         fact(near > 0.5, f"images with a word of their caption among the {NEAR} nearest: {near:.0%}, needed above 50%"),
         fact(all(f["frozen"].values()), "both frozen models keep their bits"),
         fact(len(set(f["trained_parameters"].values())) == 1, f"one linear map trains: {f['trained_parameters']}")])
