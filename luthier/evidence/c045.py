"""SHERL on tiny-clip and image-text retrieval. Diao et al., 2024, arXiv:2407.07523. The id B168 names the same system.
As in c021 every arm trains the two projections, too."""

import torch

from luthier.evidence import _bench, beats, c021, fact, judge, not_below
from luthier.methods.side.sherl import sherl
from luthier.state import State

SYSTEM, METHODS, SEEDS, MINUTES = "C045", ("sherl",), (0, 1, 2), 20
CLAIM = "Gradients stop at the late layer; memory below LoRA's; no worse than LST and UniPT; weights beat uniform ones"
BASELINE = "lora (memory), ladder and unipt at about as many parameters, the same network with uniform weights"
MODEL, DATA = c021.MODEL, c021.DATA


def run(seeds, task=None, steps=c021.STEPS, rates=c021.RATES):
    task = task or _bench.task("scenes:retrieval", MODEL, 800, 200, 300)
    arms = c021.chains(task, {"sherl": [f"sherl(reduce={r})" for r in c021.REDUCED], "unipt": c021.UNIPT, "lora": c021.LORA})
    arms["uniform"] = arms["sherl"].replace("sherl(reduce", "sherl(weigh='uniform', reduce")
    trained = {k: v for k, v in arms.items() if k not in ("lora", "probe")}
    per_seed, facts = _bench.arms(task, trained, seeds, steps, c021.BATCH, rates, head=False)
    facts |= c021.measured(task, arms) | {"late_layers": 2 * 6}                           # q, k, v, o, up, down of two towers
    a, b = torch.eye(2)[:, None, None]
    p = State(dict(c=torch.ones(2), c0=torch.zeros(1), taps=3), "0:sherl", "")
    facts["twice"] = [float(w[0, 0, 0]) for w in (sherl().weights(x, torch.ones(1, 1, 2), p) for x in ([a, b], [a, a, b]))]
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f = figures["facts"]
    once, twice = f["twice"]
    return judge(
        [not_below(figures, "sherl", "ladder", what="R@1 no worse than LST"),
         not_below(figures, "sherl", "unipt", what="R@1 no worse than UniPT"),
         beats(figures, "sherl", "uniform", "R@1 with weights against redundancy above uniform weights"),
         fact(f["memory"]["sherl"]["peak"] < f["memory"]["lora"]["peak"],
              f"SHERL and LoRA: {c021.memories(f, 'sherl', 'lora')}")],
        [fact(f["graph"]["sherl"] == [f["late_layers"], 0],
              f"linear layers of blocks in the autograd graph: {f['graph']['sherl'][0]}, in the last block of each tower: "
              f"{f['late_layers']} (with LoRA {f['graph']['lora'][0]})"),
         fact(twice < once, f"a layer that comes twice has weight {twice:.3f} each time, {once:.3f} when it comes once")])
