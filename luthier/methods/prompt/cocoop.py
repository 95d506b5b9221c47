"""Context words that each image shifts.    t_c(x) = [v_1 + π] .. [v_n + π] [name of c] [.],    π = W2 relu(W1 f(x) + b1) + b2
Zhou et al., Conditional Prompt Learning for Vision-Language Models (CoCoOp), 2022. arXiv:2203.05557 §3.2, eq. 3. f(x): the
image's unit feature, (d,); W1: (d / 16, d). Start and place of the context are CoOp's. Every image has texts of its own for all
classes, so a forward runs the text tower on B C of them. With W2 = b2 = 0 it is CoOp.
"""

import torch
from torch.nn import functional as F

from luthier.errors import DoesNotFit
from luthier.method import Method, method

from . import _texts


@method
class cocoop(Method):
    at: str = "words"
    n: int = 4
    words: str = ""
    reduce: int = 16
    std: float = 0.02
    exempt = {"identity_at_init": "the context stands in the text from the first step"}
    example = dict(reduce=4)

    def init(self, site, model):           # trains n D + (d + 1) d / reduce + (d / reduce + 1) D
        if not hasattr(model, "width"):
            raise DoesNotFit(f"cocoop makes its context from the image while the texts are read, and {type(model).__name__} does "
                             "not offer its image features then. Open a class-names task.")
        n, d = len(_texts.tokens(model, self.words)) if self.words else self.n, model.width
        r = max(1, d // self.reduce)
        return dict(P=_texts.start(site, model, self.words, (n, site.d_out), self.std),
                    W1=site.uniform(r, d, bound=d**-0.5), b1=site.uniform(r, bound=d**-0.5),
                    W2=site.uniform(site.d_out, r, bound=r**-0.5), b2=site.uniform(site.d_out, bound=r**-0.5),
                    **_texts.order(site, model, n, middle=False))

    def produce(self, ctx, p):             # v + π(x): (B, n, D)
        pi = F.linear(torch.relu(F.linear(ctx["image"](), p.W1, p.b1)), p.W2, p.b2)
        return dict(P=p.P + pi[:, None])

    def stream(self, t, p):                # (C, T, D) -> (B C, n + T - words before the name, D)
        B, C = len(p.P), len(t.h)
        return _texts.placed(t.times(B), p.P.repeat_interleave(C, 0), p, copies=B)
