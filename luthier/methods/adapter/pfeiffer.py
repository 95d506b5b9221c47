"""One bottleneck a block, which reads the normed sum.    h' = h + U σ(D n(h + x) + d) + u,    h = MLP(x)
Pfeiffer et al., MAD-X, 2020. arXiv:2005.00052 §2.2.1 (and AdapterFusion, arXiv:2005.00247): added to h, the output of the MLP,
and fed with what the norm n behind it gives. x: the residual that the block adds to h. Biases and D ~ N(0, 0.02²) as in the
authors' code (AdapterHub); n is the identity where the norm comes before the MLP. U = 0 at init (theirs: as D): the identity.
"""

import torch.nn.functional as F

from luthier.errors import BadChain
from luthier.method import Method, method

ACTS = dict(relu=F.relu, gelu=F.gelu, swish=F.silu, silu=F.silu, tanh=F.tanh)


@method
class pfeiffer(Method):
    at: str = "mid mlp.out"
    width: int = 48
    act: str = "relu"                      # σ
    adapterhub = dict(places={"output": "mlp.out"}, fields=dict(act="non_linearity"),
                      tensors={"adapter_down.0.weight": "D", "adapter_down.0.bias": "d", "adapter_up.weight": "U",
                               "adapter_up.bias": "u"},
                      when=dict(mh_adapter=False, output_adapter=True, original_ln_before=True, residual_before_ln=True))

    def __post_init__(self):
        super().__post_init__()
        if self.act not in ACTS:
            raise BadChain(f"pfeiffer(act={self.act!r}): there is {', '.join(ACTS)}.")

    def init(self, site):                  # trains 2 width D + width + D per block
        if site.role == "mid":             # here the residual is only remembered
            return {}
        D, U = site.normal(self.width, site.d_out, std=0.02), site.zeros(site.d_out, self.width)
        state, norm = dict(D=D, d=site.zeros(self.width), U=U, u=site.zeros(site.d_out)), site.peers.get("mlp.norm")
        order = list(site.peers)           # as data meets them
        if norm is None or norm.b is None or order.index("mlp.norm") < order.index("mlp.out"):
            return state
        return state | dict(gain=site.fixed(norm.W[:, 0].clone()), shift=site.fixed(norm.b.clone()),
                            eps=next(getattr(norm.module, n) for n in ("eps", "variance_epsilon") if hasattr(norm.module, n)))

    def stream(self, t, p):                # t.h: (B, T, D)
        if not hasattr(p, "D"):
            return t.lane(p.key, t.h)
        s = t.h + t.lanes[p.key]
        s = F.layer_norm(s, s.shape[-1:], p.gain, p.shift, p.eps) if hasattr(p, "gain") else s
        return t.map_h(lambda h: h + ACTS[self.act](s @ p.D.T + p.d) @ p.U.T + p.u)
