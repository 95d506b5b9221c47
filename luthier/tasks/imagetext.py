"""Images and a text in, a text out: captions, questions, true or false of several pictures, places, clips. A row has an image or
a list of them, a prompt if anything is asked, the response, and, where a file holds several tasks, which one it is.

What is done to a row that is not plain: grey, CMYK and transparent images become RGB, of an animated one the first frame is
used, huge ones are made smaller, a number as a response is written out, a prompt that is too long loses its beginning and a
response its end; each is counted in the notes. A row whose image is missing or broken or whose response is empty is left out and
counted, and the data is refused when that is more than one row in a hundred."""

import base64
import io
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch

from .. import zoo
from ..attach import Tuned, base_of
from ..errors import BadData, DoesNotFit, nearest
from ..still import at_hand, once
from . import metrics
from .base import to_device
from .cider import cider
from .classify import IGNORE
from .hub import Hub, writes
from .image import BUDGET, ImageClassification, decode, resize
from .lm import Language
from .read import Table
from .split import order

SCORES = {"accuracy": metrics.exact, "bleu": metrics.bleu, "cider": cider, "acc_iou": metrics.acc_iou}
ROW_KINDS = {"caption": "bleu", "vqa": "accuracy", "nlvr": "accuracy", "ground": "acc_iou", "clip": "accuracy",
             "direction": "accuracy", "order": "accuracy"}


class Rows(dict):
    """A batch whose rows are of one kind."""
    kind = None


class Album:
    """Images, each once: decoded at the first look, kept while the budget lasts."""

    def __init__(self, side):
        self.side, self.items, self.number, self.kept, self.bytes = side, [], {}, {}, 0

    def add(self, item, base="."):
        key = (str(base), item) if isinstance(item, str | bytes) else id(item)
        if key not in self.number:
            self.number[key] = len(self.items)
            self.items.append((item, base))
        return self.number[key]

    def look(self, k, told=None):
        image = self.kept.get(k)
        if image is None:
            image = decode(self.items[k][0], self.side, self.items[k][1], told)
            if self.bytes + image.numel() <= BUDGET:
                self.kept[k], self.bytes = image, self.bytes + image.numel()
        return image


class ImageToText(Language):
    kind = "image-to-text"
    reads = ("image-text",)
    small = 100
    metrics = (*SCORES, "average")
    higher = True
    longest = 128
    asks = "prompt"                                  # the role of what is asked of an image
    what, one, form = "image", "an image", "a path to a PNG or JPEG, its bytes, or an array (H, W, 3)"

    def __init__(self, model=None, *, metric=None, **more):
        super().__init__(model, metric=metric, **more)
        self.asked, self.kinds, self.longest_answer, self.words = metric, (), 64, None
        self.eyes, self.memory, self.albums = None, (None, {}), {}
        self.taken = 0                                   # places of the language model that an image takes, where these are few
        self.hub = Hub(model, self.origin) if self.origin and self.origin.kind not in (*self.reads, "other") else None

    def can_read(self):
        return super().can_read() or writes(self.model, self.origin) is not None

    @property
    def tokenizer(self):
        if self.hub and self._tokenizer is None:
            self._tokenizer = self.hub.tokenizer()
        return super().tokenizer

    side, base, fitting_size = ImageClassification.side, ImageClassification.base, ImageClassification.fitting_size

    # -- rows ---------------------------------------------------------------------------------------------------------
    def strata(self, table):
        return list(map(str, self.column(table, "task"))) if "task" in self.roles else [0] * len(table)

    def check(self, table):
        kinds = self.column(table, "task") if "task" in self.roles else ()
        bad = [i for i, kind in enumerate(kinds) if not isinstance(kind, str) or kind not in ROW_KINDS]
        for i in bad[:1]:
            kind = kinds[i]
            if self.too_many(len(bad), table):
                raise BadData(f"{table.where(i)}: there is no task {kind!r}. {nearest(kind, ROW_KINDS)} The column "
                              f"{self.roles['task']!r} may hold {', '.join(ROW_KINDS)}. If it means something else, rename it.")
            self.notes.append(f"{len(bad)} rows that cannot be used are left out; {table.where(i)}: there is no task {kind!r}")
            kept = table.take(sorted(set(range(len(table))) - set(bad)))
            table.columns, table.lines = kept.columns, kept.lines

    def learn(self, data):
        train = self.tables["train"]
        if "task" in self.roles:
            here = set(self.column(train, "task"))
            self.kinds = tuple(k for k in ROW_KINDS if k in here)
        if self.asked is None:
            self.metric = "average" if len(self.kinds) > 1 else ROW_KINDS[self.kinds[0]] if self.kinds else \
                "accuracy" if "prompt" in self.roles else "bleu"
        if "bleu" in {self.metric, *(ROW_KINDS[k] for k in self.kinds if self.metric == "average")}:
            metrics.sacrebleu()                      # asked for before anything is trained
        if self.origin:
            self.options["image_size"] = self.options.get("image_size") or self.fitting_size()
            texts = [a for several in self.answers(train) for a in several[:1]]
            coded = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
            self.longest_answer = min(self.max_length, 1 + max(map(len, coded), default=63))
            self.words = torch.bincount(torch.tensor([i for ids in coded for i in ids], dtype=torch.long))

    def limit(self, name, most, seed):
        super().limit(name, most, seed)
        self.tables[name] = self.readable(self.tables[name])

    def answers(self, table):
        """The responses of every row: one, or several that are equally right; none where one is empty or no text."""
        def text(v):
            return str(v).strip() if isinstance(v, str | int | float) and not isinstance(v, bool) and v == v else ""
        rows = [v if isinstance(v, list | tuple) else [v] for v in self.column(table, "response")]
        return [texts if all(texts := [text(v) for v in row]) else [] for row in rows]

    def shown(self, table, album):
        """The places in the album of the images of every row."""
        def real(x):
            return x is not None and not (isinstance(x, str) and not x.strip())
        rows, base = self.column(table, "image"), self.base(table)
        return [[album.add(x, base) for x in (v if isinstance(v, list | tuple) else [v]) if real(x)] for v in rows]

    def readable(self, table):
        """The table without rows that cannot be used; refused when they are more than UNREADABLE of all."""
        bad, told, album = {}, Counter(), self.album
        asked, kinds = (self.column(table, r) if r in self.roles else [None] * len(table) for r in ("prompt", "task"))
        for i, (shown, answers) in enumerate(zip(self.shown(table, album), self.answers(table), strict=True)):
            if isinstance(asked[i], list | tuple | dict | bytes):
                bad[i] = f"the prompt (column {self.roles['prompt']!r}) is no text"
                continue
            if not shown or not answers:
                bad[i] = f"the response (column {self.roles['response']!r}) is empty or no text" if shown else \
                    f"no {self.what} is named (column {self.roles['image']!r})"
                continue
            if ROW_KINDS.get(kinds[i], self.metric) == "acc_iou" and None in map(metrics.box, answers):
                bad[i] = f"the response (column {self.roles['response']!r}) is no box, which has four numbers"
                continue
            try:
                self.few(shown)
                for k in shown:
                    album.look(k, told)
            except Exception as error:               # Pillow raises whatever its decoders do
                bad[i] = f"the {self.what} cannot be read ({str(error)[:160] or type(error).__name__})"
        self.notes += [f"{n:,} {self.what}s are {what}" for what, n in told.items()]
        return self.without(table, bad)

    def few(self, shown):
        if self.hub and self.hub.token is None and len(shown) > 1:
            raise ValueError(f"the row has {len(shown)} images, and this model looks at one")

    @property
    def album(self):
        return self.albums.setdefault(self.side, self.new_album())

    def new_album(self):
        return Album(self.side)

    # -- tokens -------------------------------------------------------------------------------------------------------
    @property
    def apart(self):
        """Whether an encoder reads the prompt and a decoder writes the response."""
        return self.hub.apart if self.hub else bool(self.origin.parts) and self.origin.parts[-1].kind == "text-pair"

    @property
    def alike(self):
        """Whether prompts of one batch must be of one length: BLIP's decoder looks at padding, too (transformers 5)."""
        return bool(self.hub) and self.hub.own and self.apart and self.hub.token is None

    def end(self):
        """The ids that end an answer."""
        t = self.tokenizer
        return [i for i in [t.sep_token_id if t.eos_token_id is None else t.eos_token_id] if i is not None]

    def ask(self, prompt):
        """Ids of what stands before the answer."""
        if self.apart:
            return self.tokenizer(prompt)["input_ids"] or [self.pad_id()]
        start = next(i for i in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.pad_id()) if i is not None)
        return [start] + (self.ids(prompt.rstrip() + "\n") if prompt.strip() else [])

    def encode(self, table, album=None):
        end, n, cut, rows = self.end(), 0, 0, []
        album, nothing = album or self.album, [None] * len(table)
        prompts, kinds = (self.column(table, r) if r in self.roles else nothing for r in ("prompt", "task"))
        answers = self.answers(table) if self.roles["response"] in table.columns else [[""]] * len(table)
        for shown, prompt, kind, right in zip(self.shown(table, album), prompts, kinds, answers, strict=True):
            prompt, answer, row = "" if prompt is None or prompt != prompt else str(prompt), self.ids(right[0]) + end, {}
            ask, n = self.ids(prompt) if self.hub else self.ask(prompt), self.places(shown)
            cut += len(ask) + len(answer) > n
            answer = answer[:max(n // 2, n - len(ask))]
            if self.hub:                                 # image tokens stand among the words: the words are what is cut
                if len(ask) > n - len(answer):
                    prompt = self.tokenizer.decode(ask[len(ask) + len(answer) - n:])
                ask, row["text"] = self.hub.ask(prompt, [album.look(k) for k in shown], self.side, self.tokenizer)
            else:
                ask = ask[-(n - len(answer)):]
            rows.append(row | dict(ask=ask, answer=answer, answers=right, kind=kind, pictures=(album, shown)))
        if cut:
            self.notes.append(f"{table.source}: {cut:,} of {len(rows):,} rows are longer than {n:,} tokens and were cut")
        return rows

    def places(self, shown):
        """How many tokens of text the model has places for beside these images."""
        left = self.origin.longest - self.taken * len(shown)
        if left < 16 <= self.origin.longest:
            raise BadData(f"A row has {len(shown)} {self.what}s, which take {self.taken * len(shown)} of the "
                          f"{self.origin.longest} places of the language model. Give fewer, or use a way with fewer tokens, such "
                          "as limber(tokens=4).")
        return min(self.max_length, left)

    def length(self, example):
        return len(example["ask"]) + len(example["answer"])

    # -- batches: where rows are of several kinds, each is of one --------------------------------------------------------
    def _of_kinds(self, examples, alike=False):
        """The rows of each kind; alike: of each length of prompt, for models that are not to meet padding there."""
        kinds, found = [(e["kind"], alike and len(e["ask"])) for e in examples], {}
        for i, kind in enumerate(kinds):
            found.setdefault(kind, []).append(i)
        return list(found.values())

    def batches(self, split, size, seed=0, epoch=0, shuffle=None, start=0):
        examples, shuffle, plan = self.examples(split), split == "train" if shuffle is None else shuffle, []
        for mine in self._of_kinds(examples, self.alike):
            cut = order(len(mine), size, seed, epoch, shuffle, lambda i, mine=mine: self.length(examples[mine[i]]))
            plan += [[mine[i] for i in part] for part in cut]
        if shuffle and (len(self.kinds) > 1 or self.alike):
            g = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
            plan = [plan[i] for i in torch.randperm(len(plan), generator=g)]
        for part in plan[start:]:
            yield self.collate([examples[i] for i in part])

    def n_batches(self, split, size):
        return sum(-(-len(mine) // size) for mine in self._of_kinds(self.examples(split), self.alike))

    def plan(self, examples, batch_size, alike=False):
        found = []
        for mine in self._of_kinds(examples, alike or self.alike):
            mine = sorted(mine, key=lambda i: self.length(examples[i]))
            found += [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]
        return found

    def collate(self, examples, asking=False):
        """Rows padded on the right, a decoder's with the answer behind the prompt; for generation (asking) the prompts alone, a
        decoder's padded on the left."""
        rows = [e["ask"] if asking or self.apart else e["ask"] + e["answer"] for e in examples]
        batch = Rows(input_ids=_padded(rows, self.pad_id(), left := asking and not self.apart),
                     attention_mask=_padded([[1] * len(r) for r in rows], 0, left), **self.images(examples, asking))
        batch.kind = examples[0]["kind"]
        if not asking:
            labels = [e["answer"] if self.apart else [IGNORE] * len(e["ask"]) + e["answer"] for e in examples]
            spelled = self.hub and self.apart
            batch.update(self.hub.labelled(labels, self.pad_id()) if spelled else dict(labels=_padded(labels, IGNORE)))
        if self.hub:
            batch.update(self.hub.told(batch))
        return batch

    def images(self, examples, asking=False):
        """pixel_values (B, 3, S, S) or (B, N, 3, S, S) with image_mask; or what frozen eyes saw of them, image_states."""
        rows = [[(album, k) for k in shown] for album, shown in (e["pictures"] for e in examples)]
        if self.hub:
            return self.hub.see(list(zip(rows, (e["text"] for e in examples), strict=True)), self.pixels, asking)
        most, more = max(map(len, rows)), {}
        if any(len(row) < most for row in rows):
            more["image_mask"] = torch.tensor([[1] * len(row) + [0] * (most - len(row)) for row in rows])
        keys = [row[min(n, len(row) - 1)] for row in rows for n in range(most)]
        if self.eyes is not None:
            return dict(image_states=self.seen(keys).unflatten(0, (len(rows), most))) | more
        x = self.pixels(keys)
        return dict(pixel_values=x if most == 1 else x.unflatten(0, (len(rows), most))) | more

    def pixels(self, keys):
        x = torch.cat([resize(album.look(k)[None], self.side) for album, k in keys])
        mean, std = (torch.tensor(self.origin.image.get(k, (0.5,) * 3)).view(1, 3, 1, 1) * 255 for k in ("mean", "std"))
        return (x - mean) / std

    # -- what frozen eyes see is computed once an image -------------------------------------------------------------------
    @contextmanager
    def seeing(self, model):
        """Within, batches are for `model`: where nothing tunes its eyes, they hold what these see in place of pixels."""
        from ..save import fingerprint

        base, before = base_of(model), self.eyes
        self.eyes = base if hasattr(base, "still") and at_hand(base) and base.still() else None
        if self.eyes is not None:
            which = fingerprint(base.vision), repr(base.way), self.side, str(next(base.parameters()).device)
            self.memory = self.memory if self.memory[0] == which else (which, {})
        try:
            with self.hub.seeing(base, (self.side,)) if self.hub else nullcontext():
                yield self
        finally:
            self.eyes = before

    def seen(self, keys):
        device = next(self.eyes.parameters()).device
        return torch.stack(once(self.memory[1], keys, keys, lambda new: self.eyes.see(self.pixels(new).to(device))[:, 0]))

    # -- the model ------------------------------------------------------------------------------------------------------
    def build(self, seed=0, dtype=None):
        """The model; what a bridge starts untrained depends on `seed`."""
        if self.model is None:
            raise BadData("This task has no model to build on. Open it with model=, e.g. model=\"dinov2-s+smollm2-135m\".")
        model = zoo.load(self.model, dtype)
        words, rows = len(self.tokenizer), (model if self.hub else model.language).get_input_embeddings().num_embeddings
        if words > rows:
            raise DoesNotFit(f"The tokenizer of {self.origin.ref} has {words:,} words, its model {rows:,} embeddings: they do "
                             "not belong together. Put the model's own tokenizer beside it.")
        if self.hub:
            table = self.rows(np.zeros((self.side, self.side, 3), np.uint8))
            self.hub.fits(model, self.outputs_of, self.collate(self.encode(table, Album(self.side))))
            return model
        model, taken = model.draw(seed), 0
        try:
            if model.numbered or self.options.get("image_size"):
                with torch.no_grad():
                    states = model.see(model.blank(side=self.side))
                taken = model.taken(states) if model.numbered else 0
        except RuntimeError as error:
            raise DoesNotFit(f"image_size={self.side}: {self.origin.ref} cannot look at images of that size "
                             f"({str(error)[:160]}). Leave it out, or take a larger one.") from error
        if taken != self.taken:
            self.taken, self._encoded = taken, {}
        if taken > self.origin.longest - 16:
            raise DoesNotFit(f"{self.origin.ref}: {self.one} takes {taken} of the {self.origin.longest} places of the language "
                             "model, which leaves too few for text. Use a way with fewer tokens, such as limber(tokens=4), or a "
                             "language model that reads longer texts.")
        return model

    def loss(self, model, batch):
        """The text's own, and what the bridge's way adds."""
        out, base = self.outputs_of(model, batch), base_of(model)
        total, n = self.nll_of(out, batch)
        more = base.objective(out, batch["labels"].to(total.device), self.words) if getattr(base, "has_loss", False) else 0.0
        return total / max(n, 1) + more

    def nll(self, model, batch):
        return self.nll_of(self.outputs_of(model, batch), batch)

    def nll_of(self, out, batch):
        labels, logits = batch["labels"], out.get("logits")
        if logits is None:                               # it gives its own loss alone: the mean over all labels but the first
            n = int((labels[:, 1:] != IGNORE).sum())
            return out["loss"] * n, n
        logits = logits if self.apart else logits[:, -labels.shape[1]:]
        return self.chosen(logits, labels) if self.apart else self.chosen(logits[:, :-1], labels[:, 1:])

    def logits(self, model, batch):
        out = self.outputs_of(model, batch)
        return out["logits"] if "logits" in out else out["loss"]

    def outputs_of(self, model, batch):
        self.tell(model, batch)
        given = to_device({k: v for k, v in batch.items() if k != "labels" or self.apart}, model)
        return model(**(self.hub.given(given) if self.hub else given))

    def tell(self, model, batch):
        """Methods that make their state from a context learn which kind of task a batch is."""
        if isinstance(model, Tuned):
            model.context = dict(model.context, task=getattr(batch, "kind", None))

    # -- answers --------------------------------------------------------------------------------------------------------
    def said(self, model, examples, batch_size):
        """What the model answers to each, greedily."""
        found, was = [None] * len(examples), model.training
        model.eval()
        try:
            for part in self.plan(examples, batch_size, alike=bool(self.hub) and self.hub.own):
                batch = self.collate([examples[i] for i in part], asking=True)
                if hasattr(model, "serve_rows"):     # a rack: each row has its own adapter
                    model.serve_rows(part)
                self.tell(model, batch)
                with torch.no_grad():
                    out = self.written(model, to_device(batch, model), max(len(examples[i]["pictures"][1]) for i in part))
                for i, ids in zip(part, out, strict=True):
                    found[i] = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        finally:
            model.train(was)
        return found

    def written(self, model, batch, most=1):
        """The ids of what is written after the prompts; most: images in a row."""
        if self.hub:
            return self.hub.generate(model, batch, self.longest_answer, self.pad_id(), *self.end())
        most = self.longest_answer if self.apart or not self.taken else max(1, min(
            self.longest_answer, self.origin.longest - self.taken * most - batch["input_ids"].shape[1]))
        out = model.generate(**batch, do_sample=False, max_new_tokens=most, pad_token_id=self.pad_id(),
                             eos_token_id=self.tokenizer.eos_token_id)
        return out if self.apart else out[:, batch["input_ids"].shape[1]:]

    def evaluate(self, model, split="test", batch_size=32):
        with self.seeing(model):
            return super().evaluate(model, split, batch_size)

    def score(self, model, examples, batch_size):
        """The metric; of several kinds of rows each kind's own, and their average."""
        total, count = self.summed(model, examples, batch_size)
        said, scores = self.said(model, examples, batch_size), {}

        def of(rows, metric):
            return SCORES[metric]([said[i] for i in rows], [examples[i]["answers"] for i in rows])

        if self.metric == "average" or len(self.kinds) > 1:
            kinds = {examples[mine[0]]["kind"]: mine for mine in self._of_kinds(examples)}
            each = {k or "accuracy": of(mine, ROW_KINDS.get(k, "accuracy")) for k, mine in kinds.items()}
            scores = {"average": sum(each.values()) / len(each)} | each
        if self.metric not in scores:
            scores[self.metric] = of(range(len(examples)), self.metric)
        told = [i for i, e in enumerate(examples) if (e["kind"] or self.metric) in ("caption", "bleu")]
        if told and "cider" not in scores:
            scores["cider"] = of(told, "cider")          # of captions both are told
        return scores | {"loss": total / count, "n": len(examples)}

    def each(self):
        return {k: ROW_KINDS[k] for k in self.kinds} if len(self.kinds) > 1 else {}

    def samples(self, n=8):
        """[{"kind", "prompt", "answers", "images": PNG files as text}] of up to n test rows, of every kind alike."""
        table, found = self.tables["test"], []
        kinds, prompts = (self.column(table, r) if r in self.roles else [None] * len(table) for r in ("task", "prompt"))
        shown, answers = self.shown(table, self.album), self.answers(table)
        for i in self._spread(kinds, n):
            found.append(dict(row=i, kind=kinds[i], prompt=None if prompts[i] is None else str(prompts[i]), answers=answers[i],
                              images=[png(self.album.items[k][0], self.album.items[k][1]) for k in shown[i]]))
        return found

    def _spread(self, kinds, n):
        """The first places of every kind, n in all."""
        each = [[i for i, k in enumerate(kinds) if k == kind] for kind in dict.fromkeys(kinds)]
        return sorted(i for mine in each for i in mine[:-(-n // len(each))])[:n]

    def tried(self, model, rows, batch_size=8):
        """[(the model's answer, whether it is right)] to each of samples(); a text is right where it is the true one."""
        examples = [self.examples("test")[r["row"]] for r in rows]
        placed = {k for k in [*ROW_KINDS, None] if ROW_KINDS.get(k, self.metric) == "acc_iou"}
        metric = {r["kind"]: SCORES["acc_iou" if r["kind"] in placed else "accuracy"] for r in rows}
        with self.seeing(model):
            said = self.said(model, examples, batch_size)
        return [(text, bool(metric[r["kind"]]([text], [r["answers"]]))) for text, r in zip(said, rows, strict=True)]

    def predict(self, model, inputs, batch_size=8):
        """[{"text": answer}] of images, (image, prompt) pairs, or dicts with the roles or columns as keys; a list is one row's
        images."""
        table, album, told = self.rows(inputs), self.new_album(), Counter()
        for i, shown in enumerate(self.shown(table, album)):
            try:
                if not shown:
                    raise ValueError(f"no {self.what} is named")
                self.few(shown)
                for k in shown:
                    album.look(k, told)
            except Exception as error:
                raise BadData(f"Input {i} ({str(self.column(table, 'image')[i])[:80]}) is not {self.one} that can be read: "
                              f"{str(error)[:160].rstrip('.') or type(error).__name__}. Give {self.form}.") from error
        self.notes += [f"{n:,} {self.what}s are {treated}" for treated, n in told.items()]
        return [{"text": text} for text in self.said(model, self.encode(table, album), batch_size)]

    def rows(self, inputs):
        one = isinstance(inputs, str | Path | bytes | dict | tuple) or hasattr(inputs, "convert") or hasattr(inputs, "shape")
        inputs, columns = [inputs] if one else list(inputs), {c: [] for c in self.roles.values()}
        columns.pop(self.roles["response"], None)
        if not inputs:
            raise BadData("There is no input to predict. Give at least one image.")
        for x in inputs:
            row = dict(zip(("image", "prompt"), x, strict=False)) if isinstance(x, tuple) else x
            row = row if isinstance(row, dict) and "bytes" not in row else {"image": x}
            for role, column in self.roles.items():
                if column in columns:
                    columns[column].append(row.get(column, row.get(role)))
        return Table(columns, "input", None, "number")

    def facts(self):
        return {"image_size": self.side, "kinds": list(self.kinds)}

    def state(self):
        return {"kinds": list(self.kinds), "longest_answer": self.longest_answer}


def png(item, base, side=160):
    """An image as the text of a PNG file, no larger than `side`."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(decode(item, side, base).permute(1, 2, 0).numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _padded(rows, fill, left=False):
    width = max(map(len, rows))
    return torch.tensor([[fill] * (width - len(r)) + r if left else r + [fill] * (width - len(r)) for r in rows])
