"""Only the biases train.    b' = b + δ,   δ: (d_out,) = 0
Ben Zaken et al., BitFit, 2021. arXiv:2106.10199 §3: every bias of linear layers, convolutions and norms. Layers without a bias
are left alone, so that the parameter count is the number of biases and nothing is added to the model. The task head trains
whole by other means (`probe`).
"""

from luthier.method import Method, method


@method
class bitfit(Method):
    at: str = "bias -head"
    peft = dict(type="BEFT", layers="linear", tensors={"beft_bias": "d: out -> 1 out"})

    def init(self, site):                  # trains d_out where there is a bias
        return None if site.b is None else dict(d=site.zeros(site.d_out))

    def weight(self, W, p, b):
        return W, b + p.d

    def fast(self, y, p):
        return y + p.d
