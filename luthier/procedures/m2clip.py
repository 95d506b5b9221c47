"""A dual encoder learns clips from four losses at once.    L = (L_con + L_cls) / 2 + L_fc + L_mlm / 10
    L_con  clips against the texts of their classes, both ways; all texts of one class are right:
           mean of KL(softmax(10 [y_i = y_j]) ‖ softmax(s v_i · w_j)) by rows and by columns
    L_cls  cross-modal classification: cross entropy of 100 v · w_c over all classes
    L_fc   visual classification: cross entropy of a linear head on v
    L_mlm  a fifth of the words of a class text is masked and filled in by one more text block (a frozen copy of the last, with an
           adapter before it) whose queries are the text and whose keys and values are the frames; then dense, gelu, LN, words
v: mean of the frames' embeddings, w: text embeddings, both of length 1. Wang et al., M2-CLIP, 2024. arXiv:2401.11649 §3.3 names
the four heads; weights, temperatures and shapes are those of the authors' code (main.py, models_adapter.py). There the visual
head reads the class token before the projection, with dropout 0.5, and L_mlm is switched off by a constant; masking is by tokens
here and by words there. Without labels, or in eval mode, it answers with L_cls's logits, for these texts or any other.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from luthier.errors import DoesNotFit
from luthier.site import sites
from luthier.tasks.headed import Output
from luthier.tokens import together

WEIGHTS = dict(con=0.5, cls=0.5, fc=1.0, mlm=0.1)


class Multitask(nn.Module):
    """clip: a bare dual encoder; texts: input_ids (C, L) and attention_mask of the classes. Attach to it what trains, its heads
    with `full(at=multitask.heads)`."""

    def __init__(self, clip, texts, mask_id, width=384, weights=None, seed=0):
        super().__init__()
        found = sites(clip)
        last = next((s.blocks[-1] for s in found.stacks if s.name == "text"), None)
        if last is None or not hasattr(clip, "get_image_features"):
            raise DoesNotFit(f"{type(clip).__name__} is no dual encoder of images and text. Use CLIP, SigLIP or tiny-clip.")
        n = next(s.n_blocks for s in found.stacks if s.name == "text") - 1
        self.clip, self.mask_id, self.weights, self._last = clip, mask_id, WEIGHTS | dict(weights or {}), (last,)
        ids, there = texts["input_ids"], texts["attention_mask"].bool()
        inner = there & there.roll(1, 1) & there.roll(-1, 1)                        # neither the first nor the last token
        inner[:, 0] = inner[:, -1] = False
        for k, v in dict(ids=ids, there=there, inner=inner, words=ids[inner].unique()).items():
            self.register_buffer(k, v, persistent=False)
        for r in ("attn.norm", "attn.q", "attn.k", "attn.v", "attn.o", "mlp.norm", "mlp.up", "mlp.down"):
            s = found[f"text.block.{n}.{r}"]
            self.register_buffer(r.replace(".", "_"), s.W.clone(), persistent=False)
            self.register_buffer(r.replace(".", "_") + "_b", None if s.b is None else s.b.clone(), persistent=False)
        self.eps = getattr(found[f"text.block.{n}.attn.norm"].module, "eps", 1e-5)
        self.n_heads = found[f"text.block.{n}.attn"].heads[0]
        mlp = found[f"text.block.{n}.mlp.out"].module
        self.act = copy.deepcopy(next(m for m in mlp.children() if not [*m.parameters()]))
        with torch.no_grad():
            e, d = self.text(ids[:1], there[:1])[0].shape[-1], self.attn_norm.shape[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            width = min(width, d)
            self.decoder = nn.ModuleDict(dict(
                fc=nn.Linear(e, len(ids)), down=nn.Linear(d, width), up=nn.Linear(width, d), dense=nn.Linear(d, d),
                norm=nn.LayerNorm(d), fill=nn.Linear(d, len(self.words)), **{} if e == d else dict(match=nn.Linear(e, d))))
        for tensor in (self.decoder["down"].bias, *self.decoder["up"].parameters()):
            nn.init.zeros_(tensor)
        self.decoder.to(ids.device, next(clip.parameters()).dtype)

    @property
    def heads(self):
        """Selector of what trains here beside the adapters."""
        return " ".join(s.name for s in sites(self) if s.path.startswith("decoder."))

    @property
    def config(self):
        return self.clip.config

    def frames(self, pixel_values):        # (B, N, 3, H, W) -> (B, N, E)
        x = pixel_values if pixel_values.dim() == 5 else pixel_values[:, None]
        with together(x.shape[1]):
            f = self.clip.get_image_features(pixel_values=x.flatten(0, 1))
        return getattr(f, "pooler_output", f).unflatten(0, x.shape[:2])

    def text(self, ids, there):            # -> (B, E), (B, L, D) before the last norm
        kept = []
        hook = self._last[0].register_forward_hook(lambda m, a, o: kept.append(o[0] if isinstance(o, tuple) else o))
        try:
            w = self.clip.get_text_features(input_ids=ids, attention_mask=there.long())
        finally:
            hook.remove()
        return getattr(w, "pooler_output", w), kept[-1]

    def forward(self, pixel_values, labels=None, texts=None):
        f = self.frames(pixel_values)
        ids, there = (self.ids, self.there) if texts is None else (texts["input_ids"], texts["attention_mask"].bool())
        v, w = F.normalize(f.mean(1), dim=-1), F.normalize(self.text(ids, there)[0], dim=-1)
        logits = 100 * v @ w.T
        if labels is None or texts is not None:
            return Output(None, logits)
        parts = self.losses(f, v, w, logits, labels)
        return Output(sum(self.weights[k] * x for k, x in parts.items()), logits)

    def losses(self, f, v, w, logits, labels):
        same = (labels[:, None] == labels).to(v.dtype).mul(10).softmax(1)
        s = self.clip.logit_scale.exp() * v @ w[labels].T
        found = dict(con=(kl(s, same) + kl(s.T, same)) / 2, cls=F.cross_entropy(logits, labels),
                     fc=F.cross_entropy(self.decoder["fc"](f.mean(1)), labels))
        if self.training and self.weights["mlm"]:
            found["mlm"] = self.filled(f, *self.masked(labels))
        return found

    def masked(self, labels, rate=0.2):    # -> ids with a fifth of their words masked, where
        ids, inner = self.ids[labels], self.inner[labels]
        n = (inner.sum(1) * rate).round().clamp(min=1)
        rank = torch.rand(ids.shape, device=ids.device).masked_fill(~inner, 2).argsort(1).argsort(1)
        hide = (rank < n[:, None]) & inner
        return ids.masked_fill(hide, self.mask_id), hide, labels

    def filled(self, f, ids, hide, labels):
        x = self.crossed(self.text(ids, self.there[labels])[1], f)[hide]
        x = self.decoder["fill"](self.decoder["norm"](F.gelu(self.decoder["dense"](x))))
        return F.cross_entropy(x, torch.searchsorted(self.words, self.ids[labels][hide]))

    def crossed(self, x, f):               # text (B, L, D), frames (B, N, E)
        z = self.decoder["match"](f) if "match" in self.decoder else f
        x = x + self.decoder["up"](F.gelu(self.decoder["down"](x)))
        n, z = self.normed(x, "attn"), self.normed(z, "attn")
        q, k, v = (F.linear(y, getattr(self, r), getattr(self, r + "_b")).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
                   for y, r in ((n, "attn_q"), (z, "attn_k"), (z, "attn_v")))
        x = x + F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), self.attn_o, self.attn_o_b)
        n = self.act(F.linear(self.normed(x, "mlp"), self.mlp_up, self.mlp_up_b))
        return x + F.linear(n, self.mlp_down, self.mlp_down_b)

    def normed(self, x, r):
        return F.layer_norm(x, x.shape[-1:], getattr(self, r + "_norm")[:, 0], getattr(self, r + "_norm_b"), self.eps)


def kl(s, target):
    return F.kl_div(s.log_softmax(1), target, reduction="batchmean")
