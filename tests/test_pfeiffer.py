"""pfeiffer against its formula, worked out on plain models (with the norm behind the MLP: tests/test_interop.py)."""

import pytest
import torch

import luthier
from luthier import tiny
from luthier.errors import BadChain


@pytest.mark.parametrize("name, norm, mlp", [("gpt2", "transformer.h.{}.ln_2", "transformer.h.{}.mlp"),
                                             ("llama", "model.layers.{}.post_attention_layernorm", "model.layers.{}.mlp")])
def test_without_a_norm_behind_it_the_bottleneck_reads_the_sum(name, norm, mlp):
    batch, plain = tiny.batch(name), tiny.build(name)
    tuned = luthier.attach(tiny.build(name), "pfeiffer(width=5, act='tanh')").eval()
    g = torch.Generator().manual_seed(0)
    states = [p for p in tuned.states.values() if hasattr(p, "D")]
    with torch.no_grad():
        for p in states:
            assert not hasattr(p, "gain")
            for t in p.parameters():
                t.add_(0.2 * torch.randn(t.shape, generator=g))
    seen = {}
    for i, p in enumerate(states):
        plain.get_submodule(norm.format(i)).register_forward_pre_hook(lambda m, args, i=i: seen.__setitem__(i, args[0]))

        def add(module, args, h, i=i, p=p):        # h + U tanh(D (h + x) + d) + u
            s = h + seen[i]
            return h + torch.einsum("dw,btw->btd", p.U, torch.tanh(torch.einsum("wd,btd->btw", p.D, s) + p.d)) + p.u
        plain.get_submodule(mlp.format(i)).register_forward_hook(add)
    with torch.no_grad():
        want, got, base = plain(**batch).logits, tuned(**batch).logits, tiny.build(name)(**batch).logits
    mask = batch["attention_mask"].bool()
    assert (want - got)[mask].abs().max() < 2e-5 < 1e-1 < (want - base)[mask].abs().max()


def test_what_trains_and_what_is_refused():
    tuned = luthier.attach(tiny.build("bert"), "pfeiffer(width=6)")
    assert sum(p.numel() for _, p in tuned.trainable()) == 2 * (2 * 6 * 32 + 6 + 32)
    assert not any("gain" in k or "shift" in k for _, p in tuned.states.items() for k in p.stored())
    with pytest.raises(BadChain, match="gelu"):
        luthier.parse("pfeiffer(act='mish')")
