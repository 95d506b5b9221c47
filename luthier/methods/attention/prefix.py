"""n learned keys and values in front of every attention.    softmax(q [K_P; K]ᵀ / √Dh) [V_P; V],    K_P, V_P: (n, Hkv, Dh)
Li & Liang, Prefix-Tuning, 2021. arXiv:2101.00190 §4.2-4.3. `reparam=True` as in the paper: the prefix comes out of a small MLP,
[K_P; V_P]_l = W_l tanh(W E + w) + w_l  with E: (n, D) and W: (mid, D) shared by all layers, W_l: (2 Hkv Dh, mid) of each layer
(N(0, 1) and U(±fan_in^-½) at init, as in the authors' code). `reparam=False`: K_P and V_P train directly, from N(0, std²).

Keys that all queries see have no position: under RoPE they are not turned, and no position in the sequence is shifted (the
authors and peft shift it by n, as the prefix poses as a KV cache). With grouped queries the prefix has the key/value heads.
"""

import torch

from luthier.method import Method, method
from luthier.methods.attention._cache import read, why, write


@method
class prefix(Method):
    at: str = "attn"
    n: int = 10
    reparam: bool = True
    mid: int = 512
    std: float = 0.02
    exempt = {"identity_at_init": "the prefix takes part in attention from the first step"}
    peft = dict(type="PREFIX_TUNING", given=dict(reparam=False), prompt=dict(why=why, write=write, read=read),
                rounds="to rounding, under rotary positions: peft shifts every position by n, so keys are turned by n places")

    def init(self, site):                  # trains 2 n Hkv Dh per layer, or (mid + 1) 2 Hkv Dh per layer + mid (D + 1) + n D
        _, H, Dh = site.heads
        if not self.reparam:
            return dict(K=site.normal(self.n, H, Dh, std=self.std), V=site.normal(self.n, H, Dh, std=self.std))
        d, bound, tower = site.stack.dim, self.mid**-0.5, site.stack.name
        E = site.shared("E", lambda: site.normal(self.n, d), group=tower)
        W = site.shared("W", lambda: site.uniform(self.mid, d, bound=d**-0.5), group=tower)
        w = site.shared("w", lambda: site.uniform(self.mid, bound=d**-0.5), group=tower)
        return dict(E=E, W=W, w=w, Wl=site.uniform(2 * H * Dh, self.mid, bound=bound), wl=site.uniform(2 * H * Dh, bound=bound),
                    heads=H)

    def attend(self, a, p):                # a.q: (B, H, T, Dh); a.k, a.v: (B, Hkv, S, Dh)
        if not self.reparam:
            return a.prepend(p.K, p.V)
        return a.prepend(*self.made(p))

    def made(self, p):                     # K, V: (n, Hkv, Dh)
        both = torch.tanh(p.E @ p.W.T + p.w) @ p.Wl.T + p.wl           # (n, 2 Hkv Dh)
        return both.view(self.n, 2, p.heads, -1).unbind(1)
