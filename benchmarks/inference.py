"""One unmerged update over the bare model; attaching; merging tokens."""

import copy

import torch

import luthier
from luthier import cost, zoo

from .common import PEER_LINEARS, clock, llama, row, timed


def unmerged(rounds=31, name="smollm2-135m", rank=8):
    """One token at batch 1, and 16 x 128 tokens, with LoRA on all linears, over the bare model."""
    from peft import LoraConfig, get_peft_model

    base = zoo.load(name).eval()
    ours = luthier.attach(copy.deepcopy(base), f"lora(rank={rank}, at='linear -head')").eval()
    peer = get_peft_model(copy.deepcopy(base), LoraConfig(r=rank, target_modules=PEER_LINEARS)).eval()
    found = []
    for rows, tokens, n in ((1, 1, rounds), (16, 128, max(5, rounds // 6))):
        batch = torch.randint(2, base.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))

        def run(model, batch=batch):
            with torch.no_grad():
                model(input_ids=batch, use_cache=True)
        times = clock({"base": lambda: run(base), "luthier": lambda: run(ours), "peft": lambda: run(peer)}, n)       # noqa: B023
        what = f"unmerged LoRA r{rank} over the base: {name}, {rows} x {tokens}"
        found.append(timed(what, times, "luthier", "base", 1.10, "peft"))
    return found


def attaching(rounds=9, width=512, layers=32):
    """Seconds to attach LoRA to 224 linears of a model that nothing was attached to before."""
    from peft import LoraConfig, get_peft_model

    bare = [llama(64, layers) for _ in range(2)]

    def ours():
        luthier.attach(bare[0], "lora(at='linear -head')").detach()

    def peer():
        get_peft_model(bare[1], LoraConfig(target_modules=PEER_LINEARS)).unload()

    times = clock({"luthier": ours, "peft": peer}, rounds)
    seconds = {k: sorted(v)[len(v) // 2] for k, v in times.items()}
    return [row(f"seconds to attach to {7 * layers} linears and detach again", seconds["luthier"], 0.05, seconds["peft"])]


def merged_tokens(rounds=7, rows=32, size=224):
    """Latency of `pitome` at half of the FLOPs on the ViT-S, over the whole model."""
    base = zoo.load("dinov2-s").eval()
    image = torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(0))
    whole, best = cost.flops(lambda: base(pixel_values=image[:1])), None
    for keep in (0.94, 0.93, 0.92, 0.91, 0.9, 0.89, 0.88):
        tuned = luthier.attach(base, f"pitome(keep={keep})").eval()
        share = cost.flops(lambda t=tuned: t(pixel_values=image[:1])) / whole
        tuned.detach()
        best = min(best or (9, 0, 0), (abs(share - 0.5), keep, share))
    tuned = luthier.attach(copy.deepcopy(base), f"pitome(keep={best[1]})").eval()

    def run(model):
        with torch.no_grad():
            model(pixel_values=image)
    times = clock({"base": lambda: run(base), "luthier": lambda: run(tuned)}, rounds)
    what = f"pitome at {best[2]:.0%} of the FLOPs over the base: dinov2-s, {rows} x {size} px"
    return [timed(what, times, "luthier", "base", 0.65)]
