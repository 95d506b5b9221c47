"""One tuning for every rank up to r.    W' = W + (α/b)·B[:, :b] A[:b],   A: (r, d_in),   B: (d_out, r) = 0
Valipour et al., DyLoRA, EACL 2023. arXiv:2210.07558 §4, algorithm 1. Each training step draws one b from low ... r for all sites,
uniformly or with P(b) ∝ (1 - geometric)^b, and runs and trains the first b rows of A and columns of B alone; with `frozen` only
the b-th ones train. Inference runs at rank r, or at the rank that `tuned.context = {"rank": b}` names, merged too.
What a step leaves out has a gradient of zero; an optimizer with momentum still moves it a little, as in the authors' code.
"""

import torch

from luthier.errors import BadChain
from luthier.method import Method, method


@method
class dylora(Method):
    at: str = "attn.q attn.v"
    rank: int = 8                          # r: the largest rank
    low: int = 1                           # the smallest rank that is trained for
    alpha: float = 16.0                    # the update is scaled by alpha / b
    geometric: float = 0.0
    frozen: bool = False
    limits = {"geometric": (0, 0.99)}

    def __post_init__(self):
        super().__post_init__()
        if self.low > self.rank:
            raise BadChain(f"dylora(rank={self.rank}, low={self.low}): ranks are drawn from low to rank, so low may not exceed "
                           f"rank. For example dylora(rank={self.rank}, low=1).")

    def init(self, site):                  # trains rank * (d_in + d_out)
        A = site.normal(self.rank, site.d_in, std=site.d_in**-0.5)
        return dict(A=A, B=site.zeros(site.d_out, self.rank), b=self.draw(site.seed, 0), seed=site.seed)

    def draw(self, seed, k):               # b of step k + 1: the same at every site and in every process
        odds = torch.tensor([(1 - self.geometric) ** b for b in range(self.low, self.rank + 1)])
        return self.low + int(odds.multinomial(1, generator=torch.Generator().manual_seed(seed * 1_000_003 + k)))

    def produce(self, ctx, p):
        b = p.b if p.training else ctx.get("rank", self.rank)
        if type(b) is not int or not 1 <= b <= self.rank:
            raise BadChain(f"{self} serves ranks 1 to {self.rank}, and its context asks for {b!r}. Set tuned.context = "
                           f"{{'rank': {self.rank}}}.")
        return dict(b=b)

    def weight(self, W, p):                # (d_out, d_in)
        A, B = self.cut(p)
        return W + self.alpha / p.b * B @ A

    def fast(self, x, y, p):               # (..., d_in) -> (..., d_out)
        A, B = self.cut(p)
        return y + self.alpha / p.b * x @ A.T @ B.T

    def cut(self, p):                      # (b, d_in), (d_out, b)
        A, B, last = p.A[:p.b], p.B[:, :p.b], p.b - 1
        if self.frozen and p.training:
            return torch.cat([A[:last].detach(), A[last:]]), torch.cat([B[:, :last].detach(), B[:, last:]], 1)
        return A, B

    def step(self, run):
        for p in run.states.values():
            p.b = self.draw(p.seed, run.k)
