"""Sparse twice: a pruned weight, and an update of low rank with a few free entries.    W' = (S1 ∘ W + (α/r)·(B A + S2)) diag(c)
Chen et al., DSEE, ACL 2023. arXiv:2111.00160 §3; details after the authors' code. B A: rank r, B = 0. S2: `sparse` entries, = 0,
at fixed places: the largest of |W - U V|, U V of rank r by GreBsmo (or of |W|, or random ones). Only the sites that `tune` names
have an update, every site is pruned. After `prune` of the run, once, and then the rest of the run tunes what is left:
    unstructured   S1 = 0 at the `sparsity` smallest |W + (α/r)(B A + S2)| of all sites together, else 1
    structured     c: one gate = 1 a head on attn.o's input, one a neuron on mlp.down's, with l1 · Σ|c| in the loss until then;
                   in each matrix the smallest `heads`, `neurons` of them go for good (rows that fed them are idle from then on)
"""

import torch

from luthier.errors import BadChain, ScheduleNotStepped
from luthier.method import Method, method
from luthier.methods.quantize._pack import pack, unpack


@method
class dsee(Method):
    at: str = "linear"
    tune: str = "q v"                      # last words of the roles that have an update
    rank: int = 16
    alpha: float = 16.0                    # the update is scaled by alpha / rank
    sparse: int = 64                       # entries of S2 in a matrix; 0: without
    support: str = "grebsmo"               # or magnitude, random
    sparsity: float = 0.5                  # part of all weights that S1 takes away; 0: without
    heads: float = 0.0                     # part of the heads, and of the neurons, that goes
    neurons: float = 0.0
    l1: float = 1e-4
    prune: float = 0.5                     # part of the run after which it is pruned
    limits = {"sparse": (0, None), "sparsity": (0, 0.99), "heads": (0, 0.99), "neurons": (0, 0.99), "prune": (0, 1)}
    example = {"rank": 2, "sparse": 5, "heads": 0.25, "neurons": 0.25}

    def __post_init__(self):
        super().__post_init__()
        if self.support not in ("grebsmo", "magnitude", "random"):
            raise BadChain(f"{self}: there is no support {self.support!r}. Choose grebsmo, magnitude or random.")

    def init(self, site):                  # trains rank * (d_in + d_out) + sparse at tuned sites, and a number a gate
        p = {}
        if site.role.rpartition(".")[2] in self.tune.split():
            p |= dict(A=site.normal(self.rank, site.d_in, std=site.d_in**-0.5), B=site.zeros(site.d_out, self.rank))
            idx = self.places(site, min(self.sparse, site.W.numel()))
            p |= dict(idx=idx, v=site.zeros(len(idx))) if self.sparse else {}
        if groups := self.groups(site):
            p |= dict(c=site.ones(groups), left=torch.arange(groups, device=site.like.device), groups=groups)
        if self.sparsity:                  # a bit a weight, once it is pruned
            p |= dict(S1=torch.zeros(0, -(-site.W.shape[1] // 8), dtype=torch.uint8, device=site.like.device))
        return dict(p, pruned=False) if p else None

    def groups(self, site):                # gates of a site
        if site.role in ("attn.o", "cross.o") and site.heads:
            return site.heads[0] if self.heads else 0
        return site.d_in if site.role == "mlp.down" and self.neurons else 0

    def places(self, site, k):             # (k,): where S2 is, in the flat weight
        W = site.W.float()
        U, V, S = None, site.random(1, W.shape[1]).float(), torch.zeros_like(W)
        if self.support == "random":
            W = site.random(*W.shape).float()
        for n in range(min(self.rank, *W.shape) if self.support == "grebsmo" else 0):       # greedily, one direction more a round
            V = V if n == 0 else torch.cat([V, torch.linalg.qr(W - U @ V - S).R[:1]])
            for _ in range(2):
                U = torch.linalg.qr((W - S) @ V.T).Q
                V = U.T @ (W - S)
                rest = (W - U @ V).flatten()
                at = rest.abs().topk(k).indices
                S = torch.zeros_like(rest).index_copy(0, at, rest[at]).view_as(W)
        return (W if U is None else W - U @ V).abs().flatten().topk(k).indices.sort().values.to(torch.int32)

    def update(self, W, p):                # W + ΔW, (d_out, d_in)
        if not hasattr(p, "A"):
            return W
        W = W + self.alpha / self.rank * p.B @ p.A
        return W.reshape(-1).index_add(0, p.idx, self.alpha / self.rank * p.v).view_as(W) if hasattr(p, "v") else W

    def weight(self, W, p):
        if p.pruned and hasattr(p, "S1"):
            W = W * unpack(p.S1, 1, W.shape[1]).to(W)
        W = self.update(W, p)
        if not hasattr(p, "c"):
            return W
        c = p.c.new_zeros(p.groups).index_copy(0, p.left, p.c)
        return W * c.repeat_interleave(W.shape[1] // p.groups)

    def loss(self, run):
        return self.l1 * sum((p.c.abs().sum() for p in run.states.values() if hasattr(p, "c") and not p.pruned), 0.0)

    @torch.no_grad()
    def step(self, run):
        if run.total is None:
            raise ScheduleNotStepped("dsee prunes after a part of the run, and nobody said how long that is. "
                                     "Set tuned.total_steps before training.")
        if run.k != max(1, round(self.prune * run.total)):
            return
        if self.sparsity:
            size = {n: self.update(run.sites[n].W, p).abs() for n, p in run.states.items()}
            flat = torch.cat([s.flatten().float() for s in size.values()])
            least = flat.kthvalue(max(1, round(self.sparsity * len(flat)))).values
            for n, p in run.states.items():
                p.S1 = pack(size[n] > least, 1)
        for n, p in run.states.items():
            p.pruned = True
            if hasattr(p, "c"):
                share = self.neurons if run.sites[n].role == "mlp.down" else self.heads
                keep = p.c.abs().topk(p.groups - round(share * p.groups)).indices.sort().values
                p.resize("c", p.c[keep], keep)
                p.left = p.left[keep]
