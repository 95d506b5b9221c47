"""Which encoders fit together, told before much is trained.
    CKA(X, Y) = ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖),    X, Y: (n, d) of the same n pairs, centred; Frobenius norms
Kornblith et al., Similarity of Neural Network Representations Revisited, 2019. arXiv:1905.00414 §3. Maniparambil et al.,
arXiv:2409.19425 choose a vision and a text encoder by it: X is the mean of an image's last states, Y a caption's vector. The
alignment probe of Zhang et al., arXiv:2412.04616, trains a linear head on each side and says how well the two then retrieve.

    rank("pairs.jsonl", ["dinov2-s", "effnet-lite0"], ["minilm"])     # [{"vision", "language", "cka", "recall@1", ...}, ...]
"""

import torch


def cka(X, Y):
    """Linear centred kernel alignment of two representations of the same rows, (n, d) and (n, e): 0 to 1."""
    X, Y = (z.double() - z.double().mean(0) for z in (X, Y))
    def dot(a, b):
        return (a.T @ b).norm()
    return float(dot(X, Y) ** 2 / (dot(X, X) * dot(Y, Y)))


@torch.no_grad()
def states(task, model, split="train", batch_size=64):
    """What the frozen encoders of sail's bridge make of a task's pairs: the means of images' states, and captions' vectors."""
    found = []
    with task.seeing(model):
        for batch in task.batches(split, batch_size, shuffle=False):
            image = batch["image_states"]
            found.append((image[:, image.shape[1] // 2:] if model.eyes.fixed else image, batch["text_states"][:len(image)]))
    return tuple(torch.cat(x) for x in zip(*found, strict=True))


def rank(data, visions, languages, *, steps=0, lr=1e-3, batch_size=64, seed=0, dim=256, **options):
    """Every pair of encoders with its CKA on the training pairs and, where steps > 0, what a linear probe of so many steps comes
    to on the validation pairs; best first, by the probe where there is one. Nothing is computed twice for one encoder."""
    from .. import tasks
    from ..compare.fit import fit

    found, memory = [], {}
    for vision in visions:
        for language in languages:
            task = tasks.open(data, model=f"{vision}+{language}:sail(gated=False, dim={dim})", task="image-text-retrieval",
                              seed=seed, **options)
            task.memory = memory
            model = task.build(seed).requires_grad_(False)
            row = {"vision": str(vision), "language": str(language), "cka": cka(*states(task, model))}
            if steps:
                tuned, _ = fit(task, model.fresh[1], seed=seed, batch_size=batch_size, steps=steps, lr=lr, progress=False,
                               log=False)
                row |= {k: v for k, v in task.evaluate(tuned, "val").items() if "@" in k}
            found.append(row)
    return sorted(found, key=lambda row: (row.get("recall@1", 0), row["cka"]), reverse=True)
