"""Segmentation by text: the task, towers that a model runs without gradients, and VLSM-Adapter."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, relu

from luthier import attach, check, tiny
from luthier.errors import DoesNotFit
from luthier.thaw import frozen

DENSE, SHALLOW = "vlsm_dense(width=6, cond=4)", "vlsm_shallow(width=6, cond=4)"


@pytest.fixture
def seg():
    return tiny.build("clipseg"), tiny.batch("clipseg")


def bare(model, batch, chain=None, tuned=None):
    """CLIPSeg step by step, with the adapters where the authors' code has them; nothing of it runs without gradients."""
    st = {k.partition("@")[2]: p for k, p in tuned.states.items()} if tuned else {}
    clip, layers = model.clip, model.config.extract_layers

    def a(h, name):
        p = st.get(name)
        return h if p is None else h + relu(linear(relu(h @ p.W1.T + p.b1), p.W2, p.b2))

    def tower(h, blocks, name, **mask):
        kept = []
        for i, b in enumerate(blocks):
            h = h + a(b.self_attn(b.layer_norm1(h), **mask)[0], f"{name}/block/{i}/attn/out")
            h = h + a(b.mlp(b.layer_norm2(h)), f"{name}/block/{i}/mlp/out")
            kept.append(h)
        return kept
    v = clip.vision_model
    seen = tower(v.pre_layrnorm(v.embeddings(batch["pixel_values"])), v.encoder.layers, "vision", attention_mask=None)
    t, ids = clip.text_model, batch["input_ids"]
    T = ids.shape[1]
    causal = torch.full((T, T), -torch.inf).triu(1)[None, None].expand(len(ids), 1, T, T)
    told = tower(t.embeddings(ids), t.encoder.layers, "text", attention_mask=causal)
    end = range(len(ids)), (ids == 3).int().argmax(1)
    c = a(clip.text_projection(t.final_layer_norm(told[-1])[end]), "clip/text_projection/weight")
    if chain == SHALLOW:
        n = len(layers)
        c = c + sum(a(told[e][end], f"text/block/{e}/out") for e in layers)
        seen = {e: a(seen[e], f"decoder/reduces/{n - 1 - k}/weight") for k, e in enumerate(layers)}
    return model.decoder([seen[e] for e in layers], c).logits


def test_bare_is_the_model(seg):
    model, batch = seg
    assert torch.allclose(bare(model, batch), model(**batch).logits, atol=1e-5)


@pytest.mark.parametrize("chain", (DENSE, SHALLOW))
def test_adapters_sit_where_the_authors_have_them(seg, chain):
    model, batch = seg
    tuned = attach(model, chain).eval()
    for _, p in tuned.trainable():
        p.data.add_(0.1)
    with torch.no_grad():
        found = tuned(**batch).logits
        with tuned.off():
            assert torch.allclose(bare(model, batch, chain, tuned), found, atol=1e-4)
            base = model(**batch).logits
    assert (found - base).abs().max() > 1e-2
    tuned.detach()
    assert torch.equal(model(**batch).logits, base)


@pytest.mark.parametrize("chain", (DENSE, SHALLOW))
def test_gradients_are_those_of_a_model_that_never_turns_them_off(seg, chain):
    model, batch = seg
    tuned = attach(model, chain).train()
    for _, p in tuned.trainable():
        p.data.add_(0.1)
    tuned(**batch).logits.square().mean().backward()
    mine = {n: p.grad.clone() for n, p in tuned.trainable()}
    tuned.zero_grad()
    with tuned.off():
        bare(model, batch, chain, tuned).square().mean().backward()
    for n, p in tuned.trainable():
        assert torch.allclose(mine[n], p.grad, atol=1e-5, rtol=1e-3), n
    learns = [n for n, g in mine.items() if g.abs().max() > 0]
    assert all(any(place in n for n in learns) for place in ("block/0", "text", "text_projection", "reduces")[:3 + (chain == SHALLOW)])


def test_numbers_by_hand(seg):
    model, batch = seg
    tuned = attach(model, DENSE)
    places = 2 * 2 * 2                     # two towers, layers 0 and 1 of three (the decoder reads up to 2), two a layer
    assert sum(p.numel() for _, p in tuned.trainable()) == places * (2 * 6 * 32 + 6 + 32) + 2 * 4 * 32 + 4 + 32
    tuned.detach()
    tuned = attach(model, SHALLOW)
    assert sum(p.numel() for _, p in tuned.trainable()) == 6 * (2 * 6 * 32 + 6 + 32) + 2 * 4 * 32 + 4 + 32


@pytest.mark.parametrize("chain", ("vlsm_dense(width=6, cond=0)", "vlsm_shallow(width=6, cond=0)",
                                   "vlsm_dense(width=6, at='vision.attn.out vision.mlp.out')",
                                   "vlsm_shallow(width=6, at='*.reduces.*.weight')"))
def test_parts_come_off(seg, chain):
    model, batch = seg
    tuned = attach(model, chain).train()
    tuned(**batch).logits.square().mean().backward()
    assert all(p.grad is not None for _, p in tuned.trainable())
    cond = [n for n in tuned.states if "text_projection" in n and any(True for _ in tuned.states[n].parameters())]
    assert not cond
    assert not [n for n in tuned.states if "at=" in chain and "@text" in n]


def test_widths_that_differ_are_refused():
    import transformers as t
    config = copy.deepcopy(tiny.build("clipseg").config)
    config.projection_dim = 16
    with pytest.raises(DoesNotFit, match="16 wide"):
        attach(t.CLIPSegForImageSegmentation(config), SHALLOW)


@pytest.mark.parametrize("name", ("vlsm_dense", "vlsm_shallow"))
def test_contracts(name):
    found = check.run_all([name], models=["clipseg"])
    assert not [r for r in found if r.verdict == "FAIL"], check.table(found)


# -- towers without gradients ---------------------------------------------------------------------------------------------

class Frozen(nn.Module):
    """Runs its tower without gradients, by a method that is decorated."""

    def __init__(self):
        super().__init__()
        self.tower, self.head = tiny.build("vit").vit, nn.Linear(32, 2)

    @torch.no_grad()
    def look(self, x):
        return self.tower(x).last_hidden_state

    def forward(self, pixel_values):
        with torch.no_grad():              # holds no blocks: stays as it is
            scale = self.head.weight.abs().mean()
        return self.head(self.look(pixel_values).mean(1) * 2) / scale


def test_a_decorated_method_is_reached_and_nothing_else():
    model, x = Frozen(), tiny.batch("vit")["pixel_values"]
    tuned = attach(model, "full(at='block.0.attn.q head')").train()
    y = tuned(x)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in tuned.trainable() if not n.endswith("b"))
    tuned.zero_grad()
    with torch.no_grad():                  # the caller's own counts as ever
        assert not tuned(x).requires_grad
    tuned.detach()
    assert not model.look(x).requires_grad


def test_only_towers_count():
    for name in tiny.MODELS:
        model = tiny.build(name)
        tuned = attach(model, "full(at='all')")
        assert not tuned._host.frozen, name
        tuned.detach()
    model = tiny.build("clipseg")
    assert {c.co_name for c in frozen(model, attach(model, DENSE)._host.towers)} == {"forward", "get_conditional_embeddings"}


class Sealed(Frozen):
    def look(self, x):
        with torch.inference_mode():
            return self.tower(x).last_hidden_state.clone()

    def forward(self, pixel_values):
        return self.look(pixel_values).clone()


def test_what_cannot_learn_is_refused():
    tuned = attach(Sealed(), "full(at='block.0.attn.q')").train()
    with pytest.raises(DoesNotFit, match="would learn nothing"):
        tuned(tiny.batch("vit")["pixel_values"])


def test_recorded_states_are_those_after_a_change(seg):
    model, batch = seg
    before = model(**batch).logits         # transformers hooks its recorders on now: before ours
    tuned = attach(model, "houlsby(at='vision.block.1.out', width=4)").eval()
    tuned.trainable()[2][1].data.add_(0.5)
    late = tuned(**batch).logits
    fresh = tiny.build("clipseg")
    other = attach(fresh, "houlsby(at='vision.block.1.out', width=4)").eval()
    other.trainable()[2][1].data.add_(0.5)
    assert torch.equal(other(**batch).logits, late) and not torch.equal(late, before)
