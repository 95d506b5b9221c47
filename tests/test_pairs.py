"""Every ordered pair of methods composes and comes off exactly, or is refused with a reason; and docs/pairs.md says which."""

from pathlib import Path

import pytest

from luthier import check
from luthier.method import discover

PAGE = Path(__file__).parent.parent / "docs" / "pairs.md"
NAMES = sorted(n for n, m in discover().items() if m.__module__.startswith("luthier.methods."))


@pytest.fixture(scope="module")
def bench():
    return {}


@pytest.mark.parametrize("model", check.PAIR_MODELS)
@pytest.mark.parametrize("first", NAMES)
def test_pairs(first, model, bench):
    found = {(first, second, model): check.pair(first, second, model, bench) for second in NAMES}
    for said in found.values():
        kind, _, why = said.partition(": ")
        assert kind in ("ok", "refused", "n/a") and bool(why) == (kind != "ok")
    row, reasons = check.pair_lines(found, first, model)
    section = PAGE.read_text(encoding="utf-8").partition(f"## {model}\n")[2].partition("\n## ")[0].splitlines()
    assert row in section and all(r in section for r in reasons), "stale: run `luthier docs`"


def test_most_pairs_compose():
    for model in check.PAIR_MODELS:
        section = PAGE.read_text(encoding="utf-8").partition(f"## {model}\n")[2].partition("\n## ")[0]
        cells = [c.strip() for line in section.splitlines() if line.startswith("|") for c in line.split("|")[2:-1]]
        runs, refused = cells.count("+"), cells.count("r")              # the rest needs a model of another kind
        assert runs > 0.9 * (runs + refused) and runs > 0.5 * len(NAMES) ** 2, "most of the matrix should say +"


def test_a_pair_that_cannot_be_undone_is_caught(monkeypatch):
    from luthier.host import Host

    drop = Host.drop

    def forgetful(self, owner):
        drop(self, owner)
        next(self.model.parameters()).requires_grad_(False)
    monkeypatch.setattr(Host, "drop", forgetful)
    with pytest.raises(AssertionError, match="after detaching"):
        check.pair("lora", "ssf", "vit")
