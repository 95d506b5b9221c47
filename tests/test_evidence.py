"""Records are whole, their verdicts follow from their figures, and their commands exist."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from luthier import evidence, systems
from luthier.errors import LuthierError

STORED = sorted(systems.store().glob("*.json"))


@pytest.mark.parametrize("path", STORED, ids=lambda p: p.stem)
def test_record_is_whole_and_its_verdict_follows_from_its_figures(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    assert evidence.faults(found) == []
    module = evidence.runner(path.stem)
    assert found["system"] == module.SYSTEM == path.stem and path.stem in evidence.names()
    verdict, reasons = module.verdict(found["figures"])
    assert (found["verdict"], found["reasons"]) == (verdict, list(reasons))
    for name, (mean, low, high) in found["intervals"].items():
        values = found["figures"]["per_seed"][name]
        assert low <= mean <= high and math.isclose(mean, sum(values) / len(values), rel_tol=1e-4, abs_tol=1e-5)


def test_records_name_no_machine():
    for path in STORED:
        text = path.read_text(encoding="utf-8")
        assert "/home" not in text and "/work" not in text and "/tmp" not in text, path.name


@pytest.mark.parametrize("id", evidence.names())
def test_runner_states_what_it_does(id):
    module = evidence.runner(id)
    assert module.SYSTEM == id and len(module.SEEDS) >= evidence.LEAST_SEEDS and module.MINUTES <= 20
    assert all(isinstance(getattr(module, n), str) and getattr(module, n) for n in ("CLAIM", "BASELINE", "MODEL", "DATA"))
    assert all(name in _registry() for name in module.METHODS)


def _registry():
    from luthier.method import discover

    return discover()


class Fake:
    """A runner with figures made up on the spot."""
    SYSTEM, CLAIM, BASELINE, MODEL, DATA, SEEDS, METHODS = "B105", "better", "worse", "none", "none", (0, 1, 2), ()
    asked = None

    def run(self, seeds):
        self.asked = seeds
        return {"per_seed": {n: [v + s / 1000 for s in seeds] for n, v in (("ours", 0.9), ("theirs", 0.5))}, "facts": {"n": 3}}

    def verdict(self, figures):
        return evidence.judge([evidence.beats(figures, "ours", "theirs")], [evidence.fact(figures["facts"]["n"] == 3, "n is 3")])


def test_run_writes_a_whole_record_and_runs_again_with_other_seeds(monkeypatch, tmp_path):
    monkeypatch.setattr(evidence, "runner", lambda name: Fake())
    for seeds in (None, "3,4,5,6", [7, 8, 9]):
        found = evidence.run("b105", seeds, tmp_path)
        assert found == json.loads((tmp_path / "B105.json").read_text(encoding="utf-8"))
        assert evidence.faults(found) == [] and found["verdict"] == "reproduced"
        assert found["command"].endswith(",".join(map(str, found["seeds"])))
    assert [p.name for p in tmp_path.iterdir()] == ["B105.json"]
    row = {r["id"]: r for r in systems.systems(tmp_path)}["B105"]
    assert (row["state"], row["record"]) == ("works", "evidence/B105.json")


def test_a_runner_that_fails_leaves_the_old_record(monkeypatch, tmp_path):
    monkeypatch.setattr(evidence, "runner", lambda name: Fake())
    evidence.run("b105", None, tmp_path)
    before = (tmp_path / "B105.json").read_bytes()
    broken = {"per_seed": {"ours": [math.nan] * 3, "theirs": [0] * 3}, "facts": {"n": 3}}
    monkeypatch.setattr(Fake, "run", lambda self, seeds: broken)
    with pytest.raises(LuthierError):
        evidence.run("b105", None, tmp_path)
    assert (tmp_path / "B105.json").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("change, says", [
    (dict(verdict="works"), "verdict"), (dict(seeds=[0, 1]), "seeds"), (dict(reasons=[]), "reasons"),
    (dict(command="luthier evidence B105"), "command"), (dict(figures={"per_seed": {}, "facts": {}}), "figure"),
    (dict(figures={"per_seed": {"ours": [1.0]}, "facts": {}}), "values"), (dict(minutes="1"), "minutes"),
    (dict(claim=None), "claim")])
def test_faults_are_seen(change, says, monkeypatch, tmp_path):
    monkeypatch.setattr(evidence, "runner", lambda name: Fake())
    assert any(says in text for text in evidence.faults(evidence.run("b105", None, tmp_path) | change))


def test_claims_are_judged_by_the_interval_of_the_paired_difference():
    clear = {"per_seed": {"a": [0.8, 0.7, 0.9], "b": [0.7, 0.6, 0.8]}, "facts": {}}
    noisy = {"per_seed": {"a": [0.8, 0.7, 0.9], "b": [0.9, 0.4, 0.8]}, "facts": {}}
    assert evidence.beats(clear, "a", "b")[0] and not evidence.beats(clear, "a", "b", by=0.2)[0]
    assert not evidence.beats(noisy, "a", "b")[0] and not evidence.beats(clear, "b", "a")[0]
    assert evidence.not_below(noisy, "a", "b")[0] and not evidence.not_below(clear, "b", "a", 0.05)[0]
    assert evidence.not_below(clear, "b", "a", 0.1)[0]
    yes, no = (True, "yes"), (False, "no")
    assert [evidence.judge(*c)[0] for c in (([yes], [yes]), ([yes], [no]), ([yes, no],), ([no], [yes]), ([no, no],))] == \
        ["reproduced", "partly", "partly", "not reproduced", "not reproduced"]


def test_seeds_are_parsed():
    assert evidence.parse_seeds("0, 1,2") == [0, 1, 2] and evidence.parse_seeds("4") == [0, 1, 2, 3]
    for bad in ("", "a", "1,1", "-1", "1.5", "0", "999999", "1,,2", "1;2"):
        with pytest.raises(LuthierError):
            evidence.parse_seeds(bad)


def test_systems_are_the_245_ids():
    rows = systems.systems()
    assert len(rows) == len({r["id"] for r in rows}) == 245
    assert {"id", "name", "fit", "state", "record", "kind", "family", "works_when"} <= set(rows[0])
    assert {r["state"] for r in rows} <= {*systems.STATES.values(), "open"}
    by_id = {r["id"]: r for r in rows}
    for a, b in (("B128", "C020"), ("B173", "C021"), ("B168", "C045")):
        assert by_id[a]["same_as"] == b and by_id[b]["same_as"] == a
        assert (by_id[a]["state"], by_id[a]["record"]) == (by_id[b]["state"], by_id[b]["record"])
    assert all((r["state"] == "open") == (r["record"] is None) for r in rows)


def test_a_system_is_found_by_id_and_name_and_the_nearest_is_suggested():
    assert systems.row("b105")["name"] == systems.row("GPTQ")["name"] == "GPTQ"
    with pytest.raises(LuthierError, match="GPTQ"):
        systems.row("GPTQQ")
    with pytest.raises(LuthierError, match="no runner"):
        evidence.runner("C036")


def test_a_broken_record_is_refused(tmp_path):
    for text in ("", "{", "[]", '{"verdict": "fine"}', "null"):
        (tmp_path / "B105.json").write_text(text, encoding="utf-8")
        with pytest.raises(LuthierError, match="B105.json"):
            systems.systems(tmp_path)


def test_the_search_climbs_to_a_peak():
    from luthier.evidence._bench import climb

    for peak in range(5):
        seen = []
        assert climb(lambda i: seen.append(i) or -abs(i - peak), 5) == peak, peak    # noqa: B023


def test_records_travel_in_the_wheel(tmp_path):
    """Built as pip builds it, the package carries the records and finds them away from any checkout."""
    pytest.importorskip("setuptools")
    root = Path(systems.__file__).parent.parent
    if not (root / "setup.py").is_file():
        pytest.skip("no checkout")
    for name in ("luthier", "evidence"):
        shutil.copytree(root / name, tmp_path / "src" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(root / name, tmp_path / "src")
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")]
    subprocess.run(build, cwd=tmp_path / "src", check=True, capture_output=True)
    ask = "import json; from luthier.systems import systems, store; print(json.dumps([str(store()), systems()]))"
    said = subprocess.run([sys.executable, "-c", ask], cwd=tmp_path / "lib", check=True, capture_output=True, text=True,
                          env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    where, rows = json.loads(said.stdout)
    assert where == str(tmp_path / "lib" / "luthier" / "evidence" / "records") and rows == systems.systems()
