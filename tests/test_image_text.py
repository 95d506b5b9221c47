"""Images and text in, text out: rows and what is done to odd ones, batches, cached features, scores, the command line."""

import json
import shutil

import folders
import numpy as np
import pytest
import torch
from PIL import Image

import luthier
from luthier import tasks, zoo
from luthier._compat import torchvision
from luthier.cli import main
from luthier.compare.fit import ready
from luthier.errors import BadData
from luthier.tasks import metrics
from luthier.train import train

torchvision()                            # before a test builds a vision model of transformers
WORDS = ("good", "bad", "fine", "awful")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    base = tmp_path_factory.mktemp("pair")
    return f"{folders.vit(base / 'vit')}+{folders.llama(base / 'llama')}:limber(dropout=0.0)"


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    from transformers import T5Config, T5ForConditionalGeneration
    base = tmp_path_factory.mktemp("apart")
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(vocab_size=len(folders.WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                                        dropout_rate=0.0, pad_token_id=0, eos_token_id=3, decoder_start_token_id=0)
                               ).save_pretrained(base / "t5")
    folders.tokenizer(base / "t5", decoder=True)
    return f"{folders.vit(base / 'vit')}+{base / 't5'}:limber(dropout=0.0)"


def picture(k, size=16, shape=(16, 16, 3)):
    """Four kinds of picture that a word tells apart."""
    image = np.full(shape, 20, np.uint8)
    half = size // 2
    image[(k // 2) * half:(k // 2 + 1) * half, (k % 2) * half:(k % 2 + 1) * half] = 230
    return image


def pairs(folder, n=40, **change):
    """A JSONL of n rows and its images; change: row number -> dict of columns."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        Image.fromarray(picture(i % 4)).save(folder / f"{i}.png")
        rows.append(dict(image=f"{i}.png", question="what is it", answer=WORDS[i % 4]))
    for i, columns in change.get("change", {}).items():
        rows[i] = rows[i] | columns
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / "rows.jsonl"


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "kind", "roles"), [
    (dict(image=["a.png"], caption=["a dog"]), "image-to-text", dict(image="image", response="caption")),
    (dict(img=["a.png", ""], question=["what", "who"], answer=["a", "b"]), "image-to-text",
     dict(image="img", prompt="question", response="answer")),
    (dict(images=[["a.png", "b.png"]], prompt=["x"], response=["true"], task=["nlvr"]), "image-to-text",
     dict(image="images", prompt="prompt", response="response", task="task")),
    (dict(image=["a.png", "b.png"] * 4, label=["x", "y"] * 4), "image-classification", dict(image="image", label="label"))])
def test_columns_are_told_by_name_and_content(columns, kind, roles):
    assert tasks._roles.guess(columns, "t") == (kind, roles)


def test_one_bad_row_ends_nothing(tmp_path, pair):
    """Missing, truncated, unnamed images and empty answers are left out, counted and shown; more than a hundredth is refused."""
    path = pairs(tmp_path / "a", 300, change={7: dict(image="gone.png")})
    task = tasks.open(path, model=pair)
    assert sum(task.size(s) for s in ("train", "val", "test")) == 299
    note = next(n for n in task.notes if "cannot be used" in n)
    assert "1 rows" in note and "rows.jsonl, line 8" in note and "gone.png" in note
    for change in (dict(image="gone.png"), dict(image=None), dict(answer=""), dict(answer=None)):
        with pytest.raises(BadData, match=r"rows.jsonl, line \d+.*(No such file|no image is named|is empty)"):
            tasks.open(pairs(tmp_path / "b", 20, change={i: change for i in range(0, 20, 2)}), model=pair)
    whole = (tmp_path / "a" / "0.png").read_bytes()
    (tmp_path / "a" / "0.png").write_bytes(whole[:len(whole) // 2])
    assert any("2 rows" in n or "1 rows" in n and "line 1:" in n for n in tasks.open(path, model=pair).notes)


def test_odd_images_are_treated_and_told(tmp_path, pair):
    path = pairs(tmp_path / "a")
    for i, mode in enumerate(("L", "CMYK", "RGBA", "I;16")):
        image = Image.fromarray(picture(0))
        image = Image.fromarray(np.full((16, 16), 60000, np.uint16)) if mode == "I;16" else image.convert(mode)
        if mode == "RGBA":
            image.putalpha(100)
        image.save(tmp_path / "a" / f"{i}.{'tiff' if mode in ('CMYK', 'I;16') else 'png'}")
    frames = [Image.fromarray(picture(k)) for k in (0, 1)]
    frames[0].save(tmp_path / "a" / "4.gif", save_all=True, append_images=frames[1:])
    Image.new("L", (5000, 5000)).save(tmp_path / "a" / "5.png")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, name in {1: "1.tiff", 3: "3.tiff", 4: "4.gif"}.items():
        rows[i]["image"] = name
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    told = " ".join(tasks.open(path, model=pair).notes)
    for what in ("grey", "CMYK", "transparent", "animated", "huge"):
        assert f"images are {what}" in told, told


def test_long_texts_are_cut_and_numbers_written_out(tmp_path, pair):
    path = pairs(tmp_path / "a", change={0: dict(answer=7), 1: dict(answer="good " * 500), 2: dict(question="was " * 500)})
    task = tasks.open(path, model=pair, max_length=32)
    rows = task.examples("train") + task.examples("val") + task.examples("test")
    assert max(map(task.length, rows)) <= 32 and sum("were cut" in n for n in task.notes) >= 1
    assert ["7"] in [r["answers"] for r in rows]
    with pytest.raises(BadData, match="no task 'count'.*Nearest"):
        tasks.open(pairs(tmp_path / "b", change={i: dict(task="count" if i % 2 else "vqa") for i in range(40)}), model=pair)
    with pytest.raises(BadData, match="needs a column for image"):
        (tmp_path / "t.csv").write_text("prompt,response\na,b\nc,d\n")
        tasks.open(tmp_path / "t.csv", model=pair, task="image-to-text")


# -- batches ------------------------------------------------------------------------------------------------------------


def test_a_row_is_prompt_then_answer_and_the_answer_alone_is_learned(tmp_path, pair):
    task = tasks.open(pairs(tmp_path / "a"), model=pair)
    e = task.examples("train")[0]
    batch = task.collate([e])
    words, labels = task.tokenizer.convert_ids_to_tokens(batch["input_ids"][0]), batch["labels"][0]
    assert words[1:4] == ["what", "is", "it"] or "[UNK]" in words
    assert words[-1] == "[SEP]" and words[-2] == e["answers"][0]
    assert (labels[:-2] == -100).all() and (labels[-2:] == batch["input_ids"][0, -2:]).all()
    assert batch["pixel_values"].shape == (1, 3, 16, 16)


def test_rows_may_have_several_images(tmp_path, pair):
    path = pairs(tmp_path / "a", change={i: dict(image=[f"{i}.png", "3.png"]) for i in range(0, 40, 2)})
    task = tasks.open(path, model=pair)
    batch = next(iter(task.batches("train", 8)))
    assert batch["pixel_values"].shape == (8, 2, 3, 16, 16) and set(batch["image_mask"].sum(1).tolist()) == {1, 2}
    assert task.loss(task.build(), batch).isfinite()


def test_batches_are_of_one_kind(tmp_path, pair):
    path = pairs(tmp_path / "a", change={i: dict(task=("vqa", "nlvr")[i % 2]) for i in range(40)})
    task, told = tasks.open(path, model=pair), []
    batches = list(task.batches("train", 8))
    assert {b.kind for b in batches} == {"vqa", "nlvr"} and len(batches) == task.n_batches("train", 8)
    tuned = ready(task, "full(at='connector')")
    tuned.model.forward = lambda **batch: told.append(tuned.context["task"]) or type(tuned.model).forward(tuned.model, **batch)
    for b in batches:
        task.loss(tuned, b)
    assert told == [b.kind for b in batches]
    scores = task.evaluate(tuned)
    assert list(scores)[:3] == ["average", "vqa", "nlvr"] and scores["average"] == (scores["vqa"] + scores["nlvr"]) / 2


# -- what frozen eyes see is computed once ----------------------------------------------------------------------------------


class Watch:
    """How often the eyes ran, and whether they built a graph."""

    def __init__(self, model):
        self.calls, self.graphs = 0, 0
        for m in model.vision.modules():
            m.register_forward_hook(self.seen)
        model.vision.register_forward_hook(self.count)

    def seen(self, module, args, out):
        h = out if torch.is_tensor(out) else next((v for v in (out.values() if hasattr(out, "values") else out)
                                                   if torch.is_tensor(v)), None)
        self.graphs += h is not None and h.requires_grad

    def count(self, module, args, out):
        self.calls += 1


@pytest.mark.parametrize("chain", ["full(at='connector')", "full(at='connector') >> lora(rank=2, at='text.attn.q')"])
def test_cached_states_give_the_same_losses_and_no_graph(tmp_path, pair, chain):
    found, states = [], []
    for cached in (True, False):
        task = tasks.open(pairs(tmp_path / "a"), model=pair, limit=24)         # batches of one size: products round alike
        if not cached:
            task.seeing = luthier.train.contextlib.nullcontext
        tuned = ready(task, chain, seed=0, batch_size=8)
        watch = Watch(tuned.base)
        found.append(train(tuned, task, epochs=3, batch_size=8, seed=0)["loss"])
        states.append([p.detach().clone() for _, p in tuned.trainable()])
        assert watch.graphs == 0                            # no module of the eyes ever made a tensor with a graph
        assert watch.calls == (len(found[0]) // 3 if cached else len(found[0]))
    assert found[0] == found[1] and all(map(torch.equal, *states))


def test_eyes_that_are_tuned_look_each_time(tmp_path, pair):
    task = tasks.open(pairs(tmp_path / "a"), model=pair)
    for chain in ("lora(rank=2, at='vision.attn.q')", "houlsby(width=2, at='vision.mlp.out')", "full()"):
        tuned = ready(task, chain, batch_size=8)
        assert not tuned.base.still()
        with task.seeing(tuned):
            assert "pixel_values" in next(iter(task.batches("train", 8)))
        tuned.active = False
        assert tuned.base.still()


# -- learning and scores ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["pair", "apart"])
def test_it_learns_what_the_pictures_show(tmp_path, which, request):
    task = tasks.open(pairs(tmp_path / "a", 80), model=request.getfixturevalue(which))
    tuned = ready(task, "full()", seed=0, batch_size=16)
    train(tuned, task, epochs=25 if which == "pair" else 40, batch_size=16, lr=5e-3 if which == "pair" else 1e-2, seed=0)
    scores = task.evaluate(tuned)
    assert scores["accuracy"] > 0.9, scores
    said = task.predict(tuned, [(picture(k), "what is it") for k in range(4)])
    assert [s["text"] for s in said] == list(WORDS)
    shuffled = task.predict(tuned, [(picture(3 - k), "what is it") for k in range(4)])
    assert [s["text"] for s in shuffled] == list(WORDS)[::-1]


def test_scores_by_hand():
    assert metrics.exact(["Yes.", "no", " 2 "], [["yes"], ["yes", "No"], ["3"]]) == 2 / 3
    assert metrics.iou([0, 0, 2, 2], [1, 0, 3, 2]) == pytest.approx(2 / 6)
    assert metrics.acc_iou(["0 0 2 2", "x", "1 1 3 3"], [["0 0 2 3"], ["0 0 1 1"], ["0 0 2 2"]]) == pytest.approx(1 / 3)
    pytest.importorskip("sacrebleu")
    assert metrics.bleu(["a small red circle"], [["a small red circle"]]) == pytest.approx(1)
    # 4 of 5, 3 of 4, 2 of 3, 1 of 2 n-grams: (4/5 · 3/4 · 2/3 · 1/2)^(1/4)
    assert metrics.bleu(["a b c d e"], [["a b c d x"]]) == pytest.approx(0.2 ** 0.25, abs=1e-6)


@pytest.mark.parametrize("name", ["caption", "vqa", "nlvr", "ground", "clips"])
def test_built_in_rows_are_true_and_the_same_each_time(name):
    from luthier.tasks import pictures
    fn = getattr(pictures, name)
    rows = [fn(i, 0) for i in range(60)]
    assert [r["response"] for r in rows] == [fn(i, 0)["response"] for i in range(60)] != [fn(i, 1)["response"] for i in range(60)]
    if name == "nlvr":
        share = np.mean([r["response"] == "true" for r in rows])
        assert 0.3 < share < 0.7 and {len(r["image"]) for r in rows} == {2, 3}
    if name == "ground":
        from luthier import scenes
        s = scenes.scene(5, 0, 32)
        box = np.array(rows[5]["response"].split(), int)
        assert (s.boxes() == box).all(1).any()


# -- the command line -------------------------------------------------------------------------------------------------------


def test_bridge_then_predict(tmp_path, pair, capsys):
    eyes, _, mouth = pair.removesuffix(":limber(dropout=0.0)").partition("+")
    path = pairs(tmp_path / "a")
    out = str(tmp_path / "out")
    assert main(["bridge", eyes, mouth, "--with", "limber(dropout=0.0)", "--data", str(path), "--out", out, "--epochs", "2",
                 "--log", "none"]) == 0
    said = capsys.readouterr()
    assert "accuracy" in said.out and "luthier predict" in said.out and "image-to-text" in said.err
    assert main(["predict", out, str(tmp_path / "a" / "0.png"), "what is it", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)[0]) == ["text"]
    assert main(["predict", out, str(path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 40
    assert main(["predict", out, "what is it"]) == 2
    assert "No image" in capsys.readouterr().err
    assert main(["predict", out, "nowhere.png", "what is it"]) == 2
    assert "not an image that can be read" in capsys.readouterr().err
    shutil.rmtree(out)
    assert main(["bridge", mouth, mouth, "--data", str(path), "--out", out]) == 2
    assert "sees no images" in " ".join(capsys.readouterr().err.split())


def test_a_tokenizer_of_another_model_is_refused(tmp_path, pair):
    eyes, _, mouth = pair.removesuffix(":limber(dropout=0.0)").partition("+")
    model = zoo.load(mouth)
    model.resize_token_embeddings(8)
    model.save_pretrained(tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{mouth}/{name}", tmp_path / "small" / name)
    task = tasks.open(pairs(tmp_path / "a"), model=f"{eyes}+{tmp_path / 'small'}")
    with pytest.raises(luthier.LuthierError, match="do not belong together"):
        task.build()
