"""Any number of trained numbers at arbitrary places.    θ' = θ + scatter(idx, v),   idx: `count` places, uniform over all sites;
v = 0 at init. Su et al., Exploring the Impact of Model Scaling on Parameter-Efficient Tuning, 2023. arXiv:2306.02320 §3.2: a
tunable module is any number of parameters anywhere. The places follow from the seed; an entry costs 8 bytes in single precision.

luthier.procedures.apet puts whole modules (LoRA, adapters, ...) and whole tensors at random sites, as the authors' code does.
"""

import torch

from luthier.errors import DoesNotFit
from luthier.method import Method, method
from luthier.methods.sparse.sparse import sparse


@method
class apet(Method):
    at: str = "all -head"
    count: int = 4096
    example = {"at": "linear", "count": 1000}          # a few random places of a tiny embedding meet no token

    def init(self, site):                  # trains count, over all sites together
        idx = site.shared("places", lambda: self.places(site)).get(site.name)
        return None if idx is None else dict(idx=idx, v=site.zeros(len(idx)), biased=site.b is not None)

    def places(self, site):                # site name -> its part of the places, sorted: the largest of one draw for each number
        sites = [s for s in site.pool["sites"] if s.parameter.is_floating_point()]
        sizes = [s.W.numel() + (0 if s.b is None else s.d_out) for s in sites]
        if self.count > sum(sizes):
            raise DoesNotFit(f"apet(count={self.count}): the {len(sites)} sites of {self.at!r} hold {sum(sizes)} numbers. "
                             "Give fewer, or more sites: apet(at=...).")
        kept = torch.empty(3, 0, dtype=torch.float64)                   # value, site, place
        for i, (s, n) in enumerate(zip(sites, sizes, strict=True)):
            top = s.random(n).float().topk(min(n, self.count))
            new = torch.stack([top.values, torch.full_like(top.values, i), top.indices]).double().cpu()
            kept = torch.cat([kept, new], 1)
            kept = kept[:, kept[0].topk(min(self.count, kept.shape[1])).indices]
        found = {s.name: kept[2, kept[1] == i].long().sort().values for i, s in enumerate(sites)}
        kind = torch.int32 if max(sizes) < 2**31 else torch.int64
        return {s.name: found[s.name].to(s.like.device, kind) for s in sites if len(found[s.name])}

    weight, fast = sparse.weight, sparse.fast
