"""Class tokens of late vision layers in late layers of a decoder. Shukor et al., eP-ALM, 2023, arXiv:2303.11403."""

import torch

from luthier.evidence import _pairs, beats, fact, judge

SYSTEM, METHODS, SEEDS, MINUTES = "B023", ("full",), (0, 1, 2), 10
CLAIM = "Under 1% trained beats the model without images and the last layer's token alone; frames and spectrograms fit, too"
BASELINE = "the same bridge with one image for every row; with the last vision layer's class token alone; each at its best rate"
MODEL, DATA = "dinov2-s + stories260k", "captions of scenes: 300 train, 80 validation, 150 test rows"
STEPS, WAY = 300, "dinov2-s+stories260k:epalm(states_of={k}, start=0.4)"


def run(seeds):
    whole, last = WAY.format(k=6), WAY.format(k=1)
    given = {"epalm": _pairs.captions(whole), "last": _pairs.captions(last), "blind": _pairs.captions(whole, see="blind")}
    odd = {}

    def after(name, seed, tuned, task):
        if name == "epalm" and not odd:
            ids, g = torch.tensor([[1, 20, 30]]), torch.Generator().manual_seed(0)
            wave = torch.randn(3200, generator=g)
            sound = torch.stft(wave, 128, 57, return_complex=True, window=torch.hann_window(128)).abs().log1p()[:56, :56]
            for kind, x in (("frames", torch.randn(1, 5, 3, 56, 56, generator=g)), ("spectrogram", sound.expand(1, 3, 56, 56))):
                with torch.no_grad():
                    odd[kind] = bool(tuned(ids, pixel_values=x).logits.isfinite().all())
        return {}
    per_seed, facts = _pairs.arms({k: (t, _pairs.CONNECTOR) for k, t in given.items()}, seeds, STEPS, after=after)
    return {"per_seed": per_seed, "facts": facts | {"runs": odd}}


def verdict(figures):
    f = figures["facts"]
    return judge(
        [beats(figures, "epalm", "blind", "captions beat those of a model that sees nothing"),
         beats(figures, "epalm", "last", "class tokens of six layers beat the last one's alone")],
        [fact(f["share"]["epalm"] < 0.01, f"trained share {f['share']['epalm']:.2%}, needed below 1%"),
         fact(all(f["frozen"].values()), "both frozen models keep their bits"),
         fact(f["runs"] == {"frames": True, "spectrogram": True}, f"runs on {f['runs']}")])
