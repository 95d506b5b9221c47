"""The whole model from one vector of d numbers.    W_i' = W_i + λ_i · P_i θ,   P_i = H G Π H B / √(D_i ΣG²)
Aghajanyan et al., Intrinsic Dimensionality, 2020. arXiv:2012.13255 §3: Fastfood projection (Le et al., arXiv:1408.3060), and
SAID, where every layer i has a scale λ_i of its own. θ: (d,) = 0 is shared by all sites and λ_i = 1, so that m sites train
dim = d + m numbers in all. H: Walsh-Hadamard of size L = 2^k ≥ max(D_i, d); B = ±1, Π a permutation, G Gaussian: fixed, (L,).
The divisor keeps lengths: E‖P_i θ‖ = ‖θ‖. Biases stay frozen.
"""

import torch

from luthier.errors import DoesNotFit
from luthier.method import Method, method


def hadamard(x):                           # (L,) -> H x, not normalised, in L log L steps
    half = len(x) // 2
    while half:
        a, b = x.view(-1, 2, half).unbind(1)
        x, half = torch.stack((a + b, a - b), 1).flatten(), half // 2
    return x


@method
class said(Method):
    at: str = "linear norm embed.token"
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
