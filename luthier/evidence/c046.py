"""Sounds as soft prompts of a frozen language model. Liang et al., Acoustic Prompt Tuning, 2023, arXiv:2312.00249.

Tones, beeps and hiss made by code: one clip and one of three questions, or two clips between the words of a question that
compares them (NLAR's form). No sound of the test part is in training. Blind arms hear one clip whatever the row's own is: what
they come to is chance."""

import torch

from luthier.evidence import _bench, beats, fact, judge
from luthier.save import fingerprint

SYSTEM, METHODS, SEEDS, MINUTES = "C046", ("full",), (0, 1, 2), 20
CLAIM = "The aligner alone tells and compares clips above chance; the instruction changes a clip's prompts; text is untouched"
BASELINE = "the same training on one clip for every row, and an aligner that sees no instruction, at their own best rates"
MODEL, DATA = "whisper-tiny + stories260k", "sounds:ask and sounds:compare: 300 train, 60 validation, 160 test rows"
STEPS, BATCH, RATES, CONNECTOR = 250, 16, (3e-3, 1e-2), 'full(at="connector")'
SIZE = "tokens=8, width=64, layers_of=2"


def task(data, way=f"apt({SIZE})", blind=False, sizes=(300, 60, 160)):
    made = _bench.task(data, f"whisper-tiny+stories260k:{way}", *sizes)
    for split in ("train", "val", "test") if blind else ():
        rows = made.examples(split)
        album, (first, *_) = rows[0]["pictures"]
        for row in rows:
            row["pictures"] = album, [first] * len(row["places"])
    return made


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
    return torch.equal(tuned(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, tuned.base.language(
        input_ids=ids, attention_mask=torch.ones_like(ids)).logits)


def run(seeds, steps=STEPS, sizes=(300, 60, 160)):
    given = {"ask": task("sounds:ask", sizes=sizes), "ask_blind": task("sounds:ask", blind=True, sizes=sizes),
             "ask_unheeding": task("sounds:ask", f"apt({SIZE}, heed=False)", sizes=sizes),
             "compare": task("sounds:compare", sizes=sizes), "compare_blind": task("sounds:compare", blind=True, sizes=sizes)}
    per_seed, facts = {}, {"frozen": {}}
    for name, made in given.items():
        base = made.build(0)
        before = fingerprint(base.vision), fingerprint(base.language)

        def after(name, seed, tuned, made=made, before=before):
            facts["frozen"][name] = before == (fingerprint(tuned.base.vision), fingerprint(tuned.base.language))
            if name == "ask":
                facts["heeded"], facts["untouched"] = heeded(tuned, made), untouched(tuned)
            return {}
        mine, more = _bench.arms(made, {name: CONNECTOR}, seeds, steps, BATCH, RATES, after, head=False)
        per_seed |= mine
        for key, value in more.items():
            facts[key] = facts.get(key, {}) | value if isinstance(value, dict) else value
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f = figures["facts"]
    return judge(
        [beats(figures, "ask", "ask_blind", "a clip's kind, pitch and length against hearing one clip for all"),
         beats(figures, "compare", "compare_blind", "which of two clips, against hearing one clip for all"),
         beats(figures, "ask", "ask_unheeding", "an aligner that sees the instruction against one that does not")],
        [fact(f["heeded"] > 0.01, f"another question moves a clip's prompts by {f['heeded']:.0%} of their size, needed above 1%"),
         fact(f["untouched"], "text alone gives the language model's own logits to the bit"),
         fact(all(f["frozen"].values()), "audio encoder and language model keep their bits")])
