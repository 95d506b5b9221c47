"""Tasks over tiny models: every source, every kind, and a word for every way in which data can be bad."""

import csv
import gzip
import json
import math
import os
import sys

import folders
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier import tasks
from luthier._compat import torchvision
from luthier.errors import BadData, DoesNotFit, LuthierError, UnknownName
from luthier.tasks import metrics
from luthier.tasks.headed import pooled
from luthier.tasks.split import order, shares

torchvision()
ROWS = [{"sentence": f"the film was {w} {i % 10}", "stars": "pos" if w in ("good", "fine") else "neg"}
        for i in range(15) for w in ("good", "bad", "fine", "awful")]
TAGGED = [{"tokens": ["the", "film", "was", w], "tags": ["O", "B", "O", "A" if i % 2 else "O"]}
          for i in range(10) for w in ("good", "bad")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {f.__name__: f(base / f.__name__) for f in (folders.bert, folders.llama, folders.vit)}


def write(path, rows):
    """Rows as the format that the suffix names."""
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    with (gzip.open if path.name.endswith(".gz") else open)(path, "wt", newline="", encoding="utf-8") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(r) + "\n" for r in rows)
        elif kind == "json":
            json.dump(rows, file)
        else:
            out = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if kind == "tsv" else ",")
            out.writeheader()
            out.writerows(rows)
    return path


def picture(seed, size=12):
    return np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)


def learns(task, steps=30, lr=1e-2):
    """The loss falls when the model is trained."""
    model, epoch = task.build(0), 0
    before = task.evaluate(model, "train")["loss"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    while steps > 0:
        for batch in task.batches("train", 8, epoch=epoch):
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
            steps -= 1
        epoch += 1
    assert task.evaluate(model, "train")["loss"] < 0.7 * before
    return model


# sources

@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.csv.gz", "a.tsv.gz", "a.jsonl.gz", "a.parquet"])
def test_every_format_gives_the_same_task(tmp_path, tiny, name):
    task = tasks.open(write(tmp_path / name, ROWS), model=tiny["bert"])
    said = task.describe()
    assert said["kind"] == "text-classification" and said["columns"] == {"text": "sentence", "label": "stars"}
    assert said["labels"] == ["neg", "pos"] and said["sizes"] == {"train": 43, "val": 5, "test": 12}
    json.dumps(said)
    batch = next(task.batches("test", 4))
    same = next(tasks.open(write(tmp_path / "b.csv", ROWS), model=tiny["bert"]).batches("test", 4))
    assert all(torch.equal(batch[k], same[k]) for k in same)


def test_splits_beside_each_other_are_found(tmp_path, tiny):
    for part, rows in (("train", ROWS[:40]), ("dev", ROWS[40:50]), ("test", ROWS[50:])):
        write(tmp_path / f"films_{part}.csv", rows)
    write(tmp_path / "other_train.csv", ROWS[:3])
    for source in (tmp_path / "films_test.csv", tmp_path / "films_train.csv"):
        task = tasks.open(source, model=tiny["bert"])
        assert {s: task.size(s) for s in ("train", "val", "test")} == {"train": 40, "val": 10, "test": 10}
        assert any("films_dev.csv" in n for n in task.notes)
    with pytest.raises(BadData, match="several tables"):
        tasks.open(tmp_path)
    (tmp_path / "other_train.csv").unlink()
    assert tasks.open(tmp_path).size("val") == 10
    (tmp_path / "films_test.csv").unlink()
    assert tasks.open(tmp_path).size("test") == 10                   # the dev part serves, and val comes out of train


def test_images_by_class_npz_and_arrays_agree(tmp_path, tiny):
    from PIL import Image
    images, labels = [picture(i) for i in range(40)], [i % 2 for i in range(40)]
    for i, image in enumerate(images):
        place = tmp_path / "photos" / ("cat", "dog")[labels[i]]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i:02}.png")
    np.savez(tmp_path / "a.npz", images=np.stack(images), labels=labels, classes=["cat", "dog"])
    for source in (tmp_path / "photos", tmp_path / "a.npz", {"images": np.stack(images), "labels": np.array(labels)}):
        task = tasks.open(source, model=tiny["vit"])
        assert task.kind == "image-classification" and task.size() == 29 and task.outputs() == 2
        batch = next(task.batches("train", 5))
        assert batch["pixel_values"].shape == (5, 3, 16, 16) and batch["pixel_values"].abs().max() < 3
    assert tasks.open(tmp_path / "photos").describe()["labels"] == ["cat", "dog"]
    for split in ("train", "test"):
        (tmp_path / "split" / split).mkdir(parents=True)
    os.rename(tmp_path / "photos", tmp_path / "split" / "train" / "x")
    with pytest.raises(BadData, match="neither"):
        tasks.open(tmp_path / "split")


def test_image_paths_in_a_table(tmp_path, tiny):
    from PIL import Image
    for i in range(20):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.png")
    rows = [{"file": f"{i}.png", "kind": "ab"[i % 2]} for i in range(20)]
    task = tasks.open(write(tmp_path / "list.csv", rows), model=tiny["vit"])
    assert task.kind == "image-classification" and task.roles == {"image": "file", "label": "kind"}
    (tmp_path / "3.png").write_bytes(b"no image")
    with pytest.raises(BadData, match=r"list.csv, line \d+: the image cannot be read .*1 of|at most 1%"):
        tasks.open(tmp_path / "list.csv", model=tiny["vit"])


def test_built_in_names(tiny, monkeypatch, tmp_path):
    task = tasks.open("digits", model=tiny["vit"], limit=50)
    assert task.outputs() == 10 and task.size("train") == 50 and sum(task.describe()["train_counts"]) == 50
    assert tasks.open("scenes", model=tiny["vit"], limit=20).outputs() == 5
    (tmp_path / "shelf").mkdir()
    write(tmp_path / "shelf" / "my_set_train.csv", ROWS)
    monkeypatch.setenv("LUTHIER_DATA", str(tmp_path))
    assert "my_set" in tasks.known() and tasks.open("my-set").kind == "text-classification"


@pytest.mark.skipif("LUTHIER_DATA" not in os.environ, reason="LUTHIER_DATA is not set")
@pytest.mark.parametrize("name, kind, n", [
    ("sst2", "text-classification", 2), ("trec", "text-classification", 6), ("rte", "text-classification", 2),
    ("ncbi-disease", "token-classification", 3), ("ud-ewt-pos", "token-classification", 17),
    ("pneumoniamnist-half", "image-classification", 2), ("mts-dialog", "instruction", None), ("gsm8k", "instruction", None),
    ("e2e-nlg", "instruction", None), ("commonsense-boolq", "instruction", None), ("tinyshakespeare", "causal-lm", None)])
def test_the_shelf(name, kind, n):
    task = tasks.open(name, limit=40)
    assert task.kind == kind and (n is None or task.outputs() == n)


# kinds

def test_text_classification_learns_scores_and_predicts(tmp_path, tiny):
    task = tasks.open(write(tmp_path / "a.csv", ROWS), model=tiny["bert"])
    model = learns(task)
    scores = task.evaluate(model)
    assert list(scores)[0] == "accuracy" and scores["accuracy"] > 0.9 and scores["n"] == 12 and "matthews" in scores
    said = task.predict(model, ["the film was good 1", "the film was awful 2"])
    assert [s["label"] for s in said] == ["pos", "neg"] and math.isclose(sum(said[0]["scores"].values()), 1, abs_tol=1e-5)
    again = tasks.restore(json.loads(json.dumps(task.spec())))
    assert again.predict(model, "the film was bad 3") == task.predict(model, ["the film was bad 3"])
    with pytest.raises(BadData, match="no split"):
        task.evaluate(model, "tests")


def test_pairs_use_both_texts(tmp_path, tiny):
    rows = [{"premise": f"the film {i % 10}", "hypothesis": "it was good" if i % 3 else "it was bad", "label": int(i % 3 > 0)}
            for i in range(40)]
    task = tasks.open(write(tmp_path / "a.jsonl", rows), model=tiny["bert"])
    assert task.roles == {"text": "premise", "label": "label", "text_pair": "hypothesis"}
    batch = next(task.batches("train", 4))
    assert batch["token_type_ids"].max() == 1
    model = task.build(0)
    assert task.predict(model, [("the film", "it was good")]) == task.predict(model, [{"premise": "the film",
                                                                                     "hypothesis": "it was good"}])
    with pytest.raises(BadData, match="lacks its text_pair"):
        task.predict(model, "the film")


def test_token_classification(tmp_path, tiny):
    task = tasks.open(write(tmp_path / "a.jsonl", TAGGED), model=tiny["bert"])
    assert task.kind == "token-classification" and task.labels == ["A", "B", "O"] and task.metric == "f1"
    batch = next(task.batches("train", 4))
    assert batch["labels"].shape == batch["input_ids"].shape and (batch["labels"] >= 0).sum() == 16
    model = learns(task)
    assert task.evaluate(model)["f1"] > 0.5
    said, = task.predict(model, "the film was good very")
    assert said["tokens"][1] == "film" and said["tags"][1] == "B" and len(said["tags"]) == 5
    cut, = tasks.open(tmp_path / "a.jsonl", model=tiny["bert"], max_length=4).predict(model, ["the film was good"])
    assert cut["tags"][2:] == [None, None]


def test_regression(tmp_path, tiny):
    rows = [{"text": f"film {'very ' * (i % 5)} good", "score": 100 + 2.5 * (i % 5)} for i in range(50)]
    task = tasks.open(write(tmp_path / "a.csv", rows), model=tiny["bert"])
    assert task.kind == "regression" and task.higher and task.roles["target"] == "score"
    model = learns(task, steps=100)
    scores = task.evaluate(model)
    assert list(scores)[:2] == ["r2", "mae"] and scores["r2"] > 0.5 and scores["mae"] < 3
    assert 98 < task.predict(model, "film good")[0]["value"] < 106
    assert not tasks.open(tmp_path / "a.csv", model=tiny["bert"], metric="mae").higher


def test_instruction_counts_the_response_only(tmp_path, tiny):
    rows = [{"prompt": f"the film {i % 10}", "response": f"good and {i % 10}"} for i in range(30)]
    task = tasks.open(write(tmp_path / "a.jsonl", rows), model=tiny["llama"])
    assert task.kind == "instruction" and not task.higher
    batch = next(task.batches("train", 1))
    there = batch["labels"][0] >= 0
    assert task.tokenizer.decode(batch["labels"][0][there]).split()[:2] == ["good", "and"] and there.sum() == 4
    model = learns(task)
    assert task.evaluate(model)["perplexity"] < 30 and task.predict(model, "the film 3", max_new_tokens=3)[0]["text"]
    logits = model(input_ids=batch["input_ids"]).logits               # by hand: -log p of each response token
    by_hand = -logits[0].log_softmax(-1)[:-1].gather(1, batch["input_ids"][0, 1:, None])[there[1:]].mean()
    assert torch.allclose(task.loss(model, batch), by_hand, atol=1e-5)
    short = tasks.open(tmp_path / "a.jsonl", model=tiny["llama"], max_length=5)
    assert all(b["input_ids"].shape[1] <= 5 for b in short.batches("train", 4)) and any("were cut" in n for n in short.notes)


def test_causal_lm_blocks_are_full(tmp_path, tiny):
    (tmp_path / "a.txt").write_text("the film was good and the plot was bad " * 200)
    task = tasks.open(tmp_path / "a.txt", model=tiny["llama"], max_length=16, limit={"test": 3})
    batch = next(task.batches("train", 4))
    assert task.kind == "causal-lm" and batch["input_ids"].shape == (4, 16) and batch["attention_mask"].all()
    assert task.size("test") == 3 and task.evaluate(task.build(0))["tokens"] == 3 * 15
    assert task.evaluate(learns(task))["perplexity"] < 10


def test_a_decoder_classifies_by_its_last_token(tmp_path, tiny):
    task = tasks.open(write(tmp_path / "a.csv", ROWS), model=tiny["llama"])
    model = learns(task)
    assert model.pool == "last" and not hasattr(model.backbone, "lm_head")
    batch = next(task.batches("train", 8))
    wide = {k: torch.nn.functional.pad(v, (0, 3)) if v.dim() == 2 else v for k, v in batch.items()}
    assert torch.allclose(task.logits(model, batch), task.logits(model, wide), atol=1e-5)


def test_a_dual_tower_lends_the_tower_that_reads_the_data(tmp_path):
    model = folders.clip(tmp_path / "clip")
    text = tasks.open(write(tmp_path / "a.csv", ROWS), model=model)
    image = tasks.open({"images": np.stack([picture(i) for i in range(20)]), "labels": np.arange(20) % 2}, model=model)
    for task, tower in ((text, "Text"), (image, "Vision")):
        model = task.build(0)
        assert tower in type(model.backbone).__name__
        task.loss(model, next(task.batches("train", 4))).backward()
        assert all(p.grad is not None for p in model.parameters())


def test_a_module_of_ones_own(tmp_path):
    images, labels = np.stack([picture(i) for i in range(30)]), np.arange(30) % 3
    task = tasks.open({"images": images, "labels": labels}, model=torch.nn.Conv2d(3, 5, 3), image_size=12)
    model = task.build(0)
    assert model.head.in_features == 5 and task.evaluate(model)["n"] == 6
    with pytest.raises(DoesNotFit, match="does not read"):
        tasks.open({"images": images, "labels": labels}, model=torch.nn.Linear(7, 2)).build(0)
    with pytest.raises(BadData, match="no name to store"):
        task.spec()


def test_build_depends_on_the_seed_only_in_its_head(tmp_path, tiny):
    task = tasks.open(write(tmp_path / "a.csv", ROWS), model=tiny["bert"])
    a, b, c = task.build(0), task.build(0), task.build(1)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert [n for n, p in c.named_parameters() if not torch.equal(p, a.get_parameter(n))] == ["head.weight"]
    assert task.build(0, dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16
    assert math.isfinite(task.loss(task.build(0, dtype=torch.bfloat16), next(task.batches("train", 4))).item())


def test_positions_stretch_to_other_image_sizes(tiny):
    task = tasks.open("digits", model=tiny["vit"], image_size=32, limit=20)
    assert task.build(0)(**{k: v for k, v in next(task.batches("train", 2)).items() if k != "labels"}).logits.shape == (2, 10)


# batches and splits

def test_batches_depend_on_seed_and_epoch(tmp_path, tiny):
    task = tasks.open(write(tmp_path / "a.csv", ROWS), model=tiny["bert"])

    def ids(**key):
        return [b["input_ids"].tolist() for b in task.batches("train", 8, **key)]
    assert ids(seed=1, epoch=2) == ids(seed=1, epoch=2) != ids(seed=1, epoch=3) != ids(seed=2, epoch=3)
    assert ids(seed=1)[3:] == ids(seed=1, start=3) and len(ids()) == task.n_batches("train", 8)
    assert ids(shuffle=False, epoch=1) == ids(shuffle=False)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 5), st.booleans())
@settings(max_examples=50, deadline=None)
def test_order_is_a_permutation(n, size, epoch, shuffle):
    plan = order(n, size, 0, epoch, shuffle, length=lambda i: i % 7)
    assert sorted(i for b in plan for i in b) == list(range(n)) and max(map(len, plan)) <= size
    assert len(plan) == -(-n // size)


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=200), st.integers(1, 200))
@settings(max_examples=50, deadline=None)
def test_shares_keep_proportions(labels, n):
    part = shares(labels, n, 0)
    assert len(part) == len(set(part)) == min(n, len(labels)) and part == sorted(part)
    kinds = set(labels)
    if len(kinds) <= n < len(labels):
        got = [labels[i] for i in part]
        assert set(got) == kinds
        if n > 3 * len(kinds):
            assert all(abs(got.count(k) / len(got) - labels.count(k) / len(labels)) < 0.2 for k in kinds)


def test_rare_classes_stay_in_training(tmp_path):
    rows = ROWS + [{"sentence": f"lone {i}", "stars": f"rare{i}"} for i in range(4)] + [{"sentence": "two", "stars": "pair"}] * 2
    task = tasks.open(write(tmp_path / "a.csv", rows), seed=3)
    assert len(task.labels) == 7 and any("4 classes have a single" in n or "5 classes have a single" in n for n in task.notes)
    assert any("rows have a text that also stands in train" in n for n in task.notes)


def test_columns_are_joined_renamed_and_checked(tmp_path, tiny):
    rows = [{"q": f"the film {i}", "ctx": "very good", "a": f"it was {i % 9} {i}"} for i in range(30)]
    path = write(tmp_path / "a.jsonl", rows)
    task = tasks.open(path, model=tiny["llama"], columns={"prompt": "ctx + q", "response": "a"})
    assert task.column(task.tables["test"], "prompt")[0].startswith("very good\nthe film")
    model = task.build(0)
    said = task.predict(model, {"ctx": "very good", "q": "the film 3"}, max_new_tokens=2)
    assert said == task.predict(model, "very good\nthe film 3", max_new_tokens=2)
    with pytest.raises(BadData, match="no such role"):
        tasks.open(path, task="causal-lm", columns={"text": "q", "label": "a"})
    rows = [{"text": "film", "label": i / 7} for i in range(30)]
    assert tasks.open(write(tmp_path / "b.csv", rows), task="regression", columns={"label": "label"}).roles["target"] == "label"


def test_tasks_travel_to_other_processes(tmp_path, tiny):
    import pickle
    task = tasks.open(write(tmp_path / "a.csv", ROWS), model=tiny["bert"])
    there = pickle.loads(pickle.dumps(task))
    pairs = zip(task.batches("train", 8), there.batches("train", 8), strict=True)
    assert all(torch.equal(a[k], b[k]) for a, b in pairs for k in a)


def test_files_larger_than_memory_are_sampled(tmp_path, monkeypatch):
    from luthier.tasks import read
    monkeypatch.setattr(read, "MOST_ROWS", 25)
    path = write(tmp_path / "a.csv", ROWS)
    tables = [read.table(path, seed, notes := []) for seed in (0, 0, 1)]
    assert "60 rows, of which a seeded sample of 25" in notes[0] and len(tables[0]) == 25
    assert tables[0].columns == tables[1].columns != tables[2].columns and tables[0].lines == sorted(tables[0].lines)
    assert tables[0].columns["sentence"][3] == ROWS[tables[0].lines[3] - 2]["sentence"]              # line 1 is the header


def test_images_beyond_the_budget_are_decoded_again(monkeypatch):
    from luthier.tasks import image
    monkeypatch.setattr(image, "BUDGET", 3 * 12 * 12 * 3)
    images = image.Images([picture(i) for i in range(9)], None, 16, ".")
    first = [images[i]["image"].clone() for i in range(9)]
    assert len(images.kept) == 3 and all(torch.equal(images[i]["image"], first[i]) for i in range(9))


# metrics and pools, by hand

def test_metrics_by_hand():
    p, t = torch.tensor([0, 1, 2, 2, 1]), torch.tensor([0, 1, 1, 2, 0])
    assert metrics.accuracy(p, t) == pytest.approx(0.6)
    assert metrics.macro_f1(p, t, 4) == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)        # class 3 does not occur
    assert metrics.micro_f1(p, t, outside=0) == pytest.approx(2 * 2 / (4 + 3))
    b, y = torch.tensor([1, 1, 0, 0, 1]), torch.tensor([1, 0, 0, 1, 1])
    assert metrics.matthews(b, y) == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    assert metrics.matthews(b * 0, y) == 0
    x, z = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 5.0])
    assert metrics.r2(x, z) == pytest.approx(1 - 4 / (26 / 3)) and metrics.mae(x, z) == pytest.approx(2 / 3)
    assert metrics.perplexity(math.log(8) * 5, 5) == pytest.approx(8)


def test_pools_by_hand():
    h, mask = torch.arange(12.0).view(1, 3, 4), torch.tensor([[1, 1, 0]])
    assert pooled(h, "cls").tolist() == [[0, 1, 2, 3]] and pooled(h, "last", mask).tolist() == [[4, 5, 6, 7]]
    assert pooled(h, "mean", mask).tolist() == [[2, 3, 4, 5]] and pooled(h, "mean").tolist() == [[4, 5, 6, 7]]
    assert pooled(h, "cls+mean").tolist() == [[0, 1, 2, 3, 6, 7, 8, 9]]
    assert pooled(torch.ones(2, 5, 3, 3), "mean").shape == (2, 5) and pooled(torch.ones(2, 5), "mean").shape == (2, 5)


# bad input: (file name, content, what the message must say)

GOOD = "text,label\n" + "".join(f"the film {i},{'ab'[i % 2]}\n" for i in range(30))
BAD = {
    "empty file": ("a.csv", "", "is empty"),
    "only a header": ("a.csv", "text,label\n", "no rows"),
    "ragged": ("a.csv", GOOD + "one,two,three\n", "line 32: 3 fields.*names 2"),
    "open quote": ("a.csv", GOOD + '"never closed,a\n', "line 3.*[Qq]uotes"),
    "two columns of one name": ("a.csv", "text,text\nx,y\n", "'text' stands twice"),
    "nameless column": ("a.csv", "text,\nx,y\n", "no name"),
    "one class": ("a.csv", GOOD.replace(",b\n", ",a\n"), "every training row has the label 'a'"),
    "missing label": ("a.csv", GOOD + "the film 40,\n", "line 32.*label.*missing"),
    "no such task": ("a.csv", "one,two\n" + "1.5,2.5\n2.5,7.0\n" * 9, "make no task.*columns="),
    "binary": ("a.csv", b"text,label\n\xff\xfe\x00\x81,1\n", "not UTF-8"),
    "NUL bytes": ("a.csv", b"\x00\x01\x02,\n", "NUL"),
    "UTF-16": ("a.csv", GOOD.encode("utf-16"), "UTF-16"),
    "bad JSON": ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b" "label": 0}\n', "line 2 is not valid JSON"),
    "JSON list line": ("a.jsonl", '{"text": "a", "label": 1}\n[1, 2]\n', "line 2 is a JSON list"),
    "deep JSON": ("a.jsonl", "[" * 100_000, "line 1 is not valid JSON"),
    "JSON object": ("a.json", '{"text": "a"}', "must be a JSON list"),
    "missing text": ("a.jsonl", "".join(json.dumps({"text": "good bad", "label": i % 2} if i != 7 else {"label": 1}) + "\n"
                                        for i in range(30)), "line 8: the text .*None"),
    "NaN target": ("a.csv", "text,score\n" + "".join(f"film,{i / 7}\n" for i in range(30)) + "film,nan\n", "line 32.*'nan'"),
    "empty target": ("a.csv", "text,score\n" + "".join(f"film,{i / 7}\n" for i in range(30)) + "film,\n", "line 32.*not a "
                                                                                                          "finite"),
    "constant target": ("a.csv", "text,score\n" + "film,1.5\nplot,1.5\n" * 30, "nothing to learn|make no task"),
    "truncated gzip": ("a.csv.gz", gzip.compress(GOOD.encode())[:-20], "truncated gzip"),
    "not gzip": ("a.csv.gz", GOOD, "not a sound gzip"),
    "corrupt gzip": ("a.csv.gz", gzip.compress(GOOD.encode())[:20] + b"\x99" * 60, "gzip"),
    "not parquet": ("a.parquet", "PAR1 no", "Parquet"),
    "not npz": ("a.npz", "no zip", "npz"),
    "unknown suffix": ("a.xlsx", "x", "suffix .xlsx"),
    "uneven tags": ("a.jsonl", json.dumps({"tokens": ["a", "b"], "tags": ["O"]}) + "\n" + (json.dumps(TAGGED[0]) + "\n") * 20,
                    "2 tokens but 1 tags"),
    "too few rows": ("a.csv", "text,label\na b,x\nc d,y\n", "too few|training|make no task"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_words(tmp_path, tiny, name):
    file, content, says = BAD[name]
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadData, match=f"(?s){says}") as caught:
        tasks.open(tmp_path / file, model=tiny["vit"] if file.endswith("npz") else tiny["bert"])
    message = str(caught.value)
    assert file in message and message.rstrip().endswith((".", ")", "].", '"')) and "\n" not in message and len(message) < 900


def test_bad_arguments_are_refused_in_words(tmp_path, tiny):
    path = write(tmp_path / "films.csv", ROWS)
    for more, says in ((dict(columns={"label": "star"}), "no column 'star'.*Nearest: stars"),
                       (dict(columns={"lable": "stars"}), "no such role.*label"),
                       (dict(task="classify"), "no task 'classify'"), (dict(task="causal-lm", model=tiny["bert"]), "cannot do"),
                       (dict(metric="acc"), "no metric 'acc'.*accuracy"), (dict(limit=0), "at least 2"),
                       (dict(limit={"train": "x"}), "limit"), (dict(limit={"trian": 3}), "no split 'trian'.*train"),
                       (dict(max_lenght=3), "no option 'max_lenght'.*max_length"), (dict(max_length=-1), "max_length"),
                       (dict(pool="max"), "no pool 'max'"), (dict(model=tiny["vit"]), "cannot do"),
                       (dict(task="token-classification"), "tokens")):
        with pytest.raises(BadData, match=says):
            tasks.open(path, **more)
    with pytest.raises(BadData, match=r"no file or folder .*filmes.csv.*Nearest: .*films.csv"):
        tasks.open(tmp_path / "filmes.csv")
    with pytest.raises(UnknownName, match="Nearest: digits"):
        tasks.open("digit")
    with pytest.raises(BadData, match="not the description"):
        tasks.restore({"kind": "no"})
    task = tasks.open(path)
    with pytest.raises(BadData, match="no model"):
        task.build()
    with pytest.raises(BadData, match="no model"):
        next(task.batches("train", 2))


def test_labels_unseen_in_training(tmp_path):
    write(tmp_path / "a_train.csv", ROWS)
    write(tmp_path / "a_test.csv", [{"sentence": "a b", "stars": "pos"}, {"sentence": "a", "stars": "possible"}])
    with pytest.raises(BadData, match=r"a_test.csv, line 3: the label 'possible' is in no training row. Nearest: pos"):
        tasks.open(tmp_path / "a_train.csv")
    write(tmp_path / "a_test.csv", [{"text": "a b", "stars": "pos"}] * 3)
    with pytest.raises(BadData, match="a_test.csv has no column 'sentence'"):
        tasks.open(tmp_path / "a_train.csv", model=None).examples("test")


def test_bad_images(tmp_path, tiny):
    from PIL import Image
    for name in ("Cat", "cat "):
        (tmp_path / "p" / name).mkdir(parents=True)
        Image.fromarray(picture(1)).save(tmp_path / "p" / name / "a.png")
    with pytest.raises(BadData, match="differ in case"):
        tasks.open(tmp_path / "p")
    good = {"images": np.zeros((20, 4, 4), np.uint8), "labels": np.arange(20) % 2}
    for change, says in (({"images": np.zeros((20, 4))}, "shape"), ({"labels": np.arange(19)}, "20 images, but 19"),
                         ({"images": np.full((20, 4, 4), np.nan)}, "NaN"), ({"labels": np.full(20, np.nan)}, "missing")):
        with pytest.raises(BadData, match=says):
            tasks.open(good | change, model=tiny["vit"])
    with pytest.raises(BadData, match="none is called images"):
        tasks.open({"points": np.zeros(3)})
    np.savez(tmp_path / "o.npz", images=np.array([object()] * 3, dtype=object), labels=[0, 1, 0])
    with pytest.raises(BadData, match="without pickles"):
        tasks.open(tmp_path / "o.npz")


def test_a_few_broken_images_are_left_out_and_said(tmp_path, tiny):
    from io import BytesIO

    from PIL import Image
    raw = []
    for i in range(400):
        Image.fromarray(picture(i, 4)).save(buffer := BytesIO(), "PNG")
        raw.append(buffer.getvalue())
    raw[3] = b"broken"
    arrays = {"bytes": np.frombuffer(b"".join(raw), np.uint8), "offsets": np.cumsum([0, *map(len, raw)]),
              "labels": np.arange(400) % 2}
    task = tasks.open(arrays, model=tiny["vit"], seed=1)
    assert sum(task.size(s) for s in task.tables) == 399 and any("1 unreadable" in n for n in task.notes)


def test_hub_sets_need_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadData, match="pip install datasets"):
        tasks.open("owner/name")


def test_a_hub_set_as_the_library_gives_it(monkeypatch):
    """A stand-in for `datasets`: splits of columns, classes as numbers with names, a test part whose labels are kept secret."""
    class Names:
        names = ["neg", "pos"]

    class Part(dict):
        features, column_names = {"label": Names()}, ["sentence", "label", "idx"]

        def __len__(self):
            return len(self["label"])

    def part(n, secret=False):
        labels = [-1 if secret else i % 2 for i in range(n)]
        return Part(sentence=[f"the film {i}" for i in range(n)], label=labels, idx=list(range(n)))

    class Library:
        @staticmethod
        def load_dataset(*name):
            if name[0] == "owner/none":
                raise FileNotFoundError("no such set\nand more")
            assert name == ("owner/glue", "sst2")
            return {"train": part(40), "validation": part(10), "test": part(5, secret=True)}
    monkeypatch.setitem(sys.modules, "datasets", Library)
    task = tasks.open("owner/glue:sst2")
    assert task.labels == ["neg", "pos"] and {s: task.size(s) for s in task.tables} == {"train": 36, "val": 4, "test": 10}
    with pytest.raises(BadData, match="owner/none could not be loaded: no such set Check"):
        tasks.open("owner/none")


@given(st.binary(max_size=300), st.sampled_from(["csv", "tsv", "jsonl", "json", "txt", "csv.gz", "parquet", "npz"]))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused(tmp_path, raw, kind):
    path = tmp_path / f"x.{kind}"
    path.write_bytes(raw)
    try:
        tasks.open(path).describe()
    except LuthierError as error:
        assert str(error)


@given(st.lists(st.fixed_dictionaries({}, optional={
    "text": st.one_of(st.none(), st.text(max_size=9), st.integers()), "tags": st.lists(st.text(max_size=2), max_size=2),
    "label": st.one_of(st.none(), st.text(max_size=2), st.integers(0, 3), st.floats())}), max_size=30))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_are_read_or_refused(tmp_path, rows):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    try:
        tasks.open(path).describe()
    except LuthierError as error:
        assert str(error)
