"""Heads that look at another frame.    head i:  softmax(q_t k_{t-Δ_i}ᵀ / √Dh) v_{t-Δ_i},   Δ = `shift`, 0 for the other heads
Li et al., ZeroI2V, 2023. arXiv:2310.01324 §3.2 (spatial-temporal dual-headed attention): no parameter, no operation more. Where
frame t - Δ does not exist the head stays with its own, as in the authors' code (models/common/stdha.py, which shifts D / 12
channels each way: one head of twelve to the frame before, one to the frame behind; on SSv2 a third to t - 2, `shift=(1, -1, 2)`).
`shift=()` is the model as it was. Frames are the rows of a clip, see luthier/clips.py; a single image is its own clip.
"""

from dataclasses import replace

from luthier.errors import DoesNotFit
from luthier.method import Method, method


@method
class stdha(Method):
    at: str = "attn"
    shift: tuple = (1, -1)                 # Δ of the first heads
    exempt = {"identity_at_init": "what heads look at changes as soon as there is a second frame",
              "acts_when_perturbed": "of a single image there is no other frame"}

    def init(self, site):                  # trains nothing
        if len(self.shift) > site.heads[1]:
            raise DoesNotFit(f"stdha(shift={self.shift}) names {len(self.shift)} heads; {site.name} has {site.heads[1]} of keys "
                             "and values. Shift fewer.")
        return {}

    def attend(self, a, p):                # a.k, a.v: (B N, H, S, Dh), the N frames of a clip in turn
        n = a.t.frames if a.t is not None else 1
        return a if n == 1 else replace(a, k=self.moved(a.k, n), v=self.moved(a.v, n))

    def moved(self, z, n):
        z = z.unflatten(0, (-1, n))
        out = z.clone()
        for head, d in enumerate(self.shift):
            if d > 0:
                out[:, d:, head] = z[:, :-d, head]
            elif d < 0:
                out[:, :d, head] = z[:, -d:, head]
        return out.flatten(0, 1)
