"""LoRA whose small rows learn fast and whose large rows learn slowly.    W' = W + B A,   A: (r, d_in),   B: (d_out, r) = 0
Huang and Balestriero, ALLoRA, 2024. arXiv:2410.09692 §4: no dropout, no factor α/r, and a gradient that knows the weight:
    ∂L/∂(BA)_i ← s_i ∂L/∂(BA)_i,   s_i = 1 / sqrt(‖(BA)_i‖ + 1/η²),   i = 1 ... d_out
so that B leaves zero η times as fast and a row of norm n slows to n^-½. The forward pass is LoRA's. s is a constant to the
gradient, and what flows on to the layers below is not scaled: their gradients have a scale of their own.
An optimizer that divides by the gradient's size (Adam) keeps only the ratios between rows and between steps.
"""

import torch

from luthier.method import Method, method


@method
class allora(Method):
    at: str = "attn.q attn.v"
    rank: int = 8
    eta: float = 2.0                       # η: the scale of a row that is zero; not the learning rate

    def init(self, site):                  # trains rank * (d_in + d_out)
        A = site.normal(self.rank, site.d_in, std=site.d_in**-0.5)
        return dict(A=A, B=site.zeros(site.d_out, self.rank))        # B = 0: identity at init

    def weight(self, W, p):                # (d_out, d_in)
        delta = p.B @ p.A
        if delta.requires_grad:
            s = self.scale(p)[:, None]
            delta.register_hook(lambda g: g * s)
        return W + delta

    def fast(self, x, y, p):               # (..., d_in) -> (..., d_out)
        return y + Scaled.apply(x, p.A, p.B, self.scale(p))

    @torch.no_grad()
    def scale(self, p):                    # (d_out,): ‖B_i A‖² = B_i (A Aᵀ) B_iᵀ, in r² numbers a row
        norm = (p.B @ (p.A @ p.A.T) * p.B).sum(1).clamp(min=0).sqrt()
        return (norm + self.eta**-2).rsqrt().to(p.B.dtype)


class Scaled(torch.autograd.Function):
    """x Aᵀ Bᵀ, with row i of the gradient of B A times s_i."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, A, B, s):               # (..., d_in), (r, d_in), (d_out, r), (d_out,)
        return x @ A.T @ B.T

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):                  # g: (..., d_out)
        x, A, B, s = (t.to(g.dtype) for t in ctx.saved_tensors)
        rows, x1 = (g * s).flatten(0, -2), x.flatten(0, -2)
        return g @ B @ A, (rows @ B).T @ x1, rows.T @ (x1 @ A.T), None
