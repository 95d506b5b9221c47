"""Adapters without a nonlinearity, which fold away.    a(x) = x + s (W₂ (W₁ x + b₁) + b₂)
    before a layer (q, k and v share one, gate and up too):  W a(x) + b  =  (W + s W W₂ W₁) x + b + s W (W₂ b₁ + b₂)
    behind a layer (o, down):                                a(W x + b)  =  (W + s W₂ W₁ W) x + b + s (W₂ (W₁ b + b₁) + b₂)
Li et al., ZeroI2V, 2023. arXiv:2310.01324 §3.3; places, W₂ = b = 0 and W₁ ~ N(0, 0.02²) from the authors' code (vit_zero_clip.py,
num_tadapter = 2): behind the norm before the attention, behind its output projection, before and behind the MLP. r = d / 4. Once
merged the model has its own operations and no other. Their dropout inside the adapter (0.1 on Kinetics, 0 on SSv2) is not here.
"""

from luthier.method import Method, method

BEFORE, BEHIND = ("q", "k", "v", "up", "gate"), ("o", "down")


@method
class linear_adapter(Method):
    at: str = "linear"
    reduce: int = 4                        # r = d / reduce
    scale: float = 0.5                     # s

    def init(self, site):                  # trains r (2 d + 1) + d for each of the four places of a block
        behind = (role := site.role.rpartition(".")[2]) in BEHIND
        if role not in BEFORE + BEHIND:
            return None
        d = site.d_out if behind else site.d_in
        r = max(1, d // self.reduce)

        def make():
            return dict(W1=site.normal(r, d, std=0.02), b1=site.zeros(r), W2=site.zeros(d, r), b2=site.zeros(d))
        return dict(behind=behind, **(make() if behind or site.family is None else site.shared("one", make, group=site.family)))

    def weight(self, W, b, p):             # (d_out, d_in), (d_out,)
        if p.behind:
            return W + self.scale * p.W2 @ (p.W1 @ W), b + self.scale * (p.W2 @ (p.W1 @ b + p.b1) + p.b2)
        return W + self.scale * (W @ p.W2) @ p.W1, b + self.scale * W @ (p.W2 @ p.b1 + p.b2)

    def fast(self, x, y, p, W):
        if p.behind:
            return y + self.scale * ((y @ p.W1.T + p.b1) @ p.W2.T + p.b2)
        return y + self.scale * ((x @ p.W1.T + p.b1) @ (W @ p.W2).T + W @ p.b2)
