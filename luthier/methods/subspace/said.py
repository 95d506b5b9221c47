"""The whole model from one vector of d numbers.    W_i' = W_i + λ_i · P_i θ,   P_i = H G Π H B / √(D_i ΣG²)
Aghajanyan et al., Intrinsic Dimensionality, 2020. arXiv:2012.13255 §3: Fastfood projection (Le et al., arXiv:1408.3060), and
SAID, where every layer i has a scale λ_i of its own. θ: (d,) = 0 is shared by all sites and λ_i = 1, so that m sites train
dim = d + m numbers. H: Walsh-Hadamard of size L = 2^k ≥ max(D_i, d); B = ±1, Π a permutation, G Gaussian: fixed, (L,).
The divisor keeps lengths: E‖P_i θ‖ = ‖θ‖. Biases stay frozen.
"""

import torch

from luthier.errors import DoesNotFit
from luthier.method import Method, method


def hadamard(x):                           # (L,) -> H x, not normalised: H_L = H_16 ⊗ H_16 ⊗ ..., one factor at a time
    H = x.new_ones(1, 1)
    while len(H) < min(16, len(x)):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    done, shape = len(H), x.shape
    x = x.view(-1, done) @ H
    while done < shape[0]:
        r = min(16, shape[0] // done)
        x, done = H[:r, :r] @ x.view(-1, r, done), done * r
    return x.view(shape)


@method
class said(Method):
    at: str = "weights"                    # in all blocks; "all": the embeddings too, at their cost in time
    dim: int = 1000                        # all that trains
    layers: bool = True                    # a λ for each site; False: Direct Intrinsic Dimension, d = dim

    def init(self, site):
        d = self.dim - site.n_sites * self.layers
        if d < 1:
            raise DoesNotFit(f"said(dim={self.dim}): {site.n_sites} sites take one scale each, which leaves {d} for θ. "
                             f"Raise dim above {site.n_sites}, select fewer sites, or set layers=False.")
        L = 1 << (max(site.W.numel(), d) - 1).bit_length()
        B, G, order = site.random(L).sign().char(), site.random(L), site.random(L).argsort().int()
        fixed = dict(B=site.fixed(B), G=site.fixed(G), order=site.fixed(order))
        scale = dict(scale=site.ones(1)) if self.layers else {}
        return dict(theta=site.shared("theta", lambda: site.zeros(d))) | scale | fixed

    def weight(self, W, p):                # (d_out, d_in)
        G = p.G.to(torch.promote_types(W.dtype, torch.float32))                     # sums of L terms: never in half precision
        x = torch.cat([p.theta.to(G), G.new_zeros(len(G) - len(p.theta))])
        x = hadamard(hadamard(x * p.B)[p.order] * G)[:W.numel()] / (W.numel() * G.square().sum()).sqrt()
        return W + (x * p.scale if self.layers else x).to(W).view(W.shape)
