"""A bottleneck after each sublayer.    h' = h + U gelu(D h + d) + u,    D: (width, D) ~ N(0, σ²),   U: (D, width) = 0
Houlsby et al., 2019. arXiv:1902.00751 §2.1, fig. 2: behind the attention's output projection and behind the second layer of the
MLP, before the residual sum. Biases as in the authors' code. Norms train too ("new layer normalization parameters per task"):
γ' = γ + g, β' = β + s with g, s = 0 at init; `norms=False` leaves them alone.

The paper draws both D and U from N(0, 10⁻⁴), which is near the identity; here U = 0, which is the identity itself.
"""

from torch.nn.functional import gelu

from luthier.method import Method, method


@method
class houlsby(Method):
    at: str = "attn.out mlp.out norm"
    width: int = 64
    std: float = 1e-2                      # σ
    norms: bool = True
    adapterhub = dict(places={"attention.output": "attn.out", "output": "mlp.out"}, fields={}, given=dict(norms=False),
                      tensors={"adapter_down.0.weight": "D", "adapter_down.0.bias": "d", "adapter_up.weight": "U",
                               "adapter_up.bias": "u"},
                      when=dict(mh_adapter=True, output_adapter=True, original_ln_before=False, non_linearity="gelu"))

    def init(self, site):                  # trains 2 width D + width + D per sublayer, 2 D per norm
        if site.kind == "weight":
            gain = dict(g=site.zeros(*site.W.shape))
            return (gain if site.b is None else gain | dict(s=site.zeros(site.d_out))) if self.norms else None
        D, U = site.normal(self.width, site.d_in, std=self.std), site.zeros(site.d_out, self.width)
        return dict(D=D, d=site.zeros(self.width), U=U, u=site.zeros(site.d_out))

    def stream(self, t, p):                # t.h: (B, T, D)
        return t.map_h(lambda h: h + gelu(h @ p.D.T + p.d) @ p.U.T + p.u)

    def weight(self, W, b, p):             # a norm's gain and offset: (d, 1), (d,)
        return W + p.g, b + p.s if hasattr(p, "s") else b
