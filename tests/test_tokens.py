"""Inserted and merged tokens are right everywhere: masks, positions, labels, left padding, KV caches, encoders and decoders."""

import pytest
import torch

from luthier import attach, tiny
from luthier.errors import DoesNotFit
from luthier.tokens import Attention, Tokens

IDS = torch.tensor([[1, 1, 5, 6, 7], [4, 5, 6, 7, 8]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
GREEDY = dict(max_new_tokens=7, do_sample=False, pad_token_id=1, eos_token_id=None)
CHAINS = ["lora(at='linear')", "prompt(n=3)", "prefix(n=3)", "houlsby(width=8)", "ladder(reduce=4)",
          "prompt(n=3) >> lora >> prefix(n=2)"]


def shaken(model, chain):
    tuned, g = attach(model, chain), torch.Generator().manual_seed(3)
    for _, p in tuned.trainable():
        p.data.add_(0.3 * torch.randn(p.shape, generator=g))
    return tuned


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_with_a_cache_equals_recomputing(name, chain):
    tuned = shaken(tiny.build(name), chain)
    cached = tuned.generate(input_ids=IDS, attention_mask=MASK, use_cache=True, **GREEDY)
    again = tuned.generate(input_ids=IDS, attention_mask=MASK, use_cache=False, **GREEDY)
    alone = tuned.generate(input_ids=IDS[:1, 2:], attention_mask=MASK[:1, 2:], use_cache=True, **GREEDY)
    assert torch.equal(cached, again)
    assert torch.equal(cached[0, 5:], alone[0, 3:])         # left padding changes nothing


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("chain", ["prompt(n=3)", "prefix(n=2)", "prompt(n=3) >> lora", "ladder(reduce=2)",
                                   "prompt(n=2) >> ladder(reduce=2)"])
def test_beam_search_with_a_cache_equals_recomputing(name, chain):
    tuned = shaken(tiny.build(name), chain)
    beams = [tuned.generate(input_ids=IDS, attention_mask=MASK, use_cache=c, num_beams=3, **GREEDY) for c in (True, False)]
    assert torch.equal(*beams)


@pytest.mark.parametrize("chain", ["prompt(n=3)", "prompt(n=3, at='encoder.embed')", "prompt(n=2, at='decoder.embed')",
                                   "prefix(n=2)"])
def test_encoder_and_decoder_sides(chain):
    ids, mask = IDS.flip(1), MASK.flip(1)                   # right padding
    tuned = shaken(tiny.build("t5"), chain)
    cached = tuned.generate(input_ids=ids, attention_mask=mask, use_cache=True, **GREEDY)
    again = tuned.generate(input_ids=ids, attention_mask=mask, use_cache=False, **GREEDY)
    alone = tuned.generate(input_ids=ids[:1, :3], attention_mask=mask[:1, :3], use_cache=True, **GREEDY)
    assert torch.equal(cached, again) and torch.equal(cached[0], alone[0])


def test_the_decoder_sees_tokens_inserted_into_the_encoder():
    model = tiny.build("t5")
    tuned = attach(model, "prompt(n=3, at='encoder.embed')")
    ids = torch.tensor([[5, 6, 7]])

    def out():
        with torch.no_grad():
            return tuned(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=ids).logits

    a = out()
    tuned.trainable()[0][1].data.add_(1.0)
    assert a.shape == (1, 3, 64) and not torch.allclose(a, out())
    with torch.no_grad():
        seen = tuned.model.encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert seen.shape[1] == 6


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_inserted_tokens_equal_the_same_embeddings_given_by_hand(name):
    """The specification: concatenate the prompt to the embeddings, lengthen the mask, cut the logits."""
    model = tiny.build(name)
    table = model.get_input_embeddings().weight
    tuned = attach(model, "prompt(n=3)")
    rows = tuned.trainable()[0][1]
    with torch.no_grad():
        loss = tuned(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
        out = tuned(input_ids=IDS, attention_mask=MASK).logits
        tuned.active = False
        embeds = torch.cat([rows.expand(2, -1, -1), table[IDS]], 1)
        mask = torch.cat([torch.ones(2, 3, dtype=torch.long), MASK], 1)
        positions = (torch.arange(8)).expand(2, -1)
        expect = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(out, expect)
    labelled = torch.nn.functional.cross_entropy(expect[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(loss, labelled)


def test_encoder_prompts_stand_behind_cls_and_padding_stays_masked():
    model = tiny.build("bert")
    tuned = shaken(model, "prompt(n=4)")
    ids, mask = IDS.flip(1), MASK.flip(1)
    with torch.no_grad():
        both = tuned(input_ids=ids, attention_mask=mask).logits
        alone = tuned(input_ids=ids[:1, :3], attention_mask=mask[:1, :3]).logits
        hidden = tuned.model.bert(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(both[:1], alone)
    assert hidden.shape[1] == 5                             # heads see the words, not the prompt


def test_merging_keeps_padding_masked():
    tuned = attach(tiny.build("bert"), "pitome(keep=0.8)")
    ids = torch.randint(5, 60, (1, 14), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids, torch.ones(1, 6, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones(1, 14), torch.zeros(1, 6)], 1).long()
    noise = padded.clone()
    noise[:, 14:] = 9                                       # what stands under the padding does not matter
    with torch.no_grad():
        a = tuned(input_ids=padded, attention_mask=mask).logits
        b = tuned(input_ids=noise, attention_mask=mask).logits
    torch.testing.assert_close(a, b)


def test_a_cache_made_before_attaching_is_refused():
    model = tiny.build("llama")
    with torch.no_grad():
        past = model(input_ids=IDS, use_cache=True).past_key_values
    tuned = attach(model, "prompt(n=3)")
    with pytest.raises(DoesNotFit, match="afresh"):
        tuned(input_ids=IDS[:, :1], past_key_values=past)


def test_convolutions_hold_no_inserted_tokens():
    with pytest.raises(DoesNotFit, match="cannot"):
        attach(tiny.build("resnet"), "prompt(n=3)")


# -- the Tokens and Attention themselves --------------------------------------------------------------------------


def stream(B=2, T=6, D=4, fixed=1):
    g = torch.Generator().manual_seed(0)
    h = torch.randn(B, T, D, generator=g)
    return Tokens(h, {"side": torch.randn(B, T, 3, generator=g), "mask": torch.ones(B, T, 1, dtype=torch.bool)}, fixed=fixed)


def test_insert_and_drop_move_every_lane():
    t = stream()
    u = t.insert(torch.ones(2, 4), "a").insert(2 * torch.ones(3, 4), "b")
    assert u.spans == {"a": (1, 3), "b": (3, 6)} and u.fixed == 6 and u.h.shape == (2, 11, 4)
    assert torch.equal(u.h[:, 0], t.h[:, 0]) and u.mask.all() and not u.lanes["side"][:, 1:6].any()
    v = u.drop("a")
    assert v.spans == {"b": (1, 4)} and torch.equal(v.h[:, 1:4], torch.full((2, 3, 4), 2.0))
    w = v.drop("b")
    assert torch.equal(w.h, t.h) and torch.equal(w.lanes["side"], t.lanes["side"]) and w.fixed == 1
    assert w.drop("b") is w


def test_merge_is_a_size_weighted_mean_and_keeps_account():
    t = stream().marked()
    src, dst = torch.tensor([[2, 4], [5, 1]]), torch.tensor([[3, 3], [2, 2]])
    u = t.merge(src, dst)
    assert u.h.shape == (2, 4, 4) and u.size.sum(1).eq(6).all()
    torch.testing.assert_close((u.h * u.size).sum(1), t.h.sum(1))           # nothing is lost
    torch.testing.assert_close(u.h[0, 2], t.h[0, [2, 3, 4]].mean(0))
    assert u.group.tolist() == [[0, 1, 2, 2, 2, 3], [0, 1, 1, 2, 3, 1]]
    again = u.merge(torch.tensor([[3], [3]]), torch.tensor([[2], [2]]))
    torch.testing.assert_close(again.h[0, 2], t.h[0, 2:].mean(0))           # four tokens, weighted by what they stand for
    kept = u.keep(torch.tensor([[0, 2], [0, 1]]))
    assert kept.group.tolist() == [[0, -1, 1, 1, 1, -1], [0, 1, 1, -1, -1, 1]]


def test_prepending_to_an_attention_keeps_causality():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 5, 8, generator=g) for _ in range(3))
    pk, pv = torch.randn(3, 2, 8, generator=g), torch.randn(3, 2, 8, generator=g)    # two key/value heads for four
    a = Attention(q, k, v, causal=True).prepend(pk, pv)
    full_k = torch.cat([pk.transpose(0, 1).repeat_interleave(2, 0).expand(2, -1, -1, -1), k], 2)
    full_v = torch.cat([pv.transpose(0, 1).repeat_interleave(2, 0).expand(2, -1, -1, -1), v], 2)
    s = q @ full_k.mT / 8**0.5
    s[..., 3:] = s[..., 3:].masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
    torch.testing.assert_close(a.run(), s.softmax(-1) @ full_v)
    torch.testing.assert_close(a.weights(), s.softmax(-1))
    b = torch.randn(2, 1, 5, 8, generator=g)
    torch.testing.assert_close(a.bias(b).run(), (s + b).softmax(-1) @ full_v)
