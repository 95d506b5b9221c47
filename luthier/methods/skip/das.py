"""Blocks that are not run: an adapter stands in for each.    h' = h + U relu(D LN(h) + d) + u,    D, U ~ N(0, 0.02²)
Wu et al., DAS (dynamic architecture skipping), NeurIPS 2023. arXiv:2309.01479 §3.2-3.3, the adapter as in the authors' code. `at`
names the blocks that are skipped for good; `luthier.procedures.das` finds which by a k-armed bandit, while the adapters train. In
blocks that stay, other adapters do their work: das(at="text.block.2.out") >> houlsby(...).
"""

from torch.nn.functional import layer_norm, relu

from luthier.errors import DoesNotFit
from luthier.method import Method, method


@method
class das(Method):
    at: str = "block.-1.out"
    width: int = 96
    exempt = {"identity_at_init": "the block no longer runs"}

    def init(self, site):                  # trains 2 width D + width + 3 D a block
        if site.role != "out" or "attn" not in site.peers:
            raise DoesNotFit(f"das skips whole blocks with attention, and {site.name} is none. Name some: "
                             "das(at=\"block.2.out\").")
        D, U = site.normal(self.width, site.d_in, std=0.02), site.normal(site.d_out, self.width, std=0.02)
        norm = dict(g=site.ones(site.d_in), s=site.zeros(site.d_in), skips=True)          # False now and then while it is sought
        return norm | dict(D=D, d=site.zeros(self.width), U=U, u=site.zeros(site.d_out))

    def around(self, f, t, p):             # t.h: (B, T, D)
        if not p.skips:
            return f(t)
        return t.map_h(lambda h: h + relu(layer_norm(h, h.shape[-1:], p.g, p.s) @ p.D.T + p.d) @ p.U.T + p.u)
