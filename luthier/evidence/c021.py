"""UniPT on tiny-clip and image-text retrieval. Diao et al., 2023, arXiv:2308.14316. The id B173 names the same system.
Every arm trains the two projections, too: alone they are the probe of the last layer."""

from luthier.attach import attach
from luthier.evidence import _bench, _clips, beats, fact, judge

SYSTEM, METHODS, SEEDS, MINUTES = "C021", ("unipt",), (0, 1, 2), 15
CLAIM = "No gradient into the backbone, peak memory at most LST's, R@1 above a last-layer probe and LST at similar parameters"
BASELINE = "probe: the projections alone; ladder (LST) and lora at about as many parameters"
MODEL = "tiny-clip"
DATA = "scenes:retrieval: 800 train, 200 validation, 300 test pairs of scene and caption"
STEPS, BATCH, RATES = 150, 32, (1e-4, 5e-4, 3e-3, 2e-2)
PROBE = "full(at='visual_projection.weight text_projection.weight')"
SIDE, REDUCED = "ladder(reduce=8)", (1, 2, 3, 4, 6, 8)
UNIPT = [f"unipt(reduce={r})" for r in REDUCED]
LORA = [f"lora(rank={r}, at='attn.q attn.v')" for r in (1, 2, 4, 8, 16, 32)]


def chains(task, methods):
    """{name: chain} with the hyperparameter, of those offered, that spends about what SIDE spends."""
    def spent(chain):
        return sum(p.numel() for _, p in attach(task.build(0), chain).trainable())

    aim, found = spent(SIDE), {"probe": PROBE, "ladder": f"{SIDE} >> {PROBE}"}
    for name, offered in methods.items():
        best = min(offered, key=lambda c: abs(spent(c) - aim))
        found[name] = f"{best} >> {PROBE}"
    return found


def measured(task, chains):
    """Memory, and layers in the graph, of one training step of every chain."""
    batch, memory, graph = _bench.first(task, size=BATCH), {}, {}
    for name, chain in chains.items():
        tuned = attach(task.build(0), chain, seed=0)
        memory[name], graph[name] = _bench.memory(tuned, task, batch), _clips.in_graph(tuned, task, batch)
    return {"memory": memory, "graph": graph, "chains": chains}


def run(seeds, task=None, steps=STEPS, rates=RATES):
    task = task or _bench.task("scenes:retrieval", MODEL, 800, 200, 300)
    arms = chains(task, {"unipt": UNIPT, "lora": LORA})
    trained = {k: v for k, v in arms.items() if k != "lora"}
    per_seed, facts = _bench.arms(task, trained, seeds, steps, BATCH, rates, head=False)
    return {"per_seed": per_seed, "facts": facts | measured(task, arms)}


def memories(f, a, b):
    a, b = f["memory"][a], f["memory"][b]
    return (f"peak memory of a training step {a['peak'] / 2**20:.1f} against {b['peak'] / 2**20:.1f} MiB, kept for backward "
            f"{a['saved'] / 2**20:.1f} against {b['saved'] / 2**20:.1f} MiB")


def verdict(figures):
    f = figures["facts"]
    return judge(
        [beats(figures, "unipt", "probe", "R@1 above the last-layer probe"),
         beats(figures, "unipt", "ladder", "R@1 above LST"),
         fact(f["memory"]["unipt"]["peak"] <= f["memory"]["ladder"]["peak"], f"UniPT and LST: {memories(f, 'unipt', 'ladder')}")],
        [fact(f["graph"]["unipt"] == [0, 0] and f["graph"]["lora"][0] > 0,
              f"backbone layers in the autograd graph: {f['graph']['unipt'][0]} (with LoRA {f['graph']['lora'][0]}); weights of "
              f"the model with a gradient: {f['graph']['unipt'][1]}")])
