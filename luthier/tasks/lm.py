"""Causal language modelling and instruction tuning: the model keeps its own head."""

import itertools

import torch
from torch.nn import functional as F

from .. import ranks, zoo
from ..errors import BadData, DoesNotFit
from . import metrics
from .classify import IGNORE, Text
from .split import shares


class Language(Text):
    reads = ("text-decoder",)
    metrics = ("perplexity",)
    higher = False
    longest = 512

    def build(self, seed=0, dtype=None):
        """The pretrained decoder with its own head; `seed` changes nothing, for nothing is new."""
        if self.model is None:
            raise BadData("This task has no model to build on. Open it with model=, e.g. model=\"smollm2-135m\".")
        model = zoo.load(self.model, dtype)
        try:
            with torch.no_grad():
                self.logits(model, self.probe())
        except Exception as error:
            raise DoesNotFit(f"{self.origin.ref} gives no logits for text ({str(error)[:300]}). {self.kind} needs a decoder with "
                             "its head, like smollm2-135m.") from error
        return model

    def nll(self, model, batch):
        """(sum of -log p, number) over labelled tokens: the logits at t predict the label at t + 1."""
        return self.chosen(self.logits(model, batch)[:, :-1], batch["labels"][:, 1:])

    def chosen(self, logits, labels):
        labels = labels.to(logits.device)
        there = labels != IGNORE                     # only these rows meet the softmax
        return F.cross_entropy(logits[there].float(), labels[there], reduction="sum"), int(there.sum())

    def logits(self, model, batch):
        out = model(**{k: v.to(next(model.parameters()).device) for k, v in batch.items() if k != "labels"})
        return out["logits"] if isinstance(out, dict) else out.logits

    def loss(self, model, batch):
        total, n = self.nll(model, batch)
        return total / max(n, 1)

    def counted(self, batch):
        return int((batch["labels"][:, 1:] != IGNORE).sum())

    def score(self, model, examples, batch_size):
        total, count = self.summed(model, examples, batch_size)
        return {"perplexity": metrics.perplexity(total, count), "loss": total / count, "n": len(examples), "tokens": count}

    def summed(self, model, examples, batch_size):
        return map(sum, zip(*self.losses(model, examples, batch_size), strict=True))

    def plan(self, examples, batch_size):
        """Batches of indices of like length."""
        index = sorted(range(len(examples)), key=lambda i: self.length(examples[i]))
        return [index[i:i + batch_size] for i in range(0, len(index), batch_size)]

    def losses(self, model, examples, batch_size):
        def run(part):
            nll, n = self.nll(model, self.collate([examples[k] for k in part]))
            return nll.item(), n

        was = model.training
        model.eval()
        try:
            with torch.no_grad():
                yield from ranks.spread(self.plan(examples, batch_size), run)
        finally:
            model.train(was)

    def evaluate(self, model, split="test", batch_size=8):
        return super().evaluate(model, split, batch_size)

    def learn(self, data):
        """Nothing: there are no labels."""

    def predict(self, model, inputs, batch_size=1, max_new_tokens=64):
        """[{"text": continuation}], greedy, one input at a time."""
        table, found = self.rows(inputs), []
        tokenizer = self.tokenizer
        was = model.training
        model.eval()
        for i in range(len(table)):
            if hasattr(model, "serve_rows"):
                model.serve_rows([i])
            ids = torch.tensor([self.start(table, i)], device=next(model.parameters()).device)
            with torch.no_grad():
                out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                     max_new_tokens=max_new_tokens, pad_token_id=self.pad_id())
            found.append({"text": tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip()})
        model.train(was)
        return found

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class CausalLM(Language):
    """Documents are joined by the end-of-text token and cut into blocks of max_length (128 by default): nothing is padding."""
    kind = "causal-lm"
    longest = 128

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self._most = {}                              # split -> (limit, seed)

    def fill(self, data, seed, limit):
        if "all" in data.splits and len(data.splits["all"]) < 10:        # few documents: split the text itself
            from .read import Table
            whole, parts = data.splits.pop("all"), {"train": [], "val": [], "test": []}
            for text in self.texts(whole):
                a, b = int(len(text) * 0.85), int(len(text) * 0.9)
                for name, piece in zip(parts, (text[:a], text[a:b], text[b:]), strict=True):
                    parts[name].append(piece)
            for name, pieces in parts.items():
                data.splits[name] = Table({self.roles["text"]: pieces}, whole.source, whole.lines, whole.unit)
            data.notes.append("few documents: each is cut 85/5/10 into train, val and test")
        return super().fill(data, seed, limit)

    def limit(self, name, most, seed):
        """A limit counts blocks."""
        self._most[name] = (most, seed)
        if most is not None:
            self.notes.append(f"{name}: at most {most:,} blocks (limit)")

    def examples(self, split):
        if split not in self._encoded:
            blocks = super().examples(split)
            most, seed = self._most.get(split, (None, 0))
            if most is not None and most < len(blocks):
                blocks = [blocks[i] for i in shares([0] * len(blocks), most, seed)]
            self._encoded[split] = blocks
        return self._encoded[split]

    def size(self, split="train"):
        return len(self.examples(split)) if self.origin else len(self.tables[split])

    def encode(self, table):
        end = [i for i in [self.tokenizer.eos_token_id] if i is not None]
        texts = [t for t in self.texts(table) if t]
        coded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        stream = list(itertools.chain.from_iterable(ids + end for ids in coded))
        n = self.max_length
        blocks = [stream[i:i + n] for i in range(0, len(stream), n)]
        if len(blocks) > 1 and len(blocks[-1]) < n:
            blocks.pop()
        if not blocks or len(blocks[0]) < 2:
            raise BadData(f"{table.source}: the text gives {len(stream)} tokens, too few to predict one from another. Give "
                          "more text.")
        return [{"input_ids": b, "attention_mask": [1] * len(b), "labels": b} for b in blocks]

    def start(self, table, i):
        return self.ids(self.texts(table)[i]) or [self.pad_id()]


class Instruction(Language):
    """Prompt and response; the loss counts the response only (and the token that ends it). The tokenizer's chat template is used
    where it has one. A prompt that is too long loses its beginning; a response that is too long loses its end."""
    kind = "instruction"

    def prompt_ids(self, text):
        if getattr(self.tokenizer, "chat_template", None):
            said = [{"role": "user", "content": text}]
            return self.ids(self.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False))
        start = self.tokenizer.bos_token_id if self.origin and self.tokenizer.bos_token_id is not None else None
        return ([start] if start is not None else []) + self.ids(text.rstrip() + "\n")

    def encode(self, table):
        end = [i for i in [self.tokenizer.eos_token_id] if i is not None]
        n, cut, rows = self.max_length, 0, []
        for prompt, response in zip(self.texts(table, "prompt"), self.texts(table, "response"), strict=True):
            ask, answer = self.prompt_ids(prompt), self.ids(response) + end
            cut += len(ask) + len(answer) > n
            answer = answer[:max(n // 2, n - len(ask))]
            ask = ask[-(n - len(answer)):]
            ids = ask + answer
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORE] * len(ask) + answer})
        if cut:
            self.notes.append(f"{table.source}: {cut:,} of {len(rows):,} rows are longer than max_length={n} and were cut")
        if not any(r["labels"][1:] for r in rows):
            raise BadData(f"{table.source}: no response has a token. Name the right column with columns={{\"response\": ...}}.")
        return rows

    def start(self, table, i):
        return self.prompt_ids(self.texts(table, "prompt")[i])
