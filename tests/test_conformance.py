"""Every registered method keeps the contract of luthier.check, on every tiny model, in every dtype."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from luthier import check, tiny
from luthier.method import discover

NAMES = sorted(n for n, m in discover().items() if m.__module__.startswith("luthier.methods."))


@pytest.mark.parametrize("name", NAMES)
def test_contract(name):
    rows = check.run_all([name])
    assert not [r for r in rows if r.verdict == "FAIL"], "\n" + check.table(rows)
    # nothing may pass for want of having run
    assert {r.check for r in rows if r.verdict in ("pass", "exempt")} >= {
        "identity_at_init", "acts_when_perturbed", "base_never_written", "detach_restores", "save_load_equal",
        "survives_deepcopy", "cost_is_counted", "compiles"}


def test_the_zoo_has_every_kind_and_every_check_runs_somewhere():
    assert set(tiny.MODELS) == {"bert", "gpt2", "llama", "t5", "vit", "dinov2", "clip", "named", "resnet", "bridged", "clips"}
    rows = [r for model in ("llama", "vit") for r in check.cell("lora", model, torch.float32, [*check.CHECKS])]
    assert {r.check for r in rows if r.verdict == "pass"} == set(check.CHECKS)


def test_tiny_models_are_the_same_each_time():
    for name in tiny.MODELS:
        a, b = tiny.build(name), tiny.build(name)
        assert a is not b and torch.equal(check.run(a, tiny.batch(name)), check.run(b, tiny.batch(name)))


GOOD = '''
    """Scale rows.  W' = (1 + s) W"""
    from luthier.method import Method, method

    @method
    class rowscale(Method):
        at: str = "attn.o"

        def init(self, site):
            return dict(s=site.zeros(site.d_out))

        def weight(self, W, p):
            return (1 + p.s)[:, None] * W
'''
BAD = GOOD.replace("(1 + p.s)[:, None] * W", "(2 + p.s)[:, None] * W").replace("rowscale", "wrongscale")


@pytest.mark.parametrize(("name", "text", "code"), [("rowscale", GOOD, 0), ("wrongscale", BAD, 1)])
def test_a_file_of_ones_own(tmp_path, name, text, code):
    path = tmp_path / f"{name}.py"
    path.write_text(textwrap.dedent(text))
    command = [sys.executable, "-m", "luthier", "check", "--fast", "--import", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(check.__file__).parents[1])
    assert run.returncode == code, run.stdout + run.stderr
    assert (f"FAIL {name} on" in run.stdout) == bool(code) and "identity_at_init" in run.stdout
    if code:
        assert "attaching changed the output" in run.stdout


def test_the_table_of_one_and_of_many():
    k = "identity_at_init"
    rows = [check.Row("a", "vit", "float32", k, "pass"), check.Row("a", "llama", "float32", k, "n/a", "x"),
            check.Row("a", "vit", "bfloat16", k, "FAIL", "off")]
    one, many = check.table(rows), check.table([*rows, check.Row("b", "vit", "float32", k, "exempt")])
    assert "identity_at_init  X   ." in one and "FAIL a on vit bfloat16: identity_at_init: off" in one
    assert "1 pass, 1 exempt, 1 n/a, 1 FAIL" in many and "\nb       e" in many
