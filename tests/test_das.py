"""DAS: blocks that an adapter stands in for, and the bandit that finds them."""

import math

import pytest
import torch
from torch.nn.functional import layer_norm, relu

from luthier import attach, cost, parse, tiny
from luthier._compat import torchvision
from luthier.errors import DoesNotFit
from luthier.procedures.das import Bandit, das, skipping


def vit(layers=4):
    torchvision()
    import transformers as t
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wide = tiny.WIDTH | dict(num_hidden_layers=layers)
        return t.ViTForImageClassification(t.ViTConfig(**wide, **tiny.PIXELS, **tiny.DRY, num_labels=5)).eval()


def test_a_skipped_block_is_its_adapter():
    model, x = vit(), tiny.batch("vit")["pixel_values"]
    tuned = attach(model, "das(at='block.1.out block.3.out', width=6)").eval()
    for _, p in tuned.trainable():
        p.data.add_(0.1)
    with torch.no_grad():
        found, v = tuned(x).logits, model.vit
        with tuned.off():
            h = v.embeddings(x)
            for i, block in enumerate(v.layers if hasattr(v, "layers") else v.encoder.layer):
                p = next((p for p in tuned.states.values() if p.site_name == f"block.{i}.out"), None)
                out = block(h) if p is None else h + relu(layer_norm(h, (32,), p.g, p.s) @ p.D.T + p.d) @ p.U.T + p.u
                h = out[0] if isinstance(out, tuple) else out
            assert torch.allclose(model.classifier(v.layernorm(h)[:, 0]), found, atol=1e-5)
            base = model(x).logits
    assert sum(p.numel() for _, p in tuned.trainable()) == 2 * (2 * 6 * 32 + 6 + 3 * 32)
    tuned.detach()
    assert torch.equal(model(x).logits, base)


def test_flops_fall_by_the_blocks_that_are_gone():
    model, batch = vit(), tiny.batch("vit")
    one = {k: cost.cost(attach(model, f"das(at='{k}', width=4)"), batch=batch, rounds=1) for k in ("block.0.out", "block.1.out")}
    two = cost.cost(attach(vit(), "das(at='block.0.out block.1.out', width=4)"), batch=batch, rounds=1)
    a, base = one["block.0.out"].flops, one["block.0.out"].base_flops
    assert a < 0.85 * base and two.flops == base - 2 * (base - a)


@pytest.mark.parametrize("where", ("encoder.block.0.out", "decoder.block.0.out"))
def test_blocks_that_others_need_are_not_skipped(where):
    tuned = attach(tiny.build("t5"), f"das(at='{where}', width=4)")
    with pytest.raises(DoesNotFit, match="later blocks need"):
        tuned(**tiny.batch("t5"))
    tuned.detach()
    tuned = attach(tiny.build("t5"), "das(at='encoder.block.1.out decoder.block.1.out', width=4)")
    assert tuned(**tiny.batch("t5")).logits.shape == (3, 6, 64)


def test_generation_with_a_cache_is_that_without():
    batch, more = tiny.batch("llama"), dict(do_sample=False, max_new_tokens=6, pad_token_id=1)
    tuned = attach(tiny.build("llama"), "das(at='block.1.out', width=4)").eval()
    assert torch.equal(tuned.generate(**batch, **more), tuned.generate(**batch, **more, use_cache=False))
    tuned.detach()
    tuned = attach(tiny.build("llama"), "das(at='block.0.out', width=4)").eval()
    with pytest.raises(DoesNotFit, match="KV cache"):
        tuned.generate(**batch, **more)
    assert tuned.generate(**batch, **more, use_cache=False).shape[1] == 18


def test_only_blocks_with_attention():
    for model, at in ((tiny.build("resnet"), "block.1.out"), (vit(), "block.0.mlp.out")):
        with pytest.raises(DoesNotFit, match="skips whole blocks"):
            attach(model, f"das(at='{at}')")


# -- the search -------------------------------------------------------------------------------------------------------------

def test_preferences_by_hand():
    bandit = Bandit(3, 1, rate=2.0)
    bandit.r[:] = torch.tensor([0.0, 1.0, -1.0])
    bandit.learn([(0,), (1,)], [0.2, 1.2])
    v = math.exp(-0.2), math.exp(-1.2)
    mean, s = sum(v) / 2, 1 / (1 + math.exp(-1.0))
    assert bandit.r.tolist() == pytest.approx([2 * (v[0] - mean) * 0.25, 1 + 2 * (v[1] - mean) * s * (1 - s), -1.0])
    assert bandit.best() == [1]


def test_draws_differ_and_follow_the_policy():
    bandit = Bandit(4, 2, seed=3)
    assert len(set(bandit.draws(6))) == 6 == len(bandit.draws(50)) and all(len(set(d)) == 2 for d in bandit.draws(6))
    bandit.r[:] = torch.tensor([9.0, -9, -9, 9])
    many = [bandit.draw() for _ in range(200)]
    assert sum(d == (0, 3) for d in many) > 190


class Planted:
    """Each skipped block costs what is written here."""
    costs = (0.9, 0.1, 0.8, 0.05)

    def build(self, seed=0):
        return vit()

    def n_batches(self, split, size):
        return 8

    def batches(self, split, size, seed=0, epoch=0, shuffle=None, start=0):
        for k in range(start, 8):
            yield tiny.batch("vit", seed=k)

    def loss(self, model, batch):
        skipped = [p.site_name for p in model.states.values() if getattr(p, "skips", False)]
        return sum(self.costs[int(n.split(".")[1])] for n in skipped) + 0.0 * model(**batch).logits.sum()


def test_the_search_finds_what_costs_least():
    found = das(Planted(), 2, width=4, beside="houlsby(width=2, norms=False)", steps=60, turn=2, samples=3)
    assert found.skipped == ("block.1.out", "block.3.out") and found.tried == 72
    r = found.preferences
    assert min(r["block.1.out"], r["block.3.out"]) > max(r["block.0.out"], r["block.2.out"])
    assert parse(repr(found.chain)) == found.chain
    tuned = attach(vit(), found.chain).train()
    tuned(**tiny.batch("vit")).logits.square().mean().backward()
    assert all(p.grad is not None for _, p in tuned.trainable())         # nothing is left in blocks that do not run
    assert len([k for k in tuned.states if "houlsby" in k]) == 4


def test_what_makes_no_search_is_refused():
    for skip in (0, 4):
        with pytest.raises(DoesNotFit, match="names 4 blocks"):
            das(Planted(), skip)


def test_the_chain_of_a_set():
    assert repr(skipping(vit(), ["block.2.out"], 8)) == "das(at='block.2.out', width=8)"
