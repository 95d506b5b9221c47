"""LiMBeR's map, and word embeddings as what image and caption are both assigned to.
    P = softmax(cos(z, E) / τ),    Q = argmax <Q, cos(z, E)> + ε H(Q), word k given μ_k, a sample 1/B
    L = L_caption - λ/2 mean [Q_text · log P_image + Q_image · log P_text]
Park et al., Bridging Vision and Language Spaces with Assignment Prediction (VLAP), 2024. arXiv:2404.09632 §3; z of an image
is the mean of its mapped tokens, of a caption the mean of the frozen language model's last states, E the word embeddings, μ the
words' frequencies f in the training captions as the authors' code takes them, softmax(f / 0.25). Q by Sinkhorn, no gradient.
"""

import torch
from torch.nn import functional as F

from .limber import limber
from .model import IGNORE
from .way import way


def sinkhorn(scores, words, steps, eps):
    """(B, K) cosines -> Q, (B, K): each row sums to 1, each column to nearly B words[k]."""
    L = scores.double() / eps
    for _ in range(steps):
        L = L - L.logsumexp(0) + words.double().log()       # each word its share of the batch
        L = L - L.logsumexp(1, keepdim=True)                # each sample shares itself out
    return L.exp().to(scores.dtype)


@way
class vlap(limber):
    scale: float = 0.1                                      # λ; 0 is LiMBeR
    tau: float = 0.01
    eps: float = 0.01
    steps: int = 3
    frequent: bool = True                                   # μ by frequency; False: every word alike
    limits = limber.limits | dict(tau=(1e-4, 10), eps=(1e-3, 10))

    def loss(self, model, front, labels, words):
        E = F.normalize(model.language.get_input_embeddings().weight.detach().float(), dim=-1)        # (K, D)
        image, text = (F.normalize(z.float(), dim=-1) @ E.T for z in (front.mean(1), read(model, labels)))      # (B, K)
        f = torch.zeros(len(E), device=E.device)
        if self.frequent and words is not None:
            f[:len(words)] = words.to(f) / words.sum()
        μ = (f / 0.25).softmax(0)
        with torch.no_grad():
            q_image, q_text = (sinkhorn(s, μ, self.steps, self.eps) for s in (image, text))
        swapped = q_text * (image / self.tau).log_softmax(-1) + q_image * (text / self.tau).log_softmax(-1)
        return -self.scale / 2 * swapped.sum(-1).mean()


@torch.no_grad()
def read(model, labels):
    """The mean of the frozen language model's last states of each caption alone, (B, D)."""
    there = labels != IGNORE
    body = model.language.get_encoder() if model.writes_apart else model.language.base_model
    h = body(input_ids=labels.clamp(min=0), attention_mask=there.long()).last_hidden_state
    return (h * there[:, :, None]).sum(1) / there.sum(1, keepdim=True).clamp(min=1)
