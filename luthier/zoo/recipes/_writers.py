"""What the recipes of models that see and write share: rows for pretraining, a tokenizer, the training, and the scores.

A model starts from tiny-clip's eyes, of which the last two blocks train along, a small language model with random weights and a
connector. It learns, as VL-T5 does (Cho et al., 2021. arXiv:2102.02779 §3.2), generic tasks told apart by the first word of the
prompt, on scenes of one to four shapes with split="seen", where novel pairs of shape and colour are neither shown nor told:

    caption:  something that is true of the picture            all:      every shape, row by row
    layout:   every shape and where it stands                  counts:   how many of each shape, or of each colour
    relation: how two shapes stand to each other               region:   what is in a box x0 y0 x1 y1 (32 steps a side)
    match:    whether a text fits the picture, or differs      boxes:    every shape, of one colour, or of one form, with its box
    fill:     the words that are left out of a text

"all:" is also asked of two or three pictures, "fill:" also without one: of texts about scenes and of the crowd-written sentences
in the training part of NLVR (Suhr et al., 2017; CC BY 4.0; no picture or answer of it is shown). What the tasks on scenes ask
(questions, true or false, where the shape of a full name is, a description from left to right) is never asked here.
"""

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ... import scenes, tasks, zoo
from ..._compat import torchvision
from ...bridges import bridge
from ...tasks import metrics
from ...tasks.imagetext import Album, ImageToText
from ...tasks.pictures import crowd
from ...tasks.read import Table
from .tiny_clip import caption, true

SIDE, LONGEST, WORDS, HOLES = 64, 512, 1024, 4
WAY = "limber(dropout=0.0, grid=4)"
SPECIAL = ["<pad>", "</s>", "<unk>", "<s>", *(f"<extra_id_{k}>" for k in range(HOLES))]
KINDS = ("caption",) * 3 + ("all",) * 4 + ("layout",) * 2 + ("counts",) * 2 + ("relation",) * 2 + ("region",) * 4 + (
    "match",) * 4 + ("fill",) * 2 + ("boxes",) * 8
NUMBERS, PANELS = ("no", "one", "two", "three", "four"), ("first", "second", "third")
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
SETTINGS = dict(steps=3000, batch=64, lr=1e-3, eyes=5e-4, warmup=150, weight_decay=0.01, seed=0, images=200)


# -- texts ----------------------------------------------------------------------------------------------------------


def place(s):
    return int(s.y * 3) * 3 + int(s.x * 3)


def listed(said):
    *rest, last = said
    return f"{', '.join(rest)} and {last}" if rest else last


def everything(s):
    return listed([f"a {x.name}" for x in sorted(s.shapes, key=place)])


def layout(s):
    return ", ".join(f"{PLACES[place(x)]}: {x.colour} {x.shape}" for x in sorted(s.shapes, key=place))


def box(s, k):
    return " ".join(map(str, replace(s, size=32).boxes()[k]))


def boxes(s, which=""):
    """which: a colour, a form, or all."""
    found = sorted(range(len(s.shapes)), key=lambda k: place(s.shapes[k]))
    return ", ".join(f"{s.shapes[k].name} {box(s, k)}" for k in found if which in ("", s.shapes[k].colour, s.shapes[k].shape))


def counts(s, what):
    """what: "shape" or "colour"."""
    found = [getattr(x, what) for x in s.shapes]
    names = [n for n in (scenes.SHAPES if what == "shape" else scenes.COLOURS) if n in found]
    return listed([f"{NUMBERS[k]} {(scenes.plural(n) if k > 1 else n) if what == 'shape' else n}"
                   for n in names if (k := found.count(n))])


def relation(s, draw):
    a, b = s.shapes[0], s.shapes[1 + draw.below(len(s.shapes) - 1)]
    dx, dy = b.x - a.x, b.y - a.y
    how = ("left of" if dx > 0 else "right of") if abs(dx) > abs(dy) else "above" if dy > 0 else "below"
    return f"a {a.colour} {a.shape} {how} a {b.colour} {b.shape}"


def holes(text, draw):
    """T5's corruption, by words (Raffel et al., 2020. arXiv:1910.10683 §3.1.4): the text with holes of one or two words, and
    what stood in them."""
    words, ask, said, k, i = text.split(), [], [], 0, 0
    least = draw.below(len(words))                       # one hole at least
    while i < len(words):
        if k < HOLES and (i == least or draw.random() < 0.2):
            n, mark = 1 + draw.below(2), SPECIAL[4 + k]
            ask, said, k, i = [*ask, mark], [*said, mark, *words[i:i + n]], k + 1, i + n
        else:
            ask, i = [*ask, words[i]], i + 1
    return " ".join(ask), " ".join(said)


def unlike(s, draw):
    """The scene with one shape's size, colour or shape changed, to a pair that is not novel."""
    while True:
        k, what = draw.below(len(s.shapes)), draw.one(("shape", "colour", "size"))
        options = [v for v in {"shape": scenes.SHAPES, "colour": list(scenes.COLOURS), "size": list(scenes.SIZES)}[what]
                   if v != getattr(s.shapes[k], what)]
        x = replace(s.shapes[k], **{what: draw.one(options)})
        if not scenes.novel(x.shape, x.colour):
            return replace(s, shapes=(*s.shapes[:k], x, *s.shapes[k + 1:]))


def match(s, draw):
    wanted = draw.below(2)
    for _ in range(8):
        text, said = caption(s if wanted else unlike(s, draw), draw)
        if bool(true([said], [s.shapes])[0, 0]) == bool(wanted):
            break
    else:
        wanted = 1 - wanted
    return f"match: {text}", "fits" if wanted else "differs"


def about(kind, s, draw):
    """(prompt, response) of a scene."""
    if kind == "relation" and len(s.shapes) < 2:
        kind = "layout"
    if kind == "match":
        return match(s, draw)
    if kind == "region":
        k = draw.below(len(s.shapes))
        return f"region: {box(s, k)}", f"a {s.shapes[k].name}"
    if kind == "boxes":
        x = draw.one(s.shapes)
        which = draw.one(("", x.colour, x.shape))
        return f"boxes: {which}".strip(), boxes(s, which)
    if kind == "counts":
        what = draw.one(("shape", "colour"))
        return f"counts: {what}", counts(s, what)
    if kind == "fill":
        ask, said = holes(draw.one((everything, layout, lambda s: caption(s, draw)[0]))(s), draw)
        return f"fill: {ask}", said
    text = {"caption": lambda: caption(s, draw)[0], "all": lambda: everything(s), "layout": lambda: layout(s),
            "relation": lambda: relation(s, draw)}[kind]()
    return f"{kind}:", text


def sentences():
    """What crowds wrote about the training pictures of NLVR."""
    return [t.removesuffix(" True or false?") for t in crowd(0).splits["train"].columns["prompt"]]


def statement(i, seed, draw, crowds):
    """A text about some scene, or of NLVR's crowds."""
    s = scenes.scene(i, seed, SIDE, 1, 4, "seen")
    return draw.one((lambda: draw.one(crowds), lambda: draw.one(crowds), lambda: everything(s), lambda: layout(s),
                     lambda: caption(s, draw)[0], lambda: draw.one(s.questions()).question))()


def tokenizer(folder, apart, crowds):
    """Byte-level pairs learned from such texts; one vocabulary for both kinds of model."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made, draw = Tokenizer(models.BPE()), scenes.Draw("writers", "tokens")
    holes = [AddedToken(t, lstrip=True) for t in SPECIAL[4:]]
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    texts = [*crowds, *(" ".join(about(KINDS[i % len(KINDS)], scenes.scene(i, 7, SIDE), draw)) for i in range(4000)),
             *(statement(i, 8, draw, crowds) for i in range(2000))]
    texts += [" ".join(map(str, range(65))), "yes no true false True False Yes No fits differs moves left right up down first "
              "then second third picture pictures describe Describe where Where which Which way"] * 60
    made.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=SPECIAL[:4] + holes, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    made.post_processor = processors.TemplateProcessing(single="$A </s>" if apart else "<s> $A",
                                                        special_tokens=[("</s>", 1), ("<s>", 3)])
    done = PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=LONGEST, pad_token="<pad>", eos_token="</s>",
                                   unk_token="<unk>", additional_special_tokens=holes,
                                   **({} if apart else {"bos_token": "<s>"}))
    done.save_pretrained(folder)
    return done


# -- rows -----------------------------------------------------------------------------------------------------------


def rows(step, size, seed, crowds, apart):
    """(what they are, their rows) of one step: most often single pictures, then several, then none."""
    draw = scenes.Draw("writers", seed, step)
    what = ("panels", "text", "one", "one", "one", "text", "one", "one", "one", "one")[step % 10]

    def drawn(i, most=4):
        return scenes.scene(i, seed, draw.one((SIDE // 2, SIDE)), 1, most, "seen")

    found = []
    for i in range(step * size * 3, step * size * 3 + (size * 3 // 8 if what == "panels" else size)):
        if what == "one":
            s = drawn(i)
            ask, said = about(draw.one(KINDS), s, draw)
            pictures = [s.image()]
        elif what == "panels":
            shown = [drawn(3 * i + k, 2) for k in range(2 + draw.below(2))]
            ask, pictures = "all:", [s.image() for s in shown]
            said = "; ".join(f"{n}: {everything(s)}" for n, s in zip(PANELS, shown, strict=False))
        else:
            text, pictures = statement(i, seed, draw, crowds), []
            ask, said = holes(text, draw) if apart or draw.below(2) else ("", text)
            ask = f"fill: {ask}" if ask else ""
        found.append((pictures, ask, said))
    return what, found


BLANK = np.zeros((SIDE, SIDE, 3), np.uint8)


def coded(task, found):
    """Rows as the task of every image-text model reads them."""
    columns = dict(image=[p or [BLANK] for p, _, _ in found], prompt=[a for _, a, _ in found], response=[r for *_, r in found])
    return task.encode(Table(columns, "scenes", None, "row"), Album(SIDE))


def batch(task, step, size, seed, crowds):
    what, found = rows(step, size, seed, crowds, task.apart)
    made = task.collate(coded(task, found))
    if what == "text":
        made.pop("pixel_values")
    return made


# -- training -------------------------------------------------------------------------------------------------------


def made(out, language, apart, crowds, seed):
    """The model, untrained but for its eyes; its tokenizer lies in out/language already."""
    torchvision()
    eyes = zoo.load("tiny-clip")
    vision = eyes.vision_model
    vision.config.architectures = ["CLIPVisionModel"]
    vision.luthier_origin = replace(eyes.luthier_origin, kind="vision", folder="")
    tokenizer(out / "language", apart, crowds)
    torch.manual_seed(seed)
    pen = language()
    pen.luthier_origin = zoo.Origin("language", "text-pair" if apart else "text-decoder", "Apache-2.0",
                                    str(out / "language"), longest=LONGEST)
    return bridge(vision, pen, WAY, seed=seed)


def task_of(model):
    return ImageToText(model, source="pretraining", roles=dict(image="image", prompt="prompt", response="response"),
                       image_size=SIDE)


def train(name, language, apart, out, say=print, **changed):
    """Train it anew into the folder `out`; a checkpoint every 200 steps lets a stopped run go on. Returns the scores."""
    given, out = SETTINGS | changed, Path(out)
    out.mkdir(parents=True, exist_ok=True)
    crowds = sentences()
    model = made(out, language, apart, crowds, given["seed"])
    task, stack = task_of(model), model.vision.encoder.layers
    model.vision.requires_grad_(False)
    stack[len(stack) // 2:].requires_grad_(True)
    theirs = [p for p in model.vision.parameters() if p.requires_grad]
    own = [*model.language.parameters(), *model.connector.parameters()]
    groups = [dict(params=own, top=given["lr"]), dict(params=theirs, top=given["eyes"])]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=given["weight_decay"])
    began, first, mean, kept = time.monotonic(), 0, None, out / "checkpoint.pt"
    if kept.exists():
        found = torch.load(kept, weights_only=True)
        model.load_state_dict(found["model"]), optimizer.load_state_dict(found["optimizer"])
        first = found["step"]
    model.train()
    for step in range(first, given["steps"]):
        rise = min(1.0, (step + 1) / given["warmup"])
        for group in optimizer.param_groups:
            group["lr"] = group["top"] * rise * (0.5 + 0.5 * math.cos(math.pi * step / given["steps"]))
        value = task.loss(model, batch(task, step, given["batch"], given["seed"] + 1, crowds))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_([*own, *theirs], 1.0)
        optimizer.step()
        now = float(value.detach())
        mean = now if mean is None else 0.98 * mean + 0.02 * now
        if (step + 1) % 100 == 0:
            say(f"step {step + 1} of {given['steps']}: loss {mean:.3f}, {time.monotonic() - began:.0f} s")
        if (step + 1) % 200 == 0:
            partial = out / "checkpoint.part"
            torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1), partial)
            partial.replace(kept)
        if (step + 1) % 800 == 0:
            say(f"  {scores(model, 40)}")
    model = model.half().float().eval()
    model.requires_grad_(True)
    found = scores(model, given["images"]) | downstream(model, given["images"])
    model.half().write(out)
    kept.unlink(missing_ok=True)
    (out / "recipe.json").write_text(json.dumps(dict(
        model=name, licence="Apache-2.0", data="luthier.scenes, split seen; the training sentences of NLVR (Suhr et al., 2017, "
        "CC BY 4.0), without pictures and answers", command=f"luthier zoo train {name}", settings=given, torch=torch.__version__,
        scores=found), indent=1) + "\n", "utf-8")
    return found


# -- what it can do -------------------------------------------------------------------------------------------------


def scores(model, n=200):
    """On new scenes of seen pairs, and of which one pair at least is novel: BLEU and exact share of "all:", exact shares of what
    has one right answer, and of "match:"; of "boxes:" the share of first boxes that overlap the true one by half (IoU)."""
    task, was, found = task_of(model), model.training, {}
    model.eval()
    for name, split in (("", "seen"), ("novel ", "novel")):
        for kind in ("all", "layout", "counts", "region", "match", "boxes"):
            draw, asked = scenes.Draw("scores", kind), []
            for i in range(n):
                s = scenes.scene(i, 6000, SIDE // 2, 1, 4, split)
                asked.append(([s.image()], *about(kind, s, draw)))
            task.longest_answer = 48
            said, right = task.said(model, coded(task, asked), 50), [[r] for *_, r in asked]
            if kind == "all":
                found[f"{name}caption BLEU"] = round(metrics.bleu(said, right), 3)
            found[name + kind] = round((metrics.acc_iou if kind == "boxes" else metrics.exact)(said, right), 3)
    model.train(was)
    return found


def downstream(model, n=200):
    """Without any tuning, on the tasks that it is meant to be tuned on."""
    task = tasks.open("scenes:multitask", model=model, limit=dict(train=40, val=40, test=n))
    found = task.evaluate(model, "test", 50)
    return {f"untuned {k}": round(float(found[k]), 3) for k in task.kinds}
