"""Every benchmark in one run: `python -m benchmarks [NAME ...]`, or `make bench`.

Contenders take turns in one process; every figure that is judged is a ratio from one run. Writes results/NAME.json, and
docs/benchmarks.md from all the results there are. On a CUDA machine the training sizes run there too.
"""

import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from . import inference, rack, training, weights
from .page import page, plot

HERE = Path(__file__).parent
ALL = {"step": training.step, "sizes": training.sizes, "large": training.large, "activations": training.activations,
       "ladder": training.ladder, "unmerged": inference.unmerged, "attaching": inference.attaching,
       "tokens": inference.merged_tokens, "gptq": weights.quantise, "mixed": rack.mixes, "loading": rack.traffic,
       "merge": weights.merge}


def machine():
    return {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "processor": platform.machine(),
            "torch": torch.__version__,
            "bf16 products": torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "peft": version("peft")}


def stored():
    return {p.stem: json.loads(p.read_text("utf-8")) for p in sorted((HERE / "results").glob("*.json"))}


def main(names):
    for name in names or ALL:
        if name not in ALL:
            sys.exit(f"No benchmark is called {name!r}. There are: {', '.join(ALL)}.")
        start = time.perf_counter()
        rows = ALL[name]()
        if not rows:
            print(f"{name}: not on this machine", flush=True)
            continue
        record = {"name": name, "machine": machine(), "seconds": round(time.perf_counter() - start, 1), "rows": rows}
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / f"{name}.json").write_text(json.dumps(record, indent=1, default=float) + "\n", "utf-8")
        for r in rows:
            print(f"{'ok  ' if r['reached'] else 'MISS'} {r['ours']:8.3f} (at most {r['bound']:.3f}, peer "
                  f"{'-' if r['peer'] is None else format(r['peer'], '.3f')})  {r['what']}", flush=True)
    (HERE.parent / "docs" / "benchmarks.md").write_text(page(stored()), "utf-8")
    (HERE.parent / "docs" / "benchmarks.svg").write_text(plot(stored()), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
