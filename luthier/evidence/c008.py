"""VL-PET: each granularity's gate has its shape and its number of parameters, and the gated encoder with values alone adapted in
the decoder against VL-Adapter's single adapters with at least as many numbers. Hu et al., ICCV 2023, arXiv:2308.09804."""

import torch

from luthier import attach
from luthier.evidence import _bench, beats, fact, judge
from luthier.method import parse

SYSTEM, METHODS, SEEDS, MINUTES = "C008", ("vl_pet", "vl_adapter"), (0, 1, 2), 15
CLAIM = "Each granularity has the right gate; gated encoder and value-only decoder beat VL-Adapter at no more parameters"
BASELINE = "vl_adapter (one set of bottlenecks), at least as many parameters"
MODEL, DATA = "tiny-vlt5", "scenes:multitask: 1200 train, 200 validation, 400 test rows"
GATES = {"large": lambda B, N, D: (B, N, D), "middleX": lambda B, N, D: (B, N, 1), "middleY": lambda B, N, D: (1, 1, D),
         "small": lambda B, N, D: (B, 1, 1)}
WIDTHS, STEPS = tuple(range(4, 97, 4)), 200


def chain(gate):
    """s = 2 for gates of σ, which lie about 1/2 at the start."""
    rank = ", rank={0}" if gate == "large" else ""
    return f"vl_pet(gate='{gate}', width={{0}}, values={{0}}{rank}, scale={1.0 if gate == 'middleY' else 2.0})"


def shapes(model, gate):
    """(the gate's shape is right, its numbers per sublayer)"""
    method, = made = parse(chain(gate).format(8))
    tuned = attach(model, made)
    p = next(s for s in tuned.states.values() if s.site_name == "encoder.block.0.attn.out")
    x = torch.randn(3, 5, p.D.shape[1])
    got = tuple(method.granularity(x, x, p).shape)
    spent = sum(q.numel() for n, q in p.named_parameters() if n in "AaVvg")
    tuned.detach()
    return got == GATES[gate](*x.shape), spent


def run(seeds):
    task = _bench.task("scenes:multitask", "tiny-vlt5", train=1200, val=200, test=400)
    model = task.build(0)
    chains = {"vl_adapter": _bench.seeing(model, "vl_adapter(reduce=4)")}
    tuned = attach(model, chains["vl_adapter"])
    budget = sum(p.numel() for _, p in tuned.trainable())
    tuned.detach()
    chains |= {gate: _bench.seeing(model, _bench.fits(model, budget, chain(gate), WIDTHS)) for gate in GATES}
    found = {gate: shapes(model, gate) for gate in GATES}
    per_seed, facts = _bench.arms(task, chains, seeds, STEPS, head=False)
    facts |= {"shapes": {g: right for g, (right, _) in found.items()}, "gate_parameters": {g: n for g, (_, n) in found.items()}}
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f = figures["facts"]
    spent, gate = f["trained_parameters"], f["gate_parameters"]
    return judge(
        [beats(figures, "large", "vl_adapter", f"large ({spent['large']} numbers) beats VL-Adapter ({spent['vl_adapter']})")],
        [fact(all(f["shapes"].values()), f"the gates have their shapes: {', '.join(g for g, ok in f['shapes'].items() if ok)}"),
         fact(gate["large"] > gate["small"] > gate["middleX"] > gate["middleY"], f"numbers of a gate: {gate}"),
         fact(all(spent[g] <= spent["vl_adapter"] for g in GATES), "no arm has more numbers than VL-Adapter")])
