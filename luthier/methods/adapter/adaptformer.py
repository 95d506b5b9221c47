"""A bottleneck beside the MLP.    h' = MLP(x) + s (U relu(D x + d) + u),    x: the input of the MLP;   U: (D, width) = 0
Chen et al., AdaptFormer, 2022. arXiv:2205.13535 §3.2, eq. 3: x = LN(h), s = 0.1, width 64; D ~ U(±D^-½) and biases 0 as in the
authors' code ("lora" init), whose default however feeds the adapter h without the norm. `parallel=False` puts the same
bottleneck behind the MLP, x = MLP(·), the sequential form of the paper's ablation.

With width 512 and s = 4 this is the scaled parallel adapter of arXiv:2110.04366 §4.6.
"""

from torch.nn.functional import relu

from luthier.method import Method, method


@method
class adaptformer(Method):
    at: str = "mlp.in mlp.out"
    width: int = 64
    scale: float = 0.1
    parallel: bool = True
    example = {"scale": 1.0}               # or the change drowns in the rounding of a tiny bf16 model

    def init(self, site):                  # trains 2 width D + width + D per block
        if site.role.endswith("in"):       # here the input is only remembered, for the parallel form
            return {} if self.parallel else None
        D = site.uniform(self.width, site.d_out, bound=site.d_out**-0.5)
        return dict(D=D, d=site.zeros(self.width), U=site.zeros(site.d_out, self.width), u=site.zeros(site.d_out))

    def stream(self, t, p):                # t.h: (B, T, D)
        if not hasattr(p, "D"):
            return t.lane(p.key, t.h)
        x = t.lanes[p.key] if self.parallel else t.h
        return t.map_h(lambda h: h + self.scale * (relu(x @ p.D.T + p.d) @ p.U.T + p.u))
