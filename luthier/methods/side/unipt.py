"""All layers read at once from beside a frozen model, with the last as anchor.    x_i = LN(D_i h_i + d_i),   a = LN(D h_L + d)
    m_i = (L1norm(relu(a x_iᵀ)) + 1) x_i       parallel interaction: each token of the anchor gathers from layer i, and its own
    c = softmax_i(γ · (mean a ⊙ mean x_i))     confidence of the layers 0..L-1, which sums to one
    h' = h_L + U relu(a + LN(P Σ_i c_i m_i + e)) + u
Diao et al., UniPT, 2023. arXiv:2308.14316 §3; formulas from the authors' code, VSE-infty/lib/adapter_for_transformer.py (text
encoder). h_i are detached: the backbone gets no gradient and keeps no activation. h_0: the input of the first block.

The authors' output is new features, `residual=False`: h' = U relu(..) + u with U ~ N(0, 1/w); their CLIP4Clip code adds h_L, and
so does the default, with U = 0: the identity. Their gate has a bias, which the softmax cancels. Causal streams (CLIP's text,
decoders): a token gathers from and averages over what it may see, which at the last token is the authors' formula. Where blocks
change the number of tokens (CNNs, which the authors pool) it is refused. In an encoder-decoder it stands beside the decoder.
"""

import torch
from torch.nn.functional import layer_norm

from luthier.method import Method, method
from luthier.methods.side._taps import down, reading, tap, tapped, visible, weighted


@method
class unipt(Method):
    at: str = "block.0.in block.*.out final"
    reduce: int = 8
    residual: bool = True
    example = {"reduce": 2}

    def init(self, site):                  # trains w (D + 3) a layer, w (2 D + w + 7) + D at the end;  w = D / reduce
        d, w = site.d_out, max(1, site.stack.dim // self.reduce)
        if site.tower == "encoder" or _last(site):
            return None                    # what comes out of the last block is read at `final`
        if site.role != "final":
            return down(site, w)
        taps = sum(s.tower == site.tower and s.role != "final" and not _last(s) for s in site.pool["sites"])
        U = site.zeros(d, w) if self.residual else site.normal(d, w, std=w**-0.5)
        return down(site, w) | dict(c=site.normal(w, std=w**-0.5), P=site.normal(w, w, std=w**-0.5), e=site.zeros(w),
                                    pg=site.ones(w), ps=site.zeros(w), U=U, u=site.zeros(d), taps=taps)

    def stream(self, t, p):                # lane of each layer: (B, T, w)
        a = reading(t.h, p)
        if not hasattr(p, "U"):
            return tap(t, p, a)
        own, (c, merged) = a, self.fused(t, p, a)
        x = weighted(c, merged) @ p.P.T + p.e
        new = torch.relu(own + layer_norm(x, x.shape[-1:], p.pg, p.ps)) @ p.U.T + p.u
        return t.map_h(lambda h: h + new if self.residual else new.to(h.dtype))

    def fused(self, t, p, a):              # -> c: (B, 1 or T, L), m: L of (B, T, w)
        xs, own = tapped(t, p), f"{p.key}>anchor"
        seen = {k: t.recall(k + p.site_name, x[:, None])[0][:, 0] for k, x in (xs | {own: a}).items()}          # (B, S, w)
        see = t.sees(seen[own].shape[1])
        anchor, merged, scores = visible(seen.pop(own), see), [], []
        for k, z in seen.items():
            s = torch.relu(a @ z.mT)       # (B, T, S)
            s = s if see is None else s * see
            merged.append(s @ z / s.sum(-1, keepdim=True).clamp(min=1e-6) + xs[k])
            scores.append((anchor * visible(z, see)) @ p.c)
        return torch.stack(scores, -1).softmax(-1), merged


def _last(site):
    return site.role == "out" and site.block == site.stack.n_blocks - 1
