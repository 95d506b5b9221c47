"""tiny-clip: a CLIP of 1.3 million parameters, trained from nothing on procedural scenes.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021. arXiv:2103.00020 §2.3: two towers,
cosine similarities over a learned temperature, cross-entropy both ways. One change: a short caption is true of many pictures of
a batch, so each row's target is spread evenly over everything that is true of it (UniCL, arXiv:2204.03610 eq. 3-4), and truth is
computed, not guessed. Pictures are scenes of one to four shapes with split="seen": the novel pairs of shape and colour are never
shown. As every colour lacks one shape there, shapes would be guessed from colours: from half-way on, a quarter of the pictures is
grey and told by shape and size alone. No other style than these two is ever shown.
"""

import json
import math
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ... import scenes
from ..._compat import torchvision

SIDE, LONGEST = 64, 40                               # pixels; tokens, so that learned contexts have room
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
FRAMES = ("{}", "{}", "a photo of {}", "a photo of {}", "a picture of {}", "an image of {}", "a drawing of {}", "there is {}",
          "this is {}", "we see {}")
JOINS = (" and ", " and ", ", ", " with ", " next to ")
NAMELESS = ("thing", "shape", "object")
SETTINGS = dict(steps=4000, batch=64, lr=1e-3, warmup=300, weight_decay=0.05, grey_from=2000, seed=0, images=1000)


def config():
    from transformers import CLIPConfig

    tower = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, projection_dim=128)
    special = dict(vocab_size=512, pad_token_id=0, bos_token_id=1, eos_token_id=3, max_position_embeddings=LONGEST)
    return CLIPConfig(text_config=tower | special | dict(num_hidden_layers=3), projection_dim=128, architectures=["CLIPModel"],
                      vision_config=tower | dict(image_size=SIDE, patch_size=8))


# -- captions ------------------------------------------------------------------------------------------------------


def phrase(words, draw):
    """("small", None, "circle") -> "a small circle"; the article is left out now and then."""
    size, colour, shape = words
    text = " ".join(w for w in (size, colour, shape or draw.one(NAMELESS)) if w)
    return text if draw.below(4) == 0 else f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def caption(scene, draw):
    """A text that is true of the scene, and what it says: ((size, colour, shape), ...), None where it says nothing."""
    shapes = list(scene.shapes)
    said = []
    for _ in range(min(len(shapes), draw.one((1, 1, 2, 3)))):
        s = shapes.pop(draw.below(len(shapes)))
        keep = draw.one(((0, 1, 1), (0, 1, 1), (1, 1, 1), (1, 1, 1), (1, 0, 1), (0, 0, 1), (0, 1, 0), (1, 0, 0)))
        words = tuple(w if k else None for w, k in zip((s.size, s.colour, s.shape), keep, strict=True))
        said.append(words if any(words) else (None, None, s.shape))
    text = draw.one(FRAMES).format(draw.one(JOINS).join(phrase(w, draw) for w in said))
    return text + ("." if draw.below(3) == 0 else ""), tuple(said)


def true(said, shown):
    """bool (texts, images): whether each thing said can be a shape of its own of the image, by Hall's condition."""
    fits = np.zeros((len(said), len(shown), 4), int)       # bit j: shape j of the image is the k-th thing said
    for t, words in enumerate(said):
        for i, shapes in enumerate(shown):
            for k, w in enumerate(words):
                fits[t, i, k] = sum(1 << j for j, s in enumerate(shapes)
                                    if w[0] in (None, s.size) and w[1] in (None, s.colour) and w[2] in (None, s.shape))
    ones, counts = np.array([bin(b).count("1") for b in range(16)]), np.array([len(w) for w in said])
    found = np.ones(fits.shape[:2], bool)
    for n in range(1, 5):
        for some in combinations(range(4), n):
            union = np.bitwise_or.reduce(fits[:, :, list(some)], 2)
            found &= (ones[union] >= n) | (counts <= max(some))[:, None]
    return found


def tokenizer(folder):
    """Byte-level pairs learned from captions: every word of theirs is one token, and any text can be written."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    special = ["<pad>", "<start>", "<unknown>", "<end>"]
    draw, texts = scenes.Draw("tiny-clip", "tokens"), []
    texts += [caption(scenes.scene(i, 7), draw)[0] for i in range(4000)]
    texts += ["a photo of a nothing, none of these, left of right of above below"] * 50
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=512, special_tokens=special, show_progress=False,
                                                        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    made.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 3)])
    done = PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=LONGEST, **dict(zip(
        ("pad_token", "bos_token", "unk_token", "eos_token"), special, strict=True)))
    done.save_pretrained(folder)
    return done


# -- training ------------------------------------------------------------------------------------------------------


def pixels(images):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W)."""
    return (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255 - MEAN[0]) / STD[0]


def batch(step, size, seed, words, grey=False):
    """Half the pictures show one shape, and with `grey` half of these no colour. -> pixels, tokens and attention mask, target
    (texts, images) of rows that sum to one"""
    draw, shown, said, texts, images = scenes.Draw("tiny-clip", seed, step), [], [], [], []
    for i in range(size):
        s = scenes.scene(step * size + i, seed, SIDE, 1, 1 if i % 2 else 4, "seen")
        if grey and i % 4 == 1:
            images.append(s.image("grey"))
            s = replace(s, shapes=tuple(replace(x, colour=None) for x in s.shapes))
        else:
            images.append(s.image())
        text, things = caption(s, draw)
        shown.append(s.shapes), said.append(things), texts.append(text)
    tokens = words(texts, padding=True, return_tensors="pt")
    return pixels(images), tokens["input_ids"], tokens["attention_mask"], torch.from_numpy(true(said, shown)).float()


def loss(model, x, ids, mask, truth):
    out = model(input_ids=ids, attention_mask=mask, pixel_values=x)
    sides = (out.logits_per_text, truth), (out.logits_per_image, truth.T)
    return sum(F.cross_entropy(logits, t / t.sum(1, keepdim=True)) for logits, t in sides) / 2


def train(out, say=print, **changed):
    """Train it anew into the folder `out`; a checkpoint every 500 steps lets a stopped run go on. Returns the scores."""
    torchvision()
    from transformers import CLIPModel

    given, out = SETTINGS | changed, Path(out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(given["seed"])
    words, model = tokenizer(out), CLIPModel(config())
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=[p for p in model.parameters() if p.dim() > 1]), dict(params=plain, weight_decay=0)]
    optimizer = torch.optim.AdamW(groups, lr=given["lr"], betas=(0.9, 0.98), weight_decay=given["weight_decay"])
    began, first, mean, kept = time.monotonic(), 0, None, out / "checkpoint.pt"
    if kept.exists():
        found = torch.load(kept, weights_only=True)
        model.load_state_dict(found["model"]), optimizer.load_state_dict(found["optimizer"])
        first = found["step"]
    for step in range(first, given["steps"]):
        rise = min(1.0, (step + 1) / given["warmup"])
        for group in optimizer.param_groups:
            group["lr"] = given["lr"] * rise * (0.5 + 0.5 * math.cos(math.pi * step / given["steps"]))
        value = loss(model, *batch(step, given["batch"], given["seed"] + 1, words, step >= given["grey_from"]))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        now = float(value.detach())
        mean = now if mean is None else 0.98 * mean + 0.02 * now
        if (step + 1) % 100 == 0:
            say(f"step {step + 1} of {given['steps']}: loss {mean:.3f}, {time.monotonic() - began:.0f} s")
        if (step + 1) % 500 == 0:
            torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1), kept)
            say(f"  {scores(model, words, 200)}")
    found = scores(model.half().float().eval(), words, given["images"])
    model.half().save_pretrained(out)
    kept.unlink(missing_ok=True)
    (out / "recipe.json").write_text(json.dumps(dict(
        model="tiny-clip", licence="Apache-2.0", data="luthier.scenes, split seen, plain and grey",
        command="luthier zoo train tiny-clip",
        settings=given, torch=torch.__version__, zero_shot=found), indent=1) + "\n", "utf-8")
    return found


# -- what it can do ------------------------------------------------------------------------------------------------


@torch.no_grad()
def scores(model, words, n=1000):
    """Zero-shot accuracy on single shapes: each attribute, seen and novel pairs among all forty, and shape in other styles."""
    pairs = [(s, c) for s in scenes.SHAPES for c in scenes.COLOURS]
    asks = dict(shape=[f"a photo of a {s}" for s in scenes.SHAPES], colour=[f"a photo of a {c} shape" for c in scenes.COLOURS],
                size=[f"a photo of a {s} shape" for s in scenes.SIZES], pair=[f"a photo of a {c} {s}" for s, c in pairs])
    answers = dict(shape=lambda s: scenes.SHAPES.index(s.shape), colour=lambda s: list(scenes.COLOURS).index(s.colour),
                   size=lambda s: list(scenes.SIZES).index(s.size), pair=lambda s: pairs.index((s.shape, s.colour)))
    was, found = model.training, {}
    model.eval()
    for name, split, style, asked in (
            ("", "seen", "plain", asks), ("novel ", "novel", "plain", asks),
            *((f"{style} ", "seen", style, ("shape", "colour")) for style in scenes.STYLES[1:])):
        shown = [scenes.scene(i, 5000, SIDE, 1, 1, split) for i in range(n)]
        x = model.get_image_features(pixels([s.image(style) for s in shown])).pooler_output
        for ask in asked:
            t = model.get_text_features(**words(asks[ask], padding=True, return_tensors="pt")).pooler_output
            said = (x @ F.normalize(t, dim=1).T).argmax(1)
            found[name + ask] = round(float((said == torch.tensor([answers[ask](s.shapes[0]) for s in shown])).float().mean()), 3)
    model.train(was)
    return found
