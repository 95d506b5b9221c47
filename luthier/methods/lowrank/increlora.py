"""Rank grown where it pays.    W' = W + (α/target)·Bᵀ diag(E) A,   A: (r, d_in),   E: (r,) = 0,   B: (r, d_out),   r = 1, 2, ...
Zhang et al., IncreLoRA, 2023. arXiv:2308.12043 §3; the order of things and the curve of rates after the authors' code.
    importance   I = Σ |ΔW ∘ ∂L/∂ΔW| / √(d_out d_in) of a site,   Ī ← β1 Ī + (1-β1) I,   Ū ← β2 Ū + (1-β2) |I - Ī|
    growth       every `every` steps after `wait`, the `top` sites of largest Ī Ū get `add` more components, until there are
                 target · sites of them
    advance      each site keeps `add` components in reserve, whose A and B already train under E = 1e-5; growth frees their E
                 and lays in new ones (`advance=False`: E = 0, so that they wait); with the last growth the reserve goes
    restart      what growth lays in or frees has a learning rate of its own, which rises over `restart` steps and then falls to 0
                 at the end of the run (`restart=0`: it shares that of the rest)
    penalty      γ Σ_sites ‖A Aᵀ - I‖² + ‖B Bᵀ - I‖²
The factor is fixed, so that growth leaves the output where it was; the authors' code divides by the present rank instead.
"""

import torch
from torch import distributed
from torch.nn.functional import linear

from luthier.errors import BadChain, ScheduleNotStepped
from luthier.method import Method, method
from luthier.state import newborn


@method
class increlora(Method):
    at: str = "linear"
    target: int = 2                        # components a site on average at the end
    alpha: float = 16.0
    add: int = 1
    top: int = 5
    wait: int = 100
    every: int = 100
    advance: bool = True
    restart: int = 100
    penalty: float = 0.1                   # γ
    beta1: float = 0.85
    beta2: float = 0.85
    limits = {"beta1": (0, 1), "beta2": (0, 1), "wait": (0, None), "restart": (0, None)}

    def __post_init__(self):
        super().__post_init__()
        if (self.target - 1) % self.add:
            raise BadChain(f"{self}: sites grow from 1 to target components by {self.add} at a time, so target - 1 must be a "
                           f"multiple of add. For example increlora(target={1 + self.add}, add={self.add}).")

    def init(self, site):                  # trains r * (d_in + 1 + d_out), in the end target * (...) on average
        rows, seen = self.rows(site, 1 + self.add), torch.zeros(3, device=site.like.device)          # seen: I, Ī, Ū
        rows["E"].data[0] = 0
        last = site.zeros(0, site.d_in + 1 + site.d_out).detach()                # the rows before the next step, once some grew
        return dict(rows, n=1, seen=seen, born=seen.new_zeros(2, 1 + self.add), last=last, seed=site.seed)

    def rows(self, site, r):
        E = site.zeros(r)
        E.data += self.advance * 1e-5
        return dict(A=site.normal(r, site.d_in, std=0.02), E=E, B=site.normal(r, site.d_out, std=0.02))

    def weight(self, W, p):                # (d_out, d_in)
        D = self.alpha / self.target * (p.B.T * self.free(p)) @ p.A
        if p.training and len(p.E) > p.n and D.requires_grad:
            fixed = D.detach()
            D.register_hook(lambda g: self.note(p, fixed, g))
        return W + D

    def note(self, p, D, g):
        if distributed.is_initialized():   # every process must see the same
            distributed.all_reduce(g := g.clone())
        p.seen[0] = (D * g).abs().sum() / D.numel() ** 0.5

    def fast(self, x, y, p):               # (..., d_in) -> (..., d_out); importance needs the dense gradient while ranks grow
        if p.training and len(p.E) > p.n:
            return y + linear(x, self.weight(p.A.new_zeros(()), p))
        return y + self.alpha / self.target * (x @ p.A.T * self.free(p)) @ p.B

    def free(self, p):                     # E, of which the reserve's does not train
        return torch.cat([p.E[:p.n], p.E[p.n:].detach()])

    def loss(self, run):
        rows = [M for p in run.states.values() for M in (p.A, p.B)]
        return self.penalty * sum((M @ M.T - torch.eye(len(M)).to(M)).square().sum() for M in rows)

    @torch.no_grad()
    def step(self, run):
        if run.total is None:
            raise ScheduleNotStepped("increlora lets the rates of new components fall until the end of the run, and nobody said "
                                     "when that is. Set tuned.total_steps before training.")
        states = list(run.states.values())
        for p in states:
            self.pace(run, p)
        if any(len(p.E) > p.n for p in states):
            score, left = self.scores(states), self.target * len(states) - sum(p.n for p in states)
            if run.k > self.wait and run.k % self.every == 0:
                for i in score.topk(min(self.top, left // self.add, len(states))).indices.tolist():
                    self.grow(run, run.sites[states[i].site_name], states[i])
                    left -= self.add
            for p in states if not left or run.k == run.total else ():
                self.lay(p, {"A": p.A[:p.n], "E": p.E[:p.n], "B": p.B[:p.n]}, p.born[:, :p.n])
        for p in states if run.k == run.total else ():
            p.last, p.born = p.last[:0], p.born[:, :0]

    def scores(self, states):              # (sites,): Ī Ū, after both have moved on
        now, mean, spread = torch.stack([p.seen for p in states], 1)
        mean = self.beta1 * mean + (1 - self.beta1) * now
        spread = self.beta2 * spread + (1 - self.beta2) * (now - mean).abs()
        for p, *seen in zip(states, now, mean, spread, strict=True):
            p.seen = torch.stack(seen)
        return mean * spread

    def grow(self, run, site, p):          # free the reserve, lay in another
        new, born = self.rows(site.bound(p.seed, run.k, {}, 0, 0), self.add), p.born
        born[1 if self.advance else slice(None), p.n:] = run.k
        p.n += self.add
        self.lay(p, {k: torch.cat([getattr(p, k), v]) for k, v in new.items()},
                 torch.cat([born, born.new_full((2, self.add), run.k)], 1))
        p.last = torch.cat([p.A, p.E[:, None], p.B], 1)

    def lay(self, p, rows, born):
        for name, new in rows.items():
            kept = torch.arange(len(new), device=new.device)
            p.resize(name, new, torch.where(kept < len(getattr(p, name)), kept, -1))
        p.born, p.last = born, p.last[:len(p.E)]

    def pace(self, run, p):                # the step just taken, at the rates that young rows should have had
        if not len(p.last):
            return
        now = torch.cat([p.A, p.E[:, None], p.B], 1)
        (ab, e), d = torch.where(p.born > 0, self.rate(run, p.born), 1).to(now), p.A.shape[1]
        factor = torch.cat([ab[:, None].expand(-1, d), e[:, None], ab[:, None].expand(-1, now.shape[1] - d - 1)], 1)
        p.last = p.last + factor * (now - p.last)
        for name, new in zip("AEB", p.last.split([d, 1, now.shape[1] - d - 1], 1), strict=True):
            getattr(p, name).copy_(new.view_as(getattr(p, name)))

    def rate(self, run, born):             # of rows born at these steps, over the rate that the optimizer gave them
        age, rest, own = (run.k - born).clamp(min=1), run.total - born, 1.0
        if self.restart:
            own = (age / self.restart).minimum((rest - age + 1) / (rest - self.restart).clamp(min=1))
            if run.optimizer is not None:
                own = own * run.optimizer.defaults["lr"] / max(run.optimizer.param_groups[0]["lr"], 1e-12)
        return own * newborn(run.optimizer, run.k, age)
