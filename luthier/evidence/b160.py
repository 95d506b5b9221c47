"""The unified view on MiniLM: one four-field description yields the named methods, and MAM against an adapter of equal budget.
He et al., 2021, arXiv:2110.04366. Each named method is compared by copying the description's D and U into it; the sequential
adapter, whose own form here has biases and another activation, is compared with the sum written out in forward hooks."""

import torch

from luthier import attach, find
from luthier.evidence import _bench, fact, judge, not_below

SYSTEM, METHODS, SEEDS, MINUTES = "B160", ("mam", "petl", "prefix", "adaptformer"), (0, 1, 2, 3, 4), 15
CLAIM = "One description yields LoRA, adapter, prefix, parallel adapter, MAM; prefix equals its gated form; MAM >= adapter"
BASELINE = "houlsby of equal budget, without norms"
MODEL, DATA = "minilm (22.7M)", "TREC question types: 400 train, 150 validation, 400 test rows"
PREFIX = "petl(at='attn', form='softmax', insertion='parallel', composition='gated', width=8)"
PARALLEL = "petl(at='mlp.in mlp.out', form='relu', insertion='parallel', composition='scaled', width=16, scale=4.0)"
VIEW = {  # name -> (four-field description, the method it must equal, names of its D and U)
    "lora": ("petl(at='attn.q attn.v', form='linear', insertion='parallel', composition='scaled', width=4, scale=2.0)",
             "lora(rank=4, alpha=8.0)", ("A", "B")),
    "prefix": (PREFIX, "prefix(n=8, reparam=False)", ("K", "V")),
    "parallel": (PARALLEL, "adaptformer(width=16, scale=4.0)", ("D", "U")),
    "mam": (f"{PREFIX} >> {PARALLEL}", "mam(n=8, width=16, reparam=False)", ("K", "V", "D", "U")),
}
ADAPTER = "petl(at='attn.out mlp.out', form='relu', insertion='sequential', composition='add', width=16)"


@torch.no_grad()
def equal(view, other, names, task, batch):
    """Largest difference of logits once the description's numbers are in the named method; and what they change."""
    base = _bench.logits(task.build(0).eval(), batch)
    first = _bench.shake(attach(task.build(0).eval(), view), by=0.1)
    second = attach(task.build(0).eval(), other)
    ours = [(p, n) for p in first.states.values() for n in ("D", "U") if hasattr(p, n)]
    theirs = [(p, n) for p in second.states.values() for n in names if hasattr(p, n)]
    for (p, n), (q, k) in zip(ours, theirs, strict=True):
        getattr(q, k).copy_(getattr(p, n))
    logits = _bench.logits(first, batch)
    return _bench.gap(logits, _bench.logits(second, batch)), _bench.gap(logits, base)


@torch.no_grad()
def adapter(task, batch):
    tuned = _bench.shake(attach(task.build(0).eval(), ADAPTER), by=0.1)
    ours, model = _bench.logits(tuned, batch), task.build(0).eval()
    base, states = _bench.logits(model, batch), [p for p in tuned.states.values() if hasattr(p, "D")]
    for site, p in zip(find(model, "attn.out mlp.out"), states, strict=True):
        site.module.register_forward_hook(lambda m, i, h, p=p: h + (h @ p.D.T).relu() @ p.U.T)
    return _bench.gap(ours, _bench.logits(model, batch)), _bench.gap(ours, base)


def run(seeds):
    task, spent = _bench.task("trec", "minilm"), {}
    batch = _bench.first(task)
    found = {n: equal(*row, task, batch) for n, row in VIEW.items()} | {"adapter": adapter(task, batch)}
    mam = "mam(n=8, width=64, reparam=False)"
    budget = _bench.body(attach(task.build(0), mam))
    unit = [_bench.body(attach(task.build(0), f"houlsby(width={w}, norms=False)")) for w in (1, 2)]
    width = 1 + -(-(budget - unit[0]) // (unit[1] - unit[0]))

    def after(name, seed, tuned):
        spent[name] = _bench.body(tuned)
        return {}

    per_seed, facts = _bench.arms(task, {"adapter": f"houlsby(width={width}, norms=False)", "mam": mam}, seeds, 150, after=after)
    facts |= {"view": {n: {"gap": a, "moved": b} for n, (a, b) in found.items()}, "method_parameters": spent}
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f = figures["facts"]
    spent = f["method_parameters"]
    return judge(
        [not_below(figures, "mam", "adapter", 0.0, f"MAM ({spent['mam']} numbers) no worse than adapter ({spent['adapter']})")],
        [fact(v["gap"] < 1e-5 < v["moved"], f"the description yields {n}: largest logit difference {v['gap']:.1e}, needed below "
                                            f"1e-5 (it moves logits by {v['moved']:.2g})") for n, v in f["view"].items()])
