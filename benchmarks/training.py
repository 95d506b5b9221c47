"""A training step over the frozen model's own, what autograd keeps, and the peak of a step."""

import copy
import statistics
from collections import Counter

import torch

import luthier
from luthier import cost

from .common import PEER_LINEARS, clock, ids, llama, row, timed

LIMIT = "the frozen model's forward pass and its gradient to the embeddings"


def _attached(model, chain):
    return luthier.attach(model, chain).train()


def _ours(base, chain):
    return _attached(copy.deepcopy(base), chain)


def _wrapped(model, **options):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=PEER_LINEARS, **options)).train()


def _peer(base, **options):
    return _wrapped(copy.deepcopy(base), **options)


def _step(model, batch):
    trained = [p for p in model.parameters() if p.requires_grad]

    def step():
        model(input_ids=batch, labels=batch).loss.backward()
        for p in trained:
            p.grad = None
    return step


def _limit(base, batch):
    x = base.get_input_embeddings()(batch).detach().requires_grad_(True)

    def step():
        base(inputs_embeds=x, labels=batch).loss.backward()
        x.grad = None
    return step


def _thin_alone(model, tokens, rank):
    """Seconds of the six products of rank r that each updated layer needs, one after the other and with nothing around them."""
    shapes, total = Counter((s.d_in, s.d_out) for s in luthier.sites(model) if s.layout == "linear" and s.role != "head"), 0.0
    for (d_in, d_out), n in shapes.items():
        x, g, y, h, A, Bt = (torch.randn(s) for s in ((tokens, d_in), (tokens, d_out), (tokens, d_out), (tokens, rank),
                                                      (rank, d_in), (rank, d_out)))
        products = [lambda: x @ A.T, lambda: y.addmm_(h, Bt), lambda: g @ Bt.T, lambda: h.T @ g, lambda: h.T @ x,        # noqa: B023
                    lambda: x.addmm_(h, A)]                                                                            # noqa: B023
        total += n * sum(cost.latency(products, 15))
    return total


KINDS = {"products": ("mm", "addmm", "addmm_", "bmm"), "element by element, what is made again included": (
    "mul", "add", "add_", "silu", "gelu", "pow", "mean", "rsqrt", "sub", "mul_"), "copies": ("copy_", "cat", "fill_", "clone")}


def _more(fn, than, rounds=9):
    """{kind of operator: milliseconds of fn() above than()'s, in themselves}: PyTorch's profiler, in turns, the median round."""
    from torch.profiler import ProfilerActivity, profile

    kinds, found = {f"aten::{op}": kind for kind, ops in KINDS.items() for op in ops}, []
    for _ in range(rounds):
        more = dict.fromkeys([*KINDS, "the rest (Python, the engine of autograd)"], 0.0)
        for run, sign in ((fn, 1), (than, -1)):
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                run()
            for e in seen.key_averages():
                more[kinds.get(e.key, [*more][-1])] += sign * e.self_cpu_time_total / 1e3
        found.append(more)
    return {kind: statistics.median(more[kind] for more in found) for kind in found[0]}


def step(rounds=21, width=512, layers=6, rows=4, tokens=128, rank=8, dtype=torch.float32, dropouts=(0.0, 0.05)):
    """Time of a step with LoRA on all linears over the frozen limit; dropout 0 and 0.05; with and without recipes."""
    base, batch, found = llama(width, layers, dtype=dtype).requires_grad_(False).train(), ids(rows, tokens), []
    size = f"LoRA r{rank}, Llama {width} x {layers}, {rows} x {tokens}, {str(dtype).removeprefix('torch.')}"
    for dropout in dropouts:
        ours = _ours(base, f"lora(rank={rank}, at='linear -head', dropout={dropout})")
        kept = _ours(base, f"lora(rank={rank}, at='linear -head', dropout={dropout})")
        kept.lean = False
        fns = {"limit": _limit(base, batch), "luthier": _step(ours, batch), "all kept": _step(kept, batch),
               "peft": _step(_peer(base, r=rank, lora_dropout=dropout), batch)}
        times = clock(fns, rounds)
        peer = timed("", times, "peft", "limit", 0)["ours"]
        bound = 1.10 if not dropout and dtype == torch.float32 else 1 + (peer - 1) / 2
        what = f"step over the frozen limit: {size}" + f", dropout {dropout}" * bool(dropout)
        thin = _thin_alone(base, rows * tokens, rank) / statistics.median(times["limit"]) if dtype == torch.float32 else None
        more = ", ".join(f"{v:.1f} ms {k}" for k, v in _more(fns["luthier"], fns["limit"]).items())
        note = f"above the limit's {1e3 * statistics.median(times['limit']):.0f} ms a profiler sees {more}"
        note += f"; the thin products, with nothing around them, take {thin:.3f} of the limit" if thin else ""
        found.append(timed(what, times, "luthier", "limit", bound, "peft", limit=LIMIT, note=note,
                           all_kept=timed("", times, "all kept", "limit", 0)["ours"]))
    return found


def sizes():
    """The same step at other sizes, ranks and lengths; in bf16 where the processor has matrix tiles for it."""
    others = [dict(width=384, layers=12), dict(width=768, layers=4), dict(rank=4), dict(rank=64), dict(tokens=16),
              dict(tokens=512)]
    if torch.cpu._is_amx_tile_supported():
        others.append(dict(dtype=torch.bfloat16, dropouts=(0.0, 0.05)))
    return [r for other in others for r in step(**dict(rounds=9, dropouts=(0.0,)) | other)]


def large(rounds=9, rows=1, tokens=1024, rank=8, dtype=torch.bfloat16, device="cuda", **config):
    """The step of a Llama of 7B random weights on a GPU over the frozen limit, and the allocator's peak. Nothing without one."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    if not torch.cuda.is_available() and device == "cuda":
        return []
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(LlamaConfig(use_cache=False, **config), dtype=dtype).requires_grad_(False).train()
    batch, same = ids(rows, tokens, base.config.vocab_size).to(device), {id(p): p for p in base.parameters()}
    ours, peer = (copy.deepcopy(base, dict(same)) for _ in range(2))                   # three models over the same weights
    fns = {"limit": _limit(base, batch), "luthier": _step(_attached(ours, f"lora(rank={rank}, at='linear -head')"), batch),
           "peft": _step(_wrapped(peer, r=rank), batch)}
    times, peak = clock(fns, rounds), {}
    for name, fn in fns.items() if device == "cuda" else ():
        torch.cuda.reset_peak_memory_stats()
        fn()
        peak[name] = torch.cuda.max_memory_allocated()
    what = (f"step over the frozen limit: LoRA r{rank}, Llama {base.num_parameters() / 1e9:.2g}B, {rows} x {tokens}, "
            f"{str(dtype).removeprefix('torch.')}")
    figures = [f"{name} {1e3 * statistics.median(t):.0f} ms" + f", peak {peak.get(name, 0) / 2**30:.1f} GiB" * (name in peak)
               for name, t in times.items()]
    return [timed(what, times, "luthier", "limit", 1.10, "peft", limit=LIMIT, bytes=peak, note="; ".join(figures))]


def activations(width=256, layers=4, rows=4, tokens=128, rank=8):
    """Bytes that autograd keeps for a step, over full tuning's in plain PyTorch."""
    base, batch = llama(width, layers, vocab=400), ids(rows, tokens, 400)

    def kept(model):
        held = [*model.parameters(), *model.buffers(), batch]
        return cost.saved(lambda: model.train()(input_ids=batch, labels=batch).loss, held)

    full, found = kept(copy.deepcopy(base).requires_grad_(True)), []
    at = "at='linear -head'"
    for what, chain, bound, peer in (
            ("LoRA", f"lora(rank={rank}, {at})", 0.65, dict(r=rank)),
            ("LoRA, dropout 0.05", f"lora(rank={rank}, {at}, dropout=0.05)", 0.67, dict(r=rank, lora_dropout=0.05)),
            ("DoRA", f"dora(rank={rank}, {at})", 0.75, dict(r=rank, use_dora=True))):
        found.append(row(f"kept activations over full tuning: {what} r{rank}, {width} x {layers}",
                         kept(_ours(base, chain)) / full, bound, kept(_peer(base, **peer)) / full, bytes_full=full))
    return found


def ladder(width=512, layers=6, rows=16, tokens=128):
    """Peak memory of a whole training step (weights, gradients, AdamW, activations) of `ladder` over full tuning and LoRA."""
    base, batch = llama(width, layers, vocab=400), ids(rows, tokens, 400)

    def peak(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)

        def step():
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        step()
        state = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
        return cost.peak(step, [*model.parameters(), *model.buffers(), batch, *state])

    side, lora = peak(_ours(base, "ladder()")), peak(_ours(base, "lora(at='linear -head')"))
    full = peak(copy.deepcopy(base).requires_grad_(True).train())
    size = f"Llama {width} x {layers}, {rows} x {tokens}"
    return [row(f"peak memory of a step, ladder over full tuning: {size}", side / full, 0.31, bytes=dict(ladder=side, full=full)),
            row(f"peak memory of a step, ladder over LoRA: {size}", side / lora, 0.5, bytes=dict(ladder=side, lora=lora))]
