"""The rack against peft's mixed batches and load_adapter, in one process, turn by turn."""

import shutil
import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch

import luthier
from luthier import cost

from .common import clock, ids, llama, row

CHAINS = {"lora": "lora(rank=8, at='linear')", "dora": "dora(rank=8, at='linear')", "ia3": "ia3()",
          "ssf": "ssf(at='linear norm')", "randlora": "randlora(at='linear')", "houlsby": "houlsby()", "prefix": "prefix()"}
FULL = dict(width=512, layers=6, vocab=4096)


def shaken(named, k):
    """Trained tensors away from their start, so that no adapter is the identity."""
    g = torch.Generator().manual_seed(k)
    for _, p in named:
        p.data += 0.02 * torch.randn(p.shape, generator=g).to(p)


def folders(chain, n, root, shape):
    """n tuned states of a chain, as save() writes them."""
    model, made = llama(**shape).eval(), []
    tuned = luthier.attach(model, chain)
    for k in range(n):
        shaken(tuned.trainable(), k)
        made.append(tuned.save(Path(root) / f"state{k}"))
    return made


def summary(t):
    """[seconds] -> {"median", "low", "high", "n"}"""
    t = sorted(t)
    return dict(median=statistics.median(t), low=t[len(t) // 4], high=t[-1 - len(t) // 4], n=len(t))


@contextmanager
def racked(method, n, shape):
    """(a rack with n states a0, a1, ... of the method's chain, the first of them attached alone)"""
    with tempfile.TemporaryDirectory() as root:
        made, rack = folders(CHAINS[method], n, root, shape), luthier.Rack(llama(**shape).eval(), "16GB")
        for k, f in enumerate(made):
            rack.load(f"a{k}", f)
        yield rack, luthier.load(llama(**shape).eval(), made[0])


def ratios(contenders, rounds, **facts):
    """Summaries of "mixed", "one" and "attached", and the first over the others."""
    got = {name: summary(t) for name, t in clock(contenders, rounds).items()}
    return dict(**facts, **got, ratio=got["mixed"]["median"] / got["one"]["median"],
                ratio_to_attached=got["mixed"]["median"] / got["attached"]["median"])


def mixed(method, rows=16, tokens=128, rounds=7, shape=FULL):
    """One forward of `rows` rows of different adapters over one of a single adapter: by the rack, and by that adapter alone."""
    with racked(method, rows, shape) as (rack, alone), torch.no_grad():
        batch, every = dict(input_ids=ids(rows, tokens, shape["vocab"])), [f"a{k}" for k in range(rows)]
        fns = {"mixed": lambda: rack(batch, names=every), "one": lambda: rack(batch, names=["a0"] * rows),
               "attached": lambda: alone(**batch), "base": lambda: rack(batch, names=[None] * rows)}
        work = {name: cost.flops(fn) for name, fn in fns.items()}
        return ratios(fns, rounds, method=method, rows=rows, tokens=tokens, flops=work) | {"served": rack.cost()["kinds"][0]}


def decode(method, rows=16, new=32, rounds=5, shape=FULL):
    """The same in generation with a KV cache, 8 tokens of prompt and `new` more."""
    with racked(method, rows, shape) as (rack, alone):
        given = dict(input_ids=ids(rows, 8, shape["vocab"]), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                     pad_token_id=0)
        return ratios({"mixed": lambda: rack.generate(names=[f"a{k}" for k in range(rows)], **given),
                       "one": lambda: rack.generate(names=["a0"] * rows, **given),
                       "attached": lambda: alone.generate(**given)}, rounds, method=method, rows=rows, new=new)


def loads(n=40, method="lora", shape=FULL):
    """Milliseconds of each of n loads into one rack, and of evicting nothing: states stay on disk until they are used."""
    with tempfile.TemporaryDirectory() as root:
        first, = folders(CHAINS[method], 1, root, shape)
        made = [first]
        for k in range(1, min(n, 40)):
            made.append(shutil.copytree(first, Path(root) / f"copy{k}"))
        rack, each = luthier.Rack(llama(**shape).eval(), "16GB"), []
        for k in range(n):
            each.append(1e3 * cost.clock(lambda: rack.load(f"a{k}", made[k % len(made)])))           # noqa: B023
        return dict(n=n, method=method, each_ms=each, first_ms=each[0], last_ms=each[-1], total_s=sum(each) / 1e3,
                    flat=statistics.median(each[-10:]) / statistics.median(each[1:11]))


def switching(n=20, method="lora", rounds=50, shape=FULL):
    """Milliseconds to hand the base from one adapter in memory to another."""
    with tempfile.TemporaryDirectory() as root:
        rack = luthier.Rack(llama(**shape).eval(), "16GB")
        for k, f in enumerate(folders(CHAINS[method], n, root, shape)):
            rack.load(f"a{k}", f)
        for name in rack.names:                            # all in memory
            with rack.serving(name):
                pass
        times = []
        for k in range(rounds):
            start = time.perf_counter()
            with rack.serving(f"a{k % n}"):
                times.append(1e3 * (time.perf_counter() - start))
        return dict(n=n, method=method, ms=summary(times))


def peft_folders(n, root, shape, dora=False):
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=dora)
    model, made = peft.get_peft_model(llama(**shape).eval(), config), []
    for k in range(n):
        shaken([(m, p) for m, p in model.named_parameters() if p.requires_grad], k)
        model.save_pretrained(Path(root) / f"peft{k}")
        made.append(Path(root) / f"peft{k}")
    return made


def peers(rows=16, tokens=128, n=40, rounds=5, shape=FULL):
    """peft's own mixed batch (adapter_names=) and load_adapter beside the rack's, on the same shape and rank."""
    import peft

    with tempfile.TemporaryDirectory() as root:
        theirs, each, ours_each = peft_folders(n, root, shape), [], []
        model = peft.PeftModel.from_pretrained(llama(**shape).eval(), theirs[0], adapter_name="a0").eval()
        ours = folders(CHAINS["lora"], n, root, shape)
        rack = luthier.Rack(llama(**shape).eval(), "16GB")
        rack.load("a0", ours[0])
        for k in range(1, n):                              # turn by turn
            each.append(1e3 * cost.clock(lambda: model.load_adapter(theirs[k], adapter_name=f"a{k}")))         # noqa: B023
            ours_each.append(1e3 * cost.clock(lambda: rack.load(f"a{k}", ours[k])))                          # noqa: B023
        model.eval()
        batch, names = dict(input_ids=ids(rows, tokens, shape["vocab"])), [f"a{k % n}" for k in range(rows)]
        with torch.no_grad():
            times = clock({"peft_mixed": lambda: model(**batch, adapter_names=names),
                         "peft_one": lambda: model(**batch, adapter_names=["a0"] * rows), "peft_plain": lambda: model(**batch),
                         "rack_mixed": lambda: rack(batch, names=names),
                         "rack_one": lambda: rack(batch, names=["a0"] * rows)}, rounds)
        got = {name: summary(t) for name, t in times.items()}

        def switch():
            for k in range(10):
                model.set_adapter(f"a{k % n}")

        return dict(rows=rows, tokens=tokens, peft=peft.__version__, **got,
                    peft_ratio=got["peft_mixed"]["median"] / got["peft_plain"]["median"],
                    rack_ratio=got["rack_mixed"]["median"] / got["rack_one"]["median"],
                    loads=dict(n=n, peft_ms=each, rack_ms=ours_each, peft_last_ms=each[-1], rack_last_ms=ours_each[-1],
                               peft_total_s=sum(each) / 1e3, rack_total_s=sum(ours_each) / 1e3),
                    peft_switch_ms=100 * cost.clock(switch))


def mixes(methods=tuple(CHAINS), rows=16, tokens=128, rounds=5):
    """Rows of as many adapters over rows of one: a forward pass, and generation with a KV cache."""
    found = []
    for method in methods:
        for what, got in ((f"forward {rows} x {tokens}", mixed(method, rows, tokens, rounds)),
                          (f"32 tokens for {rows} prompts", decode(method, rows, rounds=max(3, rounds // 2)))):
            more = f"multiply-adds, counted: {got['flops']['mixed'] / got['flops']['one']:.2f}" if "flops" in got else ""
            found.append(row(f"{rows} adapters in {rows} rows over one adapter: {method}, {what}", got["ratio"], 1.5, note=more,
                             detail=got))
    return found


def traffic(n=40, many=1000):
    """Loading and switching, beside peft; a mixed batch of LoRA, beside peft's."""
    beside, lots, switch = peers(n=n), loads(many), switching()
    p = beside["loads"]
    return [row("16 LoRAs in 16 rows over one: forward 16 x 128", beside["rack_ratio"], 1.5, beside["peft_ratio"]),
            row(f"milliseconds to load adapter number {n}", p["rack_last_ms"], 20, p["peft_last_ms"]),
            row(f"seconds for {n} loads", p["rack_total_s"], 0.8, p["peft_total_s"]),
            row(f"the last of {many} loads over the first ones", lots["flat"], 1.5),
            row("milliseconds to switch", switch["ms"]["median"], 1.0, beside["peft_switch_ms"])]
