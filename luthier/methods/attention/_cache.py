"""Keys and values that all queries see, to and from peft, where they pose as a KV cache and so shift every position by n: under
rotary positions (R_{t+n} q)·k = (R_t q)·(R_{-n} k), so the keys are turned by n places; under others nothing makes up for it."""

import sys

import torch


def why(site):
    """Why peft's prefix is another one; "" where turning its keys makes it the same."""
    if not (site.stack.causal and site.stack.rope) or site.tower:
        return ("peft's prefix poses as a KV cache, so every position is shifted by n, and learned or relative positions of "
                "shifted places are others. Only under rotary positions is that shift a turn of the prefix's keys.")
    kind = getattr(_rotary(site), "rope_type", "default")
    return "" if _rotary(site) and kind in ("default", "linear", "llama3") else f"Rotary positions {kind!r} are not known."


def _rotary(site):
    return next((m for m in site.stack.module.modules() if hasattr(m, "inv_freq") and hasattr(m, "attention_scaling")), None)


def turned(K, site, by):                   # K: (n, Hkv, Dh), by `by` places, as the model's own code turns keys
    rotary, apply = _rotary(site), sys.modules[type(site.module).__module__].apply_rotary_pos_emb
    k = K.transpose(0, 1)[None].to(rotary.inv_freq.device)             # (1, Hkv, n, Dh)
    cos, sin = rotary(k, torch.tensor([[abs(by)]], device=k.device))
    return apply(k, k, cos, sin if by > 0 else -sin)[1][0].transpose(0, 1)


def write(m, parts):                       # -> (n, layers · 2 · Hkv · Dh): K and V of each layer
    rows = []
    for p, site in parts:
        K, V = (p.K, p.V) if not m.reparam else m.made(p)
        rows += [turned(K.detach(), site, m.n).flatten(1), V.detach().flatten(1)]
    _, H, Dh = parts[0][1].heads
    return torch.cat(rows, 1), dict(token_dim=H * Dh, num_attention_heads=H, encoder_hidden_size=H * Dh)


def read(t, sites):
    n, (_, H, Dh) = len(t), sites[0].heads
    both = t.view(n, len(sites), 2, H, Dh).unbind(1)
    return [dict(K=turned(kv[:, 0], s, -n).contiguous(), V=kv[:, 1].contiguous()) for s, kv in zip(sites, both, strict=True)]
