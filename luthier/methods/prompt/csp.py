"""A learned vocabulary of attributes and objects.    t_(a, o) = "a photo of" [θ_a] [θ_o],    θ: (n_attributes + n_objects, D)
Nayak et al., Learning to Compose Soft Prompts for Compositional Zero-Shot Learning (CSP), 2023. arXiv:2204.03574 §4, eq. 2-4.
Each θ starts as the mean embedding of its word's tokens and stands as one token in every pair it belongs to, also in pairs
that training never shows. Cross-entropy runs over the pairs of training; `dropout` on θ while training, as in the authors'
code.
"""

import torch
from torch import nn
from torch.nn import functional as F

from luthier.errors import DoesNotFit
from luthier.method import Method, method

from . import _texts


@method
class csp(Method):
    at: str = "words"
    dropout: float = 0.0
    limits = {"dropout": (0, 0.99)}

    def init(self, site, model):           # trains (n_attributes + n_objects) D
        parts = getattr(model, "parts", None)
        if parts is None:
            raise DoesNotFit(f"csp composes attributes with objects, and {type(model).__name__} knows no such pairs. Open a "
                             "class-names task over data with a column for each.")
        ids = [[_texts.tokens(model, w) for w in parts[k]] for k in ("attributes", "objects")]
        first, second = (torch.stack([site.module.weight.detach()[i].mean(0) for i in words]) for words in ids)
        pairs, spans, T = torch.tensor(parts["pairs"]), model.spans, model.texts.shape[1]
        sizes = [(len(ids[0][a]), len(ids[1][o])) for a, o in parts["pairs"]]
        if any(b - a != m + n for (a, b), (m, n) in zip(spans, sizes, strict=True)):
            raise DoesNotFit("In its text, a pair is other tokens than its two words alone. Use a template with spaces around "
                             "{}.")
        state = dict(A=nn.Parameter(first), O=nn.Parameter(second), pair=site.fixed(pairs + torch.tensor([0, len(first)])),
                     at=site.fixed(torch.tensor([[a, a + 1] for a, _ in spans])))
        if max(map(max, sizes)) > 1:       # words of several tokens: the first stays, the others go behind the end of the text
            if not site.stack.causal:
                raise DoesNotFit("csp gives each word one token, and here words have several that an encoder would still see.")
            kept = [[*range(a + 1), a + m, *range(b, T)] for (a, b), (m, _) in zip(spans, sizes, strict=True)]
            state["order"] = site.fixed(torch.tensor([k + sorted({*range(T)} - {*k}) for k in kept]))
        return state

    def stream(self, t, p):                # (C, T, D) -> the same
        t = t.keep(p.order[:len(t.h)]) if hasattr(p, "order") else t
        rows = F.dropout(torch.cat([p.A, p.O]), self.dropout, p.training)[p.pair[:len(t.h)]]            # (C, 2, D)
        at = p.at[:len(t.h), :, None].expand_as(rows)
        return t.map_h(lambda h: h.scatter(1, at, rows.to(h.dtype)))
