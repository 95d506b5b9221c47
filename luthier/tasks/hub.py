"""Models of the hub that read images and write text, each in its own form. What it is, its configuration and its forward say:

    a placeholder     an image token in the configuration: its places among the words become the image's (LLaVA's kin, BLIP-2,
                      PaliGemma, Idefics); put there by the model's own processor, or where none is saved as many as its image
                      features are
    beside the words  no such token: images go in as pixels (BLIP, GIT)
    apart             an encoder reads the prompt, a decoder writes (BLIP-2 with T5; BLIP for questions: decoder_input_ids)

What else its processor makes (sizes, masks, grids) travels with the pixels. Frozen eyes look once at an image where transformers
lets the model be given what they saw: mm_encoder_outputs, in most that put image tokens among the words. BLIP and GIT run their
eyes within their forward and take nothing in their place, so these look each time; and so does any with several images a row, or
whose images are of several sizes, since features then depend on how a batch is padded. Writing itself, BLIP-2 looks, too. Eyes
that look once drop nothing."""

import inspect
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from .. import zoo
from ..errors import BadState, DoesNotFit
from ..still import at_hand, once, reached, resting, still
from .classify import IGNORE

KEPT = 1 << 30                 # bytes of processed images
GIVEN = "mm_encoder_outputs"   # where transformers lets a model be given what its encoders made before
FILES = ("processor_config.json", "preprocessor_config.json")


def writes(model, origin):
    """The class of a model of this kind, None where it writes no text."""
    cls = zoo.architecture(model)[0] if origin.kind == "vision-language" and not origin.parts else None
    takes = inspect.signature(cls.forward).parameters.keys() if cls else ()
    return cls if hasattr(cls, "generate") and {"input_ids", "pixel_values"} <= set(takes) else None


class Hub:
    """How one such model is fed. model: a reference or a module."""

    def __init__(self, model, origin):
        from transformers import GenerationMixin

        cls, config = zoo.architecture(model)
        text = getattr(config, "text_config", None) or config
        self.model, self.origin, self.config, self.takes = model, origin, config, inspect.signature(cls.forward).parameters.keys()
        token = getattr(config, "image_token_id", None)
        self.token = getattr(config, "image_token_index", None) if token is None else token
        self.shifts = bool(getattr(text, "is_encoder_decoder", False) or getattr(config, "is_encoder_decoder", False))
        self.apart = self.shifts or self.token is None and "decoder_input_ids" in self.takes
        self.start = getattr(text, "bos_token_id", None)
        self.own = cls.generate is not GenerationMixin.generate         # which may know nothing of padding
        self.kept, self.bytes, self.marks = OrderedDict(), 0, False   # marks: whether token_type_ids tell images
        self._asked, self._processor, self._places = {}, False, None
        self.eyes, self.looks, self.form, self.memory = None, None, None, (None, {})

    # -- what came with the model ---------------------------------------------------------------------------------------
    @property
    def processor(self):
        """Its own, or None where none was saved with it."""
        if self._processor is False:
            self._processor = self._read()
        return self._processor

    def _read(self):
        from transformers import AutoProcessor, ProcessorMixin

        folder = Path(self.origin.folder)
        if not self.origin.folder or folder.is_dir() and not any((folder / name).is_file() for name in FILES):
            return None
        try:
            with zoo.quiet():
                found = AutoProcessor.from_pretrained(self.origin.folder, trust_remote_code=False)
        except Exception as error:                       # transformers raises what it likes here
            raise BadState(f"The processor of {self.origin.ref} cannot be read: {str(error)[:200]} Save it again beside the "
                           "model: processor.save_pretrained(FOLDER).") from error
        return found if isinstance(found, ProcessorMixin) and getattr(found, "image_processor", None) is not None else None

    def tokenizer(self):
        return self.processor.tokenizer if self.processor else self.origin.tokenizer()

    def places(self, side):
        """How many tokens an image takes, where no processor tells: as its features are, worked out without weights."""
        if self._places is None:
            try:
                with torch.device("meta"), torch.no_grad():
                    model = self.model if isinstance(self.model, torch.nn.Module) else zoo.load(self.model, weights=False)
                    found = model.to("meta").get_image_features(pixel_values=torch.zeros(1, 3, side, side))
                found = getattr(found, "pooler_output", found)
                self._places = sum(x.shape[:-1].numel() for x in (found if isinstance(found, list | tuple) else [found]))
            except Exception as error:                   # whatever such a model does with what it does not expect
                raise DoesNotFit(f"{self.origin.ref} has no processor, and how many tokens an image takes cannot be told without "
                                 f"({str(error)[:200]}). Save it beside the model: processor.save_pretrained(FOLDER).") from error
        return self._places

    # -- text -----------------------------------------------------------------------------------------------------------
    def ask(self, prompt, images, side, tokenizer):
        """(ids before the answer, the text for the processor) of a prompt and its images, uint8 (3, h, w) each."""
        if self.token is not None:                           # where images stand is ours to say
            prompt = prompt.replace(self._mark(tokenizer), " ").strip()
        key = prompt, tuple(tuple(x.shape) for x in images)
        if key not in self._asked:
            self._asked[key] = self._ids(prompt, images, side, tokenizer)
        return self._asked[key]

    def _ids(self, prompt, images, side, tokenizer):
        line = prompt.rstrip() + "\n" if prompt.strip() else ""
        if self.token is None:
            if self.apart:
                return tokenizer(prompt)["input_ids"], None
            t = tokenizer
            start = next(i for i in (self.start, t.bos_token_id, t.cls_token_id, t.eos_token_id) if i is not None)
            return [start, *tokenizer(line, add_special_tokens=False)["input_ids"]], None
        if not self.processor or not images:
            start = [i for i in (self.start if tokenizer.bos_token_id is None else tokenizer.bos_token_id,) if i is not None]
            ids = [self.token] * (len(images) * self.places(side) if images else 0)
            return [*start, *ids, *tokenizer(line, add_special_tokens=False)["input_ids"]], None
        if getattr(self.processor, "chat_template", None):
            said = [{"type": "image"}] * len(images) + [{"type": "text", "text": prompt}] * bool(prompt.strip())
            texts = [self.processor.apply_chat_template([{"role": "user", "content": said}], add_generation_prompt=True)]
        else:                                            # some put the tokens in themselves, others want to be told where
            texts = [line, self._mark(tokenizer) * len(images) + line]
        for text in texts:
            try:
                made = self._run(images, text)
            except Exception as error:
                why = error
                continue
            ids = made["input_ids"][0].tolist()
            kinds = made.get("token_type_ids", torch.zeros(1, len(ids)))[0]
            self.marks = bool((kinds[[i == self.token for i in ids]] == 1).any())
            why = "it puts no image token there"
            if self.token in ids:
                return ids[:-1] if not self.apart and ids[-1] == tokenizer.eos_token_id else ids, text
        raise DoesNotFit(f"The processor of {self.origin.ref} does not take {len(images)} images and a text "
                         f"({str(why)[:200]}). Put the "
                         "model's own processor beside it.")

    def _mark(self, tokenizer):
        mark = getattr(self.processor, "image_token", None) or tokenizer.convert_ids_to_tokens(self.token)
        return getattr(mark, "content", mark)

    def _run(self, images, text):
        from PIL import Image
        given = [Image.fromarray(np.ascontiguousarray(x.permute(1, 2, 0).numpy())) for x in images]
        with zoo.quiet():
            return self.processor(images=given, return_tensors="pt", **({} if text is None else {"text": text}))

    # -- batches --------------------------------------------------------------------------------------------------------
    def see(self, rows, pixels, asking=False):
        """What a batch holds of its images; rows: of each its (album, number)s and text; pixels(keys): without a processor."""
        rows = [r for r in rows if r[0]]
        if not rows:
            return {}
        made = [self._made(keys, text) if self.processor else {"pixel_values": pixels(keys)} for keys, text in rows]
        seen = None if asking and self.own else self._seen(rows, made)
        found = {k: _joined([m[k] for m in made]) for k in made[0] if seen is None or k != "pixel_values"}
        return found if seen is None else found | {"image_features": seen}

    def _made(self, keys, text):
        key = tuple(keys), text if "qformer_input_ids" in self.takes else None
        if key not in self.kept:
            found = self._run([album.look(k) for album, k in keys], text)
            words = found["input_ids"].shape[1] if "input_ids" in found else None
            self.kept[key] = made = {k: v for k, v in found.items() if torch.is_tensor(v) and k in self.takes and k not in (
                "input_ids", "attention_mask", "labels") and (v.dim() != 2 or v.shape[1] != words or k == "qformer_input_ids")}
            self.bytes += sum(v.nbytes for v in made.values())
            while self.bytes > KEPT and len(self.kept) > 1:
                self.bytes -= sum(v.nbytes for v in self.kept.popitem(last=False)[1].values())
        return self.kept[key]

    def told(self, batch):
        """What some want to know of each token: which stand for images, or for the answer (PaliGemma sees no further there)."""
        answer = batch["labels"] != IGNORE if "labels" in batch else torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        marked = {"mm_token_type_ids": batch["input_ids"] == self.token,
                  "token_type_ids": batch["input_ids"] == self.token if self.marks else answer}
        return {k: v.long() for k, v in marked.items() if k in self.takes and self.token is not None and not self.apart}

    def labelled(self, answers, pad):
        """The decoder's side of a batch, where it is apart: shifted by the model, or spelled out."""
        width = max(map(len, answers))
        rows = torch.tensor([[*a] + [IGNORE] * (width - len(a)) for a in answers])
        if self.shifts:
            return {"labels": rows}
        ids = F.pad(torch.where(rows == IGNORE, pad, rows), (1, 0), value=self.start)
        labels = F.pad(rows, (1, 0), value=IGNORE)
        mask = F.pad((rows != IGNORE).long(), (1, 0), value=1)
        return {"decoder_input_ids": ids, "decoder_attention_mask": mask, "labels": labels}

    # -- what frozen eyes see is computed once --------------------------------------------------------------------------
    @contextmanager
    def seeing(self, model, which):
        """Within, batches are for the base model `model`: where it takes what its get_image_features gave, and nothing tunes what
        that runs, they hold it in place of pixels. which: what else the memory depends on."""
        from ..save import fingerprint

        before = self.eyes
        able = GIVEN in self.takes and hasattr(model, "get_image_features")
        self.eyes = model if able and at_hand(model) else None
        if self.eyes is not None:
            which = fingerprint(model), *which
            self.memory = self.memory if self.memory[0] == which else (which, {})
            self.looks = None                            # the modules that look, known from the first batch
        try:
            yield
        finally:
            self.eyes = before

    def _seen(self, rows, made):
        """The image features (B, N, ...) of rows of one image each, made of tensors of one shape; None where it must look."""
        if self.eyes is None or "qformer_input_ids" in made[0] or any(len(keys) > 1 for keys, _ in rows):
            return None
        if any(m[k].shape != made[0][k].shape for m in made for k in m):
            return None
        device, asks = next(self.eyes.parameters()).device, inspect.signature(self.eyes.get_image_features).parameters

        def look(new):
            given = {k: torch.cat([m[k] for m in new]).to(device) for k in new[0] if k in asks}
            given["pixel_values"] = given["pixel_values"].to(next(self.eyes.parameters()).dtype)
            out = self.eyes.get_image_features(**given, return_dict=True)
            self.form = type(out), isinstance(out.pooler_output, list | tuple)
            parts = torch.stack(list(out.pooler_output))     # an image may be several, as tiles or as tokens
            return list(parts.unflatten(0, (len(new), -1)))
        if self.looks is None:
            self.looks = reached(self.eyes, lambda: look(made[:1]))
        if not still(self.eyes, self.looks):
            return None
        with resting(self.looks):
            found = once(self.memory[1], [keys[0] for keys, _ in rows], made, look)
        return torch.stack(found)

    def given(self, batch, writing=False):
        """A batch as the model takes it: in a forward some want to be told that there are no pixels, writing none may be."""
        if "image_features" not in batch:
            return batch
        make, listed = self.form
        x = batch["image_features"].flatten(0, 1)
        return {k: v for k, v in batch.items() if k != "image_features"} | {
            GIVEN: {"image": make(pooler_output=list(x) if listed else x)}} | ({} if writing else {"pixel_values": None})

    # -- answers --------------------------------------------------------------------------------------------------------
    def generate(self, model, batch, most, pad, end):
        """The ids of what it writes, the prompt left out."""
        asked = batch["input_ids"]
        if self.own and self.token is None and not self.apart:         # BLIP's takes a text with its end, and cuts that
            mask = F.pad(batch["attention_mask"], (0, 1), value=1)
            batch = batch | {"input_ids": F.pad(asked, (0, 1), value=end), "attention_mask": mask}
        more = {} if self.own else dict(pad_token_id=pad, eos_token_id=end)
        out = model.generate(**self.given(batch, writing=True), do_sample=False, max_new_tokens=most, **more)
        n = asked.shape[1]
        return out[:, n:] if not self.apart and out.shape[1] >= n and torch.equal(out[:, :n].to(asked), asked) else out

    def fits(self, model, outputs_of, batch):
        """Refuse a processor or a tokenizer that belongs to another model."""
        mine = getattr(self.processor, "image_token_id", None) if self.processor else None
        if None not in (mine, self.token) and mine != self.token:
            raise DoesNotFit(f"The image token of {self.origin.ref}'s processor is {mine}, its model's is {self.token}: they "
                             "do not belong together. Put the model's own processor beside it.")
        try:
            with torch.no_grad():
                outputs_of(model, batch)
        except Exception as error:
            raise DoesNotFit(f"{self.origin.ref} cannot run on what its processor makes of an image and a text "
                             f"({str(error)[:300]}). Put the "
                             "model's own processor and tokenizer beside it.") from error


def _joined(tensors):
    """Of several rows, one after the other; what is smaller is padded with zeros."""
    sizes = [max(s) for s in zip(*(t.shape[1:] for t in tensors), strict=True)]
    return torch.cat([F.pad(t, [p for n, m in zip(reversed(t.shape[1:]), reversed(sizes), strict=True) for p in (0, m - n)])
                      for t in tensors])
