"""Bridges: a frozen vision model, a connector, a frozen language model."""

import pytest
import torch
from torch.nn import functional as F

import luthier
from luthier import tiny, zoo
from luthier.bridges import bridge, discover, parse
from luthier.errors import BadChain, DoesNotFit, UnknownName
from luthier.save import fingerprint

LANGUAGES = ("llama", "gpt2", "t5", "bart")


def language(name):
    if name != "bart":
        return tiny.build(name)
    import transformers as t
    torch.manual_seed(0)
    return t.BartForConditionalGeneration(t.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0, max_position_embeddings=64, pad_token_id=1, bos_token_id=2,
        eos_token_id=3, decoder_start_token_id=3)).eval()


def made(words="llama", eyes="vit", way="limber()", seed=0):
    return bridge(tiny.build(eyes), language(words), way, seed=seed)


def given(words, n=None, seed=1):
    batch = tiny.batch("t5" if words == "bart" else words, seed=seed)
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randn(3, *([n] if n else []), 3, 16, 16, generator=g)
    return batch | dict(pixel_values=pixels)


# -- what goes where ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["llama", "gpt2"])
def test_a_decoder_reads_the_mapped_patches_and_then_the_text(words):
    m, b = made(words), given(words)
    patches = m.vision(b["pixel_values"]).last_hidden_state[:, 1:]                     # 16, without the class token
    front = patches @ m.connector.map.weight.T + m.connector.map.bias
    text = m.language.get_input_embeddings()(b["input_ids"])
    mask = torch.cat([torch.ones(3, 16, dtype=torch.long), b["attention_mask"]], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    y = m.language(inputs_embeds=torch.cat([front, text], 1), attention_mask=mask, position_ids=places).logits[:, 16:]
    out = m(**b, labels=b["input_ids"])
    assert out.logits.shape == (3, 12, 64) and torch.allclose(out.logits, y, atol=1e-5)
    assert torch.allclose(out.loss, F.cross_entropy(y[:, :-1].flatten(0, 1), b["input_ids"][:, 1:].flatten()), atol=1e-5)


@pytest.mark.parametrize("words", ["t5", "bart"])
def test_an_encoder_reads_the_mapped_patches_and_then_the_text(words):
    m, b = made(words), given(words)
    patches = m.vision(b["pixel_values"]).last_hidden_state[:, 1:]
    front = patches @ m.connector.map.weight.T + m.connector.map.bias
    text = m.language.get_input_embeddings()(b["input_ids"])
    mask = torch.cat([torch.ones(3, 16, dtype=torch.long), b["attention_mask"]], 1)
    y = m.language(inputs_embeds=torch.cat([front, text], 1), attention_mask=mask, decoder_input_ids=b["decoder_input_ids"])
    out = m(**b)
    assert out.logits.shape == (3, 6, 64) and torch.allclose(out.logits, y.logits, atol=1e-5)


def test_k_tokens_come_from_the_summary():
    m, b = made(way="limber(tokens=3)"), given("llama")
    cls = m.vision(b["pixel_values"]).last_hidden_state[:, 0]
    front = (cls @ m.connector.map.weight.T + m.connector.map.bias).view(3, 3, 32)
    assert m.connector.map.weight.shape == (96, 32)
    assert torch.allclose(m.connector(m.see(b["pixel_values"])[:, 0]), front, atol=1e-5)


@pytest.mark.parametrize("eyes", ["vit", "dinov2", "clip", "resnet"])
@pytest.mark.parametrize("words", LANGUAGES)
def test_any_eyes_and_any_mouth(eyes, words):
    m, b = made(words, eyes), given(words)
    assert m(**b).logits.isfinite().all()
    for more in ({}, {"num_beams": 3}):
        ids = m.generate(b["input_ids"], attention_mask=b["attention_mask"], pixel_values=b["pixel_values"], max_new_tokens=3,
                         do_sample=False, **more)
        assert len(ids) == 3 and (m.writes_apart or torch.equal(ids[:, :12], b["input_ids"]))


@pytest.mark.parametrize("words", LANGUAGES)
def test_without_images_it_is_the_language_model(words):
    m, b = made(words), tiny.batch("t5" if words == "bart" else words)
    assert torch.equal(m(**b).logits, m.language(**b).logits)
    ids = dict(max_new_tokens=3, do_sample=False, attention_mask=b["attention_mask"])
    assert torch.equal(m.generate(b["input_ids"], **ids), m.language.generate(b["input_ids"], **ids))


# -- padding and several images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", LANGUAGES)
def test_padding_changes_nothing(words):
    """Of text on the side where its kind is padded, and of images."""
    m, b = made(words), given(words, n=2)
    ids, left = b["input_ids"][:1], not m.writes_apart
    fill, more = torch.full((1, 3), 1), {} if left else dict(decoder_input_ids=b["decoder_input_ids"][:1])
    alone = m(input_ids=ids, pixel_values=b["pixel_values"][:1, 0], **more).logits
    order = (lambda x, y: [x, y]) if left else (lambda x, y: [y, x])
    mask = torch.cat(order(torch.zeros_like(fill), torch.ones_like(ids)), 1)
    both = m(input_ids=torch.cat(order(fill, ids), 1), attention_mask=mask, pixel_values=b["pixel_values"][:1],
             image_mask=torch.tensor([[1, 0]]), **more).logits
    assert torch.allclose(both[:, -alone.shape[1]:], alone, atol=2e-5)
    said = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
    one = m.generate(ids, pixel_values=b["pixel_values"][:1, 0], **said)[:, -4:]
    two = m.generate(torch.cat(order(fill, ids), 1), attention_mask=mask, pixel_values=b["pixel_values"][:1],
                     image_mask=torch.tensor([[1, 0]]), **said)[:, -4:]
    assert torch.equal(one, two)


def test_images_keep_their_order():
    m, b = made(), given("llama", n=2)
    y, z = (m(**b | dict(pixel_values=x)).logits for x in (b["pixel_values"], b["pixel_values"].flip(1)))
    assert not torch.allclose(y, z, atol=1e-3)


@pytest.mark.parametrize("words", ["llama", "gpt2"])
def test_a_cache_made_with_images_goes_on_with_text(words):
    m, b = made(words), given(words)
    whole = m(**b).logits
    first = m(b["input_ids"][:, :8], b["attention_mask"][:, :8], b["pixel_values"], use_cache=True)
    rest = m(b["input_ids"][:, 8:], b["attention_mask"], past_key_values=first.past_key_values).logits
    assert torch.allclose(torch.cat([first.logits, rest], 1)[b["attention_mask"].bool()], whole[b["attention_mask"].bool()],
                          atol=2e-5)


# -- what trains ---------------------------------------------------------------------------------------------------------


def test_only_the_connector_trains_and_the_rest_keeps_its_bits():
    m, b = made(), given("llama")
    before = fingerprint(m.vision), fingerprint(m.language)
    tuned = luthier.attach(m, 'full(at="connector")').train()
    assert {n.rpartition("/")[2] for n, _ in tuned.trainable()} == {"weight.W", "weight.b"}
    optimizer = torch.optim.AdamW([p for _, p in tuned.trainable()], lr=1e-2)
    losses = []
    for _ in range(15):
        loss = tuned(**b, labels=b["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert (fingerprint(m.vision), fingerprint(m.language)) == before
    assert all(p.grad is None for p in m.parameters())


def test_sites_have_towers_by_structure():
    every = luthier.sites(made())
    assert {"vision.block.1.attn.q", "text.block.1.mlp.down", "text.embed.token", "connector.map.weight", "head"} <= {
        s.name for s in every}
    assert [s.name for s in luthier.find(every, "connector")] == ["connector.map.weight"]
    assert {s.tower for s in luthier.find(every, "text")} == {"text"}
    assert {s.tower for s in luthier.find(luthier.sites(made("t5")), "encoder decoder")} == {"encoder", "decoder"}


def test_states_computed_once_give_the_same_to_the_bit():
    m, b = made(), given("llama", n=2)
    states = m.see(b["pixel_values"])
    kept = {k: v for k, v in b.items() if k != "pixel_values"} | dict(image_states=states)
    assert torch.equal(m(**kept).logits, m(**b).logits)


def test_the_connector_depends_on_the_seed_alone():
    torch.manual_seed(5)
    a, b = made(), made(seed=1)
    assert torch.equal(a.connector.map.weight, made().connector.map.weight)
    assert not torch.equal(a.connector.map.weight, b.connector.map.weight)
    assert torch.equal(a.draw(1).connector.map.weight, b.connector.map.weight)


# -- by name, and what is refused ----------------------------------------------------------------------------------------


def test_a_pair_by_its_text(tmp_path):
    import folders
    ref = f"{folders.vit(tmp_path / 'v')}+{folders.llama(tmp_path / 'l')}:limber(tokens=2)"
    origin, m = zoo.about(ref), zoo.load(ref)
    assert origin.ref == ref == m.luthier_origin.ref and origin.kind == "image-text"
    assert m.connector.k == 2 and zoo.processor(ref).pad_token == "[PAD]"
    assert zoo.about(ref.rpartition(":")[0]).ref.endswith(":limber()")


def test_ways_are_found_and_checked():
    assert "limber" in discover() and repr(parse("limber(tokens=4)")) == "limber(tokens=4)"
    with pytest.raises(UnknownName, match="Nearest: limber"):
        parse("limbr()")
    with pytest.raises(BadChain, match="tokens"):
        parse("limber(tokens=-1)")


@pytest.mark.parametrize(("eyes", "words", "why"), [
    ("llama", "llama", "sees no images"), ("vit", "bert", "writes no text"), ("vit", "vit", "writes no text")])
def test_what_does_not_fit_is_refused(eyes, words, why):
    with pytest.raises(DoesNotFit, match=why):
        bridge(tiny.build(eyes), tiny.build(words))


# -- VLAP --------------------------------------------------------------------------------------------------------------


def test_sinkhorn_is_balanced_and_by_hand():
    from luthier.bridges.vlap import sinkhorn
    scores, words = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.4, 0.3, 0.2, 0.1])
    Q = sinkhorn(scores, words, 200, 0.5)
    assert torch.allclose(Q.sum(1), torch.ones(6)) and torch.allclose(Q.sum(0), 6 * words, atol=1e-5)
    one = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).mul(torch.tensor(2.0).log())          # e^(score/1): [[1, 2], [1, 1]]
    # columns to 1/2 each: [[1/4, 1/3], [1/4, 1/6]]; rows to 1: [[3/7, 4/7], [3/5, 2/5]]
    assert torch.allclose(sinkhorn(one, torch.tensor([0.5, 0.5]), 1, 1.0), torch.tensor([[3 / 7, 4 / 7], [3 / 5, 2 / 5]]))


@pytest.mark.parametrize("words", ["llama", "t5"])
def test_vlap_swaps_assignments(words):
    """Against the loss spelled out pair by pair."""
    from luthier.bridges.vlap import sinkhorn
    m, b = made(words, way="vlap(dropout=0.0, tau=0.1, eps=0.1)"), given(words)
    labels = b.get("decoder_input_ids", b["input_ids"]).clone()
    labels[0, 2:] = -100
    out = m(**b)
    E = F.normalize(m.language.get_input_embeddings().weight, dim=-1)
    body = m.language.get_encoder() if words == "t5" else m.language.model
    total, z = 0.0, dict(image=[], text=[])
    for i in range(3):
        kept = labels[i][labels[i] != -100]
        z["image"].append(F.normalize(m.connector(m.see(b["pixel_values"])[i]).mean(1)[0], dim=0) @ E.T)
        z["text"].append(F.normalize(body(input_ids=kept[None]).last_hidden_state.mean(1)[0], dim=0) @ E.T)
    counts = torch.arange(64)
    μ = (counts / counts.sum() / 0.25).softmax(0)
    Q = {k: sinkhorn(torch.stack(v), μ, 3, 0.1) for k, v in z.items()}
    for i in range(3):
        total -= (Q["text"][i] @ (z["image"][i] / 0.1).log_softmax(0) + Q["image"][i] @ (z["text"][i] / 0.1).log_softmax(0)) / 2
    loss = m.objective(out, labels, counts)
    assert torch.allclose(loss, 0.1 * total / 3, rtol=1e-3)
    grads = torch.autograd.grad(loss, [m.connector.map.weight, m.connector.map.bias])
    assert all(g.abs().sum() > 0 for g in grads)
    plain = made(words, way="limber(dropout=0.0)")
    assert torch.equal(plain(**b).logits, out.logits) and "front" not in plain(**b)
