"""A low rank whose gates go to exact zeros.    W' = W + (α/r)·Bᵀ diag(g) A,   B: (r, d_out) = 0,   g ~ N(0, 1)
Ding et al., SoRA, EMNLP 2023. arXiv:2311.11696 §3.2-3.3. A and B follow the optimizer, g a proximal step after it:
    g ← T_ξ(g),   T_ξ(x) = sign(x) max(|x| - ξ, 0),   ξ = η λ with learning rate η: the step of L + λ ‖g‖₁
With the last step every rank whose gate is zero is deleted: what stays is a smaller LoRA with the same output.
`peak` > `xi`: ξ rises from `xi` to `peak` in `stages` equal steps over the run (algorithm 1), tracing sparsity against quality.
`penalty` · mean |g| joins the loss, as in the authors' code. That code also zeroes gates that T_ξ leaves below ξ; this does not.
"""

import torch

from luthier.errors import ScheduleNotStepped
from luthier.method import Method, method


@method
class sora(Method):
    at: str = "attn.q attn.v"
    rank: int = 8                          # r_max; the final rank of each site is found
    alpha: float = 16.0                    # the update is scaled by alpha / rank, also after ranks were deleted
    xi: float = 1e-3                       # ξ: what each step takes from every gate
    peak: float = 0.0                      # ξ of the last stage; 0: ξ stays
    stages: int = 5
    penalty: float = 0.0

    def init(self, site):                  # trains rank * (d_in + d_out + 1), in the end what is left of it
        A = site.normal(self.rank, site.d_in, std=site.d_in**-0.5)
        return dict(A=A, g=site.normal(self.rank), B=site.zeros(self.rank, site.d_out))      # B = 0: identity at init

    def weight(self, W, p):                # (d_out, d_in)
        return W + self.alpha / self.rank * (p.B.T * p.g) @ p.A

    def fast(self, x, y, p):               # (..., d_in) -> (..., d_out)
        return y + self.alpha / self.rank * (x @ p.A.T * p.g) @ p.B

    def loss(self, run):
        gates = torch.cat([p.g for p in run.states.values()])
        return self.penalty * gates.abs().sum() / max(1, len(gates))

    def threshold(self, k, total):         # ξ of step k = 1 ... total
        stage = min((k - 1) * self.stages // total, self.stages - 1)
        return self.xi + max(0, self.peak - self.xi) * stage / max(1, self.stages - 1)

    def step(self, run):
        if run.total is None:
            raise ScheduleNotStepped("sora deletes the ranks whose gates are zero with the last step, and nobody said which that "
                                     "is. Set tuned.total_steps before training.")
        for p in run.states.values():
            p.g.copy_(torch.nn.functional.softshrink(p.g, self.threshold(run.k, run.total)))
            if run.k == run.total:
                kept = p.g != 0
                for name in ("A", "g", "B"):
                    p.resize(name, getattr(p, name)[kept], kept.nonzero()[:, 0])
