"""Adapters inside both towers of a segmenter by text.    h' = h + relu(W2 relu(W1 h + b1) + b2)
Dhakal et al., VLSM-Adapter, MICCAI 2024. arXiv:2405.06196 §2.2, fig. 1c, and the authors' code: behind the attention and behind
the MLP of each layer, before the residual sum, and behind the projection that gives the conditional embedding of the text, `cond`
wide (0: none). In the layers 0 .. e-1 of both towers, where e is the last layer that the decoder reads, as theirs are (e = 9).

Of the paper's variants VLC is the default; VL is `cond=0`, V is `at="vision.attn.out vision.mlp.out"`.
"""

from luthier.method import Method, method
from luthier.methods.adapter._twice import STARTS, change, drawn, read


@method
class vlsm_dense(Method):
    at: str = "vision.attn.out vision.mlp.out text.attn.out text.mlp.out *.text_projection.weight"
    width: int = 64
    cond: int = 256
    limits = {"cond": (0, None)}
    exempt = STARTS

    def init(self, site, model):           # trains 2 width d + width + d a place
        if site.kind == "weight":
            return drawn(site, site.d_out, self.cond) if self.cond else None
        beyond = site.block is not None and read(model) and site.block >= max(read(model))
        return None if beyond else drawn(site, site.d_out, self.width)

    def stream(self, t, p):                # t.h: (B, T, d)
        return t.map_h(lambda h: h + change(h, p))

    def output(self, x, y, p):             # of the projection: (B, D), (B, d)
        return y + change(y, p)
