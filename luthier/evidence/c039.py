"""PiToMe off the shelf on DINOv2 and CIFAR-10, against ToMe's matching at the same number of merged tokens, so at equal FLOPs.
Tran et al., 2024, arXiv:2405.16148; ToMe is `pitome(protect=False)`: even and odd places, no energy.

A seed draws its own training and test images. A linear head is fitted on unmerged features of the training images; only the test
images are merged. With few patches PiToMe has few to choose from, so two sizes are tried, and both are judged.
Spectral distance: L1 between the sorted eigenvalues of the normalised Laplacian of the tokens' graph (edges (1 + cos) / 2 between
keys) and of the lifted coarse graph, at the first merge.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, normalize

from luthier import attach, cost
from luthier.evidence import _bench, beats, fact, judge
from luthier.methods.tokens.pitome import energy, pitome

SYSTEM, METHODS, SEEDS, MINUTES = "C039", ("pitome",), (0, 1, 2), 16
CLAIM = "At 40-60% of the FLOPs a smaller drop than with ToMe's matching; isolated tokens survive; a spectrally closer graph"
BASELINE = "pitome(protect=False): ToMe's bipartite soft matching, same layers, same r"
MODEL = "dinov2-s (22.1M), untuned, linear head on its CLS token"
DATA = "CIFAR-10 at 112 and 224 px (64 and 256 patches): 200 train, 200 test images, drawn anew each seed"
SIZES, KEEPS = (112, 224), (0.925, 0.9)


@dataclass(frozen=True, repr=False)
class watched(pitome):
    """The method, with a look at what each merge did to its tokens."""
    seen: object = None

    def stream(self, t, p):
        k = normalize(t.lanes[p.key][:, t.fixed:], dim=-1)
        similar, out = k @ k.mT, super().stream(t.marked(), p)
        group = out.group[:, t.fixed:] - t.fixed                                  # (B, N): coarse token of each token
        count = torch.zeros_like(group).scatter_add(1, group, torch.ones_like(group)).gather(1, group)
        low = energy(similar, p.m, self.alpha).argsort(1)[:, :k.shape[1] // 2]    # the more isolated half
        self.seen.append((similar, group, float((count.gather(1, low) == 1).float().mean())))
        return out


def spectral_distance(similar, group):
    """Mean over images. similar: (B, N, N) cosines, group: (B, N)."""
    A = (1 + similar) / 2
    member = torch.nn.functional.one_hot(group, int(group.max()) + 1).to(A)       # (B, N, n)
    mean = member / member.sum(1, keepdim=True).clamp(min=1)
    lifted = member @ (mean.mT @ A @ mean) @ member.mT
    return float((spectrum(A) - spectrum(lifted)).abs().sum(1).mean())


def spectrum(A):
    d = A.sum(-1).rsqrt()
    return torch.linalg.eigvalsh(torch.eye(A.shape[-1]) - d[:, :, None] * A * d[:, None, :])


@torch.no_grad()
def features(model, batches):
    return torch.cat([model.features(pixel_values=b["pixel_values"]) for b in batches]), torch.cat([b["labels"] for b in batches])


def fitted(x, y):
    """A ridge-like linear head: LBFGS on cross-entropy with weight decay, on standardised features."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    W = torch.zeros(int(y.max()) + 1, x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([W], max_iter=200, line_search_fn="strong_wolfe")

    def head(z):
        return (z - mean) / std @ W[:, :-1].T + W[:, -1]

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(head(x), y) + 1e-2 * W.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head


def run(seeds):
    per_seed, facts = {}, {"flops": {}}

    def put(name, value):
        per_seed.setdefault(name, []).append(value)

    for seed in seeds:
        for size in SIZES:
            task = _bench.task("cifar10", "dinov2-s", train=200, test=200, image_size=size, seed=seed, pool="cls")
            model = task.build(seed).eval()
            head = fitted(*features(model, list(task.batches("train", 50, shuffle=False))))
            tests = list(task.batches("test", 50, shuffle=False))
            one = {"pixel_values": tests[0]["pixel_values"][:2]}
            whole = cost.flops(lambda m=model, x=one: m(**x))
            put(f"{size}.unmerged", accuracy(model, head, tests))
            for keep in KEEPS:
                for name, protect in (("pitome", True), ("tome", False)):
                    seen = []
                    tuned = attach(model, watched(keep=keep, protect=protect, seen=seen))
                    tuned.eval()
                    put(f"{size}.{name}.{keep:g}", accuracy(tuned, head, tests))
                    if keep == KEEPS[-1]:
                        put(f"{size}.{name}.survive", min(s for _, _, s in seen))
                        put(f"{size}.{name}.spectral", -spectral_distance(*seen[0][:2]))
                    facts["flops"][f"{size}.{keep:g}"] = cost.flops(lambda m=tuned, x=one: m(**x)) / whole
                    tuned.detach()
        _bench.say(f"seed {seed}: " + ", ".join(f"{k} {v[-1]:.3f}" for k, v in per_seed.items()))
    return {"per_seed": per_seed, "facts": facts}


def accuracy(model, head, batches):
    x, y = features(model, batches)
    return float((head(x).argmax(-1) == y).float().mean())


def verdict(figures):
    f, per, main, also = figures["facts"]["flops"], figures["per_seed"], [], []
    for size in SIZES:
        for keep in (k for k in KEEPS if 0.395 <= f[f"{size}.{k:g}"] < 0.605):
            main.append(beats(figures, f"{size}.pitome.{keep:g}", f"{size}.tome.{keep:g}",
                              f"{size} px, {f[f'{size}.{keep:g}']:.0%} of the FLOPs: accuracy above ToMe's"))
        main.append(beats(figures, f"{size}.pitome.spectral", f"{size}.tome.spectral",
                          f"{size} px: spectral distance (negative) of the first merge below ToMe's"))
        ours, theirs = min(per[f"{size}.pitome.survive"]), min(per[f"{size}.tome.survive"])
        also.append(fact(ours == 1, f"{size} px: of the more isolated half, {ours:.0%} survive every merge (ToMe {theirs:.0%})"))
    return judge(main, also)
