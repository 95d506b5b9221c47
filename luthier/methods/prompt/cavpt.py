"""Visual prompts made from the class texts that fit the image.    x_i = B_i([cls; P_i(x); patches])
Xing et al., Dual Modality Prompt Tuning (DPT), 2022. arXiv:2208.08340 §3.4 and the authors' code. Q = M g(t_c) + m for the k
classes that the bare model likes best, (k, D); A = V softmax(q Q (k X)ᵀ / √32) X with X the block's tokens, detached, and ten
free vectors, (k, D); P = LN(A + Q). A prompt also says its class: α times the cross-entropy of C LN(A) at the prompt of the
right class, where that is among the k. Prompts of the blocks below leave first. With coop and vpt it is `dpt`.
"""

import torch
from torch.nn import functional as F

from luthier.errors import DoesNotFit
from luthier.method import Method, method


@method
class cavpt(Method):
    at: str = "vision.block.-1.in"
    k: int = 10
    alpha: float = 0.3
    inner: int = 32
    free: int = 10
    exempt = {"identity_at_init": "new tokens take part in attention from the first step",
              "only_declared_train": "the classifiers of its prompts learn from labels alone", "autocast": "the same"}

    def init(self, site, model):           # trains D (d + 1) + 2 inner D + D² + free D + (C + 4) D
        if not hasattr(model, "old"):
            raise DoesNotFit(f"cavpt makes its prompts from the texts of classes, and {type(model).__name__} has no classes. "
                             "Open a class-names task.")
        D, d = site.d_out, model.width
        return dict(M=site.uniform(D, d, bound=d**-0.5), m=site.uniform(D, bound=d**-0.5),
                    q=site.uniform(self.inner, D, bound=D**-0.5), k=site.uniform(self.inner, D, bound=D**-0.5),
                    v=site.uniform(D, D, bound=D**-0.5),
                    free=site.normal(self.free, D, std=0.02), C=site.uniform(model.old, D, bound=D**-0.5), g1=site.ones(D),
                    b1=site.zeros(D), g2=site.ones(D), b2=site.zeros(D))

    def produce(self, ctx, p):             # features of the k texts: (B, k, d)
        with torch.no_grad(), ctx["asleep"]():
            scores = ctx["scores"]()
        top = scores.topk(min(self.k, scores.shape[1])).indices
        return dict(texts=ctx["texts"]()[top], top=top)

    def stream(self, t, p):                # (B, T, D) -> (B, k + T, D)
        for name in list(t.spans):
            t = t.drop(name)
        Q, X = F.linear(p.texts, p.M, p.m), torch.cat([t.h.detach(), p.free.to(t.h.dtype).expand(len(t.h), -1, -1)], 1)
        near = F.linear(Q, p.q) @ F.linear(X, p.k).mT / self.inner**0.5
        A, D = F.linear(near.softmax(-1) @ X, p.v), Q.shape[-1:]
        if p.training:
            p.noted.update(said=F.linear(F.layer_norm(A, D, p.g1, p.b1), p.C), top=p.top)
        return t.insert(F.layer_norm(A + Q, D, p.g2, p.b2), p.key)

    def loss(self, run):
        labels, terms = run.batch.get("labels"), []
        for p in run.states.values() if labels is not None else ():
            hit = p.noted["top"] == labels[:, None].to(p.noted["top"].device)
            if hit.any():
                terms.append(F.cross_entropy(p.noted["said"][hit].float(), p.noted["top"][hit]))
        return self.alpha * sum(terms) / len(terms) if terms else 0.0
