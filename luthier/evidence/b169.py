"""M2-CLIP on tiny-clip: directions of a moving shape by name, and objects it was not trained on by name, before and after.
Wang et al., 2024, arXiv:2401.11649. All arms train the same text adapters and decoder under the same four losses."""

import torch

from luthier import tasks, zoo
from luthier.errors import RunStopped
from luthier.evidence import _bench, _clips, beats, fact, judge, not_below
from luthier.evidence._bench import attach, climb, say, train
from luthier.procedures.m2clip import Multitask

SYSTEM, METHODS, SEEDS, MINUTES = "B169", ("ted", "m2clip"), (0, 1, 2), 15
CLAIM = "TED-Adapters learn directions that frame averages cannot; zero-shot naming of held-out objects stays within 2 points"
BASELINE = "the same text adapters, decoder and losses without TED-Adapters; tiny-clip as it is (zero-shot)"
MODEL = "tiny-clip"
DATA = "scenes.clip, 4 frames of 64 px, 4 directions: 320 train, 160 validation, 320 test clips; 300 scenes of 8 novel pairs"
STEPS, BATCH, RATES = 120, 16, (5e-4, 3e-3, 2e-2)
TED, TEXT = "ted(at='vision.block.*.in vision.final') >> ", "houlsby(at='text.block.*.in', norms=False)"
CHAINS = {"m2clip": TED + TEXT, "frame average": TEXT, "no difference": TED.replace("final'", "final', difference=False") + TEXT,
          "no enhancement": TED.replace("final'", "final', enhance=False") + TEXT}


class Named(_clips.Directions):
    """Directions by the cosine of clip and text, with the decoder's losses in training."""

    def __init__(self, model, tokenizer, frames, side, sizes):
        super().__init__(model, frames, side, sizes)
        self.tokenizer = tokenizer

    def build(self, seed=0):
        clip = zoo.load(self.model) if isinstance(self.model, str) else self.model()
        mask = next(i for i in (self.tokenizer.mask_token_id, self.tokenizer.unk_token_id, self.tokenizer.eos_token_id)
                    if i is not None)
        return Multitask(clip, _clips.text(self.tokenizer, _clips.TEXTS), mask, seed=seed).eval()


def trained(task, chain, seed, lr, steps):
    model = task.build(seed)
    tuned = attach(model, f"{chain} >> full(at={model.heads!r})", seed=seed)
    train(tuned, task, steps=steps, lr=lr, batch_size=BATCH, seed=seed, progress=False, log=False)
    return tuned.eval()


def zero_shot(model, task, n=300):
    x, y, names = _clips.objects(n, task.side)
    texts = _clips.text(task.tokenizer, names)
    with torch.no_grad():
        return float((model(pixel_values=task.pixels(x), texts=texts).logits.argmax(-1) == y).float().mean())


def run(seeds, model="tiny-clip", tokenizer=None, side=64, steps=STEPS, sizes=_clips.SIZES, rates=RATES):
    tokenizer = tokenizer or tasks.open("scenes:classify", model=model).tokenizer
    task = Named(model, tokenizer, 4, side, sizes)
    per_seed, facts = {}, {"learning_rate": {}, "validation": {}, "trained_parameters": {}, "steps": steps, "batch": BATCH}
    base = task.build(0)
    facts["base"] = {"zero_shot": zero_shot(base, task), "directions": task.evaluate(base)["accuracy"]}
    for name, chain in CHAINS.items():
        found = {}

        def worth(i, chain=chain, found=found):
            if rates[i] not in found:
                try:
                    found[rates[i]] = task.evaluate(trained(task, chain, _bench.TUNE, rates[i], steps), "val")["accuracy"]
                except RunStopped:
                    found[rates[i]] = -1.0
            return found[rates[i]]

        lr = rates[climb(worth, len(rates))]
        facts["learning_rate"][name], facts["validation"][name] = lr, {f"{k:g}": v for k, v in found.items()}
        for seed in seeds:
            tuned = trained(task, chain, seed, lr, steps)
            facts["trained_parameters"][name] = sum(p.numel() for _, p in tuned.trainable())
            per_seed.setdefault(name, []).append(task.evaluate(tuned)["accuracy"])
            per_seed.setdefault(f"{name}.zero_shot", []).append(zero_shot(tuned, task))
            say(f"{name} seed {seed}: {per_seed[name][-1]:.4f}, zero-shot {per_seed[name + '.zero_shot'][-1]:.4f}")
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f, kept = figures["facts"], figures["per_seed"]["m2clip.zero_shot"]
    kept = sum(kept) / len(kept)
    return judge(
        [beats(figures, "m2clip", "frame average", "accuracy on directions above the same without TED-Adapters"),
         fact(kept >= f["base"]["zero_shot"] - 0.02,
              f"zero-shot accuracy on held-out objects: {kept:.3f} after, {f['base']['zero_shot']:.3f} before, needed within "
              "0.02")],
        [not_below(figures, "m2clip", "no difference", 0.01, "both halves no worse than temporal enhancement alone"),
         not_below(figures, "m2clip", "no enhancement", 0.01, "both halves no worse than temporal difference alone")])
