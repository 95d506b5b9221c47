"""The README says what is so: its Python runs, its commands parse, and the cheap ones run."""

import re
import shlex
from pathlib import Path

import pytest

from luthier import cli, tasks, zoo
from luthier.cli import main
from luthier.method import REGISTRY, include

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [shlex.split(line, comments=True) for block in re.findall(r"```console\n(.*?)```", README, re.S)
            for line in re.findall(r"^\$ (.*)$", block, re.M)]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The README's own words on little data and few steps."""
    from luthier import train

    monkeypatch.chdir(tmp_path)
    opened, trained = tasks.open, train.train
    monkeypatch.setattr(tasks, "open", lambda *a, **k: opened(*a, **k, limit=16, image_size=28))
    monkeypatch.setattr(train, "train", lambda tuned, task, epochs: trained(tuned, task, steps=2))


@pytest.mark.parametrize("text", [t for t in PYTHON if not t.startswith("# ")], ids=lambda t: t.split("\n")[0][:40])
def test_python_runs(small, text):
    for name in re.findall(r'model="([\w-]+)"', text):
        if not zoo.installed(name):
            pytest.skip(f"{name} is not installed")
    exec(compile(text, "README.md", "exec"), {})             # noqa: S102


@pytest.mark.parametrize("text", [t for t in PYTHON if t.startswith("# ")], ids=lambda t: t.split("\n")[0])
def test_method_passes_its_contracts(tmp_path, capsys, text):
    path = tmp_path / text.split("\n")[0].lstrip("# ")
    path.write_text(text, encoding="utf-8")
    try:
        assert main(["check", "--import", str(path), "--fast", "--model", "bert"]) == 0, capsys.readouterr()
    finally:
        for name in include(path):
            REGISTRY.pop(name, None)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command_exists(words):
    if words[0] == "make":
        targets = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{target}:", targets, re.M) for target in words[1:])
    else:
        assert words[0] == "luthier"
        cli._parse(words[1:])


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[1] in ("methods", "systems", "cost", "sites")], ids=" ".join)
def test_cheap_commands_run(words, capsys):
    assert main(words[1:]) == 0 and len(capsys.readouterr().out) > 100


def test_first_screen():
    screen = "\n".join(README.split("\n")[:32])
    assert all(word in screen for word in ("make demo", "make test", "```python", "docs/demo.png"))
