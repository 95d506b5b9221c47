"""Two models made one: a vision model looks (or an audio encoder listens), a connector maps what it saw, a language model writes
(Bridged) or reads (Dual, in dual.py). Nothing of the two is written; the result is an ordinary nn.Module, so methods, training,
cost and files know nothing of bridges."""

import inspect
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from .. import zoo
from ..errors import DoesNotFit
from ..tokens import together
from .way import DEFAULT, Fit, Run, Seen

IGNORE = -100
EYES = ("vision_model", "vision_tower", "visual")


def bridge(vision, language, with_=DEFAULT, *, seed=0, dtype=None):
    """A Bridged or, where the way makes one, a Dual of two models, each a module or what `luthier.zoo.load` takes; the connector
    starts untrained, from `seed`."""
    from . import parse

    way = parse(with_)
    origin = zoo.paired(zoo.about(vision), zoo.about(language), way)
    looks, mouth = (m if isinstance(m, nn.Module) else zoo.load(m, dtype) for m in (vision, language))
    model = kind(way)(eyes(looks), mouth, way, (origin.image.get("sizes") or [None])[0], seed, origin.parts[-1].pool)
    model.luthier_origin = origin
    return model.eval()


def kind(way):
    """The class of what a way makes."""
    from .dual import Dual

    return Dual if way.makes == Dual.kind else Bridged


def eyes(model):
    """The part of a model that looks or listens."""
    base = getattr(model, "base_model", model)
    if getattr(getattr(base, "config", None), "num_mel_bins", None) and hasattr(base, "get_encoder"):
        return base.get_encoder()
    return next((m for n, m in base.named_modules() if n.rpartition(".")[2] in EYES), base)


def heard(ears):
    """The shape of what ears take of one sound: a log-mel spectrum (bins, frames), or samples (n,); None of eyes."""
    config = getattr(ears, "config", None)
    if bins := getattr(config, "num_mel_bins", None):
        return bins, 2 * config.max_source_positions
    return (zoo.SAMPLES,) if getattr(ears, "main_input_name", "") == "input_values" else None


class _Enough(Exception):
    """The vision model has given what is read of it."""


class Pair(nn.Module):
    """vision, connector, language: what both kinds of bridge share."""

    def __init__(self, vision, language, way, side=None, seed=0, pool=""):
        super().__init__()
        from ..site import Stack, sites

        self.vision, self.language, self.way, self.trained, self.pool = vision.eval(), language.eval(), way, False, pool
        self.eyes, self.pen = ((sites(m).stacks or (Stack("", m, ""),))[-1] for m in (vision, language))
        self.side = side or _side(vision)
        try:
            with torch.no_grad():                           # one look says what there is to read
                states = self.see(self.blank())[0, 0]
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            like = "an audio encoder such as whisper-tiny" if "audio" in way.sees else "a vision model such as dinov2-s"
            raise DoesNotFit(f"{type(vision).__name__} gives {way!r} nothing that it reads ({str(error)[:200]}). Bridge from "
                             f"{like}, or in another way.") from error
        self.shape = tuple(states.shape)
        self.connector = self._fresh(seed)

    def _fresh(self, seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = self.way.connector(Fit(self.shape, self.width(), self.language, self.pen))
        like = next(self.language.parameters())
        return made.to(like.device, like.dtype)

    def draw(self, seed):
        """The connector as it starts from another seed; one that is trained stays."""
        if self.trained:
            return self
        self.connector.load_state_dict(self._fresh(seed).state_dict())
        return self

    @property
    def fresh(self):
        """What starts untrained, and the chain that trains it where no other does; None where nothing does."""
        return None if self.trained else (self.connector, 'full(at="connector")')

    def still(self, part=None):
        """Whether nothing tunes the eyes (or another part): what they see may then be computed once."""
        from ..still import still

        return still(self, set((part or self.vision).modules()))

    def train(self, mode=True):
        """Training mode; a part that nothing tunes drops nothing. Whether that is so is known where the methods are on this model
        itself, not on one around it."""
        from ..host import Host

        super().train(mode)
        for part in self.frozen if mode and Host.of(self) else ():
            if self.still(part):
                part.eval()
        return self

    @property
    def frozen(self):
        """What may be computed once where nothing tunes it."""
        return self.vision,

    @property
    def has_loss(self):
        return hasattr(self.way, "loss")

    def write(self, folder, save_file=None):
        """Into a folder that `luthier.zoo.load` reads."""
        from .folder import write

        return write(self, folder, save_file)

    # -- looking ----------------------------------------------------------------------------------------------------
    def blank(self, rows=1, side=None):
        """What eyes that see nothing are given: images; ears that hear nothing: log-mel spectra, or samples."""
        return next(self.vision.parameters()).new_zeros(rows, *(heard(self.vision) or (3, side or self.side, side or self.side)))

    def see(self, pixel_values):
        """What the connector reads of images, (B, N, ...): may be computed once and given as image_states ever after."""
        one = 1 + len(heard(self.vision) or "CHW")
        x = pixel_values if pixel_values.dim() > one else pixel_values[:, None]
        with together(x.shape[1]):
            states = self.way.states(self._look(x.flatten(0, 1).to(next(self.vision.parameters()).dtype)))
        return states.contiguous().unflatten(0, x.shape[:2])            # laid out as what was kept is: the same sums

    def _look(self, x):
        if self.way.embedded:
            return self._entering(x)
        out, fixed, norm = self._run_eyes(x), self.eyes.fixed, self.eyes.final_module
        h = getattr(out, "last_hidden_state", out)
        h = h[:, None] if h.dim() == 2 else _tokens(h, self.eyes.dim) if h.dim() == 4 else h
        layers = tuple(getattr(out, "hidden_states", None) or ())[-self.eyes.n_blocks:] if self.way.layers else ()
        if self.way.layers and not layers:
            raise DoesNotFit(f"{type(self.way).__name__} reads several layers of the vision model, and "
                             f"{type(self.vision).__name__} gives its last alone. Use a vision transformer of transformers.")
        return Seen(h[:, fixed:], h[:, 0] if fixed else h.mean(1), tuple(norm(x) if norm else x for x in layers), fixed)

    def _run_eyes(self, x):
        if not hasattr(self.vision, "config"):
            return getattr(self.vision, "forward_features", self.vision)(x)
        size, takes = getattr(self.vision.config, "image_size", None), inspect.signature(self.vision.forward).parameters
        resized = size not in (None, x.shape[-1]) and "interpolate_pos_encoding" in takes
        more = dict(interpolate_pos_encoding=True) if resized else {}
        with _unmasked(self.vision.config, "noise" in takes, x) as kept:
            return self.vision(x, output_hidden_states=self.way.layers, return_dict=True, **more, **kept)

    def _entering(self, x):
        """Seen of what enters the first block; nothing after it runs."""
        kept = []

        def stop(module, args, kwargs):
            kept.append(args[0] if args else next(iter(kwargs.values())))
            raise _Enough

        handle = self.eyes.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with suppress(_Enough):
                self._run_eyes(x)
        finally:
            handle.remove()
        h, fixed = kept[0], self.eyes.fixed
        h = _tokens(h, self.eyes.dim) if h.dim() == 4 else h
        return Seen(h[:, fixed:], h[:, fixed:].mean(1), (), fixed)

    @property
    def supports_gradient_checkpointing(self):
        return getattr(self.language, "supports_gradient_checkpointing", False)

    def gradient_checkpointing_enable(self, **options):
        for m in (self.vision, self.language):
            if getattr(m, "supports_gradient_checkpointing", False):
                m.gradient_checkpointing_enable(**options)


class Bridged(Pair):
    """A language model that writes about images, (B, 3, H, W), or (B, N, 3, H, W) with image_mask (B, N) where rows have
    fewer, or about sounds, input_features (B, F, T) or (B, N, F, T). Images stand in front of the text, or where image_places
    (B, N) says: each before so many of its tokens. Logits are those of the text alone; without images they are the language
    model's own, to the bit. asked (B,): how many tokens of a row are its instruction, for ways that heed it; else all, or all
    without a label."""

    main_input_name = "input_ids"

    def __init__(self, vision, language, *more):
        table = language.get_input_embeddings() if hasattr(language, "get_input_embeddings") else None
        if table is None or not hasattr(language, "generate") or language.get_output_embeddings() is None:
            raise DoesNotFit(f"{type(language).__name__} writes no text: it has no word embeddings, or no head over words. "
                             "Bridge to a decoder or encoder-decoder with its head, such as smollm2-135m.")
        super().__init__(vision, language, *more)
        self.takes = frozenset(inspect.signature(language.forward).parameters)

    def width(self):
        return self.language.get_input_embeddings().weight.shape[1]

    @property
    def config(self):
        return self.language.config

    @property
    def writes_apart(self):
        """Whether an encoder reads image and prompt, and a decoder writes the answer."""
        return bool(getattr(self.config, "is_encoder_decoder", False))

    # -- reading and writing ----------------------------------------------------------------------------------------
    def _inputs(self, input_ids, attention_mask, image_states, image_mask, places=None, asked=None):
        """Embeddings of images and text, (B, N T + L, D), their mask, the Run, and where the text stands, (B, L)."""
        B, N = image_states.shape[:2]
        states = image_states.to(next(self.connector.parameters()).dtype)
        text = self.language.get_input_embeddings()(input_ids)
        there = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        heeded = ()
        if self.way.heeds:                                  # the instruction's embeddings and mask, for each image
            asked = there if asked is None else there * asked
            heeded = text.repeat_interleave(N, 0), asked.repeat_interleave(N, 0)
        front = self.way.prompt(self.connector, states.flatten(0, 1), *heeded).unflatten(0, (B, N)).to(text.dtype)
        shown = there.new_ones(B, N) if image_mask is None else image_mask.to(there)
        seen = shown[:, :, None] * (torch.arange(front.shape[2], device=there.device) >= self.way.hidden)
        run, at = Run(self, states, shown, front.flatten(1, 2)), None
        if places is not None:
            if hasattr(self.way, "within"):
                raise DoesNotFit(f"{type(self.way).__name__} has its images in front of the text, so it takes no image_places.")
            places = places + there.argmax(1, keepdim=True) - 0.5          # counted from a row's first token
            text_at = torch.arange(text.shape[1], device=there.device).expand(B, -1)
            at = torch.cat([places.repeat_interleave(front.shape[2], 1), text_at], 1).argsort(stable=True, dim=1)
        h, there = torch.cat([run.front, text], 1), torch.cat([seen.flatten(1).to(there), there], 1)
        if at is not None:
            h, there, at = h.take_along_dim(at[:, :, None], 1), there.gather(1, at), at.argsort(1)[:, N * front.shape[2]:]
        order = None
        if self.writes_apart and image_mask is not None:    # an encoder knows places by order alone: padding goes behind
            order = there.argsort(stable=True, dim=1, descending=True)
        elif at is None and "position_ids" not in self.takes and not (self.writes_apart or hasattr(self.way, "within")):
            last = there.shape[1] - there.flip(1).argmax(1, keepdim=True)          # so do these decoders: it goes in front
            order = (there.bool() | (torch.arange(there.shape[1], device=there.device) >= last)).argsort(stable=True, dim=1)
        if order is not None:
            h, there = h.take_along_dim(order[:, :, None], 1), there.gather(1, order)
        return h, there, run, at

    @contextmanager
    def _within(self, run):
        """The way inside the language model, for as long as it reads these images or writes about them."""
        if not hasattr(self.way, "within"):
            yield
            return

        def begin(module, args, kwargs):
            past = kwargs.get("past_key_values")
            run.filling = past is None or past.get_seq_length() == 0

        handle = self.pen.module.register_forward_pre_hook(begin, with_kwargs=True)
        try:
            with self._rerun(run), self.way.within(run):
                run.inside = True
                yield
        finally:
            run.inside = False
            handle.remove()

    @contextmanager
    def _rerun(self, run):
        """Blocks that the backward pass runs once more, as under gradient checkpointing, run then within the way, too."""
        def again(fn, *args):
            if run.inside:
                return fn(*args)
            with self.way.within(run):
                return fn(*args)
        key = "_gradient_checkpointing_func"
        before = [(b, f) for b in self.pen.blocks if (f := b.__dict__.get(key)) is not None and self.training]
        for block, f in before:
            setattr(block, key, lambda fn, *args, f=f, **more: f(partial(again, fn), *args, **more))
        try:
            yield
        finally:
            for block, f in before:
                setattr(block, key, f)

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None, labels=None, image_mask=None, image_states=None,
                past_key_values=None, input_features=None, image_places=None, asked=None, **more):
        pixel_values = input_features if pixel_values is None else pixel_values
        if image_states is None and pixel_values is not None:
            image_states = self.see(pixel_values)
        if past_key_values is not None:
            more["past_key_values"] = past_key_values
        before, read, run = getattr(past_key_values, "_luthier_shown", (None,) * 3)    # of a cache: its mask, tokens of text, Run
        if image_states is None and before is None:
            more |= {} if labels is None else dict(labels=labels)
            return self.language(input_ids=input_ids, attention_mask=attention_mask, **more)
        n, at = input_ids.shape[1], None
        if image_states is None:
            inputs, there = input_ids, torch.cat([before, attention_mask[:, read:]], 1)
            more |= dict(input_ids=inputs, attention_mask=there)
        else:
            if asked is not None:
                asked = torch.arange(n, device=asked.device) < asked[:, None]
            elif labels is not None and not self.writes_apart:
                asked = labels == IGNORE
            inputs, there, run, at = self._inputs(input_ids, attention_mask, image_states, image_mask, image_places, asked)
            more |= dict(inputs_embeds=inputs, attention_mask=there)
        if self.writes_apart:
            more |= {} if labels is None else dict(labels=labels)
        elif "position_ids" in self.takes:                  # padding anywhere moves nothing
            more.setdefault("position_ids", (there.long().cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1]:])
        if "logits_to_keep" in self.takes and not self.writes_apart and at is None:
            more.setdefault("logits_to_keep", n)
        with self._within(run):
            out = self.language(**more)
        if not self.writes_apart:
            out["logits"] = out["logits"][:, -n:] if at is None else out["logits"].take_along_dim(at[:, :, None], 1)
            if out.get("past_key_values") is not None and before is None:
                out["past_key_values"]._luthier_shown = there, n, run
            if labels is not None:
                kept = labels[:, 1:] != IGNORE              # only these rows meet the softmax
                out["loss"] = F.cross_entropy(out["logits"][:, :-1][kept].float(), labels[:, 1:][kept])
        if self.has_loss and image_states is not None:
            out["front"] = run.front
            if labels is not None and self.training:
                out["loss"] = out["loss"] + self.objective(out, labels)
        return out

    def objective(self, out, labels, words=None):
        """What the way adds to the loss of the text."""
        return self.way.loss(self, out["front"], labels, words)

    def generate(self, input_ids=None, attention_mask=None, pixel_values=None, image_mask=None, image_states=None,
                 input_features=None, image_places=None, **more):
        """As the language model generates; of a decoder, prompt and continuation."""
        pixel_values = input_features if pixel_values is None else pixel_values
        if image_states is None and pixel_values is not None:
            image_states = self.see(pixel_values)
        if image_states is None:
            return self.language.generate(input_ids, attention_mask=attention_mask, **more)
        inputs, there, run, _ = self._inputs(input_ids, attention_mask, image_states, image_mask, image_places)
        with self._within(run):
            out = self.language.generate(inputs_embeds=inputs, attention_mask=there, **more)
        if self.writes_apart or not torch.is_tensor(out):
            return out
        return torch.cat([input_ids.repeat_interleave(len(out) // len(input_ids), 0), out], 1)

    @property
    def numbered(self):
        """Whether the language model's places are parameters, so that there are only so many."""
        from ..site import sites

        return any(s.role == "embed.position" for s in sites(self.language))

    def taken(self, states):
        """How many places of the language model an image of these states (1, 1, ...) takes."""
        with torch.no_grad():
            return self._inputs(torch.zeros(1, 1, dtype=torch.long, device=states.device), None, states, None)[0].shape[1] - 1

    def can_generate(self):
        return True

    def example(self, rows=1, tokens=128):
        """One batch such as it takes."""
        like = next(self.language.parameters())
        ids = torch.zeros(rows, tokens, dtype=torch.long, device=like.device)
        more = dict(decoder_input_ids=ids) if self.writes_apart else {}
        return dict(input_ids=ids, pixel_values=self.blank(rows).to(like.dtype)) | more


@contextmanager
def _unmasked(config, masks, x):
    """Within, a masked autoencoder (ViT-MAE), which hides patches at random whenever it runs, is shown all of them in order."""
    p, ratio = getattr(config, "patch_size", None), getattr(config, "mask_ratio", None)
    if not (masks and ratio and isinstance(p, int)):
        yield {}
        return
    config.mask_ratio = 0.0
    try:
        yield dict(noise=torch.arange((x.shape[-2] // p) * (x.shape[-1] // p), device=x.device).expand(len(x), -1))
    finally:
        config.mask_ratio = ratio


def _tokens(x, d):
    """A map (N, C, H, W), or (N, H, W, d) where only the last axis can be the channels, as (N, H W, C)."""
    return x.flatten(1, 2) if x.shape[-1] == d != x.shape[1] else x.flatten(2).mT


def _side(vision):
    size = getattr(getattr(vision, "config", None), "image_size", None) or getattr(vision, "default_cfg", {}).get(
        "input_size", (224,))[-1]
    return size[0] if isinstance(size, list | tuple) else size
