"""Two encoders made a dual one, as CLIP is: image and text, each through a head of its own, are compared by the cosine.

    logits(text, image) = exp(s) cos(f(see(image)), g(hear(text))) [+ b]

A way of this kind is a `TwoHeads`. It says `makes = "vision-language"` by that, and its verbs are

    states(seen)                  which vision states, Seen -> (N, ...)
    words(heard)                  which text states, Heard -> (N, d); or (N, L, d + 1), one a token, the last number 1 where there
                                  is a token and 0 where there is padding
    connector(fit)                Heads: f and g for states of shapes fit.states and (..., fit.width), s, and b if there is one
    loss(logits, same)            (text, image) both: logits, and whether the two belong together; without it the task's own
"""

import math
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import DoesNotFit
from .model import Pair
from .way import Heard


class Heads(nn.Module):
    """The connector of a dual encoder; itself it makes logits of cosines."""

    def __init__(self, image, text, width, scale, bias=None):
        super().__init__()
        self.image, self.text, self.width = image, text, width
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))

    def forward(self, cosines):
        y = self.logit_scale.clamp(0, math.log(100)).exp() * cosines
        return y if self.logit_bias is None else y + self.logit_bias


class Dual(Pair):
    """A vision and a language model that are compared. Read as transformers' CLIPModel is."""

    kind, main_input_name = "vision-language", "pixel_values"

    def __init__(self, vision, language, *more):
        super().__init__(vision, language, *more)
        sizes = dict(projection_dim=self.connector.width, text_config=getattr(language, "config", None))
        self.config = SimpleNamespace(**sizes, vision_config=getattr(vision, "config", None))

    def width(self):
        """Of the states of texts; one is read to know it."""
        ids = torch.zeros(1, 2, dtype=torch.long, device=next(self.language.parameters()).device)
        try:
            with torch.no_grad():
                states = self.hear(ids)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise DoesNotFit(f"{type(self.language).__name__} does not read texts ({str(error)[:200]}). Bridge to a text encoder "
                             "such as minilm.") from error
        return states.shape[-1] - (states.dim() == 3)

    @property
    def frozen(self):
        return self.vision, self.language

    @property
    def logit_scale(self):
        return self.connector.logit_scale

    def hear(self, input_ids, attention_mask=None):
        """What the text's head reads of texts, (N, ...): may be computed once and given as text_states ever after."""
        from ..tasks.headed import pooled

        whole = getattr(self.language, "config", None)
        body = self.language.get_encoder() if getattr(whole, "is_encoder_decoder", False) else getattr(
            self.language, "base_model", self.language)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        h = body(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return self.way.words(Heard(h, mask, pooled(h, self.pool or ("last" if self.pen.causal else "mean"), mask)))

    def get_image_features(self, pixel_values=None, image_states=None):
        return self.connector.image(self.see(pixel_values)[:, 0] if image_states is None else image_states)

    def get_text_features(self, input_ids=None, attention_mask=None, text_states=None):
        return self.connector.text(self.hear(input_ids, attention_mask) if text_states is None else text_states)

    def scaled(self, cosines):
        """The logits of cosines."""
        return self.connector(cosines)

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None, image_states=None, text_states=None):
        from transformers.models.clip.modeling_clip import CLIPOutput

        x = F.normalize(self.get_image_features(pixel_values, image_states), dim=-1)
        t = F.normalize(self.get_text_features(input_ids, attention_mask, text_states), dim=-1)
        y = self.scaled(t @ x.T)                            # (texts, images)
        return CLIPOutput(logits_per_image=y.T, logits_per_text=y, text_embeds=t, image_embeds=x)

    def objective(self, logits, same):
        """The loss of a batch, (text, image) both: what is said of them, and whether they belong together."""
        return self.way.loss(logits, same)

    def example(self, rows=1, tokens=128):
        like = next(self.language.parameters())
        ids = torch.zeros(rows, tokens, dtype=torch.long, device=like.device)
        return dict(input_ids=ids, pixel_values=self.blank(rows))
