"""A few weights of each matrix change; which ones is learned.    W' = W + scatter(idx, v),   idx, v: (k,),  k = density · |W|
Ansell et al., SpIEL, 2024. arXiv:2401.16405 §4 (SpIEL-AG). Every `every` steps, at each site:
    grow candidates   the k largest |∂L/∂W'| of the first backward pass; their gradients are summed over `gather` steps
    drop              the n entries of v that changed least since they were selected (they start at 0, so: smallest |v|)
    grow              the n candidates with the largest |sum| that are not active; v = 0 for newborns, optimizer state too
n = rate · (1 - t/T) · k, and all k at the first selection, which replaces the random start (authors' code). Every array has
length k: memory and optimizer state scale with density, not with the model. Merging adds v to W.
"""

import torch
from torch import distributed
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from luthier.errors import BadChain, ScheduleNotStepped
from luthier.method import Method, method
from luthier.methods.sparse._shira import prepare, read, write


@method
class spiel(Method):
    at: str = "linear"
    density: float = 0.01
    every: int = 20                        # steps between two selections
    gather: int = 5                        # steps over which the candidates' gradients are summed
    rate: float = 0.2                      # part of the entries replaced at first, falling to 0 at the end of the run
    limits = {"density": (0, 1), "rate": (0, 1)}
    peft = dict(type="SHIRA", layers="linear", names=("shira_weight", "shira_indices"), prepare=prepare, write=write, read=read,
                reads=("r",), rounds="to the bit by weight(); fast() adds the change to the layer's output, to rounding")

    def __post_init__(self):
        super().__post_init__()
        if self.gather >= self.every:
            raise BadChain(f"{self}: gradients are gathered between two selections, so gather must be less than every "
                           f"({self.every}).")

    def init(self, site):                  # trains density * d_out * d_in
        n = site.W.numel()
        k = max(1, round(self.density * n))
        idx = site.random(n).topk(k).indices.sort().values.to(torch.int32 if n < 2**31 else torch.int64)
        return dict(v=site.zeros(k), idx=idx, cand=idx[:0], sum=site.zeros(k).detach())     # sum: (0,) while nothing is gathered

    def weight(self, W, p):                # (d_out, d_in)
        new = W.reshape(-1).index_add(0, p.idx, p.v)
        if len(p.sum) and p.training and new.requires_grad:
            new.register_hook(lambda g: self.gathered(p, g.detach().clone()))
        return new.view(W.shape)

    def fast(self, x, y, p):               # the dense delta is made again for the backward pass instead of being kept
        def delta(x):
            return linear(x, self.weight(p.v.new_zeros(y.shape[-1], x.shape[-1]), p))
        return y + checkpoint(delta, x, use_reentrant=False, preserve_rng_state=False)

    def gathered(self, p, g):              # g: (d_out * d_in,), seen only here and let go
        if distributed.is_initialized():   # every process must choose the same
            distributed.all_reduce(g)
        if not len(p.cand):
            p.cand = g.abs().topk(len(p.v)).indices.to(p.idx.dtype)
        p.sum = p.sum + g[p.cand]

    @torch.no_grad()
    def step(self, run):
        if run.total is None:
            raise ScheduleNotStepped("spiel replaces fewer entries as the run goes on, and nobody said how long that is. "
                                     "Set tuned.total_steps before training.")
        k, phase = run.k, run.k % self.every
        for p in run.states.values():
            if phase == 0 and k + self.gather < run.total:
                p.sum = torch.zeros_like(p.v)
            elif phase == self.gather and len(p.cand):
                share = 1 if k == self.gather else self.rate * max(0, 1 - k / run.total)
                self.replace(p, int(share * len(p.v)))
                p.cand, p.sum = p.cand[:0], p.sum[:0]

    def replace(self, p, n):
        out = p.v.abs().topk(n, largest=False).indices                              # places in v, least change first
        stays = torch.ones_like(p.v, dtype=torch.bool).index_fill(0, out, False)
        free = ~torch.isin(p.cand, p.idx[stays])
        best = p.sum[free].abs().topk(min(n, int(free.sum()))).indices
        grown, left = p.cand[free][best], p.idx[out]
        new, out = grown[~torch.isin(grown, left)], out[~torch.isin(left, grown)]    # dropped and chosen again: as it was
        out = out[:len(new)]
        p.idx = p.idx.index_copy(0, out, new)
        kept = torch.arange(len(p.v), device=out.device).index_fill(0, out, -1)
        p.resize("v", p.v.index_fill(0, out, 0), kept)
