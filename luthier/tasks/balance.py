"""Pairs of image and text chosen so that every concept has its share.

    prototype of a concept = mean of the judge's unit features of its images;  score(row, concept) = cos(judge's text, prototype)

Maniparambil et al., arXiv:2409.19425, dataset curation, with the authors' code (collection/): a concept's best rows are its
candidates; the concept whose last candidate scores lowest chooses first, each takes its best rows that nobody took yet. The judge
is a dual encoder (theirs: CLIP, and up to 128 images a concept)."""

import torch
from torch.nn import functional as F

CANDIDATES = 25                # times the rows that a concept may have
IMAGES = 128                   # a concept


def assign(scores, per):
    """(rows, concepts) -> for each concept its rows, at most `per`, the best first; no row twice."""
    n = min(CANDIDATES * per, len(scores))
    best, rows = scores.sort(dim=0, descending=True, stable=True)
    found, taken = [[] for _ in range(scores.shape[1])], set()
    for c in best[n - 1].argsort(stable=True).tolist():
        found[c] = [i for i in rows[:n, c].tolist() if i not in taken][:per]
        taken.update(found[c])
    return found


@torch.no_grad()
def scored(texts, concepts, judge, seed=0, batch_size=64):
    """(texts, concepts): how near each text is to each concept's images. concepts: data of images and their classes."""
    from . import open

    task = open(concepts, model=judge, task="class-names", shots=IMAGES, seed=seed)
    model, sums = task.build(seed), 0
    for batch in task.batches("train", batch_size, shuffle=False):
        x = model.images(batch["pixel_values"])
        sums = sums + F.one_hot(batch["labels"], len(task.labels)).T.to(x) @ x
    tokens, found = task.tokenizer, []
    masked = "attention_mask" in tokens.model_input_names
    for i in range(0, len(texts), batch_size):
        batch = tokens(texts[i:i + batch_size], padding=True if masked else "max_length", truncation=True, return_tensors="pt",
                       max_length=min(task.origin.longest, tokens.model_max_length))
        t = model.dual.get_text_features(**{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")})
        found.append(F.normalize(getattr(t, "pooler_output", t), dim=-1))
    return torch.cat(found) @ F.normalize(sums, dim=-1).T


def balanced(texts, concepts, judge, per, seed=0):
    """Numbers of the rows chosen, in order, and how many concepts there are."""
    chosen = assign(scored(texts, concepts, judge, seed), per)
    return sorted(i for rows in chosen for i in rows), len(chosen)
