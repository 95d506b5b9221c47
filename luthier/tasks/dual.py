"""A dual encoder as a classifier by the names of its classes.

    logits(x) = exp(s) cos(f(x), g(t_c)) [+ b],    t_c = template with the name of class c in it

f and g are the image and text towers with their projections (CLIP 2103.00020 §3.1.4; SigLIP adds a bias). What the towers do
in a forward is on offer to methods as the context: `image()`, the images' unit features (B, d), and `texts()`, features of
the texts (C, d), in whatever order they are asked for; `scores()`, all cosines (B, C), of the bare towers where it is asked
for asleep. Each is computed once a forward; within `keeping()`, what reads no image and does not change is computed once.
"""

from contextlib import contextmanager, nullcontext
from functools import cached_property, partial

import torch
from torch import nn
from torch.nn import functional as F

from .. import zoo
from ..errors import BadData, DoesNotFit
from ..host import Host
from ..still import reached, resting, still
from .headed import Output


def is_dual(model):
    return hasattr(model, "get_text_features") and hasattr(model, "get_image_features")


def loaded(task, seed=0, dtype=None):
    """The dual encoder that a task is to be built on; heads that a bridge starts untrained depend on `seed`."""
    if task.model is None:
        raise BadData("This task has no model to build on. Open it with model=, e.g. model=\"tiny-clip\".")
    dual = zoo.load(task.model, dtype)
    if not is_dual(dual):
        raise DoesNotFit(f"{task.origin.ref} is no dual encoder: it gives no image and text features to compare. Use CLIP or "
                         "SigLIP, in the zoo tiny-clip; a bridge of two encoders (dinov2-s+minilm:sail()); or "
                         "task=\"image-classification\".")
    dual.luthier_origin = task.origin
    return dual.draw(seed) if hasattr(dual, "draw") else dual


class Named(nn.Module):
    """names: class names; the first `old` of them are those that training rows show. parts: for each class the numbers of its
    attribute and its object, and the words for them, where names are made of such pairs."""

    def __init__(self, dual, tokenizer, names, template="a photo of a {}.", old=None, parts=None):
        super().__init__()
        self.dual, self.context, self.names, self.old = dual, {}, tuple(names), old or len(names)
        if not hasattr(dual, "scaled"):              # the very same Parameter: read here, so that methods can reach it here
            self.logit_scale, self.logit_bias = dual.logit_scale, getattr(dual, "logit_bias", None)
        self.parts, self.tokenizer, self.most = parts, tokenizer, _positions(dual)
        self.kept, self.settled, self.asked = None, False, False         # asked: whether what reads the texts looked at an image
        ids, mask, self.spans = encode(tokenizer, [template.format(n) for n in names], self.most,
                                       [(template.index("{}"), template.index("{}") + len(n)) for n in names])
        self.register_buffer("texts", ids, persistent=False)
        self.register_buffer("mask", mask, persistent=False)

    @property
    def config(self):
        return self.dual.config

    @property
    def fresh(self):
        """What starts untrained: the heads of a dual encoder that a bridge made of two models."""
        return getattr(self.dual, "fresh", None)

    @property
    def width(self):
        """Of the features: d."""
        return getattr(self.config, "projection_dim", None) or self.config.vision_config.hidden_size

    def example(self, rows=1, tokens=128):
        """One batch such as it takes: the texts are its own."""
        from ..cost import example

        return {"pixel_values": example(self.dual, rows, 1)["pixel_values"]}

    def images(self, pixel_values):
        """(B, 3, H, W) -> unit vectors (B, d)."""
        pixel_values = pixel_values.to(next(self.dual.parameters()).dtype)
        return F.normalize(_vector(self.dual.get_image_features(pixel_values=pixel_values)), dim=-1)

    def speak(self):
        """Features of the texts, (C, d), or (B C, d) where a method made texts of its own for each image."""
        n = self.old if self.training else len(self.texts)
        mask = {} if self.mask is None else {"attention_mask": self.mask[:n]}
        return _vector(self.dual.get_text_features(input_ids=self.texts[:n], **mask))

    # -- what does not change is computed once ------------------------------------------------------------------------
    @cached_property
    def sides(self):
        """The modules that looking at an image runs, and those that reading a text runs."""
        mask = {} if self.mask is None else {"attention_mask": self.mask[:1]}
        return tuple(reached(self, work) for work in (
            lambda: self.images(**self.example()), lambda: self.dual.get_text_features(input_ids=self.texts[:1], **mask)))

    @contextmanager
    def keeping(self, settled=False):
        """Within, texts are read once where nothing tunes what reads them; settled: or no state changes, as in evaluation."""
        before = self.kept, self.settled
        self.kept, self.settled = {}, settled
        try:
            yield self
        finally:
            self.kept, self.settled = before

    def read(self):
        """As speak(); what it said before where no image has a say in it."""
        host = Host.of(self)
        if self.kept is None or host and host.rows is not None:
            return self.speak()
        alike = still(self, self.sides[1])
        if not alike and (torch.is_grad_enabled() or not self.settled):
            return self.speak()
        key = self.training, tuple(o.name for o in host.owners if o.active) if host else ()
        if key not in self.kept:
            before, self.asked = self.asked, False
            with resting(self.sides[1]) if alike else nullcontext():
                t = self.speak()
            if self.asked or len(t) != (self.old if self.training else len(self.texts)):
                return t
            self.kept[key], self.asked = t, before
        return self.kept[key]

    def forward(self, pixel_values=None, labels=None, image_features=None):
        """image_features: what images() gave, in place of pixels, where nothing tunes what looks."""
        def look():
            return self.images(pixel_values) if image_features is None else image_features
        seen = {"image": _once("image", look), "scores": _once("scores", lambda: look() @ F.normalize(self.read(), dim=-1).T)}

        def offer(what):
            self.asked = True
            return seen[what]()
        self.context.update({k: partial(offer, k) for k in seen} | {"texts": _once("texts", self.read)})
        try:
            x, t = self.context["image"](), F.normalize(self.context["texts"](), dim=-1)
        finally:
            self.context.clear()
        n = self.old if self.training else len(self.texts)
        y = x @ t.T if len(t) == n else torch.einsum("bd,bcd->bc", x, t.unflatten(0, (len(x), n)))
        if hasattr(self.dual, "scaled"):
            logits = self.dual.scaled(y)
        else:
            logits = self.logit_scale.exp() * y
            logits = logits if self.logit_bias is None else logits + self.logit_bias
        return Output(None if labels is None else F.cross_entropy(logits.float(), labels), logits)


def _vector(out):
    """Features of either form: a tensor, or what transformers 5 returns."""
    return getattr(out, "pooler_output", out)


def _positions(dual):
    config = getattr(dual.config, "text_config", None) or dual.config
    return getattr(config, "max_position_embeddings", 10**6)


def _once(what, make):
    """make(), computed when first asked for; one that asks for itself on the way is refused."""
    found = []

    def get():
        if not found:
            found.append(None)
            found[0] = make()
        if found[0] is None:
            raise DoesNotFit(f"Two methods wait for each other: the {what} features depend on themselves. Leave one of them out.")
        return found[0]
    return get


def encode(tokenizer, texts, most, chars=None):
    """-> ids (N, T), mask (N, T) or None, and for each text the tokens (start, stop) that hold its characters chars[i].
    Models whose tokenizers know no mask (SigLIP) are given texts padded to the last position, as they were trained."""
    masked = "attention_mask" in tokenizer.model_input_names
    found = tokenizer(texts, padding=True if masked else "max_length", return_offsets_mapping=True, return_tensors="pt",
                      **({} if masked else {"max_length": most, "truncation": True}))
    ids = found["input_ids"]
    if ids.shape[1] > most:
        worst = max(texts, key=lambda t: len(tokenizer(t)["input_ids"]))
        raise BadData(f"{worst[:80]!r} is {ids.shape[1]} tokens long, and the model reads {most}. Shorten it.")
    spans = []
    for i, (start, stop) in enumerate(chars or ()):
        at = [k for k, (a, b) in enumerate(found["offset_mapping"][i].tolist()) if b > a and b > start and a < stop]
        if not at:
            raise BadData(f"The tokenizer finds no token for the name in {texts[i]!r}. Give the class another name.")
        spans.append((at[0], at[-1] + 1))
    return ids, found["attention_mask"] if masked else None, tuple(spans)
