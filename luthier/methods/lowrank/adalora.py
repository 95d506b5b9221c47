"""A rank budget spent where it matters.    W' = W + (α/r)·Pᵀ diag(λ) Q,   P: (r, d_out),   λ: (r,) = 0,   Q: (r, d_in)
Zhang et al., AdaLoRA, ICLR 2023. arXiv:2303.10512 §3.1-3.3:
    penalty      γ Σ_sites ‖P Pᵀ - I‖² + ‖Q Qᵀ - I‖²        (the authors' code: mean of the norms, not squared)
    sensitivity  I = |w · ∂L/∂w|,   Ī ← β1 Ī + (1-β1) I,   Ū ← β2 Ū + (1-β2) |I - Ī|,   s = Ī Ū
    triplet i    S_i = s(λ_i) + mean_j s(P_ij) + mean_j s(Q_ij)
    budget       b(t) = b_T + (b_0 - b_T) (1 - (t - t_i)/(T - t_i - t_f))³,   b_0 before t_i, b_T in the last t_f steps
After each step the triplets that are not among the b(t) best of all sites get λ = 0. P, Q and the gradient of λ live on, so
a triplet can return; with the last step the lost ones are dropped for good. t is shifted as in the authors' code (the
paper's Appendix A has t - t_i - t_f above the line, which jumps at t_i).
"""

import torch

from luthier.errors import BadChain, ScheduleNotStepped
from luthier.method import Method, method


@method
class adalora(Method):
    at: str = "linear"
    rank: int = 12                         # per site at the start: b_0 = rank · sites
    target: int = 8                        # per site on average at the end: b_T = target · sites
    alpha: float = 16.0
    penalty: float = 0.1                   # γ
    warmup: float = 0.1                    # t_i and t_f, in parts of the whole run
    final: float = 0.3
    every: int = 1                         # steps between two allocations
    beta1: float = 0.85
    beta2: float = 0.85
    limits = {"warmup": (0, 0.5), "final": (0, 0.5), "beta1": (0, 1), "beta2": (0, 1)}
    peft = dict(type="ADALORA", layers="linear conv1d", fields=dict(init_r="rank", target_r="target"),
                tensors={"lora_A": "Q: r in", "lora_E": "lam: r -> r 1", "lora_B": "P: r out -> out r"},
                factor=("alpha", "rank"), scale=("lora_alpha", "init_r", 1e-5), patterns="lora_E",
                settings=dict(total_step=1), reads=("r",),
                rounds="to rounding: peft divides by rank + 1e-5 (worked into lora_alpha) and folds lambda into the other "
                       "factor")

    def __post_init__(self):
        super().__post_init__()
        if self.target > self.rank:
            raise BadChain(f"adalora(rank={self.rank}, target={self.target}): the budget falls from rank to target, so target "
                           f"may not exceed rank. For example adalora(rank={self.rank}, target={max(1, self.rank // 2)}).")

    def init(self, site):                  # trains rank * (d_in + d_out + 1), in the end target * (...) on average
        P, Q = (site.normal(self.rank, d, std=d**-0.5) for d in (site.d_out, site.d_in))     # rows of about unit length
        seen = site.zeros(0, site.d_out + 1 + site.d_in).detach()                            # Ī and Ū, while the run lasts
        return dict(P=P, lam=site.zeros(self.rank), Q=Q, I=seen, U=seen.clone())

    def weight(self, W, p):                # (d_out, d_in)
        return W + self.alpha / self.rank * (p.P.T * p.lam) @ p.Q

    def fast(self, x, y, p):               # (..., d_in) -> (..., d_out)
        return y + self.alpha / self.rank * (x @ p.Q.T * p.lam) @ p.P

    def loss(self, run):
        rows = [M for p in run.states.values() for M in (p.P, p.Q)]
        return self.penalty * sum((M @ M.T - torch.eye(len(M)).to(M)).square().sum() for M in rows)

    def budget(self, k, total, sites):     # triplets of all sites together that stay after step k
        start, stop = int(self.warmup * total), total - int(self.final * total)
        left = 1 - (k - start) / (stop - start) if start < k < stop else float(k <= start)
        return int((self.rank - self.target) * sites * left**3 + self.target * sites)

    @torch.no_grad()
    def step(self, run):
        if run.total is None:
            raise ScheduleNotStepped("adalora's budget falls over the whole run, and nobody said how long that is. "
                                     "Set tuned.total_steps before training.")
        states, k = list(run.states.values()), run.k
        start, stop = int(self.warmup * run.total), run.total - int(self.final * run.total)
        for p in states:
            if k < stop or not len(p.I):
                wg = [t * (torch.zeros_like(t) if t.grad is None else t.grad) for t in (p.P, p.lam, p.Q)]
                now = torch.cat([wg[0], wg[1][:, None], wg[2]], 1).abs()             # (r, d_out + 1 + d_in)
                mean, spread = (p.I, p.U) if len(p.I) else (torch.zeros_like(now), torch.zeros_like(now))
                p.I = self.beta1 * mean + (1 - self.beta1) * now
                p.U = self.beta2 * spread + (1 - self.beta2) * (now - p.I).abs()
        if not (start < k <= run.total and (k % self.every == 0 or k >= stop)):
            return
        scores = torch.cat([self.score(p) for p in states])
        keep = torch.zeros_like(scores, dtype=torch.bool)
        keep[scores.topk(self.budget(k, run.total, len(states))).indices] = True
        for p, kept in zip(states, keep.split([len(p.lam) for p in states]), strict=True):
            p.lam.data *= kept
            if k == run.total:             # nothing can return any more: the lost triplets and the statistics go
                for name in ("P", "lam", "Q"):
                    p.resize(name, getattr(p, name)[kept], kept.nonzero()[:, 0])
                p.I, p.U = p.I[:0], p.U[:0]

    def score(self, p):                    # (r,): one number for each triplet
        P, lam, Q = (p.I * p.U).split([p.P.shape[1], 1, p.Q.shape[1]], 1)
        return P.mean(1) + lam[:, 0] + Q.mean(1)
