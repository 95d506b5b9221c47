"""Sound as soft prompts: an audio encoder, an aligner that heeds the instruction, a frozen language model."""

import json
import math
import wave

import numpy as np
import pytest
import torch

import luthier
from luthier import sounds, tasks, tiny
from luthier._compat import torchvision
from luthier.bridges import bridge
from luthier.errors import BadData, DoesNotFit
from luthier.save import fingerprint
from luthier.tasks.audio import Clips, samples
from luthier.train import train
from luthier.tune import inputs


def ears():
    import transformers as t
    torchvision()
    torch.manual_seed(0)
    return t.WhisperForConditionalGeneration(t.WhisperConfig(
        vocab_size=64, num_mel_bins=8, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=20, max_target_positions=16,
        pad_token_id=1, bos_token_id=2, eos_token_id=3, decoder_start_token_id=2)).eval()


def made(words="llama", way="apt(tokens=3, width=8, layers_of=2, heads=2, every=4)", seed=0):
    return bridge(ears(), tiny.build(words), way, seed=seed)


def given(words="llama", n=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    return tiny.batch(words, seed=seed) | dict(input_features=torch.randn(3, *([n] if n else []), 8, 40, generator=g))


def attend(m, q, kv, mask=None):
    """Multi-head attention by hand; mask (N, keys), 1 where there is one."""
    w, H = q.shape[-1], m.num_heads
    Q, K, V = (x @ W.T + b for x, W, b in zip((q, kv, kv), m.in_proj_weight.chunk(3), m.in_proj_bias.chunk(3), strict=True))
    Q, K, V = (x.unflatten(-1, (H, w // H)).transpose(1, 2) for x in (Q, K, V))
    s = Q @ K.mT / (w // H) ** 0.5
    s = s if mask is None else s.masked_fill(mask[:, None, None] == 0, -torch.inf)
    return (s.softmax(-1) @ V).transpose(1, 2).flatten(2) @ m.out_proj.weight.T + m.out_proj.bias


def places(mask, w):
    rows = [[max(sum(row[:i + 1]) - 1, 0) for i in range(len(row))] for row in mask.tolist()]        # counted from the first word
    return torch.tensor([[[f(p / 10_000 ** (2 * k / w)) for f in (math.sin, math.cos) for k in range(w // 2)] for p in row]
                         for row in rows])


def align(c, x, text, mask):
    q, t, a = c.query.expand(len(x), -1, -1), c.text(text) + places(mask, c.query.shape[1]), c.sound(x) + c.place
    n, both = q.shape[1], torch.cat([torch.ones(len(x), q.shape[1], dtype=torch.long), mask], 1)
    for i, layer in enumerate(c.layers):
        h = torch.cat([q, t], 1)
        h = h + attend(layer.own, layer.norm(h), layer.norm(h), both)
        q, t = h[:, :n], h[:, n:]
        q = q + attend(layer.cross, layer.ask(q), a) if i == 0 else q          # every other layer
        q, t = q + layer.queries(q), t + layer.words(t)
    return c.norm(q) @ c.proj.weight.T + c.proj.bias


def test_the_aligner_by_hand_and_where_its_prompts_stand():
    m, b = made(), given()
    ids, mask, x = b["input_ids"], b["attention_mask"], b["input_features"]
    h = m.vision(x.flatten(0, 1)).last_hidden_state.unflatten(1, (5, 4)).mean(2)            # 20 states, four and four
    text = m.language.get_input_embeddings()(ids)
    front = align(m.connector, h, text.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)).unflatten(0, (3, 2))
    start = mask.argmax(1)
    places = torch.tensor([[0, 4], [2, 2], [1, 3]])
    rows, shown = [], []
    for i in range(3):
        cut = [int(start[i] + p) for p in places[i]]
        rows.append(torch.cat([text[i, :cut[0]], front[i, 0], text[i, cut[0]:cut[1]], front[i, 1], text[i, cut[1]:]]))
        shown.append(torch.cat([mask[i, :cut[0]], mask.new_ones(3), mask[i, cut[0]:cut[1]], mask.new_ones(3), mask[i, cut[1]:]]))
    shown = torch.stack(shown)
    y = m.language(inputs_embeds=torch.stack(rows), attention_mask=shown, position_ids=(shown.cumsum(1) - 1).clamp(min=0)).logits
    out = m(**b, image_places=places)
    for i in range(3):
        cut = [int(start[i] + p) for p in places[i]]
        want = torch.cat([y[i, :cut[0]], y[i, cut[0] + 3:cut[1] + 3], y[i, cut[1] + 6:]])
        assert torch.allclose(out.logits[i], want, atol=1e-5)


def test_the_instruction_changes_the_prompts_of_a_clip():
    m, b = made(), given(n=None)
    states = m.see(b["input_features"])[:, 0]
    text, mask = m.language.get_input_embeddings()(b["input_ids"]), b["attention_mask"]
    other = text.roll(1, 0)
    a, c = m.way.prompt(m.connector, states, text, mask), m.way.prompt(m.connector, states, other, mask)
    assert (a - c).abs().amax((1, 2)).min() > 1e-4
    deaf = made(way="apt(tokens=3, width=8, layers_of=2, heads=2, every=4, heed=False)")
    assert torch.equal(deaf.way.prompt(deaf.connector, states, text, mask), deaf.way.prompt(deaf.connector, states, other, mask))


def test_the_first_frames_alone_are_read():
    m, x = made(way="apt(tokens=3, width=8, layers_of=2, heads=2, every=4, frames=8)"), given()["input_features"]
    assert torch.equal(m.see(x), made().see(x)[:, :, :2]) and len(m.connector.place) == 2


def test_the_answer_does_not_reach_the_prompts():
    """In training the aligner reads the instruction alone: what stands there when only it is asked."""
    m, b = made(), given(n=1)
    ids = b["input_ids"]
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, :7] = -100
    changed = ids.clone()
    changed[:, 9:] = (ids[:, 9:] + 5) % 60
    a, c = (m(i, mask, input_features=b["input_features"], labels=labels).logits[:, :9] for i in (ids, changed))
    assert torch.allclose(a, c, atol=1e-5)
    d = m(ids, mask, input_features=b["input_features"], asked=torch.tensor([7, 7, 7])).logits[:, :9]
    assert torch.allclose(a, d, atol=1e-5)
    e = m(ids[:, :7], mask[:, :7], input_features=b["input_features"]).logits
    assert torch.allclose(a[:, :7], e, atol=1e-5)


@pytest.mark.parametrize("words", ["llama", "gpt2"])
def test_a_cache_goes_on_between_the_words(words):
    m, b = made(words), given(words)
    ids, x, places = b["input_ids"], b["input_features"], torch.tensor([[0, 4], [2, 2], [1, 3]])
    mask, asked = torch.ones_like(ids), torch.tensor([8, 8, 8])
    first = m(ids[:, :8], mask[:, :8], input_features=x, image_places=places, use_cache=True)
    rest = m(ids[:, 8:10], mask[:, :10], past_key_values=first.past_key_values).logits
    last = m(ids[:, 10:], mask, past_key_values=first.past_key_values).logits
    whole = m(ids, mask, input_features=x, image_places=places, asked=asked).logits[:, 8:]
    assert torch.allclose(torch.cat([rest, last], 1), whole, atol=2e-5)
    out = m.generate(ids, attention_mask=mask, input_features=x, image_places=places, max_new_tokens=3, do_sample=False)
    assert torch.equal(out[:, :12], ids)


@pytest.mark.parametrize("words", ["llama", "t5"])
def test_the_aligner_alone_trains_and_text_alone_is_untouched(words):
    m, b = made(words), given(words)
    text = {k: v for k, v in b.items() if k != "input_features"}
    before = fingerprint(m.vision), fingerprint(m.language)
    tuned = luthier.attach(m, 'full(at="connector")').train()
    labels = b.get("decoder_input_ids", b["input_ids"]).clone()
    labels[:, :4] = -100
    tuned(**b, labels=labels).loss.backward()
    assert sum(p.numel() for _, p in tuned.trainable()) == sum(p.numel() for p in m.connector.parameters())
    idle = sum(p.numel() for _, p in tuned.trainable() if p.grad is None or not p.grad.any())
    assert idle == sum(p.numel() for p in m.connector.layers[-1].words.parameters())      # of the text: nobody reads it any more
    torch.optim.SGD([p for _, p in tuned.trainable()], lr=1.0).step()
    assert torch.equal(tuned.eval()(**text).logits, m.language(**text).logits)
    assert (fingerprint(m.vision), fingerprint(m.language)) == before


# -- the task ------------------------------------------------------------------------------------------------------------


def words():
    """A tokenizer whose every word is one token."""
    return tiny.build("named").tokenizer


def opened(model, data, **more):
    return tasks.open(data, model=model, tokenizer=words(), **more)


def test_a_spectrum_is_whispers_and_a_file_is_an_array(tmp_path):
    s = sounds.sound(3)
    x = s.wave()
    assert np.array_equal(x, sounds.sound(3).wave()) and len(x) == sounds.LENGTHS[s.length] * 16000 and abs(x).max() <= 0.5
    with wave.open(str(tmp_path / "a.wav"), "wb") as f:
        f.setparams((2, 2, 16000, 0, "NONE", ""))
        f.writeframes(np.repeat((x * 32768).round().astype("<i2"), 2).tobytes())
    assert np.allclose(samples("a.wav", tmp_path), x, atol=1e-4)
    c = Clips(8, 200)
    mel = c.look(c.add(x))
    assert mel.shape == (8, 200)
    spectrum = np.abs(np.fft.rfft(sounds.Sound("tone", "low", "long", 300.0, "k").wave()))
    assert abs(spectrum.argmax() / 1.5 - 300) < 1
    with pytest.raises(ValueError, match="16,000"):
        with wave.open(str(tmp_path / "b.wav"), "wb") as f:
            f.setparams((1, 2, 8000, 0, "NONE", ""))
            f.writeframes(b"00" * 50)
        samples("b.wav", tmp_path)


def test_prompts_of_sounds_stand_where_the_text_says_clip():
    m = made()
    task = opened(m, "sounds:compare", limit=12)
    e = task.examples("train")[0]
    text = task.column(task.tables["train"], "prompt")[0]
    before = text.split("<clip>")
    n = [len(task.ids(p)) for p in before]
    assert e["places"] == [1 + n[0], 1 + n[0] + n[1]] and len(e["pictures"][1]) == 2
    batch = task.collate(task.examples("train")[:3])
    assert batch["image_places"].shape == (3, 2) and batch["pixel_values"].shape == (3, 2, 8, 40)
    assert batch["asked"].tolist() == [len(e["ask"]) for e in task.examples("train")[:3]]
    assert "asked" not in task.collate(task.examples("train")[:3], asking=True)
    named = opened(m, "sounds:name", limit=12)
    assert named.examples("train")[0]["places"] == [0] and named.metric == "bleu"


def test_a_model_of_sounds_learns_answers_and_refuses(tmp_path):
    m = made()
    task = opened(m, "sounds:ask", limit=12)
    tuned = luthier.attach(m, 'full(at="connector")')
    with task.seeing(tuned):
        start = task.loss(tuned, task.collate(list(task.examples("train")))).item()
    train(tuned, task, epochs=15, batch_size=6, lr=1e-2, progress=False, log=False)
    with task.seeing(tuned):
        assert task.loss(tuned, task.collate(list(task.examples("train")))).item() < start
    path = str(tmp_path / "a.WAV")
    assert inputs(task, [path, "Is <clip> low?"]) == [{"image": path, "prompt": "Is <clip> low?"}]
    scores = task.evaluate(tuned)
    assert 0 <= scores["accuracy"] <= 1 and scores["n"] == 12
    said = task.predict(tuned, [{"audio": sounds.sound(1).wave(), "prompt": "Is the sound <clip> low or high?"}])
    assert len(said) == 1 and isinstance(said[0]["text"], str)
    with pytest.raises(BadData, match="not a sound that can be read.*WAV"):
        task.predict(tuned, [{"audio": "nothing.wav", "prompt": ""}])
    with pytest.raises(BadData, match="2 times.*1 sounds"):
        task.predict(tuned, [{"audio": sounds.sound(1).wave(), "prompt": "Is <clip> higher than <clip>?"}])
    rows = [{"audio": ["a.wav", "b.wav"], "prompt": "Is <clip> it?", "response": "no"}] * 12
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(BadData, match="1 times.*2 sounds"):
        opened(m, tmp_path / "rows.jsonl", task="audio-to-text")


def test_what_hears_and_what_does_not():
    assert luthier.zoo.about("whisper-tiny+smollm2-135m:apt()").kind == "audio-text"
    with pytest.raises(DoesNotFit, match="hears no sounds.*whisper-tiny"):
        luthier.zoo.about("dinov2-s+smollm2-135m:apt()")
    with pytest.raises(DoesNotFit, match="sees no images"):
        luthier.zoo.about("whisper-tiny+smollm2-135m:limber()")
    with pytest.raises(DoesNotFit, match="front"):
        m = bridge(tiny.build("vit"), tiny.build("llama"), "monointern()")
        m(**tiny.batch("llama"), pixel_values=torch.zeros(3, 3, 16, 16), image_places=torch.zeros(3, 1))
