"""Scale and shift every feature.    y' = γ ⊙ y + β,   as weights W' = diag(γ) W,  b' = γ ⊙ b + β
Lian et al., SSF, 2022. arXiv:2210.08823 §3.2. After every linear, convolution and norm, patch embedding and final norm included;
γ, β: (d_out,). γ = 1 and β = 0 at init, so that nothing changes before training (the authors' code draws them from
N(1, 0.02²) and N(0, 0.02²)). The task head trains whole by other means (`probe`) and is not scaled.
"""

from luthier.method import Method, method


@method
class ssf(Method):
    at: str = "all -head"

    def init(self, site):                  # trains 2 d_out
        if site.layout not in ("linear", "conv1d", "conv", "norm"):
            return None                    # embeddings, tokens and the like are no operations on features
        return dict(gamma=site.ones(site.d_out), beta=site.zeros(site.d_out))

    def weight(self, W, p, b):             # (d_out, d_in), (d_out,)
        return p.gamma[:, None] * W, p.gamma * b + p.beta

    def fast(self, y, p):
        return p.gamma * y + p.beta
