"""The rack: a row is served as if its adapter were alone on the model, whatever the other rows carry."""

import json
import os
import random
import shutil
import sys
import threading

import pytest
import torch
from folders import bert, reviews, run
from torch import nn

import luthier
from luthier import Rack, check, cli, save, tiny
from luthier._compat import torchvision
from luthier.errors import BadState, DoesNotFit, LuthierError, RowsFailed, UnknownName, WrongBase
from luthier.host import Host
from luthier.method import REGISTRY, Method, method
from luthier.serve import fold, rows

torchvision()
CHAINS = {"lora": "lora(at='linear')", "dora": "dora(at='linear')", "ia3": "ia3()", "ssf": "ssf()",
          "randlora": "randlora(rank=4)", "houlsby": "houlsby(width=4)", "prefix": "prefix(n=2, mid=8)"}


def build(which):
    """In double precision, so that rounding hides nothing."""
    return tiny.build(which, torch.float64)


def batch(which, seed=1):
    return tiny.batch(which, torch.float64, seed)


def made(folder, which, chain, k, seed=0):
    """A state of `chain` with weights drawn from k; returns its folder."""
    model = build(which)
    tuned, g = luthier.attach(model, chain, seed=seed), torch.Generator().manual_seed(k)
    for _, p in tuned.trainable():
        p.data += 0.3 * torch.randn(p.shape, generator=g).to(p.dtype)
    tuned.save(folder)
    return folder


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """(model, chain, k, seed) -> folder, made once."""
    root, known = tmp_path_factory.mktemp("shelf"), {}

    def get(which, chain, k, seed=0):
        key = (which, chain, k, seed)
        if key not in known:
            known[key] = made(root / str(len(known)), which, chain, k, seed)
        return known[key]
    return get


def racked(shelf, which, chains, memory="2GB"):
    """A rack with adapters a0, a1, ... of these chains, and their folders by name."""
    model = build(which)
    rack, folders = Rack(model, memory), {}
    for k, chain in enumerate(chains):
        folders[f"a{k}"] = shelf(which, chain, k)
        rack.load(f"a{k}", folders[f"a{k}"])
    return rack, folders


@pytest.fixture(scope="module")
def alone():
    """What a model says with one adapter on it and nobody else around: (model, folder or None, batch) -> (rows, n)."""
    known = {}

    def get(which, folder, seed=1):
        if (which, folder, seed) not in known:
            model = build(which)
            with torch.no_grad():
                known[which, folder, seed] = said(luthier.load(model, folder) if folder else model, which, seed)
        return known[which, folder, seed]
    return get


def said(model, which, seed=1):
    return tiny.output(model, batch(which, seed))


def serve(rack, which, names, seed=1):
    return said(lambda **batch: rack(batch, names=names), which, seed)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# -- a row is served as if it were alone --------------------------------------------------------------------------
@pytest.mark.parametrize("which, chain", [
    *[("llama", c) for c in CHAINS.values()], ("gpt2", "ia3()"), ("gpt2", "lora(at='attn.q mlp.up')"), ("gpt2", "bitfit()"),
    ("bert", "houlsby(width=4)"), ("bert", "ssf()"), ("t5", "lora()"), ("vit", "probe() >> lora()"), ("vit", "vpt(n=2)"),
    ("resnet", "ssf()"), ("llama", "lora() >> ssf()"), ("llama", "ladder(reduce=4)"), ("llama", "prefix(n=2, reparam=False)"),
    ("llama", "prompt(n=3)"), ("llama", "sparse()")])
def test_rows_equal_one_by_one(shelf, alone, which, chain):
    rack, folders = racked(shelf, which, [chain] * 3)
    for names in (["a0", "a1", "a2"], ["a2", None, "a0"], ["a1", "a1", "a1"], ["a0", "a0", "a2"], [None] * 3):
        out = serve(rack, which, names)
        for i, n in enumerate(names):
            want = alone(which, folders.get(n))[i]
            scale = want.abs().max().clamp(min=1)
            close(out[i] / scale, want / scale)
            if n is None:
                close(out[i], alone(which, None)[i])
    kind, = rack.cost()["kinds"]
    assert kind["served"] == "row by row" and not kind["looped"], kind
    rack.close()
    with torch.no_grad():
        assert torch.equal(said(rack.model, which), alone(which, None)) and Host.of(rack.model) is None


@pytest.mark.parametrize("chain", ["lora(rank={}, at='linear')", "dora(rank={})", "houlsby(width={})"])
def test_other_sizes_share_a_batch_where_padding_changes_nothing(shelf, alone, chain):
    rack, folders = racked(shelf, "llama", [chain.format(r) for r in (4, 8, 2)])
    kind, = rack.cost()["kinds"]
    assert kind["adapters"] == 3 and list(kind["numbers_that_differ"].values()) in ([["rank"]], [["width"]])
    out = serve(rack, "llama", ["a2", "a0", "a1"])
    for i, n in enumerate(["a2", "a0", "a1"]):
        close(out[i], alone("llama", folders[n])[i])


def test_numbers_may_differ_too(shelf, alone):
    rack, folders = racked(shelf, "llama", ["lora(alpha=3.0)", "lora(rank=4, alpha=32.0)"])
    assert len(rack.kinds) == 1
    out = serve(rack, "llama", ["a0", "a1", "a0"])
    for i, n in enumerate(["a0", "a1", "a0"]):
        close(out[i], alone("llama", folders[n])[i])


def test_other_chains_and_sizes_that_cannot_be_padded_run_apart(shelf, alone):
    """Zero keys of a prefix would be attended to."""
    rack, folders = racked(shelf, "llama", ["prefix(n=2, mid=8)", "prefix(n=3, mid=8)", "lora()", "probe()"])
    assert len(rack.kinds) == 4
    for names in (["a0", "a1", None], ["a3", "a2", "a0"], [None, "nobody", "a1"]):
        out, errors = rack.run(batch("llama"), names=names)
        out = tiny.output(lambda out=out, **b: out, batch("llama"))
        assert set(errors) == {i for i, n in enumerate(names) if n == "nobody"}
        for i, n in enumerate(names):
            if i not in errors:
                close(out[i], alone("llama", folders.get(n))[i])


def test_random_bases_of_other_seeds(shelf, alone):
    rack = Rack(build("llama"))
    folders = [shelf("llama", CHAINS["randlora"], k, seed) for k, seed in ((0, 0), (1, 1), (2, 1))]
    for k, f in enumerate(folders):
        rack.load(f"a{k}", f)
    for names in ([0, 1, 2], [1, 2, 2]):
        out = serve(rack, "llama", [f"a{k}" for k in names])
        for i, k in enumerate(names):
            close(out[i], alone("llama", folders[k])[i])
    assert len(rack.kinds) == 1


def test_random_traffic(shelf, alone):
    """Thirty batches over twelve adapters in a memory for a few of them: every row right, the limit held throughout."""
    chains = [f"lora(rank={r})" for r in (2, 4, 8)] + ["dora()", "houlsby(width=4)", "ssf()"]
    rack, folders = racked(shelf, "llama", chains * 2, memory="250kB")
    rng, held = random.Random(0), []
    room, rack._room = rack._room, lambda *a: (held.append(rack.used), room(*a))[1]
    for step in range(30):
        names = [rng.choice([None, *folders]) for _ in range(3)]
        out = serve(rack, "llama", names, seed=step % 3)
        for i, n in enumerate(names):
            close(out[i], alone("llama", folders.get(n), step % 3)[i])
        held.append(rack.used)
    assert max(held) <= rack.memory and rack.stats["evictions"] > 10
    assert rack.used == sum(item.bytes for item in rack.items.values())


@pytest.mark.parametrize("name", CHAINS)
def test_a_row_does_not_depend_on_the_others_to_the_bit(shelf, name):
    rack, _ = racked(shelf, "llama", [CHAINS[name]] * 4)
    one = serve(rack, "llama", ["a0", "a1", "a2"])[0]
    for names in (["a0", "a3", "a1"], ["a0", "a2", "a3"]):
        assert torch.equal(serve(rack, "llama", names)[0], one)


def test_equal_neighbours_share_a_state(shelf):
    rack, _ = racked(shelf, "llama", ["lora()"] * 2)
    four = {k: torch.cat([v, v[:1]]) for k, v in batch("llama").items()}
    rack(four, names=["a0", "a1", "a0", "a1"])
    assert [k[1] for k in rack.items if k[0] == "rows"] == [("a0", "a1")]


# -- what fails, fails alone ------------------------------------------------------------------------------------------
def test_a_missing_adapter_fails_its_own_row(shelf, alone):
    rack, folders = racked(shelf, "llama", ["lora()"] * 2)
    with pytest.raises(RowsFailed, match="Row 1: no adapter is called 'a7'. Nearest: ") as e:
        rack(batch("llama"), names=["a0", "a7", "a1"])
    assert set(e.value.errors) == {1} and isinstance(e.value.errors[1], UnknownName)
    assert e.value.outputs.logits[1].isnan().all()
    got = tiny.output(lambda **b: e.value.outputs, batch("llama"))
    close(got[0], alone("llama", folders["a0"])[0])
    close(got[2], alone("llama", folders["a1"])[2])
    out, errors = rack.run(batch("llama"), names=["b", "b", "b"])
    assert out is None and len(errors) == 3
    with pytest.raises(DoesNotFit, match="2 names for a batch of 3 rows"):
        rack(batch("llama"), names=["a0", None])


@pytest.mark.parametrize("harm", ["gone", "cut", "other"])
def test_a_file_that_breaks_later_fails_its_own_rows(shelf, alone, tmp_path, harm):
    rack, folders = racked(shelf, "llama", ["lora()"] * 2)
    shutil.copytree(shelf("llama", "lora()", 5), tmp_path / "bad")
    rack.load("bad", tmp_path / "bad")
    path = tmp_path / "bad" / save.STATE
    data = path.read_bytes()
    os.remove(path)
    if harm != "gone":
        path.write_bytes(data[:200] if harm == "cut" else data[:-4] + b"abcd")
    for names in (["a0", "bad", "a1"], ["bad", "a0", "bad"], ["a1", "a0", "a0"]):
        out, errors = rack.run(batch("llama"), names=names)
        assert set(errors) == {i for i, n in enumerate(names) if n == "bad"}
        assert all(isinstance(e, BadState) and "bad" in str(e) for e in errors.values())
        got = tiny.output(lambda out=out, **b: out, batch("llama"))
        for i, n in enumerate(names):
            if n != "bad":
                close(got[i], alone("llama", folders[n])[i])
    path.write_bytes(data)                                 # whole again: served again
    close(serve(rack, "llama", ["bad", "a0", None])[0], alone("llama", shelf("llama", "lora()", 5))[0])


def test_what_does_not_fit_is_refused_at_the_door(shelf, tmp_path):
    rack, _ = racked(shelf, "llama", ["lora()"])
    before = (rack.names, rack.used, len(rack.kinds))
    bad = tmp_path / "bad"
    shutil.copytree(shelf("llama", "lora()", 0), bad)
    (bad / save.STATE).write_bytes((bad / save.STATE).read_bytes()[:-9])
    on = luthier.attach(build("llama"), "ssf()")
    luthier.attach(on, "lora()").save(tmp_path / "on")
    for folder, kind, why in ((bad, BadState, "safetensors"), (tmp_path / "none", BadState, "not there"),
                              (shelf("gpt2", "lora()", 0), WrongBase, "GPT2"), (tmp_path / "on", WrongBase, "on top of ssf")):
        with pytest.raises(kind, match=why):
            rack.load("x", folder)
    with pytest.raises(BadState, match="called 'a0' already"):
        rack.load("a0", shelf("llama", "lora()", 1))
    with pytest.raises(DoesNotFit, match="needs .* kB in memory.*Rack\\(model, memory="):
        Rack(build("llama"), "3kB").load("a", shelf("llama", "lora()", 0))
    with pytest.raises(DoesNotFit, match="is no size"):
        Rack(build("llama"), "plenty")
    assert (rack.names, rack.used, len(rack.kinds)) == before
    model = build("llama")
    with pytest.raises(WrongBase):
        Rack(model).load("x", shelf("gpt2", "lora()", 0))
    assert Host.of(model) is None and all(p.requires_grad for p in model.parameters())
    with pytest.raises(UnknownName, match="Nearest: a0"):
        rack.unload("a1")


def test_a_folder_of_adapters(shelf, tmp_path):
    for k, name in enumerate(("alice", "bob")):
        shutil.copytree(shelf("llama", "lora()", k), tmp_path / name)
    (tmp_path / "empty").mkdir()
    rack = Rack(build("llama"))
    errors = rack.load_all(tmp_path)
    assert rack.names == ["alice", "bob"] and list(errors) == ["empty"] and "alice" in rack and len(rack) == 2
    rack.unload("alice")
    assert rack.names == ["bob"]
    serve(rack, "llama", ["bob", None, "bob"])
    rack.unload("bob")
    assert Host.of(rack.model) is None and not rack.items and rack.used == 0
    shutil.rmtree(tmp_path / "alice"), shutil.rmtree(tmp_path / "bob")
    with pytest.raises(LuthierError, match="no recipe.json"):
        Rack(build("llama")).load_all(tmp_path)


def test_one_adapter_for_a_while(shelf, alone):
    rack, folders = racked(shelf, "llama", ["lora()"] * 2)
    with torch.no_grad(), rack.serving("a1") as model:
        assert model is rack.model
        close(said(model, "llama"), alone("llama", folders["a1"]))
    with torch.no_grad():
        assert torch.equal(said(rack.model, "llama"), alone("llama", None))


def test_nothing_is_dropped_while_serving(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).double().train()
    for k in range(2):
        tuned = check.jiggle(luthier.attach(model, "lora(at='all', rank=2, dropout=0.5)", seed=k))
        tuned.save(tmp_path / str(k))
        tuned.detach()
    rack = Rack(model)
    rack.load("a", tmp_path / "0").load("b", tmp_path / "1")
    x = {"input": torch.ones(2, 4, dtype=torch.float64)}
    for names in (["a", "b"], ["a", "a"]):
        first = rack(x, names=names)
        assert torch.equal(rack(x, names=names), first) and first.count_nonzero() == 8 and model.training and model[1].training


# -- generation ---------------------------------------------------------------------------------------------------------
GREEDY, BEAMS = dict(do_sample=False), dict(do_sample=False, num_beams=2)


@pytest.mark.parametrize("chain, how", [
    *[(c, how) for c in ("lora(at='linear')", "prefix(n=2, mid=8)", "houlsby(width=4)")
      for how in (GREEDY, BEAMS, BEAMS | dict(num_return_sequences=2))], ("ladder(reduce=4)", GREEDY)])
def test_generation(shelf, chain, how):
    rack, folders = racked(shelf, "llama", [chain] * 3)
    ids = batch("llama")["input_ids"][:, :8]
    given = dict(attention_mask=torch.ones_like(ids), max_new_tokens=5, pad_token_id=1, **how)
    names = ["a1", None, "a0"]
    got = rack.generate(input_ids=ids, names=names, **given)
    k = how.get("num_return_sequences", 1)
    for i, n in enumerate(names):
        model = build("llama")
        model = luthier.load(model, folders[n]) if n else model
        want = model.generate(input_ids=ids[i:i + 1], **(given | dict(attention_mask=given["attention_mask"][:1])))
        assert torch.equal(got[i * k:i * k + k, :want.shape[1]], want)
    with pytest.raises(RowsFailed) as e:
        rack.generate(input_ids=ids, names=["a1", "x", "a0"], **given)
    assert (e.value.outputs[k:2 * k] == 1).all() and torch.equal(e.value.outputs[:k], got[:k])


def test_generation_of_an_encoder_decoder(shelf):
    rack, folders = racked(shelf, "t5", ["lora()"] * 2)
    ids = batch("t5")["input_ids"]
    given = dict(max_new_tokens=4, do_sample=False)
    got = rack.generate(input_ids=ids, attention_mask=torch.ones_like(ids), names=["a0", "a1", None], **given)
    want = luthier.load(build("t5"), folders["a1"]).generate(input_ids=ids[1:2], **given)
    assert torch.equal(got[1:2, :want.shape[1]], want)


def test_sampling_is_the_same_the_first_time_and_later(shelf):
    rack, _ = racked(shelf, "llama", ["lora()"] * 3)
    ids, found = batch("llama")["input_ids"][:, :8], []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(rack.generate(input_ids=ids, attention_mask=torch.ones_like(ids), names=["a0", "a1", "a2"], pad_token_id=1,
                                   max_new_tokens=6, do_sample=True))
    assert torch.equal(*found)


def test_a_cache_goes_with_all_rows_or_is_refused(shelf):
    """Whoever decodes by hand: the first run of a kind learns from a copy, and rows that run in parts do not share a cache."""
    rack, _ = racked(shelf, "llama", ["lora()"] * 2 + ["dora()"])
    ids = torch.randint(4, 64, (3, 7), generator=torch.Generator().manual_seed(0))
    for names in (["a0", "a1", "a0"], ["a0", "a1", None]):
        want = rack({"input_ids": ids}, names=names).logits[:, -1]
        rack.kinds[0].learned = False                      # as after load() of a larger adapter of that chain
        past = rack({"input_ids": ids[:, :6]}, names=names, use_cache=True).past_key_values
        rack.kinds[0].learned = False
        close(rack({"input_ids": ids[:, 6:]}, names=names, past_key_values=past).logits[:, 0], want)
        assert past.get_seq_length() == 7
    with pytest.raises(DoesNotFit, match="run in parts"):
        rack({"input_ids": ids[:, 6:]}, names=["a0", "a2", "a1"], past_key_values=past)
    assert past.get_seq_length() == 7


def test_an_encoder_s_states_are_divided_with_their_rows(shelf, alone):
    from transformers.modeling_outputs import BaseModelOutput

    rack, folders = racked(shelf, "t5", ["lora(at='cross.q')", "dora(at='cross.q')"])
    names, given = ["a0", "a1", None], batch("t5")
    with torch.no_grad():
        h = build("t5").encoder(given.pop("input_ids"), attention_mask=given["attention_mask"]).last_hidden_state
    for states in ((h,), BaseModelOutput(last_hidden_state=h)):
        out = rack(given, names=names, encoder_outputs=states).logits.flatten(1)
        for i, n in enumerate(names):
            close(out[i], alone("t5", folders.get(n))[i])


def test_threads_take_turns(shelf, alone):
    rack, folders = racked(shelf, "llama", ["lora()", "lora()", "dora()"])
    wrong = []

    def work(seed):
        rng = random.Random(seed)
        for _ in range(4):
            names = [rng.choice([None, *folders]) for _ in range(3)]
            try:
                out = serve(rack, "llama", names)
                for i, n in enumerate(names):
                    close(out[i], alone("llama", folders.get(n))[i])
            except (LuthierError, AssertionError, RuntimeError) as e:
                wrong.append(e)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong


# -- how ----------------------------------------------------------------------------------------------------------------
def test_what_depends_on_the_state_alone_is_computed_once(shelf):
    """DoRA's norm and a prefix's MLP are kept, an adapter's matrices need nothing; rows hold no more than the states twice."""
    for name, kept in (("houlsby", False), ("dora", True), ("prefix", True)):
        rack, _ = racked(shelf, "llama", [CHAINS[name]] * 3)
        serve(rack, "llama", ["a0", "a1", "a2"])
        programs = rack.kinds[0].programs.values()
        assert any(p.kept for p in programs) == kept and all(p.fold for p in programs)
        mixed = next(v for k, v in rack.items.items() if k[0] == "rows")
        assert mixed.bytes <= 6 * max(a.bytes for a in rack.adapters.values())
        if name == "prefix":                               # the MLP itself is not stacked
            assert mixed.bytes < 3 * rack.adapters["a0"].bytes


@pytest.mark.parametrize("name", CHAINS)
def test_traces_say_the_same(shelf, monkeypatch, name):
    monkeypatch.setattr(fold, "OFTEN", 3)
    rack, _ = racked(shelf, "llama", [CHAINS[name]] * 3)
    first = serve(rack, "llama", ["a0", "a1", "a2"])
    for _ in range(4):
        again = serve(rack, "llama", ["a0", "a1", "a2"])
    close(again, first)
    if rack.kinds[0].entries[0].fast:
        assert rack.cost()["kinds"][0]["traces"] > 0


@pytest.mark.parametrize("chain", ["randlora(rank=4)", "ssf()", "probe()"])
def test_large_weights_are_made_state_by_state(shelf, alone, monkeypatch, chain):
    monkeypatch.setattr(rows, "SMALL", 0)
    rack, folders = racked(shelf, "llama", [chain] * 2)
    for names in (["a0", "a1", None], ["a1", "a0", "a1"]):
        out = serve(rack, "llama", names)
        for i, n in enumerate(names):
            close(out[i], alone("llama", folders.get(n))[i])


@pytest.mark.parametrize("d_in, d_out", [(24, 32), (32, 24), (28, 28)])
def test_randlora_beside_the_layer(d_in, d_out):
    """Its fast form is the weight's product, and is taken for few tokens only: per state, when states differ by row."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d_in, d_out)).double()
    tuned = check.jiggle(luthier.attach(model, "randlora(at='all', rank=5)"))
    patch, x = next(iter(Host.of(model).patches.values())), torch.randn(3, d_in, dtype=torch.float64)
    W, p = patch.tensors("weight", patch.entries)[0], patch.entries[0].p
    want = nn.functional.linear(x, W, model[0].bias)
    m = patch.entries[0].method
    torch.testing.assert_close(m.fast(x, nn.functional.linear(x, model[0].weight, model[0].bias), p), want)
    torch.testing.assert_close(tuned(x), want)
    few, many = (torch.zeros(n, d_in) for n in (3, 60))
    assert patch.quick and patch.worth((few,), {}) and not patch.worth((many,), {}) and patch.worth((many,), {}, 20)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s):
        return 2 * s


@pytest.fixture
def odd():
    """Two methods that cannot be mapped: one looks at a value, one uses what has no batching rule."""
    def oddity(self, site):
        return dict(s=site.zeros(site.d_out))

    def weight(self, W, p, b):
        return W * (1 + 2 * p.s[:, None]), b * (1 + 2 * p.s)

    def looks(self, x, y, p):
        return y * (1 + 2 * p.s) if p.s.sum() > 0 else y * (1 + p.s + p.s)

    def applies(self, x, y, p):
        return y * (1 + Twice.apply(p.s))

    made = {}
    for name, fast in (("looks", looks), ("applies", applies)):
        cls = type(name, (Method,), dict(at="attn.q", init=oddity, weight=weight, fast=fast, __module__="__main__",
                                         __annotations__={"at": str}))
        made[name] = method(cls)
    yield made
    for name in made:
        REGISTRY.pop(name)


@pytest.mark.parametrize("name", ["looks", "applies"])
def test_verbs_that_cannot_be_mapped_run_state_by_state(odd, tmp_path, name):
    folders = [made(tmp_path / str(k), "gpt2", f"{name}()", k) for k in range(3)]
    rack = Rack(build("gpt2"))
    for k, f in enumerate(folders):
        rack.load(f"a{k}", f)
    names = ["a0", "a2", "a1"]
    for _ in range(2):
        out = serve(rack, "gpt2", names)
        for i, n in enumerate(names):
            with torch.no_grad():
                close(out[i], said(luthier.load(build("gpt2"), folders[int(n[1])]), "gpt2")[i])
    assert rack.cost()["kinds"][0]["looped"]


class Sideways(nn.Module):
    """Rows come second: (T, B, d)."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x):
        return self.up(x.transpose(0, 1)).transpose(0, 1)


def test_a_model_whose_rows_do_not_come_first_is_served_adapter_by_adapter(tmp_path):
    torch.manual_seed(0)
    model = Sideways().double()
    for k in range(2):
        tuned = luthier.attach(model, "lora(at='all', rank=2)")
        for _, p in tuned.trainable():
            p.data += torch.randn_like(p)
        tuned.save(tmp_path / str(k))
        tuned.detach()
    rack = Rack(model)
    for k in range(2):
        rack.load(f"a{k}", tmp_path / str(k))
    x = torch.randn(2, 4, 4, dtype=torch.float64)
    out = rack({"x": x}, names=["a0", "a1"])
    for k in range(2):
        want = luthier.load(copy_of(model), tmp_path / str(k))(x)[k]
        close(out[k], want.detach())
    kind, = rack.cost()["kinds"]
    assert kind["served"] == "adapter by adapter" and "rows are not its first" in kind["why"]


def copy_of(model):
    new = Sideways().double()
    new.load_state_dict(model.state_dict())
    return new


def test_loading_is_flat(shelf, monkeypatch):
    """After the first adapter of a chain, nothing about the model is looked at again."""
    core = sys.modules["luthier.attach"]
    rack, _ = racked(shelf, "llama", ["lora()"])
    folder = shelf("llama", "lora()", 1)

    def never(*a, **k):
        raise AssertionError("the model was scanned again")

    for where, name in ((core, "plan"), (core, "sites"), (save, "fingerprint")):
        monkeypatch.setattr(where, name, never)
    for k in range(100):
        rack.load(f"b{k}", folder)
    assert len(rack) == 101 and len(rack.kinds) == 1 and rack.used == 0
    serve(rack, "llama", ["b0", "b99", "a0"])
    assert rack.stats["reads"] == 3


def test_a_rack_over_something_attached(shelf, tmp_path):
    """Adapters trained on top of another attachment are served on top of it."""
    def base():
        model = build("llama")
        return model, made_on(model)

    def made_on(model):
        under = luthier.attach(model, "lora(at='linear')", seed=3)
        for _, p in under.trainable():
            p.data += 0.1
        return under

    for k in range(2):
        model, under = base()
        tuned = luthier.attach(under, "ssf()")
        for _, p in tuned.trainable():
            p.data += 0.1 * (k + 1)
        tuned.save(tmp_path / str(k))
    model, under = base()
    rack = Rack(model)
    for k in range(2):
        rack.load(f"a{k}", tmp_path / str(k))
    out = serve(rack, "llama", ["a1", "a0", None])
    with torch.no_grad():
        close(out[2], said(under, "llama")[2])
        close(out[0], said(luthier.load(base()[0], tmp_path / "1"), "llama")[0])
    under.active = False
    with pytest.raises(WrongBase, match="stand on lora"):
        serve(rack, "llama", ["a1", "a0", None])


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision(tmp_path, dtype):
    for k, r in enumerate((4, 8)):
        tuned = luthier.attach(tiny.build("llama", dtype), f"lora(rank={r}, at='linear')")
        for _, p in tuned.trainable():
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)).to(dtype)
        tuned.save(tmp_path / str(k))
    rack = Rack(tiny.build("llama", dtype))
    for k in range(2):
        rack.load(f"a{k}", tmp_path / str(k))
    assert len(rack.kinds) == 1
    out = rack(batch("llama"), names=["a0", "a1", "a0"]).logits
    assert out.dtype == dtype
    with torch.no_grad():
        want = luthier.load(tiny.build("llama", dtype), tmp_path / "1")(**batch("llama")).logits
    torch.testing.assert_close(out[1], want[1], rtol=0.05, atol=0.1)


# -- the command line ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def customers(tmp_path_factory):
    """Two who read the same words the other way round, over one base."""
    root = tmp_path_factory.mktemp("customers")
    base = bert(root / "bert")
    for name, turned in (("alice", False), ("bob", True)):
        assert cli.main(["tune", str(reviews(root, name, turned)), "--model", base, "--with", "lora(rank=4)", "--out",
                         str(root / "rack" / name), "--epochs", "8", "--batch-size", "8", "--lr", "0.03", "--log", "none"]) == 0
    return root


def test_predict_with_a_rack(capsys, customers, tmp_path):
    def predict(*argv):
        return run(capsys, "predict", "--rack", customers / "rack", *argv)

    rows = [("alice", "good", "yes"), ("bob", "good", "no"), ("bob", "bad", "yes"), ("alice", "awful", "no"),
            ("", "fine", None)]
    (tmp_path / "in.csv").write_text("adapter,review\n" + "".join(f"{n},the film was {w}\n" for n, w, _ in rows))
    code, out, _ = predict(tmp_path / "in.csv", "--json")
    assert code == 0
    for (_, _, want), got in zip(rows, json.loads(out), strict=True):
        assert want is None or got["label"] == want
    assert predict("--adapter", "bob", "the film was good", "--memory", "100kB")[1].startswith("no")
    (tmp_path / "in.csv").write_text("adapter,review\ncarol,the film was bad\nbob,the film was bad\n")
    code, out, err = predict(tmp_path / "in.csv")
    assert code == 2 and "no adapter is called 'carol'" in err
    assert out.splitlines()[1].split("\t")[1].startswith("yes") and "no adapter is called" in out.splitlines()[0]
    for argv, says in ((["the film"], "--adapter NAME"), (["--adapter", "bob", "--memory", "x", "the film"], "is no size")):
        code, _, err = predict(*argv)
        assert code == 2 and says in err
    assert cli.main(["predict", "only an input"]) == 2
    assert "--rack DIR INPUT" in capsys.readouterr().err


def test_predict_with_a_broken_adapter(capsys, customers, tmp_path):
    shutil.copytree(customers / "rack", tmp_path / "rack")
    path = tmp_path / "rack" / "alice" / save.STATE
    path.write_bytes(path.read_bytes()[:-7])
    (tmp_path / "in.csv").write_text("adapter,review\nalice,the film was bad\nbob,the film was bad\n")
    assert cli.main(["predict", "--rack", str(tmp_path / "rack"), str(tmp_path / "in.csv"), "--json"]) == 2
    out = json.loads(capsys.readouterr().out)
    assert "error" in out[0] and out[1]["label"] == "yes"
