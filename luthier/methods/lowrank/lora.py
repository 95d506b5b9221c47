"""Low-rank update.    W' = W + (α/r)·B A,   B: (d_out, r) = 0,   A: (r, d_in) ~ N(0, 1/d_in)
Hu et al., LoRA, 2021. arXiv:2106.09685 §4.1. Dropout on the layer's input, as in the authors' code, acts in training only,
and only where the update runs beside the layer (linear layouts); the weight itself is never dropped.

Two-step tuning (Clinical LLaMA-LoRA, arXiv:2307.03042) is `lora() >> lora()`: a domain update, then a task update on top.
"""

from luthier.method import Method, method


@method
class lora(Method):
    at: str = "attn.q attn.v"
    rank: int = 8
    alpha: float = 16.0                    # the update is scaled by alpha / rank
    dropout: float = 0.0
    limits = {"dropout": (0, 1)}
    peft = dict(type="LORA", layers="linear conv1d embedding", tensors={"lora_A.weight": "A: r in", "lora_B.weight": "B: out r"},
                of=dict(embedding={"lora_embedding_A": "A: r in", "lora_embedding_B": "B: out r"}),
                fields=dict(r="rank", lora_dropout="dropout"), factor=("alpha", "rank"), scale=("lora_alpha", "r", 0),
                patterns="number", sums=True,
                rounds="to the bit where alpha / rank is a power of two, else to rounding: peft scales the product, lora x")

    def init(self, site):                  # trains rank * (d_in + d_out)
        A = site.normal(self.rank, site.d_in, std=site.d_in**-0.5)
        return dict(A=A, B=site.zeros(site.d_out, self.rank))        # B = 0: identity at init

    def weight(self, W, p):                # (d_out, d_in)
        return W + self.alpha / self.rank * p.B @ p.A

    def low_rank(self, p):
        return dict(A=p.A, B=p.B, scale=self.alpha / self.rank, dropout=self.dropout)
