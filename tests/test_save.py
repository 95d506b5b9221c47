"""A saved state: what is written, what survives a kill, and what is refused before a model is touched."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import luthier
from luthier import check, save, tiny
from luthier.errors import BadState, LuthierError, WrongBase


def tuned_on(which="llama", chain="lora(rank=4)", **kw):
    model = tiny.build(which)
    return model, check.jiggle(luthier.attach(model, chain, data=[tiny.batch(which, seed=5)], **kw))


def rewrite(folder, digest=True, **changes):
    """Change the recipe as someone would who knows about the digest."""
    path = Path(folder) / save.RECIPE
    recipe = json.loads(path.read_text()) | changes
    if digest:
        recipe["digest"] = save._digest(recipe)
    path.write_text(json.dumps(recipe))


def restate(folder, change):
    """Change the tensors, with the recipe's sha256 made to agree."""
    path = Path(folder) / save.STATE
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    rewrite(folder, sha256=save._sha256(path))


# -- what is written ------------------------------------------------------------------------------------------
def test_recipe_can_be_read(tmp_path):
    from types import SimpleNamespace

    model, tuned = tuned_on(chain="lora(rank=4) >> probe()", seed=7, name="task")
    model.luthier_origin = SimpleNamespace(ref="some/model", licence="apache-2.0")
    tuned.save(tmp_path / "s", extra={"labels": ["a", "b"]})
    recipe = save.read(tmp_path / "s")
    assert recipe["chain"] == "lora(rank=4) >> probe()" and recipe["seed"] == 7 and recipe["name"] == "task"
    assert recipe["luthier"] == luthier.__version__ and recipe["torch"] == torch.__version__
    assert recipe["base"] == dict(model="LlamaForCausalLM", origin="some/model", licence="apache-2.0",
                                  fingerprint=save.fingerprint(model))
    assert [s["method"] for s in recipe["steps"]] == ["lora", "probe"]
    assert recipe["steps"][0]["sites"][0] == "block.0.attn.q" and recipe["steps"][1]["sites"] == ["head"]
    assert all(t["trained"] for s in recipe["steps"] for t in s["tensors"].values())
    del model.luthier_origin
    tuned.detach()
    again = luthier.load(model, tmp_path / "s")
    assert again.extra == {"labels": ["a", "b"]} and again.name == "tuned" and again.seed == 7


@pytest.mark.parametrize("chain", ["lora(rank=64, at='linear')", "randlora(at='linear')", "svfit(at='linear')", "said(dim=20000)",
                                   "compacter(reduce=1, n=2)", "ia3()", "bitfit()"])
def test_size_is_what_the_tensors_need(tmp_path, chain):
    """Within 2% of the bytes of what trains, plus 200 bytes a tensor name and 3 kB of recipe: no bases, nothing twice."""
    model, tuned = tuned_on("gpt2" if "bitfit" in chain else "llama", chain)
    tuned.save(tmp_path / "s")
    need = sum(p.nbytes for _, p in tuned.trainable())
    state, recipe = ((tmp_path / "s" / f).stat().st_size for f in (save.STATE, save.RECIPE))
    names = sum(len(s["tensors"]) for s in save.read(tmp_path / "s")["steps"])
    assert need <= state <= 1.02 * need + 200 * (names + 1)
    assert recipe <= 3000 + 300 * names + 40 * sum(len(s["sites"]) for s in save.read(tmp_path / "s")["steps"]) * (names + 1)


def test_shared_tensors_are_one_before_and_after(tmp_path):
    model, tuned = tuned_on(chain="said(layers=False)")
    one = {id(p) for st in tuned.states.values() for p in st.parameters()}
    assert len(one) == 1 and len(tuned.states) > 1
    tuned.save(tmp_path / "s")
    tuned.detach()
    again = luthier.load(model, tmp_path / "s")
    assert len({id(p) for st in again.states.values() for p in st.parameters()}) == 1
    assert len(again.trainable()) == 1


def test_shapes_that_training_changed_come_back(tmp_path):
    model, tuned = tuned_on(chain="adalora(rank=6, target=2, every=1)")
    tuned.total_steps = 3
    optimizer = torch.optim.AdamW([p for _, p in tuned.trainable()], lr=1e-2)
    tuned.train()
    for _ in range(3):
        (check.loss(tuned, tiny.batch("llama")) + tuned.penalty()).backward()
        optimizer.step()
        tuned.step(optimizer)
        optimizer.zero_grad()
    tuned.eval()
    shapes = {n: p.shape for n, p in tuned.trainable()}
    y = check.run(tuned, tiny.batch("llama"))
    tuned.save(tmp_path / "s")
    tuned.detach()
    again = luthier.load(model, tmp_path / "s")
    assert {n: p.shape for n, p in again.trainable()} == shapes and again.k == 3 and again.total_steps == 3
    assert torch.equal(check.run(again, tiny.batch("llama")), y)


def test_two_attachments_load_in_their_order(tmp_path):
    model, first = tuned_on(chain="lora(rank=2)", name="domain")
    first.save(tmp_path / "first")
    second = check.jiggle(luthier.attach(model, "lora(rank=4)", name="task"))
    y = check.run(model, tiny.batch("llama"))
    second.save(tmp_path / "second")
    second.detach()
    first.detach()
    with pytest.raises(WrongBase, match="on top of lora"):
        luthier.load(model, tmp_path / "second")
    luthier.load(model, tmp_path / "first", name="domain")
    luthier.load(model, tmp_path / "second", name="task")
    assert torch.equal(check.run(model, tiny.batch("llama")), y)


def test_what_cannot_be_saved_says_so(tmp_path):
    model, tuned = tuned_on()
    with pytest.raises(BadState, match="JSON"):
        tuned.save(tmp_path / "s", extra={"a": torch.zeros(1)})
    tuned.merge()
    with pytest.raises(BadState, match="unmerge"):
        tuned.save(tmp_path / "s")
    tuned.detach()
    with pytest.raises(BadState, match="detached"):
        tuned.save(tmp_path / "s")
    assert not (tmp_path / "s").exists()


# -- the base it belongs to -----------------------------------------------------------------------------------
def test_fingerprint_tells_bases_apart():
    model = tiny.build("llama")
    mine = save.fingerprint(model)
    assert mine == save.fingerprint(tiny.build("llama"))
    structure, content = mine.split(":")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert save.fingerprint(model).split(":")[0] == structure and save.fingerprint(model) != mine
    assert save.fingerprint(tiny.build("llama", torch.bfloat16)).split(":")[0] != structure
    assert save.fingerprint(tiny.build("gpt2")) != mine
    assert save.fingerprint(tiny.build("llama").to("meta")).split(":")[0] == structure


def test_fingerprint_of_135m_parameters_takes_less_than_a_second():
    model = torch.nn.Sequential(*(torch.nn.Linear(576, 576, bias=False) for _ in range(210)), torch.nn.Embedding(49152, 1344))
    start = time.perf_counter()
    save.fingerprint(model)
    assert time.perf_counter() - start < 1


def test_wrong_bases_are_refused(tmp_path):
    model, tuned = tuned_on()
    tuned.save(tmp_path / "s")
    other = tiny.build("llama")
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    for wrong, why in ((other, "other weights"), (tiny.build("llama", torch.bfloat16), "names, shapes or dtypes"),
                       (tiny.build("gpt2"), "GPT2LMHeadModel here")):
        before = check.Snapshot(wrong)
        with pytest.raises(WrongBase, match=why):
            luthier.load(wrong, tmp_path / "s")
        assert before.differs(wrong) is None


# -- what is refused ------------------------------------------------------------------------------------------
def _key(folder):
    return next(iter(load_file(folder / save.STATE)))


def _header(f, text):
    (f / save.STATE).write_bytes(len(text).to_bytes(8, "little") + text)


def _outside(f, name):
    (f / name).rename(f.parent / name)
    (f / name).symlink_to(f.parent / name)


BAD = {
    "no state": lambda f: (f / save.STATE).unlink(),
    "no recipe": lambda f: (f / save.RECIPE).unlink(),
    "a recipe that is a folder": lambda f: ((f / save.RECIPE).unlink(), (f / save.RECIPE).mkdir()),
    "a state that is a pipe": lambda f: ((f / save.STATE).unlink(), os.mkfifo(f / save.STATE)),
    "state linked from outside": lambda f: _outside(f, save.STATE),
    "recipe linked from outside": lambda f: _outside(f, save.RECIPE),
    "state linked to a device": lambda f: ((f / save.STATE).unlink(), (f / save.STATE).symlink_to("/dev/zero")),
    "dangling link": lambda f: ((f / save.STATE).unlink(), (f / save.STATE).symlink_to(f / "nowhere")),
    "empty state": lambda f: (f / save.STATE).write_bytes(b""),
    "truncated state": lambda f: (f / save.STATE).write_bytes((f / save.STATE).read_bytes()[:-7]),
    "truncated header": lambda f: (f / save.STATE).write_bytes((f / save.STATE).read_bytes()[:20]),
    "longer state": lambda f: (f / save.STATE).write_bytes((f / save.STATE).read_bytes() + b"\0" * 64),
    "flipped bit": lambda f: (f / save.STATE).write_bytes((d := (f / save.STATE).read_bytes())[:-1] + bytes([d[-1] ^ 1])),
    "huge header": lambda f: (f / save.STATE).write_bytes((1 << 62).to_bytes(8, "little") + b"{}"),
    "header of 60 MB that is not there": lambda f: (f / save.STATE).write_bytes((60 << 20).to_bytes(8, "little") + b"{}"),
    "header that is no JSON": lambda f: _header(f, b"{{{{"),
    "header nested deeply": lambda f: _header(f, b'{"a":' + b"[" * 100000 + b"]" * 100000 + b"}"),
    "header with offsets past the end": lambda f: _header(f, b'{"a":{"dtype":"F32","shape":[99],"data_offsets":[0,396]}}'),
    "a pickle": lambda f: torch.save({"a": torch.zeros(2)}, f / save.STATE),
    "an old pickle": lambda f: torch.save({"a": torch.zeros(2)}, f / save.STATE, _use_new_zipfile_serialization=False),
    "empty recipe": lambda f: (f / save.RECIPE).write_text(""),
    "recipe cut short": lambda f: (f / save.RECIPE).write_text((f / save.RECIPE).read_text()[:-40]),
    "recipe of bytes": lambda f: (f / save.RECIPE).write_bytes(b"\xff\xfe\x00garbage"),
    "recipe nested deeply": lambda f: (f / save.RECIPE).write_text("[" * 200000),
    "recipe that is a list": lambda f: (f / save.RECIPE).write_text("[]"),
    "edited recipe": lambda f: rewrite(f, digest=False, chain="lora(rank=8)"),
    "newer format": lambda f: rewrite(f, format=99),
    "unknown field": lambda f: rewrite(f, state_file="/etc/passwd"),
    "missing field": lambda f: rewrite(f, steps=None),
    "missing tensor": lambda f: restate(f, lambda t: t.pop(_key(f))),
    "extra tensor": lambda f: restate(f, lambda t: t.update(more=torch.zeros(2))),
    "tensor named as a path": lambda f: restate(f, lambda t: t.update({"../../evil": torch.zeros(2)})),
    "wrong shape": lambda f: restate(f, lambda t: t.update({_key(f): torch.zeros(3, 3)})),
    "wrong dtype": lambda f: restate(f, lambda t: t.update({_key(f): t[_key(f)].half()})),
    "code in the chain": lambda f: rewrite(f, chain="__import__('os').system('touch pwned')"),
    "code in a hyperparameter": lambda f: rewrite(f, chain="lora(rank=__import__('os').system('touch pwned'))"),
    "unknown method": lambda f: rewrite(f, chain="nosuch()"),
    "unknown hyperparameter": lambda f: rewrite(f, chain="lora(ranks=4)"),
    "another method": lambda f: rewrite(f, chain="dora(rank=4)"),
    "another rank": lambda f: rewrite(f, chain="lora(rank=3)"),
    "other sites": lambda f: rewrite(f, chain="lora(rank=4, at='mlp.up')"),
    "longer chain": lambda f: rewrite(f, chain="lora(rank=4) >> ssf()"),
    "empty chain": lambda f: rewrite(f, chain=""),
    "chain nested deeply": lambda f: rewrite(f, chain="(" * 5000 + ")" * 5000),
    "no steps": lambda f: rewrite(f, steps=[]),
    "steps of numbers": lambda f: rewrite(f, steps=[1, 2]),
    "stepped of nothing": lambda f: rewrite(f, stepped=[]),
    "base of nothing": lambda f: rewrite(f, base={}),
    "site outside": lambda f: rewrite(f, steps=_sites(f, "../../etc/passwd")),
    "absolute site": lambda f: rewrite(f, steps=_sites(f, "/etc/passwd")),
    "sites beyond the list": lambda f: rewrite(f, steps=_tensors(f, of=[0, 1, 2, 99])),
    "a tensor renamed": lambda f: rewrite(f, steps=_tensors(f, name="C")),
    "a tensor named like a method": lambda f: rewrite(f, steps=_tensors(f, name="forward")),
    "a frozen tensor": lambda f: rewrite(f, steps=_tensors(f, trained=False)),
}


def _steps(f):
    return json.loads((f / save.RECIPE).read_text())["steps"]


def _sites(f, name):
    steps = _steps(f)
    steps[0]["sites"][0] = name
    return steps


def _tensors(f, **changes):
    steps = _steps(f)
    next(iter(steps[0]["tensors"].values())).update(changes)
    return steps


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    model, tuned = tuned_on()
    folder = tmp_path_factory.mktemp("good") / "s"
    tuned.save(folder)
    return folder, tuned.detach()


@pytest.mark.parametrize("fault", BAD)
def test_bad_folders_are_refused(fault, good, tmp_path, monkeypatch):
    import shutil

    folder, model = good
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "s")
    BAD[fault](tmp_path / "s")
    before = check.Snapshot(model)
    with check._watched() as events, pytest.raises(BadState) as e:
        luthier.load(model, tmp_path / "s")
    assert "\n" not in str(e.value) and len(str(e.value)) < 900
    assert not events and not (tmp_path / "pwned").exists()
    assert before.differs(model) is None and not luthier.attached(model)
    assert torch.equal(check.run(luthier.load(model, folder), tiny.batch("llama")), check.run(model, tiny.batch("llama")))
    for o in list(vars(model)["_luthier_host"].owners):
        vars(model)["_luthier_host"].drop(o)


@pytest.mark.parametrize("name", ["nowhere", "file.bin", "file.pt", "empty"])
def test_what_is_no_saved_folder_is_refused(name, tmp_path):
    if "file" in name:
        torch.save({"a": 1}, tmp_path / name)
    elif name == "empty":
        (tmp_path / name).mkdir()
    with pytest.raises(BadState, match="pickled files"):
        luthier.load(tiny.build("llama"), tmp_path / name)


def test_every_truncation_is_refused(good, tmp_path):
    import shutil

    folder, model = good
    shutil.copytree(folder, tmp_path / "s")
    for name in (save.STATE, save.RECIPE):
        whole = (folder / name).read_bytes()
        for n in [*range(0, 40), *range(40, len(whole), max(1, len(whole) // 40)), len(whole) - 1]:
            (tmp_path / "s" / name).write_bytes(whole[:n])
            if name == save.RECIPE and json_ok(whole[:n]):
                continue                                   # only the last newline is missing
            with pytest.raises(BadState):
                save.read(tmp_path / "s")
        (tmp_path / "s" / name).write_bytes(whole)


def json_ok(raw):
    try:
        json.loads(raw)
    except ValueError:
        return False
    return True


def test_a_link_inside_the_folder_is_fine(good, tmp_path):
    import shutil

    shutil.copytree(good[0], tmp_path / "s")
    (tmp_path / "s" / save.STATE).rename(tmp_path / "s" / "blob")
    (tmp_path / "s" / save.STATE).symlink_to("blob")
    save.read(tmp_path / "s")


# -- complete at every moment ---------------------------------------------------------------------------------
def test_other_files_in_the_folder_stay(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "notes.txt").write_text("mine")
    model, tuned = tuned_on()
    tuned.save(tmp_path / "s")
    tuned.save(tmp_path / "s")
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["notes.txt", save.RECIPE, save.STATE]
    assert (tmp_path / "s" / "notes.txt").read_text() == "mine"


def test_a_file_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "s").write_text("mine")
    model, tuned = tuned_on()
    with pytest.raises(BadState, match="is a file"):
        tuned.save(tmp_path / "s")
    assert (tmp_path / "s").read_text() == "mine"


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("at", range(12))
def test_a_failure_at_any_call_leaves_the_old_or_the_new(tmp_path, monkeypatch, old, at):
    """Fail, as a full disk would, at the n-th call that touches the disk: what is there is whole, with nothing beside it."""
    folder = tmp_path / "deep" / "s"
    if old:
        save.write(folder, {"a": lambda p: p.write_text("old"), "b": lambda p: p.write_text("old")})
    calls = 0

    def failing(real):
        def fn(*args, **kw):
            nonlocal calls
            calls += 1
            if calls == at + 1:
                raise OSError(28, "No space left on device")
            return real(*args, **kw)
        return fn

    with monkeypatch.context() as m:
        for name in ("rename", "replace", "fsync", "rmdir"):
            m.setattr(os, name, failing(getattr(os, name)))
        try:
            save.write(folder, {"a": lambda p: failing(p.write_text)("new"), "b": lambda p: failing(p.write_text)("new")})
        except BadState as e:
            assert "No space" in str(e)
    if folder.exists():
        save._finish(folder)
        assert {p.name: p.read_text() for p in folder.iterdir()} in ({"a": "new", "b": "new"}, {"a": "old", "b": "old"})
    else:
        assert not old and not (tmp_path / "deep").exists()
    assert not list(tmp_path.rglob("*part*"))


KILLED = """
import sys, torch, luthier
from luthier import check, tiny
torch.set_num_threads(1)
model = tiny.build("llama")
tuned = luthier.attach(model, "lora(rank=4)")
print("ready", flush=True)
k = 0
while True:
    k += 1
    for _, p in tuned.trainable():
        p.data.fill_(k)
    tuned.save(sys.argv[1], extra={"k": k})
"""


def test_killed_while_overwriting_the_folder_is_whole(tmp_path):
    folder, seen = tmp_path / "s", set()
    model = tiny.build("llama")
    for i in range(6):
        run = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE,
                               cwd=Path(luthier.__file__).parents[1])
        run.stdout.readline()
        time.sleep(0.05 + 0.037 * i)
        run.send_signal(signal.SIGKILL)
        run.wait()
        if not folder.exists():
            continue
        tuned = luthier.load(model, folder)
        values = {float(v) for _, p in tuned.trainable() for v in p.detach().unique()}
        assert values == {float(tuned.extra["k"])}
        seen |= values
        tuned.detach()
        assert sorted(p.name for p in folder.iterdir() if "part" not in p.name) == [save.RECIPE, save.STATE]
    assert seen
    tuned = luthier.attach(model, "lora(rank=4)")
    tuned.save(folder)                                     # and the next save clears what the killed ones left
    assert sorted(p.name for p in folder.iterdir()) == [save.RECIPE, save.STATE]


def test_errors_are_the_users(tmp_path):
    assert issubclass(BadState, LuthierError) and issubclass(WrongBase, BadState)
