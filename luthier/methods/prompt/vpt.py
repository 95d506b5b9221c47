"""n learned tokens behind [CLS], fresh ones before every block.    x_i = B_i([cls; P_i; patches]),    P_i: (n, D)
Jia et al., Visual Prompt Tuning, 2022. arXiv:2203.12119 §3.2, eq. 4-7. `deep=True`: the outputs at the prompts' places are thrown
away and the next block gets prompts of its own; `deep=False`: one P at the input, whose outputs travel on. Every P is drawn from
U(±b), b² = 6 / (patch values + D), Xavier's bound for a patch embedding, as in the authors' code. The head sees no prompt.
"""

from torch import nn

from luthier.method import Method, method


@method
class vpt(Method):
    at: str = "embed block.1-.in"
    n: int = 10
    deep: bool = True
    exempt = {"identity_at_init": "new tokens take part in attention from the first step"}

    def init(self, site):                  # trains n D, deep: n D per block
        if site.block is not None and not self.deep:
            return None
        convs = [m.weight for m in site.stack.module.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
        fan_in = convs[0][0].numel() if convs else site.d_out          # 3 patch² of the patch embedding
        return dict(P=site.uniform(self.n, site.d_out, bound=(6 / (fan_in + site.d_out))**0.5))

    def stream(self, t, p):                # (B, T, D) -> (B, T + n, D), or the same length where prompts are replaced
        return t.drop(p.key).insert(p.P, p.key)
