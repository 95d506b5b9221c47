"""Merged models written site by site: the same bits as merging in memory, in little memory, complete or not at all."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import luthier
from luthier import attach, cost, merging, tiny
from luthier.errors import BadOrder, BadState, DoesNotFit, NotMergeable, WrongBase
from luthier.methods.merge import _experts
from luthier.methods.merge._experts import kth, near


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiny models in many pieces."""
    monkeypatch.setattr(merging, "SIZE", 2000)
    monkeypatch.setattr(merging, "AHEAD", 4)
    monkeypatch.setattr(_experts, "PART", 700)
    monkeypatch.setattr(_experts, "EVERY", 3)


@pytest.fixture
def alone(monkeypatch):
    """Whatever is not made site by site fails."""
    monkeypatch.setattr(merging, "attach", None)


def contents(folder):
    return {(f.name, k): t for f in sorted(Path(folder).rglob("*.safetensors")) for k, t in load_file(f).items()}


def same(a, b):
    a, b = contents(a), contents(b)
    assert a.keys() == b.keys() and a
    for k, t in a.items():
        assert t.dtype == b[k].dtype and torch.equal(t, b[k]), k


def by_memory(model, chain, folder, **options):
    """The specification: attach, merge, save."""
    tuned = attach(model, chain, **options).merge()
    merging.plain(model, Path(folder), merging._save_file)
    tuned.detach()


def put(text, model, folder):
    return text.format(repr(near(model, folder)["experts"]))


EXPERTS = ["ties(experts={0}, density=0.3)", "dare(experts={0}, drop=0.5, combine='elect')", "dare(experts={0}, drop=0.5)",
           "ties(experts={0}, density=0.1, scale=0.5) >> dare(experts={0}, combine='sum', seed=3)"]


@pytest.mark.parametrize(("text", "name", "dtype"), [
    *[(EXPERTS[0], n, torch.float32) for n in tiny.MODELS], *[(t, "bert", torch.float32) for t in EXPERTS[1:]],
    (EXPERTS[3], "gpt2", torch.bfloat16), (EXPERTS[0], "clip", torch.bfloat16)])
def test_experts_are_merged_on_disk_as_in_memory(text, name, dtype, tmp_path, monkeypatch):
    model = tiny.build(name, dtype)
    before = copy.deepcopy(model.state_dict())
    chain = put(text, model, tmp_path)
    (tmp_path / "memory").mkdir()
    by_memory(model, chain, tmp_path / "memory")
    monkeypatch.setattr(merging, "attach", None)
    files = luthier.merge(model, chain, tmp_path / "disk")
    assert files == sorted(p.name for p in (tmp_path / "memory").iterdir())
    same(tmp_path / "memory", tmp_path / "disk")
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items()) and not luthier.attached(model)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_tied_weights_and_fused_ones_keep_what_they_are(name, tmp_path, alone):
    model = tiny.build(name)
    if name == "llama":
        model.lm_head.weight = model.model.embed_tokens.weight
        model.config.tie_word_embeddings = True
    luthier.merge(model, put(EXPERTS[0], model, tmp_path), tmp_path / "disk")
    again = type(model).from_pretrained(tmp_path / "disk").eval()
    tuned = attach(model, put(EXPERTS[0], model, tmp_path)).merge()
    assert torch.equal(tiny.output(again, tiny.batch(name)), tiny.output(tuned, tiny.batch(name)))
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight


def test_a_tie_that_comes_apart_is_merged_in_memory(tmp_path):
    model = tiny.build("gpt2")
    chain = put("ties(at='all -head', experts={0})", model, tmp_path)
    (tmp_path / "memory").mkdir()
    by_memory(model, chain, tmp_path / "memory")
    luthier.merge(model, chain, tmp_path / "disk")
    same(tmp_path / "memory", tmp_path / "disk")
    assert "lm_head.weight" in load_file(tmp_path / "disk" / "model.safetensors") and model.config.tie_word_embeddings


def test_calibrated_chains_are_merged_in_memory(tmp_path):
    model, data = tiny.build("llama"), [tiny.batch("llama", seed=5)]
    (tmp_path / "memory").mkdir()
    by_memory(model, "gptq()", tmp_path / "memory", data=data)
    luthier.merge(model, "gptq()", tmp_path / "disk", data=data)
    same(tmp_path / "memory", tmp_path / "disk")
    assert not luthier.attached(model)
    with pytest.raises(DoesNotFit, match="calibration"):
        luthier.merge(model, "gptq()", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_shards_are_those_of_the_library(tmp_path, monkeypatch, alone):
    model = tiny.build("bert")
    monkeypatch.setattr(type(model), "save_pretrained", _sharded(type(model).save_pretrained))
    chain = put(EXPERTS[0], model, tmp_path)
    for folder in ("memory", "disk"):
        (tmp_path / folder).mkdir()
    by_memory(model, chain, tmp_path / "memory")
    luthier.merge(model, chain, tmp_path / "disk")
    same(tmp_path / "memory", tmp_path / "disk")
    assert len(list((tmp_path / "disk").glob("model-*.safetensors"))) > 2


def _sharded(save_pretrained):
    return lambda self, folder: save_pretrained(self, folder, max_shard_size="9KB")


# -- memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", EXPERTS[:2], ids=["ties", "dare"])
def test_memory_beside_the_base_is_less_than_its_largest_weight(text, tmp_path, monkeypatch):
    model = torch.nn.Sequential(*[torch.nn.Linear(300, 300, bias=False) for _ in range(6)], torch.nn.Embedding(2000, 300))
    for name in ("SIZE", "PART"):
        monkeypatch.setattr(merging if name == "SIZE" else _experts, name, 6000)
    monkeypatch.setattr(_experts, "EVERY", 64)
    chain, held = put(text, model, tmp_path), list(model.parameters())
    peak = cost.peak(lambda: luthier.merge(model, chain, tmp_path / "disk"), held) - cost.nbytes(held)
    assert peak < 0.5 * 2000 * 300 * 4


# -- complete or not at all -----------------------------------------------------------------------------------


def test_a_killed_run_leaves_nothing_that_loads(tmp_path):
    model = tiny.build("llama")
    chain = put(EXPERTS[0], model, tmp_path)
    code = f"""
import os, signal
from luthier import merging, tiny
model, n, before = tiny.build("llama"), [0], merging._File.put
def put(self, *args):
    n[0] += 1
    if n[0] == 9:
        for job, _ in self.waiting: job.result()
        os.kill(os.getpid(), signal.SIGKILL)
    before(self, *args)
merging._File.put = put
merging.merge(model, {chain!r}, {str(tmp_path / "disk")!r})
"""
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(Path(luthier.__file__).parents[1])})
    assert run.returncode == -signal.SIGKILL and not (tmp_path / "disk").exists()
    (torn,) = (tmp_path / f for f in os.listdir(tmp_path) if f.startswith(".disk.part-"))
    assert (torn / "model.safetensors").stat().st_size > 1000
    with pytest.raises(SafetensorError):
        safe_open(torn / "model.safetensors", "pt")
    luthier.merge(model, chain, tmp_path / "disk")
    assert not torn.exists() and contents(tmp_path / "disk")


def test_what_is_refused_writes_nothing(tmp_path):
    model = tiny.build("llama")
    good = near(model, tmp_path)["experts"][0]

    def refuse(error, match, chain):
        with pytest.raises(error, match=match):
            luthier.merge(model, chain, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not luthier.attached(model)
        assert not [f for f in os.listdir(tmp_path) if "part-" in f]
    torn, part, other, pickled = (str(tmp_path / f"{n}.safetensors") for n in ("torn", "part", "other", "pickled"))
    whole = load_file(good)
    Path(torn).write_bytes(Path(good).read_bytes()[:-7])
    save_file({k: v for k, v in whole.items() if "norm" not in k}, part)
    save_file(whole | {"lm_head.weight": torch.zeros(3, 3)}, other)
    torch.save(whole, pickled)
    for file, error, match in ((torn, BadState, "no whole safetensors"), (part, BadState, "holds nothing for"),
                               (other, WrongBase, "this very base"), (pickled, BadState, "no whole safetensors")):
        refuse(error, match, f"ties(experts={(good, file)!r})")
    refuse(NotMergeable, "running model", "houlsby(width=2)")
    tuned = attach(model, "lora(rank=2)")
    with pytest.raises(BadOrder, match="attached"):
        luthier.merge(model, "full()", tmp_path / "out")
    tuned.detach()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(BadState, match="not empty"):
        luthier.merge(model, "full()", tmp_path / "full")


# -- the cut --------------------------------------------------------------------------------------------------


def by_paper(model, experts, density):
    """TIES as Algorithm 1 reads, everything at once; an entry whose experts balance stays."""
    base = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    names, kept = [n for n, _ in model.named_parameters()], []
    for file in experts:
        τ = torch.cat([t.reshape(-1) for n in names for t in [load_file(file)[n]]]) - base
        order = τ.abs().sort().values
        k = round(density * len(τ))
        kept.append(τ * (τ.abs() >= order[len(τ) - k]) if k else τ * 0)
    τ = torch.stack(kept)
    agree = (τ.sign() == τ.sum(0).sign()) & (τ != 0)
    return base + (τ * agree).sum(0) / agree.sum(0).clamp(min=1)


@pytest.mark.parametrize("density", [0.0, 0.001, 0.2, 0.5, 0.97, 1.0])
def test_ties_on_disk_is_the_algorithm_to_the_bit(density, tmp_path, alone):
    model = tiny.build("bert")
    experts = near(model, tmp_path)["experts"]
    luthier.merge(model, f"ties(experts={experts!r}, density={density})", tmp_path / "disk")
    made = load_file(tmp_path / "disk" / "model.safetensors")
    assert torch.equal(torch.cat([made[n].reshape(-1) for n, _ in model.named_parameters()]), by_paper(model, experts, density))


NUMBERS = {"normal": lambda g, n: g.normal(size=n), "all alike": lambda g, n: np.full(n, 0.5),
           "nearly all zero": lambda g, n: g.normal(size=n) * (g.random(n) < 0.1),
           "few values": lambda g, n: g.integers(0, 4, n) / 4, "many scales": lambda g, n: np.exp(20 * g.normal(size=n)),
           "rising": lambda g, n: np.arange(n) / n,
           "one part unlike": lambda g, n: np.r_[g.normal(size=n - n // 5), 99 + g.random(n // 5)],
           "two values": lambda g, n: 1.0 * (g.random(n) < 0.5),
           "not a number": lambda g, n: np.where(g.random(n) < 0.01, np.nan, g.normal(size=n))}


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("bits", [np.int32, np.int64])
def test_the_kth_largest_is_exact_for_any_numbers(kind, bits, monkeypatch):
    monkeypatch.setattr(_experts, "EVERY", 16)
    n = 30_000                                             # enough that a sample must be trusted first
    x = np.abs(NUMBERS[kind](np.random.default_rng(0), n).astype(np.float32 if bits is np.int32 else np.float64)).view(bits)
    parts, order = np.array_split(x, n // 500), np.sort(x)[::-1]
    for k in (1, 2, n // 100, n // 5, n // 2, n - n // 7, n - 1, n):
        assert kth(lambda every=1: parts[::every], n, k, bits) == order[k - 1]
