"""What the benchmarks share: shapes, contenders run in turns, and a row of the table as a plain dict."""

import statistics

import torch

from luthier import cost
from luthier._compat import torchvision

torchvision()

PEER_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(width=512, layers=6, vocab=8000, seed=0, dtype=torch.float32):
    """A Llama shape with random weights, the same ones each time; heads of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    heads = max(1, width // 64)
    config = LlamaConfig(vocab_size=vocab, hidden_size=width, intermediate_size=-(-width * 8 // 3 // 32) * 32, use_cache=False,
                         num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads)
    return LlamaForCausalLM(config).to(dtype)


def ids(rows, tokens, vocab=8000, seed=1):
    return torch.randint(2, vocab, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def clock(contenders, rounds):
    """{name: function} -> {name: [seconds]}, run in turns; the first round warms up and is left out."""
    columns = zip(*cost.turns(list(contenders.values()), rounds + 1)[1:], strict=True)
    return dict(zip(contenders, columns, strict=True))


def ratio(times, name, base):
    """Median over rounds of a contender's time over the base's in the same round, with the quartiles."""
    r = sorted(a / b for a, b in zip(times[name], times[base], strict=True))
    return dict(median=statistics.median(r), low=r[len(r) // 4], high=r[-1 - len(r) // 4])


def row(what, ours, bound, peer=None, low=None, high=None, **detail):
    """One line of the table: a ratio (or figure) of ours, what it must not exceed, the peer's in the same run, and whatever else
    was measured. Whether the bound is reached is worked out here and nowhere else."""
    return dict(what=what, ours=ours, low=low, high=high, peer=peer, bound=bound, reached=ours <= bound, **detail)


def timed(what, times, name, base, bound, peer=None, **detail):
    """A row from `clock`: the ratio of `name` to `base`, beside the peer's."""
    r = ratio(times, name, base)
    milliseconds = {k: 1e3 * statistics.median(v) for k, v in times.items()}
    return row(what, r["median"], bound, peer and ratio(times, peer, base)["median"], r["low"], r["high"],
               milliseconds=milliseconds, **detail)
