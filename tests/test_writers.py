"""The zoo's own models that see and write, a bridged model in one folder, and what a comparison shows of several tasks."""

import base64
import io
import json
import shutil

import folders
import pytest
import torch
from safetensors.torch import load_file, save_file

import luthier
from luthier import scenes, tasks, zoo
from luthier._compat import torchvision
from luthier.bridges import bridge
from luthier.compare import compare, report, rows, table
from luthier.errors import BadState, DoesNotFit
from luthier.scenes import Draw, Scene, Shape, scene
from luthier.zoo.recipes import _writers as writers

torchvision()
NAMES = ("tiny-vlt5", "tiny-vlm")


# -- the models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_without_a_picture_it_is_its_language_model_to_the_bit(name):
    model, words = zoo.load(name), zoo.processor(name)
    batch = dict(words(["fill: a <extra_id_0> circle", "a red circle"], padding=True, return_tensors="pt"))
    batch.pop("token_type_ids", None)
    more = dict(decoder_input_ids=torch.tensor([[0, 5, 6], [0, 7, 8]])) if model.writes_apart else {}
    with torch.no_grad():
        assert torch.equal(model(**batch, **more).logits, model.language(**batch, **more).logits)
    assert model.trained and model.fresh is None and zoo.about(name).kind == "image-text"
    before = model.connector.map.weight.clone()
    assert torch.equal(model.draw(5).connector.map.weight, before)


@pytest.mark.parametrize("name", NAMES)
def test_it_does_what_its_recipe_says(name):
    """The figures in the recipe are what its weights do; on fewer scenes here."""
    folder = zoo._located(zoo.TABLE[name])
    said, found = json.loads((folder / "recipe.json").read_text())["scores"], writers.scores(zoo.load(name), 50)
    assert all(abs(found[k] - said[k]) < 0.2 for k in found), (found, said)
    assert found["boxes"] > 0.1 and found["caption BLEU"] > max(0.5, found["novel caption BLEU"])
    assert found["counts"] > 0.4 and found["region"] > 0.45 > said["novel region"]
    assert said["untuned vqa"] < 0.3 and said["untuned ground"] < 0.3        # what tuning is for


def test_they_are_small():
    size = sum(f.stat().st_size for n in ("tiny-clip", *NAMES) for f in zoo._located(zoo.TABLE[n]).rglob("*") if f.is_file())
    assert size < 20e6


def test_their_words_cover_the_tasks():
    for name in NAMES:
        words = zoo.processor(name)
        for text in ("yes", "no", "true", "false", "3", "12", "32", "left", "circle", "circles", "diamond", "yellow", "exactly"):
            assert len(words(text, add_special_tokens=False)["input_ids"]) == 1, (name, text)
        for text in ("There are exactly 2 red shapes. True or false?", "Zebra, façade & 日本"):
            assert words.decode(words(text)["input_ids"], skip_special_tokens=True).strip() == text


def test_own_models_are_trained_by_a_command(tmp_path):
    said = []
    for name in NAMES:
        found = zoo.train(name, tmp_path / name, said.append, steps=2, batch=4, warmup=1, images=4)
        assert 0 <= found["match"] <= 1 and {"untuned caption", "untuned ground"} <= found.keys()
        model = zoo.load(tmp_path / name)
        assert model.luthier_origin == zoo.about(tmp_path / name) and not (tmp_path / name / "checkpoint.pt").exists()
        assert load_file(tmp_path / name / "model.safetensors")["connector.map.weight"].dtype == torch.float16
        task = tasks.open("scenes:vqa", model=str(tmp_path / name), limit=12)
        with torch.no_grad():
            assert task.loss(model, next(iter(task.batches("train", 4)))).isfinite()
    assert "tiny-clip" in str(pytest.raises(luthier.errors.UnknownName, zoo.train, "_writers", tmp_path).value)


# -- the rows that they learn from ----------------------------------------------------------------------------------


S = Scene((Shape("circle", "red", "small", 0.2, 0.15), Shape("square", "red", "large", 0.8, 0.2),
           Shape("circle", "blue", "small", 0.5, 0.85)), 32)


def test_texts_are_true():
    assert writers.everything(S) == "a small red circle, a large red square and a small blue circle"
    assert writers.layout(S) == "top left: red circle, top right: red square, bottom: blue circle"
    assert writers.counts(S, "shape") == "two circles and one square" and writers.counts(S, "colour") == "two red and one blue"
    assert {writers.relation(S, Draw(i)) for i in range(20)} == {
        "a red circle left of a red square", "a red circle above a blue circle"}
    assert writers.about("region", S, Draw(1))[0].startswith("region: ")
    for i in range(200):
        s, draw = scene(i, 3, 32, 1, 4, "seen"), Draw("t", i)
        ask, said = writers.holes(writers.everything(s), draw)
        whole, parts = ask, said.split("<extra_id_")[1:]
        for k, part in enumerate(parts):
            assert part.startswith(f"{k}> ") and f"<extra_id_{k}>" in ask
            whole = whole.replace(f"<extra_id_{k}>", part.partition("> ")[2].strip())
        assert whole == writers.everything(s) and parts
        assert not any(scenes.novel(x.shape, x.colour) for x in writers.unlike(s, draw).shapes)


def test_matches_are_as_often_right_as_wrong_and_nothing_of_the_tasks_is_asked():
    answers, crowds = [], ["There is 1 black block"]
    for step in range(40):
        for pictures, ask, said in writers.rows(step, 16, 1, crowds, step % 2 == 0)[1]:
            assert len(pictures) <= 3 and not ask.startswith(("Describe", "How", "Is ", "Where", "What"))
            answers += [said] * ask.startswith("match:")
    assert 0.35 < answers.count("fits") / len(answers) < 0.65 and set(answers) == {"fits", "differs"}


# -- one folder -----------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path):
    return folders.vit(tmp_path / "vit"), folders.llama(tmp_path / "llama")


def batch(model, task):
    return next(iter(task.batches("train", 4)))


def test_a_bridge_of_ones_own_is_kept_in_one_folder(tmp_path, parts):
    model = bridge(*parts, "limber(grid=2, dropout=0.0)", seed=3)
    model.connector.map.weight.data.mul_(2)
    model.write(tmp_path / "mine")
    shutil.rmtree(parts[0]), shutil.rmtree(parts[1])                       # it stands alone
    again = zoo.load(tmp_path / "mine")
    assert again.state_dict().keys() == model.state_dict().keys() and again.trained and repr(again.way) == repr(model.way)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    task = tasks.open("scenes:caption", model=str(tmp_path / "mine"), limit=12)
    with torch.no_grad():
        x = next(iter(task.batches("train", 4)))
        assert torch.equal(task.logits(again, x), task.logits(model, x))
    assert zoo.load(tmp_path / "mine", dtype="bfloat16").connector.map.weight.dtype == torch.bfloat16
    assert repr(luthier.attach(again, "lora(at='text.attn.q')").chain)


def test_a_merged_bridge_is_such_a_folder(tmp_path, parts):
    model = bridge(*parts, "limber(dropout=0.0)")
    tuned = luthier.attach(model, "full(at='connector') >> lora(at='text.attn.q', rank=2)", seed=1)
    for _, p in tuned.trainable():
        p.data.add_(0.05)
    tuned.save(tmp_path / "state")
    task = tasks.open("scenes:caption", model=model, limit=12)
    x = next(iter(task.batches("train", 4)))
    with torch.no_grad():
        right = task.logits(tuned.eval(), x)
    tuned.merge()
    model.write(tmp_path / "merged")
    with torch.no_grad():
        assert (task.logits(zoo.load(tmp_path / "merged"), x) - right).abs().max() < 1e-5


@pytest.mark.parametrize(("change", "word"), [
    (dict(language="/etc"), "neither ./language"), (dict(vision="../vit"), "neither ./vision"), (dict(format=9), "format is 9"),
    (dict(side="x"), "another type"), (None, "JSONDecodeError"), ("tensors", "differ in 1 tensors, first connector.map.bias"),
    ("cut", "do not fit")])
def test_a_damaged_folder_is_refused(tmp_path, parts, change, word):
    bridge(*parts).write(tmp_path / "m")
    facts, tensors = tmp_path / "m" / "bridge.json", tmp_path / "m" / "model.safetensors"
    if change == "tensors":
        save_file({k: v for k, v in load_file(tensors).items() if k != "connector.map.bias"}, tensors)
    elif change == "cut":
        tensors.write_bytes(tensors.read_bytes()[:2000])
    else:
        facts.write_text("{" if change is None else json.dumps(json.loads(facts.read_text()) | change))
    with pytest.raises(BadState, match=word):
        zoo.load(tmp_path / "m")


def test_what_no_file_can_describe_is_refused(tmp_path, parts):
    class Eyes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.map = torch.nn.Conv2d(3, 8, 4, 4)

        def forward(self, pixel_values):
            return self.map(pixel_values)

    model = bridge(Eyes(), zoo.load(parts[1]))
    with pytest.raises(DoesNotFit, match="vision model, Eyes"):
        model.write(tmp_path / "m")


def test_a_grid_is_the_largest_of_its_patches(parts):
    from luthier.bridges.limber import pooled

    x = torch.arange(16.0).view(1, 16, 1)
    assert pooled(x, 2).flatten().tolist() == [5, 7, 13, 15] and pooled(x, 4).equal(x)
    with pytest.raises(DoesNotFit, match="gives 16"):
        pooled(x, 5)


# -- several tasks in a comparison ----------------------------------------------------------------------------------


def test_each_task_has_its_score_and_answers_are_shown(tmp_path, parts):
    bridge(*parts, "limber(dropout=0.0)").write(tmp_path / "m")
    d = compare("scenes-clips-multitask", str(tmp_path / "m"), "full, none", 2, tmp_path / "out", epochs=1, batch_size=8,
                limit=12, progress=False)
    assert d["task"]["each"] == {"caption": "bleu", "direction": "accuracy", "order": "accuracy"}
    found = {r["chain"]: r for r in rows.rows(d)}
    each = found["full()"]["each"]
    assert set(each) == {"caption", "direction", "order"}
    assert sum(m for m, _ in each.values()) / 3 == pytest.approx(found["full()"]["mean"])
    head = next(line for line in table.show(d).splitlines() if "method" in line)
    assert "caption (bleu)" in head and "direction" in head and "scenes:clips-multitask" in table.show(d)
    shown = d["entries"][d["samples"]]["result"]
    assert len(shown["rows"]) == len(shown["tried"]) == 8 and len(shown["rows"][0]["images"]) == 6
    page = report.write(d, tmp_path / "out")[0].read_text("utf-8")
    assert page.count('class="card several"') == 8 and "What tuning changed" in page and "<small>(bleu)</small>" in page
    again = compare("scenes-clips-multitask", str(tmp_path / "m"), "full, none", 2, tmp_path / "out", epochs=1, batch_size=8,
                    limit=12, progress=False)
    assert again["samples"] == d["samples"] and len(again["entries"]) == len(d["entries"])


def test_right_answers_are_told_from_wrong_ones(parts):
    task = tasks.open("scenes:multitask", model="+".join(parts), limit=16)
    shown = task.samples(4)
    assert [r["kind"] for r in shown] == ["caption", "vqa", "nlvr", "ground"] and len(shown[2]["images"]) > 1
    task.said = lambda model, examples, size: [e["answers"][0].upper() for e in examples]
    assert [right for _, right in task.tried(task.build(), shown)] == [True] * 4
    task.said = lambda model, examples, size: ["0 0 1 1"] * 4
    assert [right for _, right in task.tried(task.build(), shown)] == [False] * 4


def test_rows_of_ones_own_are_shown_by_their_tasks(tmp_path, parts):
    from PIL import Image

    lines = []
    for i in range(30):
        Image.fromarray(scene(i, 0, 400).image()).save(tmp_path / f"{i}.png")
        kind = ("vqa", "caption")[i % 2]
        lines.append(json.dumps(dict(image=f"{i}.png", question="good?" if kind == "vqa" else "", answer="fine", task=kind)))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    task = tasks.open(tmp_path / "rows.jsonl", model="+".join(parts))
    assert task.each() == {"caption": "bleu", "vqa": "accuracy"} == task.describe()["each"]
    shown = task.samples(4)
    assert sorted(r["kind"] for r in shown) == ["caption", "caption", "vqa", "vqa"]
    assert {r["answers"][0] for r in shown} == {"fine"}
    image = Image.open(io.BytesIO(base64.b64decode(shown[0]["images"][0])))
    assert image.size == (160, 160) and image.format == "PNG"
    one = tasks.open("scenes:vqa", model="+".join(parts), limit=12)
    assert one.each() == {} and one.samples(3)[0]["kind"] is None
