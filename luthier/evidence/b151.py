"""PEGO on DINOv2 and digits in four domains, leaving one out. Hu et al., ECCV 2024, arXiv:2407.15085.

scikit-learn's digits are turned by 0, 25, 50 and 75 degrees; each domain has a colour of its own. An arm trains on three domains
and is scored on the fourth, each of them in turn; a seed's figure is the mean over the four. Rates are searched for on images of
the training domains, those of the first split.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

from luthier import attach, find, tasks
from luthier.evidence import _bench, beats, fact, judge
from luthier.method import parse

SYSTEM, METHODS, SEEDS, MINUTES = "B151", ("pego",), (0, 1, 2), 15
CLAIM = "Leaving one domain out, the mean beats one LoRA of the same total rank; both terms fall; merged logits are equal"
BASELINE = "lora of rank n r at the same matrices, with the same factor of 1"
MODEL, DATA = "dinov2-s (22.1M)", "digits at 56 px, turned and coloured in 4 domains: 360 train, 150 validation, 240 test images"
STEPS, RANK, N, SIZE = 50, 4, 4, 28
ANGLES, COLOURS = (0, 25, 50, 75), ((1.0, 0.3, 0.3), (0.3, 1.0, 0.3), (0.4, 0.4, 1.0), (1.0, 0.9, 0.2))
CHAINS = {"pego": f"pego(rank={RANK}, n={N})", "lora": f"lora(rank={N * RANK}, alpha={float(N * RANK)})"}
FREE = f"pego(rank={RANK}, n={N}, preserve=0.0, diverse=0.0)"


def domain(images, k):
    """uint8 (N, 28, 28, 3): 8 x 8 digits made larger, turned and coloured."""
    x = F.interpolate(torch.tensor(images, dtype=torch.float32)[:, None] / 16, (SIZE, SIZE), mode="bilinear")
    c, s = math.cos(math.radians(ANGLES[k])), math.sin(math.radians(ANGLES[k]))
    grid = F.affine_grid(torch.tensor([[c, -s, 0], [s, c, 0]]).expand(len(x), 2, 3), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False).permute(0, 2, 3, 1) * torch.tensor(COLOURS[k])
    return (255 * x).clamp(0, 255).byte().numpy()


def left_out(k):
    """The task that trains on all domains but k and is tested on k; no digit is in two of its splits."""
    from sklearn.datasets import load_digits

    data, found = load_digits(), {"classes": np.array([str(n) for n in range(10)])}
    order = np.random.default_rng(0).permutation(len(data.images))
    for split, start, n, domains in (("train", 0, 120, [d for d in range(4) if d != k]),
                                     ("val", 400, 50, [d for d in range(4) if d != k]), ("test", 600, 240, [k])):
        rows = [order[start + i * n:start + (i + 1) * n] for i in range(len(domains))]
        found[f"{split}_images"] = np.concatenate([domain(data.images[r], d) for r, d in zip(rows, domains, strict=True)])
        found[f"{split}_labels"] = np.concatenate([data.target[r] for r in rows])
    return tasks.open(found, model="dinov2-s", image_size=56)


def terms(tuned):
    """Both terms of the loss, summed over all sites."""
    m, sites = parse(CHAINS["pego"])[0], {s.name: s for s in find(tuned, "attn.q attn.v")}
    with torch.no_grad():
        both = [m.terms(sites[p.site_name].W, p) for p in tuned.states.values() if p.site_name in sites]
    return [float(sum(t)) for t in zip(*both, strict=True)]


def run(seeds):
    every, per_seed, facts = [left_out(k) for k in range(4)], {}, {"learning_rate": {}, "by_domain": {}, "steps": STEPS}
    for name, chain in CHAINS.items():
        lr, _ = _bench.search(every[0], chain, STEPS, 16)
        scores = [[_bench.score(_bench.trained(task, chain, s, lr, STEPS), task) for task in every] for s in seeds]
        facts["learning_rate"][name], facts["by_domain"][name] = lr, scores
        facts.setdefault("trained_parameters", {})[name] = _bench.body(attach(every[0].build(0), chain))
        per_seed[name] = [sum(row) / len(row) for row in scores]
        _bench.say(f"{name}: {per_seed[name]}")
    lr = facts["learning_rate"]["pego"]
    for name, chain in (("with", CHAINS["pego"]), ("without", FREE)):
        facts.setdefault("terms", {})[name] = terms(_bench.trained(every[0], chain, seeds[0], lr, STEPS))
    facts["mechanics"] = _bench.mechanics(every[0].build(0), _bench.first(every[0]), CHAINS["pego"])
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f = figures["facts"]
    (keep, part), (free_keep, free_part) = f["terms"]["with"], f["terms"]["without"]
    sizes = f["trained_parameters"]
    return judge(
        [beats(figures, "pego", "lora", "mean accuracy on the domain left out above one LoRA of the same total rank")],
        [fact(keep < free_keep, f"Σ‖W (BA)ᵀ‖₁ after training: {keep:.3g}, without the losses {free_keep:.3g}"),
         fact(part < free_part, f"Σ‖B_i A_i (B_j A_j)ᵀ‖₁ after training: {part:.3g}, without the losses {free_part:.3g}"),
         fact(sizes["pego"] == sizes["lora"], f"trained numbers: {sizes}"), *_bench.exact(f["mechanics"])])
