"""Magnitude and direction, tuned apart.    W' = m ⊙ V / ‖V‖,   V = W + (α/r)·B A,   m: (d_out, 1) = ‖W‖
Liu et al., DoRA, 2024. arXiv:2402.09353 §4.1, eq. 5; the norm is a constant to the gradient, §4.3.

The paper calls the norm column-wise; the authors' code and peft take it over the inputs of each output (`dim=1` of a
(d_out, d_in) weight), one magnitude per output feature. So does this file.
"""

import torch

from luthier.method import Method, method


@method
class dora(Method):
    at: str = "attn.q attn.v"
    rank: int = 8
    alpha: float = 16.0                    # the update is scaled by alpha / rank
    peft = dict(type="LORA", when=dict(use_dora=True), layers="linear conv1d",
                tensors={"lora_A.weight": "A: r in", "lora_B.weight": "B: out r", "lora_magnitude_vector": "m: out 1 -> out"},
                rest=dict(m=lambda W: W.norm(dim=1, keepdim=True)), fields=dict(r="rank"), factor=("alpha", "rank"),
                scale=("lora_alpha", "r", 0), patterns="number",
                rounds="to rounding: peft adds (m/norm - 1) y and the update to each other before it adds them to y")

    def init(self, site):                  # trains rank * (d_in + d_out) + d_out
        A, B = site.normal(self.rank, site.d_in, std=site.d_in**-0.5), site.zeros(site.d_out, self.rank)
        m = site.zeros(site.d_out, 1)
        m.data += self._direction(site.W, A, B).detach().norm(dim=1, keepdim=True)
        return dict(A=A, B=B, m=m)

    def weight(self, W, p):                # (d_out, d_in)
        V = self._direction(W, p.A, p.B)
        return self._scale(V, p) * V

    def low_rank(self, p, W):
        with torch.no_grad():
            V = self._direction(W, p.A, p.B)
        return dict(A=p.A, B=p.B, scale=self.alpha / self.rank, gain=self._scale(V, p)[:, 0])      # 1 at init, to the bit

    def _direction(self, W, A, B):         # V: (d_out, d_in)
        return W + self.alpha / self.rank * B @ A

    def _scale(self, V, p):                # (d_out, 1); a row of zeros has no direction, and stays
        norm = V.detach().norm(dim=1, keepdim=True)
        return torch.where(norm > 0, p.m / norm.where(norm > 0, 1), 1)
