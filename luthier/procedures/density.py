"""The share of neurons that fire: nonzeros among what the last matrix of each MLP reads, over some batches, padding left out.
What hardware that skips zeros has left to do; DEFT (arXiv:2402.01911) lowers it."""

import torch

from luthier.attach import base_of
from luthier.site import find


@torch.no_grad()
def density(model, batches, at="mlp.act", near=0.0):
    """site name -> share of |o| > near (for activations such as GELU that never are exactly 0, a small number)."""
    sites, fired, seen, mask = find(base_of(model), at), {}, {}, None

    def count(site):
        def hook(module, args):
            x = args[0]
            x = x[mask.bool()] if mask is not None and x.shape[:2] == mask.shape else x
            fired[site.name] = fired.get(site.name, 0) + int((x.abs() > near).sum())
            seen[site.name] = seen.get(site.name, 0) + x.numel()
        return hook

    handles = [s.module.register_forward_pre_hook(count(s)) for s in sites]
    try:
        for batch in batches:
            mask = batch.get("attention_mask")
            model(**{k: v for k, v in batch.items() if k != "labels"})
    finally:
        for h in handles:
            h.remove()
    return {name: fired[name] / seen[name] for name in seen}
