"""Adapters that pass messages on the graph of attention.   h' = h + U (gelu(G h + g) ⊙ F') + u,   F' = α (A' F_V + (2μ/p) F_Q)
Wu et al., p-Laplacian Adaptation, AAAI 2024. arXiv:2312.10613. Checked in the authors' code (wuhy68/p-Adapter, eff_blip/
eff_modeling_blip.py, BertSelfAttention and BertSelfOutput), not in the paper's text. Behind each attention, self and cross, of
output h = W_o [heads] and weights A, for a query i and a value j, per head (D is cut into as many as the attention has):

F_Q = D (W_o q + b_o) + d,  F_V = D (W_o v + b_o) + d        A'_ij = A_ij (A_ij ‖F_Qi - F_Vj‖² + ε)^((p-2)/2)
α_i = 1 / (Σ_j A'_ij + 2μ/p)                                 μ = μ0 (2 + tanh m), m = 0 and p train (p: `learn`)

In an encoder's self-attention F_Q is F_V, its token's own, as in the code. Elsewhere the code loses the term 2μ/p F_Q (it takes a
block off the diagonal that is zero), and it has a decoder's self-attention as an encoder's where nothing is cached, as in
training, but as a cross attention where something is: here both are cross attentions with that term. Of cross attentions the
code averages the values to `image_sample_len`; here all stay.
p = 2 is plain attention, F' = (A F_V + μ F_Q) / (1 + μ). `ffn` adds U relu(D x + d) + u beside the MLP, x its input. U = 0 and
u = 0 at init: the identity (the code draws U). ε = 1e-6 keeps A' finite. W_o, b_o are the base's; queries and values are as the
core gets them.
"""

import torch
from torch.nn.functional import gelu, relu

from luthier.errors import DoesNotFit
from luthier.method import Method, method


@method
class p_adapter(Method):
    at: str = "block.*.* *.out mlp.in"
    reduce: int = 8                        # width: d / reduce, rounded up to a multiple of the heads
    p: float = 1.5
    mu: float = 0.1                        # μ0
    learn: bool = True
    ffn: bool = True
    limits = {"p": (1, 4), "mu": (1e-3, 1e3)}
    example = {"reduce": 4}

    def init(self, site):                  # trains 3 width d per attention, 2 width d per MLP, and biases
        group, _, place = site.role.rpartition(".")
        if site.tower == "vision" or site.block is None:
            return None
        if site.role in ("mlp.in", "mlp.out"):
            return None if not self.ffn else {} if place == "in" else self.maps(site, site.d_out, -(-site.d_out // self.reduce))
        core = site if site.kind == "attend" else site.peers.get(group)
        if core is None or core.kind != "attend":
            return None                    # block.in, block.out, mid
        o = site.peers.get(f"{core.role}.o")
        if o is None or o.d_in != core.heads[0] * core.heads[2]:
            raise DoesNotFit(f"p_adapter needs the output projection of {core.name}, and finds none that takes its heads.")
        d, H = o.d_out, core.heads[0]
        r = -(-d // (self.reduce * H)) * H
        if site.kind == "stream":
            return self.maps(site, d, r, "G", "g")
        bias = {} if o.b is None else dict(b=site.fixed(o.b))
        power = dict(p=site.ones(1).data.mul_(self.p))
        power = dict(p=torch.nn.Parameter(power["p"])) if self.learn else power
        return bias | power | dict(D=site.normal(r, d, std=d**-0.5), d=site.zeros(r), m=site.zeros(1), W=site.fixed(o.W),
                                   own=core.role == "attn" and not site.stack.causal)

    def maps(self, site, d, r, D="D", b="d"):
        return {D: site.normal(r, d, std=d**-0.5), b: site.zeros(r), "U": site.zeros(d, r), "u": site.zeros(d)}

    def attend(self, a, p):                # a.q: (B, H, T, Dh)
        H, wide = a.q.shape[1], torch.promote_types(a.q.dtype, torch.float32)

        def nodes(x):                      # (B, Hx, T, Dh) -> (B, H, T, r / H)
            x = x.repeat_interleave(H // x.shape[1], 1).transpose(1, 2).flatten(2) @ p.W.T
            return ((x + p.b if hasattr(p, "b") else x) @ p.D.T + p.d).unflatten(-1, (H, -1)).transpose(1, 2).to(wide)
        V = nodes(a.v)
        Q = V if p.own and V.shape[2] == a.q.shape[2] else nodes(a.q)
        F = propagate(a.weights().to(wide), Q, V, p.p.to(wide), self.mu * (2 + p.m.to(wide).tanh()))
        return a.lane(self.lane(p, "out"), F.transpose(1, 2).flatten(2).to(a.q.dtype))     # (B, T, r)

    def lane(self, p, what):
        return f"{p.key}:{what}"

    def stream(self, t, p):                # t.h: (B, T, d)
        if hasattr(p, "G"):
            F = t.lanes[self.lane(p, "out")]
            return t.map_h(lambda h: h + (gelu(h @ p.G.T + p.g) * F) @ p.U.T + p.u)
        if not hasattr(p, "D"):
            return t.lane(self.lane(p, "mlp"), t.h)
        x = t.lanes[self.lane(p, "mlp")]
        return t.map_h(lambda h: h + relu(x @ p.D.T + p.d) @ p.U.T + p.u)


def propagate(A, Q, V, p, mu):             # (..., T, S), (..., T, k), (..., S, k) -> (..., T, k)
    far = torch.cdist(Q, V, compute_mode="donot_use_mm_for_euclid_dist")
    A = A * (A * far * far + 1e-6) ** ((p - 2) / 2)
    return (A @ V + 2 * mu / p * Q) / (A.sum(-1, keepdim=True) + 2 * mu / p)
