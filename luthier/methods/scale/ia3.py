"""Rescaled keys, values and hidden activations.    k' = l_k ⊙ k,   v' = l_v ⊙ v,   FFN: W_down (l_ff ⊙ σ(W_up x))
Liu et al., (IA)³, 2022. arXiv:2205.05638 §3.3. As weights: W_k' = diag(l_k) W_k with b' = l_k ⊙ b, W_down' = W_down diag(l_ff);
l = 1 at init. (The authors' T5 code scales the ungated half of a gated FFN, which gives the same product.)
"""

import torch

from luthier.method import Method, method


@method
class ia3(Method):
    at: str = "*.k *.v mlp.down"           # cross-attention too
    into: str = "mlp.down"                 # roles whose input is rescaled, not their output
    peft = dict(type="IA3", layers="linear conv1d", tensors={"ia3_l": "out: out -> out 1 | into: in -> 1 in"}, rest=dict(out=1),
                listed=dict(feedforward_modules="into"),
                makes=dict(into=lambda site: dict(into=site.role), out=lambda site: dict(into="")),
                rounds="keys and values to the bit; mlp.down to rounding: peft scales its input, ia3 adds what scaling changes")

    def init(self, site):                  # trains d_in at `into`, else d_out
        into = site.role in self.into.split()
        return dict(into=site.ones(site.d_in)) if into else dict(out=site.ones(site.d_out))

    def weight(self, W, p, b):             # (d_out, d_in), (d_out,)
        return (W * p.into, b) if hasattr(p, "into") else (p.out[:, None] * W, p.out * b)

    def fast(self, x, y, p, W):
        return y + torch.nn.functional.linear(x * (p.into - 1), W) if hasattr(p, "into") else p.out * y
