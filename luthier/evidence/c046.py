"""Sounds as soft prompts of a frozen language model. Liang et al., Acoustic Prompt Tuning, 2023, arXiv:2312.00249.

Tones, beeps and hiss made by code: one clip and one of three questions, or two clips between the words of a question that
compares them (NLAR's form). No sound of the test part is in training. Blind arms hear one clip whatever the row's own is: what
they come to is chance. The language model is tiny-vlt5's, which knows soft prompts but not these answers, so they are said in
words of its own (SAID), and chosen: of those that training gives to the question, the one the model finds likeliest. How often it
writes the right one by itself is told beside it."""

import tempfile

import torch
from torch.nn import functional as F

from luthier import attach, zoo
from luthier.evidence import _bench, beats, fact, judge
from luthier.save import fingerprint
from luthier.tasks.lm import IGNORE

SYSTEM, METHODS, SEEDS, MINUTES = "C046", ("full",), (0, 1, 2), 15
CLAIM = "The aligner alone tells and compares clips above chance; heeding the instruction helps; text is untouched"
BASELINE = "the same training on one clip for every row, or without the instruction, each at its own best learning rate"
MODEL = "whisper-tiny + the language part of tiny-vlt5"
DATA = "sounds:ask and sounds:compare: 300 train, 60 validation, 160 test rows"
STEPS, BATCH, RATES, CONNECTOR = 400, 16, (3e-3, 1e-2), 'full(at="connector")'
SIZE = "tokens=8, width=64, layers_of=2, frames=100, every=5"
SAID = {"low": "bottom", "high": "top", "short": "small", "long": "large", "tone": "circle", "rising tone": "triangle",
        "falling tone": "diamond", "beeps": "square", "hiss": "cross", "yes": "fits", "no": "differs"}


class Chosen:
    """A task whose answers are chosen among those that training gives to a question."""

    def __init__(self, task):
        self.task, self.choices = task, {}
        for row in task.examples("train"):
            self.choices.setdefault(tuple(row["ask"]), {})[row["answers"][0]] = row["answer"]

    def __getattr__(self, name):
        return getattr(self.task, name)

    @torch.no_grad()
    def evaluate(self, model, split="test"):
        rows, right = self.examples(split), []
        with self.seeing(model):
            for ask, said in self.choices.items():
                mine = [row for row in rows if tuple(row["ask"]) == ask]
                for part in (mine[i:i + 16] for i in range(0, len(mine), 16)):
                    found = [self.likely(model, [dict(row, answer=ids) for row in part]) for ids in said.values()]
                    answers = list(said)
                    right += [answers[k] == row["answers"][0] for k, row in zip(torch.stack(found).argmax(0), part, strict=True)]
        return {self.metric: sum(right) / len(rows)}

    def likely(self, model, rows):
        """Log-likelihoods of the answers of rows."""
        batch = self.collate(rows)
        logits, labels = self.logits(model, batch), batch["labels"]
        if not self.apart:                                  # a decoder's logits are of what comes next
            logits, labels = logits[:, :-1], labels[:, 1:]
        return -F.cross_entropy(logits.mT, labels, ignore_index=IGNORE, reduction="none").sum(1)


def language(folder):
    """tiny-vlt5's language model and tokenizer, as a model of their own."""
    zoo.load("tiny-vlt5").language.save_pretrained(folder)
    zoo.about("tiny-vlt5").parts[-1].tokenizer().save_pretrained(folder)
    return folder


def task(words, data, way=f"apt({SIZE})", blind=False, sizes=(300, 60, 160)):
    made = _bench.task(data, f"whisper-tiny+{words}:{way}", *sizes)
    for split in ("train", "val", "test"):
        rows = made.examples(split)
        album, (first, *_) = rows[0]["pictures"]
        for row in rows:
            word = SAID[row["answers"][0]]
            row["answers"], row["answer"] = [word], made.ids(word) + made.end()
            if blind:
                row["pictures"] = album, [first] * len(row["places"])
    return Chosen(made)


def hear(given):
    """What the encoder makes of each sound, once for all arms: these differ in what is asked and in the aligner alone."""
    known = {}
    for made in given.values():
        shown = {(album, k) for split in ("train", "val", "test") for e in made.examples(split)
                 for album, ks in [e["pictures"]] for k in ks}
        of = {key: key[0].items[key[1]][0].__self__.key for key in shown}
        with made.seeing(attach(made.build(0), CONNECTOR)):
            made.memory[1].update({key: known[name] for key, name in of.items() if name in known})
            for key, name in of.items():
                known[name] = made.seen([key])[0]


@torch.no_grad()
def heeded(tuned, given):
    """How far, relative to its size, the prompt of a test clip moves when another of the questions is asked."""
    base, rows, found = tuned.base, given.examples("test"), []
    asks = {tuple(r["ask"]): r["ask"] for r in rows}.values()
    with given.seeing(tuned):
        for row in rows[:10]:
            states = given.images([row])["image_states"][0]
            made = []
            for ids in asks:
                ids = torch.tensor([ids])
                words = base.language.get_input_embeddings()(ids)
                made.append(base.way.prompt(base.connector, states, words, torch.ones_like(ids)))
            found += [float((a - made[0]).norm() / made[0].norm()) for a in made[1:]]
    return sum(found) / len(found)


@torch.no_grad()
def untouched(tuned):
    """Whether text alone gives the language model's own logits, to the bit."""
    ids = torch.randint(5, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    text = dict(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=ids)
    return torch.equal(tuned(**text).logits, tuned.base.language(**text).logits)


def run(seeds, steps=STEPS, sizes=(300, 60, 160)):
    with tempfile.TemporaryDirectory() as folder:
        return _run(language(folder), seeds, steps, sizes)


def _run(words, seeds, steps, sizes):
    given = {"ask": task(words, "sounds:ask", sizes=sizes), "ask_blind": task(words, "sounds:ask", blind=True, sizes=sizes),
             "ask_unheeding": task(words, "sounds:ask", f"apt({SIZE}, heed=False)", sizes=sizes),
             "compare": task(words, "sounds:compare", sizes=sizes),
             "compare_blind": task(words, "sounds:compare", blind=True, sizes=sizes)}
    hear(given)
    per_seed, facts = {}, {"frozen": {}}
    for name, made in given.items():
        base = made.build(0)
        before = fingerprint(base.vision), fingerprint(base.language)

        def after(name, seed, tuned, made=made, before=before):
            facts["frozen"][name] = before == (fingerprint(tuned.base.vision), fingerprint(tuned.base.language))
            if name == "ask":
                facts["heeded"], facts["untouched"] = heeded(tuned, made), untouched(tuned)
            return {"written": _bench.score(tuned, made.task)}
        mine, more = _bench.arms(made, {name: CONNECTOR}, seeds, steps, BATCH, RATES, after, head=False)
        per_seed |= mine
        for key, value in more.items():
            facts[key] = facts.get(key, {}) | value if isinstance(value, dict) else value
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f = figures["facts"]
    return judge(
        [beats(figures, "ask", "ask_blind", "a clip's kind, pitch and length against hearing one clip for all"),
         beats(figures, "compare", "compare_blind", "which of two clips, against hearing one clip for all")],
        [beats(figures, "ask", "ask_unheeding", "queries that see the instruction against those that do not"),
         fact(f["heeded"] > 0.01, f"another question moves a clip's prompts by {f['heeded']:.0%} of their size, needed above 1%"),
         fact(f["untouched"], "text alone gives the language model's own logits to the bit"),
         fact(all(f["frozen"].values()), "audio encoder and language model keep their bits")])
