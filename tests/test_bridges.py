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


# -- eP-ALM and Mono-InternVL: inside the decoder ------------------------------------------------------------------------


def deep(words="llama", layers=6):
    """A decoder with enough layers for some of them to be late."""
    import transformers as t
    torch.manual_seed(1)
    if words == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=64, n_layer=layers, n_embd=32, n_head=4, n_positions=64)).eval()
    return t.LlamaForCausalLM(t.LlamaConfig(**tiny.TEXT, **tiny.WIDTH | dict(num_hidden_layers=layers))).eval()


def walked(language, h, places, before=lambda i, h, places: (h, places), ffn=None):
    """A Llama spelled out, layer by layer: causal attention, no padding; `before` may change the stream, `ffn` runs in the FFN's
    place."""
    body = language.model
    for i, layer in enumerate(body.layers):
        h, places = before(i, h, places)
        n = h.shape[1]
        mask = torch.full((n, n), float("-inf")).triu(1)[None, None]
        x = layer.input_layernorm(h)
        h = h + layer.self_attn(x, position_embeddings=body.rotary_emb(x, places[None]), attention_mask=mask)[0]
        x = layer.post_attention_layernorm(h)
        h = h + (layer.mlp(x) if ffn is None else ffn(i, layer, x))
    return language.lm_head(body.norm(h))


def test_epalm_shows_class_tokens_to_late_layers():
    m, b = bridge(tiny.build("vit"), deep(), "epalm(states_of=2, soft=2, start=0.34)"), given("llama")
    ids, pixels = b["input_ids"][:1], b["pixel_values"][:1]
    seen = m.vision(pixels, output_hidden_states=True).hidden_states
    tokens = [m.connector.map(m.vision.layernorm(h)[:, :1]) for h in seen[-2:]]
    assert m.way.layers_of(6, 2) == {2: 0, 3: 1, 4: 1, 5: None}
    assert parse("epalm()").layers_of(32, 6) == {19 + i: i // 2 for i in range(12)} | {31: None}       # as for OPT-2.7B

    def before(i, h, places):
        if i == 2:                                          # a token more from here on, at place 0
            return torch.cat([tokens[0], h], 1), torch.cat([torch.zeros(1, dtype=torch.long), places])
        return (torch.cat([tokens[1], h[:, 1:]], 1), places) if i in (3, 4) else (h, places)
    h = torch.cat([m.connector.soft.P[None], m.language.get_input_embeddings()(ids)], 1)
    y = walked(m.language, h, torch.arange(h.shape[1]), before)[:, 3:]
    assert torch.allclose(m(ids, pixel_values=pixels).logits, y, atol=1e-5)


def test_monointern_routes_tokens_by_kind():
    m, b = bridge(tiny.build("vit"), deep(layers=3), "monointern()"), given("llama")
    ids, pixels = b["input_ids"][:1], b["pixel_values"][:1]
    same = bridge(m.vision, m.language, "monointern(experts=False)")
    assert torch.allclose(m(ids, pixel_values=pixels).logits, same(ids, pixel_values=pixels).logits, atol=1e-5)      # copies
    with torch.no_grad():
        for p in m.connector.experts.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    patches = m.vision.embeddings(pixels)[:, 1:].view(1, 2, 2, 2, 2, -1)                # four by four, two by two of them a token
    norm, first, _, last = m.connector.map
    front = norm(patches.permute(0, 1, 3, 5, 2, 4).reshape(1, 4, -1)) @ first.weight.T + first.bias
    front = F.gelu(front) @ last.weight.T + last.bias
    h = torch.cat([front, m.language.get_input_embeddings()(ids)], 1)

    def ffn(i, layer, x):
        return torch.cat([m.connector.experts[i](x[:, :4]), layer.mlp(x[:, 4:])], 1) if i < 2 else layer.mlp(x)
    y = walked(m.language, h, torch.arange(h.shape[1]), ffn=ffn)[:, 4:]
    assert torch.allclose(m(ids, pixel_values=pixels).logits, y, atol=1e-5)


def test_monointern_joins_squares_that_fit():
    with pytest.raises(DoesNotFit, match="join=3.*16 patches"):
        made(way="monointern(join=3)")
    assert made(way="monointern(join=1)")(**given("llama")).logits.shape == (3, 12, 64)


def test_monointern_never_runs_the_blocks_of_the_eyes():
    m, ran = made(way="monointern()"), []
    for block in m.eyes.blocks:
        block.register_forward_hook(lambda *a: ran.append(1))
    m(**given("llama"))
    assert not ran


@pytest.mark.parametrize("words", ["llama", "gpt2"])
@pytest.mark.parametrize("way", ["epalm(states_of=2, soft=1, start=0.3)", "monointern()"])
@pytest.mark.parametrize("chain", ["", "prompt(n=2, at='text.embed')"])
def test_inside_a_decoder_with_caches_padding_and_inserted_tokens(words, way, chain):
    m, b = bridge(tiny.build("vit"), deep(words, 4), way), given("llama", n=2)
    jiggle = [p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))) for p in
              m.connector.parameters() if not p.requires_grad_(False).requires_grad]
    model = luthier.attach(m, chain) if chain else m
    shown = torch.tensor([[1, 1], [1, 0], [1, 1]])
    said = dict(pixel_values=b["pixel_values"], image_mask=shown, max_new_tokens=4, do_sample=False, eos_token_id=None)
    ids, mask = b["input_ids"], b["attention_mask"]
    for beams in (1, 3):
        fast, slow = (model.generate(ids, attention_mask=mask, **said, num_beams=beams, use_cache=c) for c in (True, False))
        assert torch.equal(fast, slow) and jiggle
    alone = model(ids[1:2], mask[1:2], b["pixel_values"][1:2, 0]).logits
    assert torch.allclose(model(ids, mask, b["pixel_values"], image_mask=shown).logits[1:2], alone, atol=2e-5)
    text = {k: b[k] for k in ("input_ids", "attention_mask")}
    if not chain:
        assert torch.equal(m(**text).logits, m.language(**text).logits)
        first = m(ids[:, :8], mask[:, :8], b["pixel_values"], image_mask=shown, use_cache=True)
        rest = m(ids[:, 8:], mask, past_key_values=first.past_key_values).logits
        whole = m(ids, mask, b["pixel_values"], image_mask=shown).logits[:, 8:]
        assert torch.allclose(rest, whole, atol=2e-5)


@pytest.mark.parametrize("way", ["epalm(states_of=2)", "monointern()", "vlap()"])
def test_every_way_trains_all_of_its_connector_and_nothing_else(way):
    m, b = made(way=way), given("llama")
    before = fingerprint(m.vision), fingerprint(m.language)
    tuned = luthier.attach(m, 'full(at="connector")').train()
    tuned(**b, labels=b["input_ids"]).loss.backward()
    assert sum(p.numel() for _, p in tuned.trainable()) == sum(p.numel() for p in m.connector.parameters())
    assert all(p.grad is not None and p.grad.any() for _, p in tuned.trainable())
    optimizer = torch.optim.AdamW([p for _, p in tuned.trainable()], lr=1e-2)
    optimizer.step()
    text = {k: b[k] for k in ("input_ids", "attention_mask")}
    assert torch.equal(tuned.eval()(**text).logits, m.language(**text).logits)           # text alone, to the bit
    assert (fingerprint(m.vision), fingerprint(m.language)) == before


@pytest.mark.parametrize("way", ["epalm()", "monointern()"])
def test_ways_inside_a_decoder_refuse_others(way):
    with pytest.raises(DoesNotFit, match="decoder"):
        made("t5", way=way)


# -- mBLIP: a connector moved to another language model ----------------------------------------------------------------------


def test_a_connector_moves_to_another_language_model():
    from luthier.procedures.realign import realign
    m, b = made(), given("llama")
    tuned = luthier.attach(m, 'full(at="connector")')
    with torch.no_grad():
        for _, p in tuned.trainable():
            p.add_(1.0)
    front, other = m.connector.map.weight + 1, deep()
    new = realign(tuned, other)
    assert torch.equal(new.connector.map.weight, front) and new.carried == ["map.bias", "map.weight"]
    assert new.language is other and torch.equal(new.draw(3).connector.map.weight, front)
    assert not torch.equal(m.connector.map.weight, front) and tuned(**b).logits.isfinite().all()       # the old one is as it was
    again = luthier.attach(new, 'full(at="connector") >> lora(rank=2, at="text.attn.q")')
    assert len(again.trainable()) == 2 + 2 * 6
    import transformers as t
    wide = t.LlamaForCausalLM(t.LlamaConfig(**tiny.TEXT, **tiny.WIDTH | dict(hidden_size=48, num_hidden_layers=1)))
    with pytest.raises(DoesNotFit, match="width 32.*has 48"):
        realign(tuned, wide)


def test_a_map_is_read_by_its_places():
    """EfficientNet's last map is wider than its last block; Swin's has its channels last."""
    from luthier.bridges.model import _tokens
    x = torch.randn(1, 12, 2, 3)
    for h, d in ((x, 8), (x.permute(0, 2, 3, 1), 12)):
        assert torch.equal(_tokens(h, d)[0, 4], x[0, :, 1, 1])
