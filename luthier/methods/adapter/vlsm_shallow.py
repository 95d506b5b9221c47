"""Adapters on what a segmenter's decoder is given.    a(h) = h + relu(W2 relu(W1 h + b1) + b2)
Dhakal et al., VLSM-Adapter, MICCAI 2024. arXiv:2405.06196 §2.2, fig. 1b, and the authors' code. With e over the layers that the
decoder reads, h_e their states, c the text's conditional embedding, pooled at its end token:

    image   the decoder's reduction of layer e reads a_e(h_e); the towers themselves run on as they were
    text    c' = a_c(c) + Σ_e a_e(h_e of the text tower, at the end token)        over those e that it has

`cond`: width of a_c, 0 for none. VLC is the default; VL is `cond=0`, V is `at="*.reduces.*.weight"`, in which no text is
read. As in their code the text's states themselves are added, too, so nothing of it starts at the base.
"""

from luthier.errors import DoesNotFit
from luthier.method import Method, method
from luthier.methods.adapter._twice import STARTS, change, drawn, read
from luthier.state import Noted


@method
class vlsm_shallow(Method):
    at: str = "*.reduces.*.weight text.block.*.out text.final *.text_projection.weight"
    width: int = 512
    cond: int = 256
    limits = {"cond": (0, None)}
    example = {"width": 8, "cond": 4}
    exempt = STARTS

    def init(self, site, model):           # trains 2 width d + width + d a place
        seen = dict(seen=site.shared("seen", Noted))       # from the text tower to its projection, within one forward
        if site.path.endswith("text_projection"):
            return seen | (drawn(site, site.d_out, self.cond) if self.cond else {})
        if site.kind == "weight":
            return drawn(site, site.d_in, self.width)
        if site.block is None:
            return seen
        if site.block not in (read(model) or ()):
            return None
        if site.d_out != model.config.projection_dim:
            raise DoesNotFit(f"vlsm_shallow adds states of the text tower, {site.d_out} wide, to its embedding, which is "
                             f"{model.config.projection_dim} wide. Leave them out: vlsm_shallow(at=\"*.reduces.*.weight "
                             "*.text_projection.weight\").")
        return seen | drawn(site, site.d_out, self.width)

    def stream(self, t, p):                # t.h: (B, T, d), looked at only
        p.seen[p.site_name] = t.h, p
        return t

    def output(self, x, y, p, W):
        if not hasattr(p, "seen"):         # a reduction: (B, T, D), (B, T, d)
            return y + change(x, p) @ W.T
        y = y + change(y, p) if hasattr(p, "W1") else y                          # the projection: (B, D), (B, d)
        if p.seen:
            last, _ = p.seen.pop("text.final")
            end = (last == x[:, None]).all(-1).int().argmax(1)                   # pooling took one of these tokens
            for h, q in p.seen.values():
                h = h[range(len(h)), end]
                y = y + h + change(h, q)
            p.seen.clear()
        return y
