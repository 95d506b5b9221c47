"""SVFit on MiniLM and TREC: only singular values train. Sun et al., 2024, arXiv:2409.05926."""

from luthier.evidence import _bench, beats, fact, judge

SYSTEM, METHODS, SEEDS, MINUTES = "B092", ("svfit",), (0, 1, 2), 6
CLAIM = "Exactly the base at init; r trained numbers a matrix, a sixteenth of LoRA's; better than a linear probe; exact merge"
BASELINE = "linear probe; lora(rank=8) at the same matrices is shown beside it"
MODEL, DATA = "minilm (22.7M, 384 wide)", "TREC question types: 400 train, 150 validation, 400 test rows"
AT = "attn.q attn.v"


def run(seeds):
    task = _bench.task("trec", "minilm")
    chains = {"probe": "probe()", "svfit": f"svfit(rank=384, at={AT!r})", "lora": f"lora(rank=8, at={AT!r})"}
    spent = {}

    def after(name, seed, tuned):
        spent[name] = _bench.body(tuned)
        return {}

    per_seed, facts = _bench.arms(task, chains, seeds, steps=75, after=after)
    tuned = _bench.attach(task.build(0), "svfit(rank=64)")
    facts |= {"method_parameters": spent, "trained_a_matrix": [p.numel() for _, p in tuned.trainable()], "rank": 64}
    facts["mechanics"] = _bench.mechanics(task.build(0), _bench.first(task), chains["svfit"], by=0.5)
    return {"per_seed": per_seed, "facts": facts}


def verdict(figures):
    f = figures["facts"]
    ratio = f["method_parameters"]["lora"] / f["method_parameters"]["svfit"]
    return judge(
        [beats(figures, "svfit", "probe", "accuracy above the linear probe")],
        [fact(set(f["trained_a_matrix"]) == {f["rank"]}, f"rank {f['rank']} trains {f['trained_a_matrix'][0]} numbers a matrix"),
         fact(ratio >= 16, f"{ratio:.1f} times fewer trained numbers than lora(rank=8), needed 16"),
         *_bench.exact(f["mechanics"])])
