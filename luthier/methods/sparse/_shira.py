"""Entries at fixed places to and from peft's SHIRA, which counts them in ranks: r (d_in + d_out) at every weight."""

import torch

from luthier.errors import DoesNotFit


def prepare(parts):                        # spare entries are 0, at places that nothing else has
    return dict(r=max(-(-len(p.v) // (s.d_in + s.d_out)) for _, p, s in parts), mask_type="random")


def write(p, site, config):
    k, n = config["r"] * (site.d_in + site.d_out), site.d_in * site.d_out
    if k > n:
        raise DoesNotFit(f"peft's SHIRA counts entries in ranks, and rank {config['r']} at {site.name} is {k} of {n} entries. "
                         "merge() instead.")
    free = torch.ones(n, dtype=torch.bool)
    free[p.idx.long().cpu()] = False
    idx = torch.cat([p.idx.long().cpu(), free.nonzero()[:k - len(p.v), 0]])
    v = torch.cat([p.v.detach().cpu(), p.v.new_zeros(k - len(p.v), device="cpu")])
    return dict(shira_weight=v, shira_indices=torch.stack([idx // site.d_in, idx % site.d_in]).to(torch.int32))


def read(t, site, config):
    v, (row, col) = t["shira_weight"], t["shira_indices"].long()
    if len(v) != len(row) or row.min() < 0 or col.min() < 0 or row.max() >= site.d_out or col.max() >= site.d_in:
        raise ValueError(f"{len(v)} entries, at places up to ({row.max()}, {col.max()}) of {site.d_out} x {site.d_in}")
    idx, n = row * site.d_in + col, site.d_in * site.d_out
    if len(idx.unique()) != len(idx):
        raise ValueError("a place is there twice")
    return dict(v=v, idx=idx.to(torch.int32 if n < 2**31 else torch.int64)), dict(density=len(v) / n)
