"""Two bottlenecks that see time, before every block.    x_t' = x_t + U (K * (D x_t + d) + k) + u  [+ the next, for patches]
    difference:  + U' (K' * (D' (x_t - x_{t-1}) + d') + k') + u',    x_0 - x_{-1} = 0
K: depthwise over time, 3 frames, for every token by itself (global temporal enhancement); K': depthwise 3 x 3 over the map of
patches (local temporal difference). K = K' = 0 at init: the identity; D, U ~ U(±fan_in^-½).
Wang et al., M2-CLIP, 2024. arXiv:2401.11649 §3.2 (TED-Adapter, before each transformer layer); formulas from the authors' code,
models_adapter.py, class Adapter2 (width 384 of 768). At `final` stands the enhancement alone: theirs is behind the projection of
the class token (Adapter1). Either half can be switched off. Their text adapters and their decoder: m2clip.
"""

import torch

from luthier.method import Method, method
from luthier.methods.adapter._time import clips, grid, looks, over_space, over_time


@method
class ted(Method):
    at: str = "block.*.in"
    reduce: int = 2                        # width = D / reduce
    enhance: bool = True
    difference: bool = True
    exempt = {"only_declared_train": "of a single image there is no frame before it to differ from"}

    def init(self, site):                  # trains w (2 D + 5) + D for the one, w (2 D + 11) + D for the other;  w = D / reduce
        d, w, state = site.d_out, max(1, site.d_out // self.reduce), {}
        if not looks(site):
            return None                    # a tower of words
        for on, n, kernel in ((self.enhance, "e", (3, w)), (self.difference and site.role != "final", "o", (w, 1, 3, 3))):
            if on:
                state |= {n + "D": site.uniform(w, d, bound=d**-0.5), n + "d": site.zeros(w), n + "K": site.zeros(*kernel),
                          n + "k": site.zeros(w), n + "U": site.uniform(d, w, bound=w**-0.5), n + "u": site.zeros(d)}
        return state or None

    def stream(self, t, p):                # t.h: (B N, T, D), the N frames of a clip in turn
        new = 0
        if hasattr(p, "eD"):
            new = over_time(clips(t, t.h @ p.eD.T + p.ed), p.eK, p.ek).flatten(0, 1) @ p.eU.T + p.eu
        if hasattr(p, "oD"):
            x, size = clips(t, t.h[:, t.fixed:]), grid(t, "ted")       # (B, N, h w, D)
            step = torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:] - x[:, :-1]], 1).flatten(0, 1)
            step = over_space(step @ p.oD.T + p.od, p.oK, p.ok, size, groups=len(p.oK)) @ p.oU.T + p.ou
            new = new + torch.cat([step.new_zeros(len(step), t.fixed, step.shape[-1]), step], 1)
        return t.map_h(lambda h: h + new)
