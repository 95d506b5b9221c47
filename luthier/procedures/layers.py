"""What a tuned model's layers still share with the base's: per block, CKA and RSA of the pooled states, and a linear probe.
    CKA = ‖Yᶜᵀ Xᶜ‖² / (‖Xᶜᵀ Xᶜ‖ ‖Yᶜᵀ Yᶜ‖)    linear, columns centred. Kornblith et al., 2019. arXiv:1905.00414 §3
    RSA = Pearson correlation of the cosine similarities between all pairs of inputs, before and after
Shi et al. (Telly), 2023. arXiv:2304.05216 §3-4: a state is the mean over tokens (here without padding). Where both fall, tuning
changed the layer; layers that stay near 1 can be frozen.
"""

import torch

from luthier.attach import base_of
from luthier.site import find


@torch.no_grad()
def states(model, batches, at="block.*.out"):
    """site name -> (inputs, D): mean over the real tokens of what each block puts out."""
    found, pooled, mask = find(base_of(model), at), {}, None

    def keep(site):
        def hook(module, args, out):
            h = out[0] if isinstance(out, tuple) else out
            w = h.new_ones(h.shape[:2]) if mask is None or mask.shape != h.shape[:2] else mask.to(h)
            pooled.setdefault(site.name, []).append((h * w[..., None]).sum(1) / w.sum(1, keepdim=True))
        return hook

    handles = [s.module.register_forward_hook(keep(s)) for s in found]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            mask = batch.get("attention_mask")
            model(**{k: v for k, v in batch.items() if k != "labels"})
    finally:
        model.train(training)
        for h in handles:
            h.remove()
    return {name: torch.cat(parts).double() for name, parts in pooled.items()}


def cka(X, Y):                             # (n, d), (n, e)
    X, Y = X - X.mean(0), Y - Y.mean(0)
    return float((Y.T @ X).norm() ** 2 / ((X.T @ X).norm() * (Y.T @ Y).norm()))


def rsa(X, Y):
    pairs = torch.triu_indices(len(X), len(X), 1)
    both = [torch.nn.functional.normalize(Z, dim=1) for Z in (X, Y)]
    return float(torch.corrcoef(torch.stack([(Z @ Z.T)[pairs[0], pairs[1]] for Z in both]))[0, 1])


def profile(before, after, batches):
    """site name -> {"cka", "rsa"} between two models (or a Tuned and its base) on the same batches."""
    batches = list(batches)
    a, b = states(before, batches), states(after, batches)
    return {name: {"cka": cka(a[name], b[name]), "rsa": rsa(a[name], b[name])} for name in a}


def probes(model, task, ridge=1e-2):
    """site name -> accuracy on test rows of a ridge regression onto the labels, fitted on the block's states of train rows."""
    data = {split: list(task.batches(split, 64, shuffle=False)) for split in ("train", "test")}
    seen = {split: states(model, batches) for split, batches in data.items()}
    labels = {split: torch.cat([b["labels"] for b in batches]) for split, batches in data.items()}
    found = {}
    for name, X in seen["train"].items():
        mean, std = X.mean(0), X.std(0) + 1e-6
        X, Z = (torch.nn.functional.pad((x - mean) / std, (0, 1), value=1.0) for x in (X, seen["test"][name]))
        Y = torch.nn.functional.one_hot(labels["train"]).double()
        W = torch.linalg.solve(X.T @ X + ridge * len(X) * torch.eye(X.shape[1], dtype=X.dtype), X.T @ Y)
        found[name] = float(((Z @ W).argmax(1) == labels["test"]).double().mean())
    return found


def show(rows):
    """{name: {column: number}} as a table in text."""
    columns = list(next(iter(rows.values())))
    wide = max(map(len, rows))
    return "\n".join([" ".join([" " * wide, *(f"{c:>7}" for c in columns)]),
                      *(" ".join([f"{name:{wide}}", *(f"{row[c]:7.3f}" for c in columns)]) for name, row in rows.items())])
