"""Fewer neurons fire.    L = L_task + λ · mean over layers and entries of o² / (o² + ε),    o: what the MLP's last matrix reads
Runwal et al., From PEFT to DEFT, 2024. arXiv:2402.01911 §3: a soft count of nonzeros, added while any other method trains; of an
encoder and a decoder the two means are summed. λ = 1, ε = 1e-7 as in the authors' code. Nothing here trains unless `adaptive`.

`adaptive=True` (ADA-DEFT): each MLP's output is multiplied by a trained a (1 at init), the layer's term by |a|, and an MLP with
|a| < `skip` is not run at inference. The paper learns layer weights and skips by them; that they are this product is unchecked.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensor

from luthier.errors import DoesNotFit
from luthier.method import Method, method


@method
class deft(Method):
    at: str = "mlp.act mlp.out"
    weight_l: float = 1.0                  # λ
    eps: float = 1e-7
    adaptive: bool = False
    skip: float = 0.05
    example = {"adaptive": True, "weight_l": 0.1}

    def init(self, site):
        if site.role == "mlp.act":
            return {}
        return dict(a=site.ones(1), d=site.d_out) if self.adaptive else None

    def stream(self, t, p):                # t.h: (B, T, neurons), looked at only
        if torch.is_grad_enabled():
            square = t.h.float().square()
            p.noted["density"] = (square / (square + self.eps)).mean()
        return t

    def around(self, f, t, p):             # an MLP, or its last matrix where the MLP is no module of its own
        if not (p.training or isinstance(p.a, FakeTensor)) and p.a.abs() < self.skip:   # where only shapes run, all is counted
            return t.map_h(lambda h: h.new_zeros(*h.shape[:-1], p.d))
        return f(t).map_h(lambda h: p.a * h)

    def loss(self, run):
        towers = {}
        for name, p in run.states.items():
            if run.sites[name].role == "mlp.act":
                if "density" not in p.noted:
                    raise DoesNotFit(f"deft saw no activation at {name} in this forward: the model did not run there, or without "
                                     "gradients. Call the model in train mode first, and leave out what runs blocks itself.")
                gate = run.states.get(name.replace("mlp.act", "mlp.out"))
                term = p.noted["density"] * (1 if gate is None else gate.a.abs())
                towers.setdefault(run.sites[name].tower, []).append(term.sum())
        return self.weight_l * sum(sum(v) / len(v) for v in towers.values())
