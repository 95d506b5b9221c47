"""Merge the most redundant tokens between attention and MLP; isolated ones are kept. Nothing is trained.

k_i: a token's key, mean over heads.   energy_i = 1/N Σ_j elu(cos(k_i, k_j) - m),   elu(x) = x if x ≥ 0 else α (exp(x) - 1)
Tran et al., PiToMe, 2024. arXiv:2405.16148 §3.2, eq. 4, as in the authors' code (where the paper leaves m in above the margin):
m = 0.9 - 0.9 l/L in layer l = 0… of L, α = 1. The 2r tokens of highest energy may merge; in that order they go alternately to
A and B, and each of A is absorbed by its most similar of B, as a mean weighted by size. Attention is proportional:
softmax(q kᵀ/√Dh + log size). r = (1 - keep) of the tokens that may merge.

`protect=False` is the matching of ToMe (Bolya et al., 2022. arXiv:2210.09461 §3): A and B are the even and odd places, and the
r tokens of A with the closest partner merge. Special and inserted tokens never merge; padding merges first and weighs nothing.
"""

import torch
from torch.nn.functional import elu, normalize, pad

from luthier.errors import DoesNotFit
from luthier.method import Method, method


def energy(similar, m, alpha):             # (B, N, N) -> (B, N)
    return elu(similar - m, alpha).mean(-1)


@method
class pitome(Method):
    at: str = "block.*.attn block.*.mid"
    keep: float = 0.9
    protect: bool = True
    margin: float = 0.9
    alpha: float = 1.0
    limits = {"keep": (0.5, 1)}
    exempt = {"identity_at_init": "merges tokens"}
    example = {"keep": 0.6}

    def init(self, site):
        if site.stack.causal:
            raise DoesNotFit(f"pitome merges later tokens into earlier ones, and {site.name} is causal: that would read "
                             "the future. Use it on an encoder: pitome(at=\"encoder.block.*.attn encoder.block.*.mid\").")
        return dict(m=self.margin * (1 - site.block / site.stack.n_blocks))

    def attend(self, a, p):                # a.k: (B, H, T, Dh); further keys, a prefix, stand before the tokens' own
        own = a.k[:, :, -a.q.shape[2]:]
        if "size" in a.t.lanes:
            a = a.bias(pad(a.t.size[..., 0].log(), (a.k.shape[2] - own.shape[2], 0))[:, None, None])
        return a.lane(p.key, own.detach().mean(1))

    def stream(self, t, p):                # (B, T, D) -> (B, T - r, D)
        k = normalize(t.lanes[p.key][:, t.fixed:].float(), dim=-1)     # (B, N, Dh)
        r = min(int(k.shape[1] * (1 - self.keep) + 1e-6), k.shape[1] // 2)
        if not r:
            return t
        similar, real = k @ k.mT, None if t.mask is None else t.mask[:, t.fixed:]
        if real is not None:               # padding is like padding only
            similar = torch.where(real[:, :, None] == real[:, None, :], similar, similar - 3)
            t = t.lane("size", torch.where(t.mask[..., None], t.size, 1e-6))
        if self.protect:
            e = energy(similar, p.m, self.alpha)
            e = e if real is None else e.masked_fill(~real, torch.inf)
            order = e.argsort(dim=1, descending=True, stable=True)[:, :2 * r]
            A, B = order[:, ::2], order[:, 1::2]
        else:
            odd = torch.arange(k.shape[1], device=k.device).expand(k.shape[:2])
            A, B = odd[:, ::2], odd[:, 1::2]
        near = similar.gather(1, A[..., None].expand(*A.shape, similar.shape[2]))
        near = near.gather(2, B[:, None].expand(*near.shape[:2], B.shape[1])).max(-1)
        best = near.values.topk(r, dim=1).indices
        return t.merge(t.fixed + A.gather(1, best), t.fixed + B.gather(1, near.indices.gather(1, best)))
