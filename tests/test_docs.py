"""Generated pages say what the code and the records say, and what is linked exists. (tests/test_sites.py holds docs/sites.md.)"""

import json
import re
import shlex
from pathlib import Path

import pytest

from luthier import docs, systems
from luthier.errors import LuthierError
from luthier.method import discover

ROOT = Path(__file__).parent.parent


def test_pages_are_fresh():
    assert docs.stale(ROOT / "docs", slow=False) == [], "run `luthier docs`"


def test_every_method_has_a_page_and_a_row():
    made = docs.pages(slow=False)
    for name, thing in discover().items():
        if not thing.__module__.startswith("luthier.methods."):
            continue
        page = made[f"methods/{name}.md"]
        assert f"(methods/{name}.md)" in made["methods.md"] and page.count("```text") == 1
        for field in thing.__dataclass_fields__ if isinstance(thing, type) else ():
            assert f"| `{field}` |" in page, (name, field)
        for check, why in getattr(thing, "exempt", {}).items():
            assert f"- `{check}`: {why}" in page


def test_every_system_has_a_row():
    text = docs.pages(slow=False)["systems.md"]
    for row in systems.systems():
        assert len(re.findall(rf"^\| \[?{row['id']}\b.*\| {row['state']} \|", text, re.M)) >= 1, row["id"]


def test_a_comparison_is_what_its_command_left():
    """Nothing typed: the command names the folder, and every row of the page is the mean of the runs it kept."""
    made = docs.pages(slow=False)["comparisons.md"]
    for path in docs.COMPARED.glob("*/results.json"):
        document = json.loads(path.read_text("utf-8"))
        argv = shlex.split(document["command"])
        assert argv[:2] == ["luthier", "compare"] and argv[argv.index("--out") + 1] == f"comparisons/{path.parent.name}"
        assert f"$ {document['command']}\n" in made and {"report.html", "pareto.png"} <= {p.name for p in path.parent.iterdir()}
        own = made.partition(f"$ {document['command']}\n")[2].partition("\n## ")[0]
        runs = [document["entries"][k] for k in document["plan"] if k in document["entries"]]
        for chain in document["setting"]["methods"]:
            scores = [e["result"]["score"] for e in runs if e["job"]["chain"] == chain and e["job"]["kind"] == "score"]
            line = next(x for x in own.splitlines() if x.startswith(f"| `{chain.replace('()', '')}` |"))
            assert len(scores) == len(document["setting"]["seeds"]) and f" {sum(scores) / len(scores):.4f}" in line


def test_the_page_on_data_names_every_kind_metric_and_built_in_set():
    from luthier import tasks
    from luthier.tasks import arrays, audio, pictures
    said = (docs.home() / "data.md").read_text("utf-8")
    for name in (*arrays.BUILT_IN, *audio.BUILT_IN, *pictures.BUILT_IN):
        assert f"`{name}`" in said, name
    for kind, made in tasks.KINDS.items():
        line = next(x for x in said.splitlines() if x.startswith(f"| `{kind}` |"))
        assert all(m in line for m in made.metrics) or kind == "audio-to-text" and "as image-to-text" in line, kind


def test_pages_go_stale_and_are_written_and_removed(tmp_path):
    everything = sorted(docs.pages(slow=False))
    assert docs.stale(tmp_path, slow=False) == everything == docs.write(tmp_path, slow=False)
    assert docs.stale(tmp_path, slow=False) == []
    (tmp_path / "methods.md").write_text("typed", encoding="utf-8")
    (tmp_path / "methods" / "gone.md").write_text("an old method", encoding="utf-8")
    (tmp_path / "guide.md").write_text("by hand", encoding="utf-8")
    assert docs.stale(tmp_path, slow=False) == ["methods.md", "methods/gone.md"] == docs.write(tmp_path, slow=False)
    assert docs.stale(tmp_path, slow=False) == [] and (tmp_path / "guide.md").read_text(encoding="utf-8") == "by hand"


def test_what_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LuthierError, match="cannot be written"):
        docs.write(tmp_path / "file", slow=False)


@pytest.mark.parametrize("page", sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")]), ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
