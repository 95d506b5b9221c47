"""Vision-language models of the hub in their own forms: what a batch holds against their own processors and losses, learning,
answers, and the whole path from the command line; CIDEr-D; predictions of every image task; bad rows; frozen eyes."""

import json
import math
from contextlib import nullcontext

import hubs
import numpy as np
import pytest
import torch
from folders import run
from PIL import Image

import luthier
from luthier import tasks, zoo
from luthier.compare.fit import ready
from luthier.errors import BadData, DoesNotFit
from luthier.tasks.cider import cider
from luthier.train import train

SAID = ("good", "bad", "fine", "awful")
IGNORE = -100


def picture(k):
    """Red, green, blue, white."""
    image = np.full((16, 16, 3), 20, np.uint8)
    image[..., k if k < 3 else slice(None)] = 230
    return image


def pairs(folder, n=40, change=(), question="what is it"):
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        Image.fromarray(picture(i % 4)).save(folder / f"{i}.png")
        rows.append(dict(image=f"{i}.png", question=question, answer=SAID[i % 4]))
    for i, columns in dict(change).items():
        rows[i] = rows[i] | columns
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def folders_of(tmp_path_factory):
    made, base = {}, tmp_path_factory.mktemp("hubs")

    def get(name):
        if name not in made:
            made[name] = hubs.MODELS[name](base / name)
        return made[name]
    return get


# -- forms ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", hubs.MODELS)
def test_a_batch_holds_what_its_own_processor_makes(tmp_path, folders_of, name):
    """Ids of the prompt, pixels and whatever comes with them; prompt and image places are no labels."""
    task = tasks.open(pairs(tmp_path), model=folders_of(name))
    model, e = task.build(), task.examples("train")[0]
    batch = task.collate([e])
    labels, ids = batch["labels"][0], batch["input_ids"][0]
    right = task.tokenizer(e["answers"][0], add_special_tokens=False)["input_ids"] + [hubs.END]
    assert labels[labels != IGNORE].tolist() == right
    if not task.apart:
        assert ids[-2:].tolist() == right and (labels[:-2] == IGNORE).all()
    if name != "llava_bare":
        from transformers import AutoProcessor
        made, album, (k,) = AutoProcessor.from_pretrained(folders_of(name)), *e["pictures"]
        image = Image.fromarray(album.look(k).permute(1, 2, 0).numpy())
        token = getattr(made, "image_token", None) if name in ("llava", "paligemma", "idefics3") else None
        own = made(images=[[image]] if name == "idefics3" else image, text=(token or "") + "what is it\n", return_tensors="pt")
        assert torch.equal(own["pixel_values"], batch["pixel_values"])
        if name not in ("blip", "git"):                     # whose text has a start of its own, and no end before the answer
            assert own["input_ids"][0].tolist() == ids[:len(e["ask"])].tolist()
        else:
            assert own["input_ids"][0][1:-1].tolist() == ids[1:len(e["ask"])].tolist() and ids[0] == hubs.START
    if model.config.model_type != "blip" and task.hub.token is not None:
        places = (ids == task.hub.token).sum()
        features = model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
        assert places == sum(x.shape[:-1].numel() for x in (features if isinstance(features, list | tuple) else [features])) > 0


@pytest.mark.parametrize("name", hubs.MODELS)
def test_the_loss_is_the_models_own_and_padding_changes_nothing(tmp_path, folders_of, name):
    path = pairs(tmp_path, change={i: dict(question="was it not very good and fine") for i in range(0, 40, 2)})
    task = tasks.open(path, model=folders_of(name))
    model = task.build()
    examples = sorted(task.examples("train")[:6], key=task.length)
    batch = task.collate(examples[::5])
    assert len({len(e["ask"]) for e in examples[::5]}) == 2
    with torch.no_grad():
        ours, own = task.loss(model, batch), model(**batch).loss
        alone = [task.nll(model, task.collate([e])) for e in examples[::5]]
    assert torch.allclose(ours, own, atol=1e-5)
    if task.alike:                                          # its decoder looks at padding: there is none
        batches = list(task.batches("train", 8))
        assert len(batches) == task.n_batches("train", 8) and all((b["attention_mask"] == 1).all() for b in batches)
        return
    assert torch.allclose(ours, sum(a for a, _ in alone) / sum(n for _, n in alone), atol=1e-4)


@pytest.mark.parametrize("name", hubs.MODELS)
def test_prompts_of_several_lengths_are_answered_as_each_alone(tmp_path, folders_of, name):
    path = pairs(tmp_path, change={i: dict(question="was it not very good and fine") for i in range(0, 40, 2)})
    task = tasks.open(path, model=folders_of(name))
    model = task.build()
    task.longest_answer = 4
    examples = task.examples("train")[:5]
    assert task.said(model, examples, 8) == [task.said(model, [e], 1)[0] for e in examples]


@pytest.mark.parametrize("name", ["blip", "blip_vqa"])
def test_blip_is_asked_as_its_own_processor_asks(tmp_path, folders_of, name):
    from transformers import AutoProcessor
    task = tasks.open(pairs(tmp_path), model=folders_of(name))
    model, made, e = task.build(), AutoProcessor.from_pretrained(folders_of(name)), task.examples("test")[0]
    own = made(images=Image.fromarray(e["pictures"][0].look(e["pictures"][1][0]).permute(1, 2, 0).numpy()), text="what is it",
               return_tensors="pt")
    ids = model.generate(**own, max_new_tokens=task.longest_answer, do_sample=False)[0]
    if name == "blip":
        ids = ids[own["input_ids"].shape[1] - 1:]
    assert task.said(model, [e], 1) == [task.tokenizer.decode(ids, skip_special_tokens=True).strip()]


@pytest.mark.parametrize("name", ["blip", "blip_vqa", "blip2", "blip2_t5", "llava", "git"])
def test_it_learns_what_the_pictures_show(tmp_path, folders_of, name):
    task = tasks.open(pairs(tmp_path, 80), model=folders_of(name))
    tuned = ready(task, "full()", seed=0, batch_size=16)
    train(tuned, task, epochs=30, batch_size=16, lr=5e-3, seed=0)
    assert task.evaluate(tuned)["accuracy"] > 0.9
    assert [s["text"] for s in task.predict(tuned, [(picture(k), "what is it") for k in range(4)])] == list(SAID)


def test_a_chat_template_asks_and_several_images_have_their_places(tmp_path):
    template = ("{% for m in messages %}a "
                "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}"
                "{% endif %}{% endfor %} b{% endfor %}")
    folder = hubs.llava(tmp_path / "llava", template=template)
    path = pairs(tmp_path / "a", change={i: dict(image=[f"{i}.png", "3.png"]) for i in range(0, 40, 2)})
    task = tasks.open(path, model=folder)
    two = next(e for e in task.examples("train") if len(e["pictures"][1]) == 2)
    one = next(e for e in task.examples("train") if len(e["pictures"][1]) == 1)
    a, what, unknown = (task.tokenizer(w, add_special_tokens=False)["input_ids"] for w in ("a", "what is it", "b"))
    assert one["ask"] == [*a, *[hubs.WORDS] * 4, *what, *unknown] and two["ask"] == [*a, *[hubs.WORDS] * 8, *what, *unknown]
    batch = task.collate([one, two])
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    model = task.build()
    assert torch.allclose(task.loss(model, batch), sum(task.nll(model, task.collate([e]))[0] for e in (one, two)) / 4, atol=1e-4)


@pytest.mark.parametrize("name", ["llava", "llava_bare", "paligemma", "idefics3"])
def test_text_alone_is_the_language_models_own(tmp_path, folders_of, name):
    task = tasks.open(pairs(tmp_path), model=folders_of(name))
    model, e = task.build(), task.examples("train")[0]
    ids = [i for i in e["ask"] if i != task.hub.token]
    rows = [e | dict(ask=ids, pictures=(task.album, []), text=None), e | dict(ask=ids[:-1], pictures=(task.album, []), text=None)]
    batch = task.collate(rows)
    assert "pixel_values" not in batch and task.loss(model, batch).isfinite()
    body = model.model.text_model if name == "idefics3" else model.model.language_model
    ids = batch["input_ids"][:1]
    assert torch.allclose(model(input_ids=ids).logits, model.lm_head(body(input_ids=ids).last_hidden_state), atol=1e-5)


def test_what_does_not_belong_together_is_refused(tmp_path, folders_of):
    path = pairs(tmp_path / "a")
    with pytest.raises(BadData, match="cannot do"):
        tasks.open(path, model=hubs.folders.clip(tmp_path / "clip"))
    with pytest.raises(BadData, match="row has 2 images, and this model looks at one"):
        tasks.open(pairs(tmp_path / "b", change={i: dict(image=["0.png", "1.png"]) for i in range(5)}), model=folders_of("blip"))
    made = hubs.llava(tmp_path / "llava")
    facts = json.loads((tmp_path / "llava" / "processor_config.json").read_text())
    (tmp_path / "llava" / "processor_config.json").write_text(json.dumps(facts | dict(patch_size=4)))
    with pytest.raises(DoesNotFit, match="cannot run on what its processor makes"):
        tasks.open(path, model=made).build()
    (tmp_path / "llava" / "processor_config.json").write_text("{")
    with pytest.raises(luthier.LuthierError, match="processor of .* cannot be read"):
        tasks.open(path, model=made)


def test_a_long_prompt_loses_words_and_no_image(tmp_path, folders_of):
    path = pairs(tmp_path, change={0: dict(question="was " * 300), 1: dict(answer="good " * 300)})
    for name in ("llava", "blip", "blip2_t5"):
        task = tasks.open(path, model=folders_of(name), max_length=24)
        rows = [e for s in ("train", "val", "test") for e in task.examples(s)]
        assert any("were cut" in n for n in task.notes)
        if name != "blip":
            assert {sum(i == task.hub.token for i in e["ask"]) for e in rows} == {3 if name == "blip2_t5" else 4}
        assert all(len([i for i in e["ask"] if i != task.hub.token]) + len(e["answer"]) <= 26 for e in rows)
        assert task.loss(task.build(), task.collate(rows)).isfinite()


# -- the whole path ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blip", "blip_vqa", "blip2", "blip2_t5", "llava"])
def test_tune_then_predict(tmp_path, folders_of, name, capsys):
    path, out = pairs(tmp_path / "a"), tmp_path / "out"
    assert run(capsys, "tune", path, "--model", folders_of(name), "--with", "lora(rank=2)", "--out", out, "--epochs", "1",
               "--log", "none")[0] == 0
    code, said, _ = run(capsys, "predict", out, tmp_path / "a" / "0.png", "what is it", "--json")
    assert code == 0 and list(json.loads(said)[0]) == ["text"]
    task, tuned = luthier.tune.reopen(out)
    again = tasks.open(path, model=folders_of(name))
    fresh = luthier.attach(again.build(), "lora(rank=2)")
    assert tuned.chain == fresh.chain and any(p.abs().sum() > 0 for n, p in tuned.trainable() if n.endswith("B"))
    some = again.examples("test")[:4]
    assert task.said(tuned, some, 4) == again.said(luthier.load(again.build(), out), some, 4)
    merged = tmp_path / "merged"
    assert run(capsys, "merge", out, "--out", merged)[0] == 0
    plain, batch = zoo.load(str(merged)), again.collate(again.examples("test")[:2])
    assert torch.allclose(again.loss(plain, batch), again.loss(tuned, batch), atol=1e-4)


@pytest.mark.parametrize("name", ["blip_vqa", "llava"])
def test_a_row_of_compare(tmp_path, folders_of, name, capsys):
    code, said, told = run(capsys, "compare", pairs(tmp_path / "a"), "--model", folders_of(name), "--methods", "lora(rank=2)",
                           "--seeds", "1", "--epochs", "1", "--out", tmp_path / "cmp", "--json")
    assert code == 0, told
    rows = json.loads(said)
    assert any("lora" in json.dumps(r) for r in rows) and not any("error" in r and r["error"] for r in rows), said


# -- CIDEr-D ----------------------------------------------------------------------------------------------------------------


def test_cider_by_hand():
    """Two images. `a` and `c` stand with one of them each, `b` with both: log 2, log 2, 0; of bigrams and so on each with one."""
    assert cider(["a b", "c b"], [["a b"], ["c b"]]) == pytest.approx(10 * (1 + 1) / 4)      # 1 and 2 agree; no 3, 4
    # "a" against "a b": one word against two, e^(-1/72); unigrams (log 2) · (log 2, 0), clipped the same; no bigram in common
    assert cider(["a", "c b"], [["a b"], ["c b"]]) == pytest.approx(10 * (math.exp(-1 / 72) / 4 + 2 / 4) / 2)
    # said twice: (2 log 2, 0) is clipped to log 2, over 2 log 2 · log 2; lengths 2 and 2
    assert cider(["a a", "c b"], [["a b"], ["c b"]]) == pytest.approx(10 * (1 / 2 / 4 + 2 / 4) / 2)
    # two references: the mean; a word that no reference has weighs log 2 in the norm
    x = (1 / math.sqrt(2) + 0) / 4
    assert cider(["a z", "c b"], [["a", "q q q"], ["c b"]]) == pytest.approx(10 * (math.exp(-1 / 72) * x / 2 + 2 / 4) / 2)
    assert cider(["A, b.", "c b"], [["a b"], ["c b"]]) == pytest.approx(5)
    assert cider(["", "c b"], [["a b"], ["c b"]]) == pytest.approx(2.5)
    assert cider(["a b"], [["a b"]]) == 0                    # one image tells nothing of how common a word is


GOLDEN = [                                                   # by the authors' scorer (coco-caption's), words split as ours
    ("a red circle left of a blue square", ["a red circle is left of a blue square", "there is a red circle"]),
    ("two green triangles", ["two green triangles and a red cross", "two triangles", "green triangles two"]),
    ("a red cross above a red cross", ["a red cross above a yellow cross"]),
    ("nothing of the kind", ["a blue circle"]),
    ("a blue circle a blue circle a blue circle", ["a blue circle"])]


def test_cider_is_the_authors_to_the_digit():
    said, right = map(list, zip(*GOLDEN, strict=True))
    assert cider(said, right) == pytest.approx(2.8566377959658382, abs=1e-12)


def test_captions_are_told_by_both(tmp_path, folders_of):
    path = pairs(tmp_path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(dict(image=r["image"], caption=f"the film was {r['answer']}")) + "\n" for r in rows))
    for metric in (None, "cider"):
        task = tasks.open(path, model=folders_of("blip"), metric=metric)
        assert task.metric == (metric or "bleu")
        scores = task.evaluate(task.build())
        assert next(iter(scores)) == task.metric and scores["cider"] >= 0 and ("bleu" in scores) == (metric is None)


# -- predictions: one bad row ends nothing ----------------------------------------------------------------------------------


@pytest.fixture
def album(tmp_path):
    """A folder of pictures, and beside it two that cannot be read."""
    folder = tmp_path / "album"
    folder.mkdir()
    for k in range(3):
        Image.fromarray(picture(k)).save(folder / f"{k}.png")
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    return folder


def test_of_many_inputs_those_that_can_are_answered(tmp_path, folders_of, album, capsys):
    out = tmp_path / "out"
    assert run(capsys, "tune", pairs(tmp_path / "a"), "--model", folders_of("llava"), "--with", "lora(rank=2)", "--out", out,
               "--epochs", "1", "--log", "none")[0] == 0
    code, said, told = run(capsys, "predict", out, album, tmp_path / "broken.jpg", tmp_path / "gone.png", "what is it", "--json")
    found = json.loads(said)
    assert code == 2 and [list(y) for y in found] == [["text"]] * 3 + [["error"]] * 2
    told = " ".join(told.split())
    assert "Row 3: Input 3" in told and "1 further rows failed" in told and "gone.png" in found[4]["error"]
    rows = [dict(image="album/0.png", question="was it good"), dict(image=None), dict(image=["album/1.png"], question=None),
            dict(question="is it"), dict(image="album/2.png", question=7)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    code, said, told = run(capsys, "predict", out, tmp_path / "rows.jsonl", "--json")
    assert code == 2 and [next(iter(y)) for y in json.loads(said)] == ["text", "error", "text", "error", "text"], told
    assert "no image is named" in " ".join(told.split())
    (tmp_path / "other.jsonl").write_text(json.dumps(dict(picture="0.png")) + "\n")
    code, _, told = run(capsys, "predict", out, tmp_path / "other.jsonl")
    told = " ".join(told.split())
    assert code == 2 and "has no column 'image'" in told and "It has: picture" in told


def test_images_and_texts_are_ranked(tmp_path, album, capsys):
    """Of a tuned dual encoder and of one as it came; scores are cosines, best first."""
    clip = hubs.folders.clip(tmp_path / "clip")
    code, said, told = run(capsys, "predict", clip, album, tmp_path / "broken.jpg", "the film", "a very good plot", "--json")
    found = json.loads(said)
    assert code == 2 and list(found[3]) == ["error"] and "Row 3" in told
    assert [list(y) for y in found[:3]] == [["texts"]] * 3 and [list(y) for y in found[4:]] == [["images"]] * 2
    task, model = luthier.tune.opened(clip)
    images = [dict(image=torch.from_numpy(picture(k)).permute(2, 0, 1)) for k in range(3)]
    x = {**super(type(task), task).collate(images), **task.words(["the film", "a very good plot"])}
    with torch.no_grad():
        out = model(**x)
    near = out.image_embeds @ out.text_embeds.T
    for k in range(3):
        order = near[k].argsort(descending=True).tolist()
        assert [y["text"] for y in found[k]["texts"]] == [["the film", "a very good plot"][i] for i in order]
        assert [y["score"] for y in found[k]["texts"]] == pytest.approx(near[k][order].tolist(), abs=1e-5)
    for k in range(2):
        order = near[:, k].argsort(descending=True)
        assert [y["image"] for y in found[4 + k]["images"]] == [str(album / f"{i}.png") for i in order]
    rows = [dict(image=f"album/{k}.png", caption=f"a {SAID[k]} film") for k in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    code, said, _ = run(capsys, "predict", clip, tmp_path / "rows.jsonl", "--json")
    assert code == 0 and [sorted(y) for y in json.loads(said)] == [["images", "texts"]] * 3
    code, said, _ = run(capsys, "predict", clip, album, "the film")
    assert code == 0 and "0.png" in said and "the film" in said
    code, _, told = run(capsys, "predict", clip, album)
    assert code == 2 and "no text to rank them by" in " ".join(told.split())
    code, _, told = run(capsys, "predict", clip, "the film")
    assert code == 2 and "No image is among" in " ".join(told.split())


def test_class_names_of_folders_and_rows(tmp_path, album, capsys):
    """Zero-shot by names, tuned, and tuned with other names than before."""
    clip = hubs.folders.clip(tmp_path / "clip")
    code, said, told = run(capsys, "predict", clip, album, tmp_path / "broken.jpg", "--names", "good film, bad plot", "--json")
    found = json.loads(said)
    assert code == 2 and [sorted(y) for y in found] == [["label", "score", "scores"]] * 3 + [["error"]] and "Row 3" in told
    assert set(found[0]["scores"]) == {"good film", "bad plot"} and sum(found[0]["scores"].values()) == pytest.approx(1)
    for names, why in (("good, good", "named twice"), ("good,", "has no name"), ("good, green", None),
                       ("red, green", "are the same")):
        code, _, told = run(capsys, "predict", clip, album, "--names", names)
        assert code == (0 if why is None else 2) and (why or "") in " ".join(told.split())
    for k in range(4):
        for i in range(6):
            (tmp_path / "d" / SAID[k]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(k)).save(tmp_path / "d" / SAID[k] / f"{i}.png")
    paths = ("album/0.png", "gone.png", "album/1.png")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(dict(image=p)) + "\n" for p in paths))
    for chain in ("none", "coop(n=2)"):
        out = tmp_path / chain[:4]
        code, _, told = run(capsys, "tune", tmp_path / "d", "--model", clip, "--task", "class-names", "--with", chain,
                            "--out", out, "--epochs", "1", "--log", "none")
        assert code == 0, told
        code, said, _ = run(capsys, "predict", out, album, "--json")
        assert code == 0 and len(json.loads(said)) == 3 and set(json.loads(said)[0]["scores"]) == set(SAID)
        code, said, told = run(capsys, "predict", out, tmp_path / "rows.jsonl", "--json")
        assert code == 2 and ["error" in y for y in json.loads(said)] == [False, True, False]
        code, said, told = run(capsys, "predict", out, album, "--names", "good film, awful film", "--json")
        assert code == 0 and set(json.loads(said)[0]["scores"]) == {"good film", "awful film"}, told


def test_a_model_as_it_came_answers_or_says_why_not(tmp_path, folders_of, album, capsys):
    code, said, _ = run(capsys, "predict", folders_of("blip_vqa"), album, "what is it", "--json")
    assert code == 0 and [list(y) for y in json.loads(said)] == [["text"]] * 3
    bert = hubs.folders.bert(tmp_path / "bert")
    code, _, told = run(capsys, "predict", bert, "the film was good")
    assert code == 2 and "has learned no task" in " ".join(told.split())


# -- odd input --------------------------------------------------------------------------------------------------------------


def odd(folder):
    """Grey, CMYK, transparent, 16 bits, animated and huge: six files."""
    folder.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(picture(0))
    image.convert("L").save(folder / "0.png")
    image.convert("CMYK").save(folder / "1.jpg")
    clear = image.convert("RGBA")
    clear.putalpha(100)
    clear.save(folder / "2.png")
    Image.fromarray(np.full((16, 16), 60000, np.uint16)).save(folder / "3.tiff")
    image.save(folder / "4.gif", save_all=True, append_images=[Image.fromarray(picture(1))])
    Image.new("L", (5000, 5000)).save(folder / "5.png")
    return sorted(folder.iterdir())


TREATED = ("grey", "CMYK", "transparent", "animated", "huge")


def test_odd_images_are_treated_and_told_by_every_task(tmp_path, folders_of, capsys):
    clip = hubs.folders.clip(tmp_path / "clip")
    for word in SAID:
        files = odd(tmp_path / "d" / word)
    task = tasks.open(str(tmp_path / "d"), model=clip, task="class-names")
    assert task.size() + task.size("val") + task.size("test") == 24
    for what in TREATED:
        assert any(f"images are {what}" in n for n in task.notes), task.notes
    rows = [dict(image=str(f), caption=f"the film was {SAID[i % 4]} {i}") for i, f in enumerate(files * 4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = tasks.open(tmp_path / "rows.jsonl", model=clip, task="image-text-retrieval")
    assert all(any(f"images are {what}" in n for n in task.notes) for what in TREATED)
    code, said, told = run(capsys, "predict", folders_of("blip_vqa"), *files, "what is it")
    assert code == 0 and all(f"images are {what}" in told for what in TREATED)


def test_one_bad_row_in_hundreds_is_left_out_and_told(tmp_path):
    """By tasks of pairs and of names: no image, a list, a number in its place, no caption, a number or too much for one."""
    clip = hubs.folders.clip(tmp_path / "clip")
    path = pairs(tmp_path / "a", 300)
    rows = [dict(image=r["image"], caption=f"the film was {r['answer']}") for r in map(json.loads, path.read_text().splitlines())]
    for change, told in ((dict(image=None), "no image is named|unreadable"), (dict(image=["0.png", "1.png"]), "unreadable"),
                         (dict(image="a"), "unreadable"), (dict(caption=" "), "empty captions"),
                         (dict(caption=None), "empty captions"),
                         (dict(caption="good " * 300), "cut there"), (dict(caption=7), None)):
        path.write_text("".join(json.dumps(r | change if i == 7 else r) + "\n" for i, r in enumerate(rows)))
        task = tasks.open(path, model=clip, task="image-text-retrieval", columns=dict(image="image", caption="caption"))
        n = sum(task.size(s) for s in ("train", "val", "test"))
        texts = [len(task.examples(s)) for s in ("train", "val", "test")]
        left = told is None or "cut" in told
        assert n == sum(texts) == (300 if left else 299), change
        assert told is None or any(w in note for w in told.split("|") for note in task.notes), (change, task.notes)


def test_a_row_of_a_task_that_is_not_known_is_left_out(tmp_path, folders_of):
    path = pairs(tmp_path / "a", 300, change={i: dict(task="vqa") for i in range(300)})
    rows = list(map(json.loads, path.read_text().splitlines()))
    for kind in ("count", None, ["vqa"]):
        path.write_text("".join(json.dumps(r | dict(task=kind) if i == 7 else r) + "\n" for i, r in enumerate(rows)))
        task = tasks.open(path, model=folders_of("blip"), columns=dict(task="task"))
        assert sum(task.size(s) for s in ("train", "val", "test")) == 299
        assert any("line 8: there is no task" in n for n in task.notes), task.notes


def test_rows_of_several_states_over_one_model_of_the_hub(tmp_path, folders_of, album, capsys):
    for name, chain in (("a", "lora(rank=2)"), ("b", "ia3()")):
        code, _, told = run(capsys, "tune", pairs(tmp_path / "data"), "--model", folders_of("llava"), "--with", chain, "--out",
                            tmp_path / "rack" / name, "--epochs", "2", "--lr", "0.05", "--log", "none")
        assert code == 0, told
    rows = [dict(image=f"album/{k}.png", question="what is it", adapter=name) for k, name in enumerate(("a", "b", "a"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    code, said, told = run(capsys, "predict", "--rack", tmp_path / "rack", tmp_path / "rows.jsonl", "--json")
    assert code == 0, told
    for k, name in enumerate(("a", "b", "a")):
        task, model = luthier.tune.reopen(tmp_path / "rack" / name)
        assert json.loads(said)[k] == task.predict(model, [(str(album / f"{k}.png"), "what is it")])[0]


def test_bad_rows_are_judged_by_all_rows(tmp_path, folders_of):
    """One of five in the part for validation is one of hundreds; a part without any good row is refused."""
    rows = list(map(json.loads, pairs(tmp_path, 400).read_text().splitlines()))
    for split, at in (("train", range(395)), ("val", range(395, 400))):
        text = "".join(json.dumps(rows[i] | dict(image="gone.png") if i == 397 else rows[i]) + "\n" for i in at)
        (tmp_path / f"x_{split}.jsonl").write_text(text)
    task = tasks.open(tmp_path / "x_train.jsonl", model=folders_of("blip"))
    assert any("x_val.jsonl, line 3" in n for n in task.notes)
    (tmp_path / "x_val.jsonl").write_text("".join(json.dumps(r | dict(image="gone.png")) + "\n" for r in rows[:2]))
    with pytest.raises(BadData, match="in all 2 of 2 rows cannot be used"):
        tasks.open(tmp_path / "x_train.jsonl", model=folders_of("blip"))


def test_one_odd_cell_does_not_change_what_the_columns_mean(tmp_path, folders_of):
    path = pairs(tmp_path, 300)
    rows = list(map(json.loads, path.read_text().splitlines()))
    for cell in (dict(image="."), dict(image=[["0.png"]]), dict(image="a picture"), dict(image={}), dict(question=dict(a=1))):
        path.write_text("".join(json.dumps(r | cell if i == 3 else r) + "\n" for i, r in enumerate(rows)))
        task = tasks.open(path, model=folders_of("blip"))
        assert task.kind == "image-to-text" and sum(task.size(s) for s in ("train", "val", "test")) == 299, cell
        assert any("line 4: " in n for n in task.notes)


def test_an_image_token_in_a_prompt_is_no_image(tmp_path, folders_of):
    for name in ("llava", "llava_bare", "blip2"):
        path = pairs(tmp_path / name, change={3: dict(question="<image> what is it <image>")})
        task = tasks.open(path, model=folders_of(name))
        assert len({tuple(e["ask"]) for s in ("train", "val", "test") for e in task.examples(s)}) == 1


def test_a_size_that_the_eyes_cannot_look_at_is_refused(tmp_path):
    pair = f"{hubs.folders.vit(tmp_path / 'vit')}+{hubs.folders.llama(tmp_path / 'llama')}:limber(tokens=2)"
    with pytest.raises(DoesNotFit, match="image_size=2: .* cannot look at images of that size"):
        tasks.open(pairs(tmp_path / "a"), model=pair, image_size=2).build()


@pytest.mark.parametrize("name, chain", [(n, "lora(rank=2, at='text.attn.q')") for n in (
    "llava", "llava_bare", "paligemma", "idefics3", "blip2", "blip2_t5", "blip")] + [
    ("llava", "lora(rank=2, at='vision.attn.q')"), ("llava", "full(at='connector')")])
def test_frozen_eyes_look_once_where_the_model_can_be_told(tmp_path, folders_of, name, chain):
    """Losses, states and scores are the same to the bit: batches are of one size, so products round alike."""
    chain = chain.replace("text.", "decoder.") if name == "blip2_t5" else chain
    found, ran, told = [], [], "vision" not in chain and "connector" not in chain and name != "blip"
    for kept in (True, False):
        task = tasks.open(pairs(tmp_path / "a"), model=folders_of(name), limit=dict(train=16, test=4))
        if not kept:
            task.seeing = lambda model: nullcontext()
        tuned = ready(task, chain, seed=0, batch_size=8)
        for m in tuned.base.modules():                   # BLIP-2's Q-Former drops out: looking once does without
            vars(m).update({k: 0.0 for k in ("p", "attention_dropout") if isinstance(vars(m).get(k), float)})
        tower, calls = next(m for n, m in tuned.base.named_modules() if n.endswith(("vision_tower", "vision_model"))), []
        tower.register_forward_pre_hook(lambda m, args, calls=calls: calls.append(torch.is_grad_enabled()))
        losses = train(tuned, task, epochs=3, batch_size=8, seed=0, progress=False, log=False)["loss"]
        ran.append(list(calls))
        found.append((losses, task.evaluate(tuned, "test", 4), [p.detach().clone() for _, p in tuned.trainable()]))
    assert found[0][:2] == found[1][:2] and all(map(torch.equal, found[0][2], found[1][2]))
    assert len(ran[1]) == 6 and len(ran[0]) == (1 + 2 if told else 6 + (name != "blip"))    # one look to see what looks
    assert not any(ran[0]) if told else any(ran[0][1:])


def test_eyes_that_drop_out_are_still_as_they_rest(tmp_path):
    """BLIP-2's Q-Former has dropout: frozen, it drops nothing, and the features are those of evaluation."""
    task = tasks.open(pairs(tmp_path / "a"), model=hubs.blip2(tmp_path / "m"), limit=dict(train=16, test=4))
    tuned = ready(task, "lora(rank=2, at='text.attn.q')", seed=0, batch_size=8).train()
    with task.seeing(tuned):
        batch = next(task.batches("train", 8, shuffle=False))
        want = next(iter(task.batches("train", 8, shuffle=False)))
    assert torch.equal(batch["image_features"], want["image_features"]) and tuned.base.qformer.training
    pixels = next(task.batches("train", 8, shuffle=False))["pixel_values"]
    with torch.no_grad():
        bare = tuned.eval().base.get_image_features(pixel_values=pixels).pooler_output
    assert torch.equal(batch["image_features"][:, 0], bare)
