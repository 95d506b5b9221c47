"""Two models made one: a vision model looks, a connector maps what it saw, a language model writes. Nothing of the two is
written; the result is an ordinary nn.Module, so methods, training, cost and files know nothing of bridges."""

import inspect

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import DoesNotFit
from .way import Fit, Seen

IGNORE = -100
EYES = ("vision_model", "vision_tower", "visual")


def bridge(vision, language, with_="limber()", *, seed=0, dtype=None):
    """A Bridged of two models, each a module or what `luthier.zoo.load` takes; the connector starts untrained, from `seed`."""
    from .. import zoo
    from . import parse

    way = parse(with_)
    origin = zoo.paired(zoo.about(vision), zoo.about(language), way)
    eyes, mouth = (m if isinstance(m, nn.Module) else zoo.load(m, dtype) for m in (vision, language))
    model = Bridged(_eyes(eyes), mouth, way, (origin.image.get("sizes") or [None])[0], seed)
    model.luthier_origin = origin
    return model.eval()


def _eyes(model):
    """The part of a model that looks."""
    base = getattr(model, "base_model", model)
    return next((m for n, m in base.named_modules() if n.rpartition(".")[2] in EYES), base)


class Bridged(nn.Module):
    """vision, connector, language. Images are (B, 3, H, W), or (B, N, 3, H, W) with image_mask (B, N) where rows have fewer.
    Logits are those of the text alone; without images they are the language model's own, to the bit."""

    main_input_name = "input_ids"

    def __init__(self, vision, language, way, side=None, seed=0):
        super().__init__()
        from ..site import sites

        self.vision, self.language, self.way = vision, language, way
        stacks = sites(vision).stacks
        self.fixed, self.wide = (stacks[-1].fixed, stacks[-1].dim) if stacks else (0, 0)
        self.side = side or _side(vision)
        self.takes = frozenset(inspect.signature(language.forward).parameters)
        table = language.get_input_embeddings() if hasattr(language, "get_input_embeddings") else None
        if table is None or not hasattr(language, "generate") or language.get_output_embeddings() is None:
            raise DoesNotFit(f"{type(language).__name__} writes no text: it has no word embeddings, or no head over words. "
                             "Bridge to a decoder or encoder-decoder with its head, such as smollm2-135m.")
        try:
            with torch.no_grad():                           # one look says what there is to read
                states = self.see(next(vision.parameters()).new_zeros(1, 3, self.side, self.side))[0, 0]
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise DoesNotFit(f"{type(vision).__name__} does not look at images ({str(error)[:200]}). Bridge from a vision model "
                             "such as dinov2-s.") from error
        self.shape = tuple(states.shape)
        self.connector = self._fresh(seed)

    def _fresh(self, seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = self.way.connector(Fit(self.shape, self.language.get_input_embeddings().weight.shape[1], self.language))
        like = next(self.language.parameters())
        return made.to(like.device, like.dtype)

    def draw(self, seed):
        """The connector as it starts from another seed."""
        self.connector.load_state_dict(self._fresh(seed).state_dict())
        return self

    @property
    def config(self):
        return self.language.config

    @property
    def writes_apart(self):
        """Whether an encoder reads image and prompt, and a decoder writes the answer."""
        return bool(getattr(self.config, "is_encoder_decoder", False))

    @property
    def fresh(self):
        """What starts untrained, and the chain that trains it where no other does."""
        return self.connector, 'full(at="connector")'

    def still(self):
        """Whether nothing tunes the eyes: what they see may then be computed once."""
        from ..host import Host

        host = Host.of(self)
        return not any(p.requires_grad for p in self.vision.parameters()) and not (
            host and host.touches(set(self.vision.modules())))

    def train(self, mode=True):
        """Training mode; eyes that nothing tunes drop nothing."""
        super().train(mode)
        if mode and self.still():
            self.vision.eval()
        return self

    # -- looking ----------------------------------------------------------------------------------------------------
    def see(self, pixel_values):
        """What the connector reads of images, (B, N, ...): may be computed once and given as image_states ever after."""
        x = pixel_values if pixel_values.dim() > 4 else pixel_values[:, None]
        states = self.way.states(self._look(x.flatten(0, 1).to(next(self.vision.parameters()).dtype)))
        return states.contiguous().unflatten(0, x.shape[:2])            # laid out as what was kept is: the same sums, to the bit

    def _look(self, x):
        from ..host import as_tokens

        if hasattr(self.vision, "config"):
            size, takes = getattr(self.vision.config, "image_size", None), inspect.signature(self.vision.forward).parameters
            resized = size not in (None, x.shape[-1]) and "interpolate_pos_encoding" in takes
            more = dict(interpolate_pos_encoding=True) if resized else {}
            out = self.vision(x, output_hidden_states=self.way.layers, return_dict=True, **more)
        else:
            out = getattr(self.vision, "forward_features", self.vision)(x)
        h = getattr(out, "last_hidden_state", out)
        h = h[:, None] if h.dim() == 2 else as_tokens(h, self.wide)[0]
        layers = tuple(getattr(out, "hidden_states", None) or ())
        return Seen(h[:, self.fixed:], h[:, 0] if self.fixed else h.mean(1), layers, self.fixed)

    # -- reading and writing ----------------------------------------------------------------------------------------
    def _inputs(self, input_ids, attention_mask, image_states, image_mask):
        """Embeddings of images and text, (B, N T + L, D), their mask, and those of the images alone."""
        B, N = image_states.shape[:2]
        like = next(self.connector.parameters())
        states = image_states.flatten(0, 1).to(like.dtype)
        front = self.way.prompt(self.connector, states).unflatten(0, (B, N))                                 # (B, N, T, D)
        text = self.language.get_input_embeddings()(input_ids)
        there = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        shown = there.new_ones(B, N) if image_mask is None else image_mask.to(there)
        shown = shown[:, :, None].expand(front.shape[:3]).flatten(1)
        front = front.flatten(1, 2).to(text.dtype)
        h, there = torch.cat([front, text], 1), torch.cat([shown, there], 1)
        if self.writes_apart and image_mask is not None:    # an encoder knows places by order alone: padding goes behind
            order = there.argsort(stable=True, dim=1, descending=True)
            h, there = h.take_along_dim(order[:, :, None], 1), there.gather(1, order)
        return h, there, front

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None, labels=None, image_mask=None, image_states=None,
                past_key_values=None, **more):
        if image_states is None and pixel_values is not None:
            image_states = self.see(pixel_values)
        if past_key_values is not None:
            more["past_key_values"] = past_key_values
        before = getattr(past_key_values, "_luthier_shown", None)           # the mask of images that a cache holds
        if image_states is None and before is None:
            more |= {} if labels is None else dict(labels=labels)
            return self.language(input_ids=input_ids, attention_mask=attention_mask, **more)
        if image_states is None:
            there = torch.cat([before, attention_mask], 1)
            more |= dict(input_ids=input_ids, attention_mask=there)
            inputs, front = input_ids, None
        else:
            inputs, there, front = self._inputs(input_ids, attention_mask, image_states, image_mask)
            more |= dict(inputs_embeds=inputs, attention_mask=there)
        if self.writes_apart:
            return self._told(self.language(**more, **{} if labels is None else dict(labels=labels)), front, labels)
        n = input_ids.shape[1]
        if "position_ids" in self.takes:                    # padding anywhere moves nothing
            more.setdefault("position_ids", (there.long().cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1]:])
        if "logits_to_keep" in self.takes:
            more.setdefault("logits_to_keep", n)
        out = self.language(**more)
        out["logits"] = out["logits"][:, -n:]
        if out.get("past_key_values") is not None and before is None:
            out["past_key_values"]._luthier_shown = there[:, :-n]
        if labels is not None:
            kept = labels[:, 1:] != IGNORE                  # only these rows meet the softmax
            out["loss"] = F.cross_entropy(out["logits"][:, :-1][kept].float(), labels[:, 1:][kept])
        return self._told(out, front, labels)

    def _told(self, out, front, labels):
        """An output that also holds what the way's own loss reads, and in training that loss."""
        if front is not None and self.has_loss:
            out["front"] = front
            if labels is not None and self.training:
                out["loss"] = out["loss"] + self.objective(out, labels)
        return out

    @property
    def has_loss(self):
        return hasattr(self.way, "loss")

    def objective(self, out, labels, words=None):
        """What the way adds to the loss of the text."""
        return self.way.loss(self, out["front"], labels, words)

    def generate(self, input_ids=None, attention_mask=None, pixel_values=None, image_mask=None, image_states=None, **more):
        """As the language model generates; of a decoder, prompt and continuation."""
        if image_states is None and pixel_values is not None:
            image_states = self.see(pixel_values)
        if image_states is None:
            return self.language.generate(input_ids, attention_mask=attention_mask, **more)
        inputs, there, _ = self._inputs(input_ids, attention_mask, image_states, image_mask)
        out = self.language.generate(inputs_embeds=inputs, attention_mask=there, **more)
        if self.writes_apart or not torch.is_tensor(out):
            return out
        return torch.cat([input_ids.repeat_interleave(len(out) // len(input_ids), 0), out], 1)

    def can_generate(self):
        return True

    @property
    def supports_gradient_checkpointing(self):
        return getattr(self.language, "supports_gradient_checkpointing", False)

    def gradient_checkpointing_enable(self, **options):
        for m in (self.vision, self.language):
            if getattr(m, "supports_gradient_checkpointing", False):
                m.gradient_checkpointing_enable(**options)

    def example(self, rows=1, tokens=128):
        """One batch such as it takes."""
        like = next(self.language.parameters())
        ids = torch.zeros(rows, tokens, dtype=torch.long, device=like.device)
        more = dict(decoder_input_ids=ids) if self.writes_apart else {}
        return dict(input_ids=ids, pixel_values=like.new_zeros(rows, 3, self.side, self.side)) | more


def _side(vision):
    size = getattr(getattr(vision, "config", None), "image_size", None) or getattr(vision, "default_cfg", {}).get(
        "input_size", (224,))[-1]
    return size[0] if isinstance(size, list | tuple) else size
