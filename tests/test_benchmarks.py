"""The benchmarks' page says what the stored results say, and nothing in a result was typed by hand."""

import re
from xml.sax.saxutils import escape

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import common, training
from luthier import cost

STORED = benchmarks.stored()


def test_the_page_is_made_from_the_results():
    docs = benchmarks.HERE.parent / "docs"
    assert (docs / "benchmarks.md").read_text("utf-8") == benchmarks.page(STORED)
    plotted = (docs / "benchmarks.svg").read_text("utf-8")
    for r in STORED.values():
        for x in r["rows"]:
            assert f">{escape(x['what'])}</text>" in plotted
    assert len(re.findall("</text>", plotted)) == len(re.findall("</text>", benchmarks.plot(STORED)))
    assert set(STORED) <= set(benchmarks.ALL)


@pytest.mark.parametrize("name", STORED)
def test_reached_follows_from_the_figures(name):
    assert STORED[name]["rows"]
    for r in STORED[name]["rows"]:
        assert r["reached"] is (r["ours"] <= r["bound"])


def test_a_ratio_is_taken_within_a_round(monkeypatch):
    """A machine that slows down threefold in the middle changes both times and not the ratio."""
    rows = iter([(9, 9), (1, 2), (1, 2), (3, 6), (3, 6)])
    monkeypatch.setattr(cost, "turns", lambda fns, rounds: [next(rows) for _ in range(rounds)])
    times = common.clock({"base": None, "ours": None}, 4)
    assert times == {"base": (1, 1, 3, 3), "ours": (2, 2, 6, 6)}            # without the first round
    r = common.timed("", times, "ours", "base", 1.5)
    assert r["ours"] == r["low"] == r["high"] == 2 and not r["reached"]


def test_an_unknown_benchmark_is_named(tmp_path):
    with pytest.raises(SystemExit, match="No benchmark is called 'stepp'"):
        benchmarks.main(["stepp"])


def test_the_gpu_s_benchmark_on_a_small_shape_without_one():
    small = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, vocab_size=100)
    row, = training.large(rounds=2, tokens=8, device="cpu", dtype=torch.float32, **small)
    assert row["ours"] > 0 and row["bytes"] == {} and "luthier" in row["note"]
