"""Random bases and their diagonals to and from peft's RANDLORA. peft flattens B: (D, n, r) by bases first and A: (r, n, d) by
ranks first, and so pairs column j r + i of B with row i n + j of A: the columns change places here, which is exact."""

import torch

from luthier.errors import DoesNotFit


def write(p, site, config):
    return dict(randlora_lambda=p.L.detach().T, randlora_gamma=p.G.detach())


def common(parts):
    """One pair of bases of which every shape takes a corner; for shapes with bases of their own there is none."""
    r = len(parts[0][1].A)
    D, d = sorted((max(s.d_out for *_, s in parts), max(s.d_in for *_, s in parts)))[::-1]
    A, B = torch.full((r, d), torch.nan), torch.full((D, -(-d // r), r), torch.nan)
    for _, p, _ in parts:
        n = len(p.L)
        for whole, new in ((A[:, :p.A.shape[1]], p.A), (B[:len(p.B), :n], p.B.view(-1, n, r).mT.reshape(-1, n, r))):
            if len(p.A) != r or not (whole.isnan() | whole.eq(new.cpu())).all():
                raise DoesNotFit("Each shape of weight has bases of its own here; peft has one pair, of which smaller shapes "
                                 "take a corner. Export one shape at a time: choose its sites with at=\"attn.q\".")
            whole.copy_(new)
    return dict(randlora_A=A[:, None].nan_to_num(0), randlora_B=B.nan_to_num(0))


def read(t, site, config):
    d, D = sorted((site.d_out, site.d_in))
    r, n = t["randlora_lambda"].shape
    if r != config["r"] or r > d or n != -(-d // r):
        raise ValueError(f"rank {r} with {n} bases at a weight of {site.d_out} x {site.d_in}")
    if "randlora_A" not in t or "randlora_B" not in t:
        raise KeyError("the random bases are not in the file: save it again in peft with save_projection=True")
    B = t["randlora_B"][:D, :n].reshape(D, r, n).mT.reshape(D, n * r)
    state = dict(L=t["randlora_lambda"].T.contiguous(), G=t["randlora_gamma"], A=t["randlora_A"][:, 0, :d].contiguous(), B=B)
    return state, dict(rank=r, scale=config["randlora_alpha"] / r)
