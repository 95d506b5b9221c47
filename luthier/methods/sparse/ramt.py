"""A bit for every attention weight of the image tower.    W' = W ⊙ 1[m > τ],    m = 0.01 and τ = 0.005 at init: nothing is masked
Zheng et al., Regularized Mask Tuning (R-AMT), 2023. arXiv:2307.15049 §3.2-3.3, eq. 3-7. m trains straight through the threshold,
with reg · |m|₂ added to the loss. Gradient dropout: with a the loss's gradient and b that of the cross-entropy between the bare
model's predictions and these, an entry of a is kept with probability P = (1 + sign(a) (a + b) / (|a| + |b|)) / 2, else it shrinks
to (1 - λ) a; `drop=0` leaves it out. After the last step only the bits are left.
"""

import torch

from luthier.method import Method, method
from luthier.methods.quantize._pack import pack, unpack


@method
class ramt(Method):
    at: str = "vision.attn.q vision.attn.k vision.attn.v vision.attn.o"
    start: float = 0.01
    threshold: float = 0.005
    drop: float = 1.0                      # λ
    reg: float = 1e-4
    limits = {"drop": (0, 1)}

    def init(self, site):                  # trains d_out d_in, stores d_out d_in / 8 bytes once trained
        bits = torch.zeros(0, -(-site.d_in // 8), dtype=torch.uint8, device=site.like.device)
        return dict(m=site.zeros(site.d_out, site.d_in), bits=bits, done=False)

    def weight(self, W, p):
        if p.done:
            return W * unpack(p.bits, 1, W.shape[1]).to(W)
        m = p.m + self.start               # m is kept about 0, so that it is exact in half precision
        return W * ((m > self.threshold).to(W) + (m - m.detach()))

    def loss(self, run):
        live = [p for p in run.states.values() if not p.done]
        if not live:
            return 0.0
        if self.drop and run.bare is not None:
            said, zero = (getattr(out, "logits_per_image" if "logits_per_image" in dir(out) else "logits").float()
                          for out in (run.outputs, run.bare()))
            apart = -(zero.softmax(-1) * said.log_softmax(-1)).sum(-1).mean()
            for p, b in zip(live, torch.autograd.grad(apart, [p.m for p in live], retain_graph=True), strict=True):
                self.gate(p.m, b, torch.rand_like(b))
        return self.reg * sum((p.m + self.start).float().norm() for p in live)

    def gate(self, m, b, u):               # stands on the next gradient of m, once
        def hook(a):
            handle.remove()
            agree = (1 + a.sign() * (a + b) / (a.abs() + b.abs() + 1e-8)) / 2
            return (1 - self.drop + self.drop * (agree > u).to(a)) * a
        handle = m.register_hook(hook)

    def step(self, run):
        if run.k == run.total:
            for p in run.states.values():
                p.bits, p.done = pack(p.m + self.start > self.threshold, 1), True
                p.resize("m", p.m.new_zeros(0, p.m.shape[1]), torch.zeros(0, dtype=torch.long))
