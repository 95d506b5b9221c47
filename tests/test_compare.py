"""The comparison: statistics against scipy, entries that resume, the front and the answer against hand-made results."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from compare_fixture import WAYS, document
from folders import bert, vit
from PIL import Image

from luthier._compat import torchvision
from luthier.compare import compare, report, store, table, work
from luthier.compare.fit import dress, ready
from luthier.compare.measure import Meter, touched
from luthier.compare.rows import answer, rows
from luthier.compare.stats import interval, paired, t_cdf, t_quantile
from luthier.errors import BadChain, BadState, DoesNotFit, LuthierError, NoSuchSite, RunStopped
from luthier.method import INCLUDED, REGISTRY, include

torchvision()
ROOT = Path(__file__).parent.parent


# -- statistics ---------------------------------------------------------------------------------------------------------


def test_t_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for df in (1, 2, 3, 4, 5, 8, 9, 30, 101):
        for q in (.025, .3, .6, .95, .975, .999):
            t = stats.t.ppf(q, df)
            assert t_quantile(q, df) == pytest.approx(t, rel=1e-8) and t_cdf(t, df) == pytest.approx(q, rel=1e-9)


def test_interval_by_hand():
    mean, low, high = interval([1, 2, 3])                  # s = 1, t(0.975, 2) = 4.30265, /sqrt(3)
    assert mean == 2 and high - mean == pytest.approx(mean - low) == pytest.approx(4.302652730 / math.sqrt(3), rel=1e-9)
    assert interval([7]) == (7, -math.inf, math.inf)
    assert paired([3, 5, 9], [2, 4, 8]) == (1, 1, 1)
    with pytest.raises(ValueError):
        paired([1], [1, 2])


# -- rows, front, answer ------------------------------------------------------------------------------------------------


def test_rows_front_and_answer_by_hand():
    found = {r["chain"]: r for r in rows(document())}
    assert list(found) == list(WAYS) and found["probe()"]["trained"] == 3850 and found["full()"]["seeds"] == [0, 1, 2]
    assert {c for c, r in found.items() if "trained" in r["front"]} == {
        "probe()", "ia3()", "bitfit()", "ssf()", "lora(rank=8)", "houlsby(width=32) >> lora(rank=4) >> ssf()"}
    assert "step" not in found["full()"]["front"] and "memory" in found["ladder(reduce=8)"]["front"]
    said = answer(document())
    assert said["pick"] == "lora(rank=8)" and said["best"].startswith("houlsby") and set(said["tied"]) == {
        said["best"], "lora(rank=8)", "dora()"}
    assert "28% of the trained parameters" in said["text"][1]


def test_answer_when_less_is_better_and_when_one_seed_says_nothing():
    ways = {"a()": ([9.0, 9.1, 9.2], 100, 1, 1e6, 1.0, 1.0, True), "b()": ([5.0, 5.1, 5.2], 1000, 1, 1e6, 1.0, 1.0, True)}
    assert answer(document(ways, higher=False, metric="perplexity"))["pick"] == "b()"
    assert answer(document(ways, higher=True))["pick"] == "a()"
    once = {c: (s[:1], *rest) for c, (s, *rest) in ways.items()}
    said = answer(document(once, seeds=(0,)))
    assert said["pick"] == "a()" and "One seed cannot tell" in said["text"][-1]
    nothing = document({"a()": ([], 1, 1, None, None, None, None)}, seeds=())
    assert answer(nothing)["pick"] is None and "no result" in table.show(nothing)


def test_table_is_aligned_and_says_what_it_is():
    lines = table.show(document()).splitlines()
    head = next(i for i, line in enumerate(lines) if "method" in line and "trained" in line)
    assert "accuracy (n=3)" in lines[head] and lines[head + 2].lstrip("* ").startswith("houlsby(width=32)")
    assert lines[head + 3].startswith("*  lora(rank=8)  ".strip()) and "0.9607 ± 0.0087" in lines[head + 3]
    column = lines[head].index("trained") + len("trained")
    assert all(line[column - 1].strip() and not line[column].strip() for line in lines[head + 2:head + 14])
    assert table.count(12_345_678) == "12.3M" and table.count(999) == "999" and table.size(1_500_000) == "1.5 MB"


def test_report_is_self_contained_and_escapes(tmp_path):
    d = document()
    d["setting"]["data"] = "<script>alert(1)</script>"
    page, picture = report.write(d, tmp_path)
    text = page.read_text("utf-8")
    assert "<script>alert" not in text and not re.search(r"(src|href)=\"(?!data:)", text) and "luthier demo" in text
    assert picture.read_bytes().startswith(b"\x89PNG") and len(text) < 1_500_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pareto.png", "report.html"]
    unmeasured = document({"a()": ([.5], 10, 10, None, None, None, None)}, seeds=(0,))
    report.write(unmeasured, tmp_path)


# -- entries --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny ViT in a folder and pictures whose class is their brightness."""
    folder = tmp_path_factory.mktemp("compare")
    g = np.random.default_rng(0)
    labels = np.arange(60) % 2
    np.savez(folder / "light.npz", images=(g.integers(0, 90, (60, 8, 8)) + 150 * labels[:, None, None]).astype(np.uint8),
             labels=labels)
    return str(folder / "light.npz"), vit(folder / "vit")


QUICK = dict(epochs=1, batch_size=16, progress=False)


@pytest.fixture(scope="module")
def first(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, compare(*place, "probe, full, lora(rank=2)", 2, out, **QUICK)


def test_compare_trains_and_measures_everything(first):
    out, d = first
    found = {r["chain"]: r for r in rows(d)}
    assert list(found) == ["probe()", "full()", "lora(rank=2)"] and all(len(r["scores"]) == 2 for r in found.values())
    assert found["probe()"]["trained"] < found["lora(rank=2)"]["trained"] < found["full()"]["trained"]
    assert found["probe()"]["memory"] < found["full()"]["memory"] and found["probe()"]["stored"] < found["full()"]["stored"]
    assert all(r["step"] > 0 and r["latency"] > 0 and r["merged"] for r in found.values())
    kept = json.loads((out / "results.json").read_text())
    assert kept == json.loads(json.dumps(d)) and kept["machine"]["cores"] and kept["versions"]["torch"]
    report.write(d, out)


def test_finished_entries_are_not_run_again(first, place, monkeypatch):
    out, d = first
    monkeypatch.setattr(work, "do", lambda *a: pytest.fail("ran again"))
    monkeypatch.setattr("luthier.compare.measure.Meter", lambda *a: pytest.fail("measured again"))
    again = compare(*place, "probe, full, lora(rank=2)", 2, out, **QUICK)
    assert rows(again) == rows(d)
    fewer = compare(*place, "lora(rank=2)", 1, out, **QUICK)               # a part of it: nothing to run, one row
    assert [len(r["scores"]) for r in rows(fewer)] == [1]


def test_what_changes_a_result_changes_its_key(first, place, monkeypatch):
    out, ran = first[0], []
    monkeypatch.setattr(work, "do", lambda job, tell: ran.append(job) or {"score": .5, "trained": 1, "stored": 1, "seconds": 0,
                                                                          "steps": 1})
    for change in (dict(lr=2e-3), dict(epochs=2), dict(batch_size=8), dict(limit=20)):
        before = len(ran)
        compare(*place, "probe", 1, None, measure=False, **{**QUICK, **change})
        compare(*place, "probe", 1, out, measure=False, **{**QUICK, **change})
        assert len(ran) == before + 2, change


def test_equal_runs_give_equal_scores_here_and_in_processes(place):
    one = compare(*place, "probe, lora(rank=2)", 2, None, measure=False, **QUICK)
    two = compare(*place, "probe, lora(rank=2)", 2, None, measure=False, jobs=2, **QUICK)
    assert [r["scores"] for r in rows(one)] == [r["scores"] for r in rows(two)]


@pytest.fixture
def own(tmp_path):
    """A method of the user's own, in a file that only --import knows."""
    file = tmp_path / "own_scale.py"
    file.write_text('"""W\' = (1 + g) W"""\nfrom luthier.method import Method, method\n\n\n@method\nclass own_scale(Method):\n'
                    '    at: str = "attn.q"\n\n    def init(self, site):\n        return dict(g=site.zeros(site.d_out, 1))\n\n'
                    '    def weight(self, W, p):\n        return (1 + p.g) * W\n')
    for name in include(file):
        yield name
        REGISTRY.pop(name)
        INCLUDED.clear()


def test_a_method_of_ones_own_runs_in_other_processes(place, own):
    one = compare(*place, own, 2, None, measure=False, **QUICK)
    two = compare(*place, own, 2, None, measure=False, jobs=2, **QUICK)
    assert [r["scores"] for r in rows(one)] == [r["scores"] for r in rows(two)]


def test_ray(place, own):
    pytest.importorskip("ray")
    one = compare(*place, f"probe, {own}", 1, None, measure=False, **QUICK)
    far = compare(*place, f"probe, {own}", 1, None, measure=False, ray="local", **QUICK)
    assert [r["scores"] for r in rows(one)] == [r["scores"] for r in rows(far)]


def test_other_machines_are_given_absolute_paths(place, monkeypatch):
    monkeypatch.chdir(Path(place[0]).parent)
    assert work._absolute({"source": "light.npz", "model": "vit", "limit": 3}) == {
        "source": place[0], "model": place[1], "limit": 3}
    assert work._absolute({"source": "digits", "model": "minilm"}) == {"source": "digits", "model": "minilm"}


@pytest.mark.parametrize("has, asks", [({"CPU": 8.0}, 0), ({"CPU": 8.0, "GPU": 4.0}, 1)])
def test_on_a_cluster_with_gpus_each_entry_asks_for_one(monkeypatch, has, asks):
    """Ray hides the GPUs from a task that asks for none. A Ray of straw, for there is no GPU here."""
    class Straw:
        class exceptions:
            RayTaskError = type("RayTaskError", (Exception,), {})
            RayError = type("RayError", (Exception,), {})
        asked = {}

        def is_initialized(self):
            return True

        def cluster_resources(self):
            return has

        def remote(self, **options):
            Straw.asked = options
            return lambda fn: type("Remote", (), {"remote": staticmethod(lambda job, files: "there")})

        def wait(self, references, num_returns):
            return references[:1], references[1:]

        def get(self, reference):
            raise Straw.exceptions.RayError("the node died")

    monkeypatch.setitem(sys.modules, "ray", Straw())
    with pytest.raises(LuthierError, match="node died.*What was finished is kept"):
        list(work.run([{"task": {"source": "x"}}], ray="auto"))
    assert Straw.asked == {"num_cpus": 1, "num_gpus": asks}


def test_without_ray_the_remedy_is_said(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LuthierError, match="pip install"):
        compare(*place, "probe", 1, None, ray="local", **QUICK)


def test_learning_rates_are_searched_alike(place, monkeypatch):
    tried = []
    scores = {("probe()", .1): .9, ("probe()", .01): .2, ("full()", .1): .1, ("full()", .01): .8}

    def do(job, tell):
        tried.append((job["kind"], job["chain"], job["lr"], job["seed"], job["split"]))
        return {"score": scores[job["chain"], job["lr"]], "trained": 1, "stored": 1, "seconds": 0, "steps": 1}

    monkeypatch.setattr(work, "do", do)
    d = compare(*place, "probe, full", 2, None, tune_lr=True, grid=(.1, .01), measure=False, **QUICK)
    search = [t for t in tried if t[0] == "search"]
    assert sorted(search) == sorted(("search", c, lr, 1000, "val") for c in ("probe()", "full()") for lr in (.1, .01))
    assert {r["chain"]: r["lr"] for r in rows(d)} == {"probe()": .1, "full()": .01}
    assert all(seed in (0, 1) and split == "test" for kind, _, _, seed, split in tried if kind == "score")


def test_a_run_that_diverges_is_a_row_not_the_end(place):
    d = compare(*place, "probe, full", 1, None, measure=False, lr={"probe": 1e-2, "full": 1e30}, **{**QUICK, "epochs": 3})
    found = {r["chain"]: r for r in rows(d)}
    assert found["full()"]["mean"] is None and "became nan" in found["full()"]["failed"] and found["probe()"]["mean"] is not None
    assert "no result" in table.show(d) and "lost a run" in table.show(d)


@pytest.mark.parametrize("change, error", [
    (dict(methods="lor()"), BadChain), (dict(methods=""), BadChain), (dict(methods=[]), LuthierError),
    (dict(seeds=0), LuthierError),
    (dict(seeds=[1, 1]), LuthierError), (dict(seeds=[-1]), LuthierError), (dict(jobs=0), LuthierError),
    (dict(epochs=0), LuthierError),
    (dict(batch_size=-1), LuthierError), (dict(lr=0), LuthierError), (dict(lr=float("nan")), LuthierError),
    (dict(grid=(1, -1)), LuthierError),
    (dict(methods="probe, lora(at=\"nowhere\")"), NoSuchSite), (dict(methods="lora() >> full()"), LuthierError),
])
def test_bad_requests_are_refused_before_anything_is_written(place, tmp_path, change, error):
    with pytest.raises(error):
        compare(*place, **{"methods": "probe", "seeds": 1, "out": tmp_path / "out", **QUICK, **change})
    assert not list(tmp_path.iterdir())


def test_broken_results_are_not_overwritten(place, tmp_path):
    for text in ("", "{", "[]", "{\"format\": 99}", "{\"format\": 1, \"setting\": {}, \"plan\": [], \"entries\": {\"a\": 1}}"):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(BadState, match="not a results file"):
            compare(*place, "probe", 1, tmp_path, **QUICK)
        assert (tmp_path / "results.json").read_text() == text


def test_a_full_disk_keeps_what_was_written(place, tmp_path, monkeypatch):
    compare(*place, "probe", 1, tmp_path, measure=False, **QUICK)
    before = (tmp_path / "results.json").read_bytes()

    def full(*a):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(store.os, "replace", full)
    with pytest.raises(RunStopped, match="No space left"):
        compare(*place, "probe", 2, tmp_path, measure=False, **QUICK)
    assert (tmp_path / "results.json").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_task_made_in_python_stays_in_this_process(place):
    from luthier import tasks

    task = tasks.open(place[0], model=place[1])
    assert len(rows(compare(task, methods="probe", seeds=1, measure=False, **QUICK))) == 1
    with pytest.raises(LuthierError, match="this process only"):
        compare(task, methods="probe", seeds=1, jobs=2, **QUICK)


def test_kill_and_go_on(place, tmp_path):
    argv = [sys.executable, "-m", "luthier", "compare", place[0], "--model", place[1], "--methods", "probe, full, lora(rank=2)",
            "--seeds", "3", "--epochs", "2", "--batch-size", "4", "--out", str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path, since = tmp_path / "results.json", time.monotonic()
    while not path.exists() or len(json.loads(path.read_text())["entries"]) < 3:
        assert run.poll() is None and time.monotonic() - since < 300
        time.sleep(0.02)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    kept = json.loads(path.read_text())["entries"]
    run = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and "lora(rank=2)" in run.stdout
    after = json.loads(path.read_text())["entries"]
    assert len(after) == 12 and all(after[k] == v for k, v in kept.items())
    assert len(re.findall("^training:", run.stderr, re.M)) == 9 - len(kept)


# -- fitting and measuring --------------------------------------------------------------------------------------------------


def test_the_new_head_trains_once(place):
    from luthier import tasks

    task = tasks.open(*place[:1], model=place[1])
    model = task.build()
    assert repr(dress(model, "lora()")) == "lora() >> probe()" and repr(dress(model, "full")) == "full()"
    assert repr(dress(model, "probe() >> lora()")) == "probe() >> lora()"
    with pytest.raises(DoesNotFit, match="nothing trains the part of Headed"):
        ready(task, "gptq(at=\"head\")")


def test_a_language_model_keeps_its_own_head(tmp_path):
    from folders import llama

    from luthier import tasks

    (tmp_path / "t.txt").write_text("the film was good\n" * 80)
    task = tasks.open(tmp_path / "t.txt", model=llama(tmp_path / "m"), max_length=16)
    assert repr(dress(task.build(), "lora()")) == "lora()"
    d = compare(task, methods="lora(rank=2)", seeds=1, **{**QUICK, "batch_size": 4})
    assert rows(d)[0]["mean"] > 1 and not d["task"]["higher"]


def test_memory_counts_what_the_step_touches():
    w, unused = torch.randn(100, 100), torch.randn(50)
    assert [t is w for t in touched(lambda: w.view(-1) * 2 + unused.new_zeros(1), [w, unused])] == [True]


def test_memory_is_the_same_twice(place):
    from luthier import tasks

    meter = Meter(tasks.open(place[0], model=place[1]), 8)
    assert meter("lora(rank=2)")["memory"] == meter("lora(rank=2)")["memory"]


def test_text(tmp_path):
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(f"the film was {'good' if i % 2 else 'bad'},{i % 2}\n"
                                                             for i in range(40)))
    d = compare(tmp_path / "t.csv", bert(tmp_path / "bert"), "probe, houlsby(width=4), prompt(n=2)", 1, tmp_path / "out", **QUICK)
    assert not rows(d)[1]["merged"] and all(r["step"] for r in rows(d))


def test_plots_name_what_differs():
    chains = ["vl_adapter(reduce=4)", "vl_adapter(reduce=4, share='none')", "lora(at='encoder.attn.q decoder.attn.q', rank=4)",
              "full() >> lora(at='encoder.attn.v decoder.attn.v', rank=4)", "none", "probe()"]
    assert list(report.named(chains).values()) == ["vl_adapter", "vl_adapter(share='none')", "lora(at=…)", "full >> lora(at=…)",
                                                   "none", "probe"]
    assert report.named(["mine()", "probe()"]) == {"mine()": "mine", "probe()": "probe"}
    free = document(WAYS | {"none": ([.5, .5, .5], 0, 10, 1e6, .1, 1.0, True)})
    few, more = (Image.open(io.BytesIO(report.plot(d))) for d in (document(), free))
    assert more.height == few.height and more.width > few.width             # a key stands beside the panels
