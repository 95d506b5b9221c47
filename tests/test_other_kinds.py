"""Bridges between kinds of models that nothing else names: eyes that give maps or windows, ears that hear samples, decoders with
learned positions or none, encoder-decoders; from the command line, and what does not fit."""

import importlib.util
import io
import json
import wave
from collections import Counter
from pathlib import Path

import folders
import numpy as np
import pytest
import torch
from PIL import Image

import luthier
from luthier import bridge, sounds, tasks, tiny, zoo
from luthier._compat import torchvision
from luthier.errors import BadData, DoesNotFit
from luthier.tasks.audio import Clips
from luthier.tasks.image import decode

torchvision()
SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
WORDS = dict(bos_token_id=2, eos_token_id=3, pad_token_id=0, vocab_size=len(folders.WORDS))
CONVS = dict(conv_dim=[8] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
LAYERS = dict(d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2)
BART = LAYERS | dict(encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, decoder_start_token_id=3,
                     forced_eos_token_id=3)
OPT = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=8)
WHISPER = LAYERS | dict(encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=100, suppress_tokens=None,
                        begin_suppress_tokens=None)
KINDS = dict(
    convnext=("ConvNextModel", dict(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32)),
    swin=("SwinModel", dict(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)),
    siglip=("SiglipVisionModel", SMALL | dict(image_size=16, patch_size=8)),
    beit=("BeitModel", SMALL | dict(image_size=16, patch_size=8)),
    mae=("ViTMAEModel", SMALL | dict(image_size=16, patch_size=8)),
    biogpt=("BioGptForCausalLM", WORDS | SMALL | dict(max_position_embeddings=64)),
    mpt=("MptForCausalLM", WORDS | dict(d_model=16, n_layers=2, n_heads=2, max_seq_len=64)),
    opt=("OPTForCausalLM", WORDS | OPT | dict(max_position_embeddings=64)),
    short=("OPTForCausalLM", WORDS | OPT | dict(max_position_embeddings=18)),
    bloom=("BloomForCausalLM", WORDS | dict(hidden_size=16, n_layer=2, n_head=2)),
    neox=("GPTNeoXForCausalLM", WORDS | SMALL | dict(max_position_embeddings=64)),
    mistral=("MistralForCausalLM", WORDS | SMALL | dict(num_key_value_heads=1, sliding_window=16)),
    qwen2=("Qwen2ForCausalLM", WORDS | SMALL | dict(num_key_value_heads=1)),
    bart=("BartForConditionalGeneration", WORDS | BART),
    mt5=("MT5ForConditionalGeneration", dict(
        vocab_size=len(folders.WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=3,
        decoder_start_token_id=0)),
    whisper=("WhisperForConditionalGeneration", WORDS | WHISPER | dict(decoder_start_token_id=2)),
    wav2vec2=("Wav2Vec2Model", SMALL | CONVS), hubert=("HubertModel", SMALL | CONVS),
    ast=("ASTModel", SMALL | dict(max_length=32, num_mel_bins=16)),
)
APT = "apt(tokens=3, width=16, layers_of=2, heads=2)"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    base = tmp_path_factory.mktemp("kinds")

    def get(kind):
        import transformers

        if not (base / kind).exists():
            name, facts = KINDS[kind]
            torch.manual_seed(0)
            model = getattr(transformers, name)
            model(model.config_class(**facts)).save_pretrained(base / kind)
            if "vocab_size" in facts:
                folders.tokenizer(base / kind, decoder=True)
        return str(base / kind)
    return get


def pairs(folder, text="response", n=24, say="good"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(4):
        Image.fromarray(np.random.RandomState(i).randint(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    rows = [{"image": f"{i % 4}.png", text: say} | ({"prompt": "what is it"} if text == "response" else {}) for i in range(n)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / "rows.jsonl"


def clips(folder, n=24):
    rows = []
    for i in range(n):
        made = sounds.sound(i)
        with wave.open(str(folder / f"{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(sounds.RATE)
            file.writeframes((made.wave() * 32767).astype("<i2").tobytes())
        rows.append(dict(audio=f"{i}.wav", prompt="Is the sound <clip> low or high?", response=made.pitch))
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / "rows.jsonl"


@pytest.mark.parametrize("eyes, words, way", [
    ("convnext", "opt", "limber()"), ("swin", "bloom", "limber()"), ("siglip", "neox", "limber(tokens=2)"),
    ("swin", "mt5", "limber()"), ("mae", "biogpt", "limber()"), ("beit", "bart", "vlap()"),
    ("siglip", "opt", "epalm(states_of=2)"),
    ("beit", "mistral", "monointern()"), ("convnext", "qwen2", "monointern()"), ("swin", "opt", "sail(dim=16)"),
    ("convnext", "bart", "projectors(dim=16)"), ("beit", "mt5", "sail(dim=16)")])
def test_bridge_then_predict(tmp_path, made, capsys, eyes, words, way):
    dual = way.startswith(("sail", "projectors"))
    code, _, err = folders.run(capsys, "bridge", made(eyes), made(words), "--with", way, "--data",
                               pairs(tmp_path / "a", "caption" if dual else "response"), "--out", tmp_path / "out", "--epochs", 1,
                               "--batch-size", 8, "--log", "none")
    assert code == 0, err
    code, said, err = folders.run(capsys, "predict", tmp_path / "out", tmp_path / "a" / "1.png", "what is it", "--json")
    assert code == 0 and json.loads(said)[0].keys() & {"text", "texts"}, err


@pytest.mark.parametrize("ears, words", [("whisper", "mistral"), ("wav2vec2", "neox"), ("hubert", "bart")])
def test_bridge_then_predict_a_sound(tmp_path, made, capsys, ears, words):
    code, _, err = folders.run(capsys, "bridge", made(ears), made(words), "--with", APT, "--data", clips(tmp_path), "--out",
                               tmp_path / "out", "--epochs", 1, "--batch-size", 8, "--log", "none")
    assert code == 0, err
    code, said, err = folders.run(capsys, "predict", tmp_path / "out", tmp_path / "1.wav", "Is the sound <clip> low?", "--json")
    assert code == 0 and isinstance(json.loads(said)[0]["text"], str), err
    (tmp_path / "cut.wav").write_bytes((tmp_path / "1.wav").read_bytes()[:6])
    code, _, err = folders.run(capsys, "predict", tmp_path / "out", tmp_path / "cut.wav", "low?")
    assert code == 2 and "is not a sound that can be read: EOFError. Give a path to a WAV" in " ".join(err.split())
    code, _, err = folders.run(capsys, "predict", tmp_path / "out", "low?")
    assert code == 2 and "No sound is among" in err and "sound.wav" in err


def test_samples_are_what_wav2vec2s_own_extractor_makes(made):
    from transformers import Wav2Vec2FeatureExtractor

    assert zoo.about(made("wav2vec2")).image == dict(samples=160_000)
    album, x = Clips(samples=160_000), sounds.sound(1).wave()
    album.add(x)
    want = Wav2Vec2FeatureExtractor()(x, sampling_rate=16_000, return_tensors="pt")["input_values"][0]
    assert album.look(0).shape == (160_000,) and torch.allclose(album.look(0)[:len(x)], want, atol=1e-5)
    assert not album.look(0)[len(x):].any()
    told = {"longer than 10 seconds: cut there": 0}
    album.add(np.ones(200_000, np.float32))
    assert album.look(1, told).shape == (160_000,) and set(told.values()) == {1}


def test_ears_and_eyes_that_do_not_fit_are_refused(made):
    with pytest.raises(DoesNotFit, match="hears neither log-mel spectra as Whisper does nor samples"):
        zoo.about(f"{made('ast')}+{made('neox')}:apt()")
    with pytest.raises(DoesNotFit, match=r"gives epalm\(states_of=2\) nothing that it reads"):
        bridge(made("convnext"), made("opt"), "epalm(states_of=2)")
    with pytest.raises(DoesNotFit, match="not one module each that is its FFN"):
        bridge(made("beit"), made("bloom"), "monointern()")


def test_what_enters_blocks_of_a_map_is_read_by_its_places(made):
    m = bridge(made("convnext"), made("qwen2"), "monointern(join=1)")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    seen = []
    handle = m.eyes.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    m.vision(x)
    handle.remove()
    assert m.see(x).shape == (2, 1, 64, 8) and torch.equal(m.see(x)[:, 0], seen[0].flatten(2).mT)


def test_a_masked_autoencoder_is_shown_whole_images_in_order(made):
    m = bridge(made("mae"), made("opt"), "limber()")
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert m.vision.config.mask_ratio == 0.75 and m.see(x).shape == (2, 1, 4, 16) and torch.equal(m.see(x), m.see(x))
    entering = m.vision.embeddings.patch_embeddings(x) + m.vision.embeddings.position_embeddings[:, 1:]
    seen = bridge(made("mae"), made("qwen2"), "monointern(join=1)").see(x)[:, 0]
    assert torch.allclose(seen, entering, atol=1e-6)


@pytest.mark.parametrize("words", ["mpt", "bloom"])
def test_padding_before_a_text_does_not_stand_between_it_and_its_images(made, words):
    """A decoder that is told no places counts all that lies between two tokens."""
    m = bridge(made("beit"), made(words), "limber()")
    g = torch.Generator().manual_seed(1)
    x, ids = torch.randn(2, 2, 3, 16, 16, generator=g), torch.randint(4, 20, (2, 5), generator=g)
    mask, pad = torch.ones_like(ids), torch.zeros(2, 3, dtype=torch.long)
    with torch.no_grad():
        alone = m(ids, mask, x[:, :1]).logits
        front = m(torch.cat([pad, ids], 1), torch.cat([pad, mask], 1), x, image_mask=torch.tensor([[1, 0]] * 2)).logits[:, 3:]
        behind = m(torch.cat([ids, pad], 1), torch.cat([mask, pad], 1), x, image_mask=torch.tensor([[1, 0]] * 2)).logits[:, :5]
    assert torch.allclose(front, alone, atol=1e-6) and torch.allclose(behind, alone, atol=1e-6)


def test_bridging_models_in_training_mode_writes_nothing_of_them():
    from transformers import ResNetConfig, ResNetModel
    eyes = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")).train()
    before = {k: v.clone() for k, v in eyes.state_dict().items()}
    bridge(eyes, tiny.build("llama"))
    assert all(torch.equal(v, before[k]) for k, v in eyes.state_dict().items())


def test_texts_leave_the_places_that_images_take(tmp_path, made):
    """A decoder with 64 learned positions: images take four, and neither long rows nor long answers run past the last."""
    pair = f"{made('beit')}+{made('opt')}:limber()"
    task = tasks.open(pairs(tmp_path / "a", say="the film was good " * 30), model=pair)
    model = task.build()
    assert task.taken == 4 and max(map(task.length, task.examples("train"))) == 60
    tuned = luthier.attach(model, 'full(at="connector")')
    assert task.loss(tuned, next(task.batches("train", 4))).isfinite()
    picture = np.zeros((16, 16, 3), np.uint8)
    assert task.evaluate(tuned)["n"] and len(task.predict(tuned, [(picture, "good " * 90)])) == 1
    with pytest.raises(BadData, match="A row has 13 images, which take 52 of the 64 places"):
        task.predict(tuned, [{"image": [picture] * 13}])
    with pytest.raises(DoesNotFit, match="an image takes 4 of the 18 places of the language model"):
        tasks.open(pairs(tmp_path / "b"), model=f"{made('beit')}+{made('short')}:limber()").build()
    free = tasks.open(pairs(tmp_path / "c"), model=f"{made('beit')}+{made('bloom')}:limber()")
    free.build()
    assert free.taken == 0


# -- what is done to odd input is said ---------------------------------------------------------------------------------------


def test_what_is_cut_is_said_while_tuning(tmp_path, made, capsys):
    code, _, err = folders.run(capsys, "bridge", made("beit"), made("opt"), "--data", pairs(tmp_path / "a", say="the film " * 50),
                               "--out", tmp_path / "out", "--epochs", 1, "--batch-size", 24, "--log", "none")
    said = " ".join(err.split())
    assert code == 0 and "17 of 17 rows are longer than 60 tokens and were cut" in said and "5 of 5 rows are longer" in said


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency_is_told_and_keeps_its_colours():
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (16, 16, 3), dtype=np.uint8)).convert("P")
    want, told = np.array(image.convert("RGB")), Counter()
    image.info["transparency"] = bytes(range(3))
    assert np.array_equal(decode(image, 16, told=told).permute(1, 2, 0).numpy(), want)
    assert told == {"transparent: what lies below shows": 1}


def changed(path, i, n=200, **columns):
    """The rows of pairs(), n of them, row i with other columns."""
    rows = [json.loads(line) for line in pairs(path, n=n).read_text().splitlines()]
    rows[i] |= columns
    (path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path / "rows.jsonl"


def test_half_characters_are_replaced_and_told(tmp_path, made, capsys):
    code, _, err = folders.run(capsys, "bridge", made("beit"), made("opt"), "--data",
                               changed(tmp_path, 3, response="good \ud83d", meta={"a": ["\ude00"]}), "--out", tmp_path / "out",
                               "--epochs", 1, "--batch-size", 50, "--log", "none")
    assert code == 0 and "rows.jsonl: 1 rows hold half of a character" in err, err
    code, said, err = folders.run(capsys, "predict", tmp_path / "out", tmp_path / "1.png", "what \udcff is it", "--json")
    assert code == 0 and json.loads(said)[0].keys() == {"text"}, err


def test_what_a_bridge_is_tuned_for_needs_no_guess(tmp_path, made):
    pair = f"{made('beit')}+{made('opt')}:limber()"
    for names in (("image", "text"), ("file_name", "description"), ("image", "sentence")):
        rows = [dict(zip(names, (f"{i % 4}.png", f"good film {i}"), strict=True)) for i in range(20)]
        pairs(tmp_path).write_text("".join(json.dumps(r) + "\n" for r in rows))
        task = tasks.open(tmp_path / "rows.jsonl", model=pair)
        assert (task.kind, task.roles) == ("image-to-text", dict(zip(("image", "response"), names, strict=True)))
    (tmp_path / "rows.jsonl").write_text('{"question": "what", "answer": "good"}\n' * 20)
    with pytest.raises(BadData, match="image-to-text needs a column for image"):
        tasks.open(tmp_path / "rows.jsonl", model=pair)


def test_odd_kinds_of_tasks_and_places_that_are_no_boxes_are_left_out_and_counted(tmp_path, made):
    pair = f"{made('beit')}+{made('opt')}:limber()"
    path = changed(tmp_path, 3, n=400)
    rows = [json.loads(line) | dict(task="ground", response="1 2 3 4") for line in path.read_text().splitlines()]
    rows[5]["task"], rows[7]["response"] = ["ground"], "on the left"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = tasks.open(path, model=pair)
    notes = " ".join(task.notes)
    assert "line 6: there is no task ['ground']" in notes and "line 8: the response (column 'response') is no box" in notes
    assert sum(map(len, task.tables.values())) == 398


def test_one_bad_row_of_few_ends_nothing_either(tmp_path, made):
    for kind, text, model in (("image-to-text", "response", f"{made('beit')}+{made('opt')}"),
                              ("image-text-retrieval", "caption", folders.clip(tmp_path / "clip"))):
        rows = [json.loads(line) for line in pairs(tmp_path, text).read_text().splitlines()]
        rows[3]["image"] = "gone.png"
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        task = tasks.open(tmp_path / "rows.jsonl", model=model, task=kind)
        assert sum(map(len, task.tables.values())) == 23 and any("line 4" in note for note in task.notes)


def test_where_nothing_can_be_written_is_said_first(tmp_path, made, capsys):
    from luthier.compare.rows import short
    (tmp_path / "out").write_text("")
    for argv in (("bridge", made("beit"), made("opt"), "--data", "gone.jsonl"),
                 ("compare", "gone.jsonl", "--model", f"{made('beit')}+{made('opt')}")):
        for out in (tmp_path / "out", tmp_path / "out" / "inner"):
            code, _, err = folders.run(capsys, *argv, "--out", out)
            said = " ".join(err.split())
            assert code == 2 and f"Nothing can be written into {out}: {tmp_path / 'out'} is a file. Give another folder." in said
    assert short(f"{made('beit')}+{made('opt')}:limber()") == "beit+opt:limber()" and short("/a/b+c.csv") == "b+c.csv"


def test_what_is_asked_of_rows_and_of_stdin(tmp_path, made, capsys, monkeypatch):
    code, _, err = folders.run(capsys, "bridge", made("beit"), made("opt"), "--data", pairs(tmp_path), "--out", tmp_path / "out",
                               "--epochs", 1, "--batch-size", 24, "--log", "none")
    assert code == 0, err
    from luthier.tune import inputs
    task = tasks.open(tmp_path / "rows.jsonl", model=f"{made('beit')}+{made('opt')}")
    (tmp_path / "some.jsonl").write_text('{"image": "0.png"}\n{"image": "1.png", "prompt": "good"}\n')
    found = inputs(task, [tmp_path / "some.jsonl", tmp_path / "2.png", "what", "why"])
    assert [(Path(x["image"]).name, x["prompt"]) for x in found] == [
        ("0.png", "what"), ("0.png", "why"), ("1.png", "good"), ("2.png", "what"), ("2.png", "why")]
    one, two = tmp_path / "0.png", tmp_path / "1.png"
    for text in (f"{one}\n{two}\n", f'{json.dumps(dict(image=str(one)))}\n{json.dumps(dict(image=str(two)))}\n'):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        code, said, err = folders.run(capsys, "predict", tmp_path / "out", "-", "what is it", "--json")
        assert code == 0 and len(json.loads(said)) == 2, err
    code, _, err = folders.run(capsys, "predict", tmp_path / "out", "https://a.b/c.png", "what is it")
    assert code == 2 and "nothing is fetched from an address: download the image" in " ".join(err.split())


def test_deep_grey_keeps_its_shades():
    shades, told = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16), Counter()
    for deep in (shades, (shades * 65535).astype(np.int32), (shades * 65535).astype(np.uint16), (shades * 255).astype(np.int32)):
        seen = decode(Image.fromarray(deep), 16, told=told).numpy()
        assert np.abs(seen.astype(int) - np.arange(256).reshape(1, 16, 16)).max() <= 1
    assert told == {"grey: made RGB": 4}
    with pytest.raises(ValueError, match="NaN"):
        decode(Image.fromarray(shades * np.nan), 16)


def test_few_shot_example_takes_its_numbers_from_the_command_line(tmp_path, monkeypatch):
    for i in range(24):
        (tmp_path / "data" / ("good", "bad")[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (i * 9, 0, 0)).save(tmp_path / "data" / ("good", "bad")[i % 2] / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("few", Path(__file__).parents[1] / "examples" / "few_shot_coop.py")
    few = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(few)
    assert len(few.main("data", folders.clip(tmp_path / "clip"), "2", "2")) == 2


def test_predicting_says_what_was_done_to_an_image(tmp_path, capsys):
    clip, names = folders.clip(tmp_path / "clip"), ("--names", "good,bad")
    Image.new("CMYK", (16, 16)).save(tmp_path / "a.jpg")
    for asked in (names, ("a good film",), ("a good film " * 30,)):
        code, _, err = folders.run(capsys, "predict", clip, tmp_path / "a.jpg", *asked)
        assert code == 0 and "1 images are CMYK: made RGB" in err
        assert ("1 texts exceed 32 tokens and are cut there" in err) == (len(asked[0]) > 100)
