"""A results.json made by hand: ten ways, three seeds, as the demo would write it."""

WAYS = {  # chain: (scores, trained, stored, memory, step, latency, merged)
    "probe()": ([.912, .918, .909], 3_850, 17_000, 131e6, .31, 1.00, True),
    "full()": ([.958, .951, .966], 22_060_810, 88_300_000, 460e6, 1.0, 1.00, True),
    "lora(rank=8)": ([.961, .964, .957], 298_762, 1_210_000, 212e6, .62, 1.00, True),
    "dora()": ([.962, .960, .957], 307_978, 1_260_000, 251e6, .88, 1.00, True),
    "houlsby()": ([.955, .959, .952], 1_193_290, 4_800_000, 219e6, .65, 1.11, False),
    "adaptformer()": ([.957, .951, .949], 596_746, 2_400_000, 210e6, .61, 1.07, False),
    "vpt()": ([.921, .935, .929], 49_930, 205_000, 302e6, .92, 1.42, False),
    "ssf()": ([.957, .949, .955], 157_450, 640_000, 240e6, .71, 1.00, True),
    "bitfit()": ([.943, .941, .949], 61_450, 260_000, 196e6, .58, 1.00, True),
    "ia3()": ([.931, .940, .933], 31_498, 131_000, 199e6, .60, 1.00, True),
    "ladder(reduce=8)": ([.935, .929, .938], 450_000, 1_900_000, 139e6, .38, 1.22, False),
    "houlsby(width=32) >> lora(rank=4) >> ssf()": ([.965, .962, .967], 1_050_000, 4_300_000, 262e6, .83, 1.12, False),
}


def document(ways=WAYS, higher=True, seeds=(0, 1, 2), metric="accuracy"):
    entries = {}
    for chain, (scores, trained, stored, memory, step, latency, merged) in ways.items():
        for seed, score in zip(seeds, scores, strict=False):
            entries[f"{chain}/{seed}"] = {"job": {"kind": "score", "chain": chain, "seed": seed, "lr": 1e-3}, "result": {
                "score": score, "metrics": {metric: score}, "trained": trained, "stored": stored, "steps": 75, "seconds": 9.0}}
        if memory:
            entries[f"{chain}/cost"] = {"job": {"kind": "cost", "chain": chain}, "result": {
                "memory": memory, "step": step, "step_seconds": .2, "latency": latency, "latency_seconds": .01, "merged": merged,
                "threads": 2}}
    return {"format": 1, "command": "luthier demo --out demo-out", "plan": list(entries), "entries": entries,
            "setting": dict(data="digits", model="dinov2-s", methods=list(ways), seeds=list(seeds), epochs=3, batch_size=16,
                            precision="no",
                            lr=dict.fromkeys(ways, 1e-3), grid=None),
            "task": dict(kind="image-classification", metric=metric, higher=higher, sizes=dict(train=400, val=144, test=359),
                         notes=["test: 359 rows drawn from train (seed 0)"]),
            "machine": dict(processor="a processor", cores=2, threads=2, gpu=None, system="Linux"),
            "versions": dict(python="3.11.7", luthier="0.1.0", torch="2.13.0")}
