"""Bridged models in the rest of the house: many states over one base, merging, files, other tools, costs, recomputed blocks."""

import json
import subprocess
import sys

import folders
import pytest
import torch
from folders import run

import luthier
from luthier import tiny
from luthier.bridges import bridge
from luthier.serve.rack import Rack

WAYS = ("limber(dropout=0.0)", "limber(tokens=2, dropout=0.0)", "epalm(states_of=2)", "monointern()", "vlap(dropout=0.0)")
CHAIN = "full(at='connector') >> lora(rank=2, at='text.attn.q text.attn.v')"


def decoder(layers=4):
    import transformers as t
    torch.manual_seed(1)
    return t.LlamaForCausalLM(t.LlamaConfig(**tiny.TEXT, **tiny.WIDTH | dict(num_hidden_layers=layers))).eval()


def made(way, words="llama"):
    return bridge(tiny.build("vit"), decoder() if words == "llama" else tiny.build(words), way)


def given(n=None):
    g = torch.Generator().manual_seed(2)
    return tiny.batch("llama") | dict(pixel_values=torch.randn(3, *([n] if n else []), 3, 16, 16, generator=g))


def states(model, folder, chain=CHAIN, names="abc"):
    """Tuned states of several values on disk."""
    for k, name in enumerate(names):
        tuned = luthier.attach(model, chain)
        g = torch.Generator().manual_seed(k)
        for _, p in tuned.trainable():
            p.data.add_(0.1 * torch.randn(p.shape, generator=g))
        tuned.save(folder / name)
        tuned.detach()


# -- the rack -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["llama", "t5"])
@pytest.mark.parametrize("way", WAYS)
def test_rows_of_several_states_over_one_bridge(tmp_path, way, words):
    if words == "t5" and way.startswith(("epalm", "monointern")):
        pytest.skip("needs a decoder")
    model, batch = made(way, words), given()
    if words == "t5":
        batch = tiny.batch("t5") | dict(pixel_values=batch["pixel_values"])
    states(model, tmp_path, CHAIN if words == "llama" else "full(at='connector') >> lora(rank=2, at='encoder.attn.q "
                                                           "decoder.attn.v')")
    rack = Rack(model)
    rack.load_all(tmp_path)
    names = ["a", "c", None]
    mixed = rack(batch, names=names)["logits"]
    more = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
    asked = {k: v for k, v in batch.items() if k != "decoder_input_ids"}
    said = rack.generate(**asked, names=names, **more)
    for i, name in enumerate(names):
        row = {k: v[i:i + 1] for k, v in batch.items()}
        ask = {k: v[i:i + 1] for k, v in asked.items()}
        if name is None:
            with torch.no_grad():
                one, ids = model(**row).logits, model.generate(**ask, **more)
        else:
            with rack.serving(name) as m, torch.no_grad():
                one, ids = m(**row).logits, m.generate(**ask, **more)
        seen = slice(None) if words == "t5" else batch["attention_mask"][i].bool()
        assert torch.allclose(mixed[i][seen], one[0][seen], atol=2e-4), (way, name)
        assert torch.equal(said[i][-4:], ids[0][-4:])
    assert len({tuple(r.flatten().tolist()) for r in mixed}) == 3


def test_a_rack_takes_kept_states_and_several_images(tmp_path):
    model, batch = made(WAYS[0]), given(n=2)
    states(model, tmp_path)
    rack = Rack(model)
    rack.load_all(tmp_path)
    kept = {k: v for k, v in batch.items() if k != "pixel_values"} | dict(image_states=model.see(batch["pixel_values"]).detach())
    for b in (batch, kept):
        b = b | dict(image_mask=torch.tensor([[1, 1], [1, 0], [1, 1]]))
        mixed = rack(b, names=["a", "b", "a"])["logits"]
        with rack.serving("b") as m, torch.no_grad():
            one = m(**{k: v[1:2] for k, v in b.items()})["logits"]
        assert torch.allclose(mixed[1], one[0], atol=2e-4)


# -- merging --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_merged_is_unmerged(tmp_path, way):
    model, batch = made(way), given()
    states(model, tmp_path, names="a")
    tuned = luthier.load(model, tmp_path / "a").eval()
    with torch.no_grad():
        before = tuned(**batch).logits
        plain = model.language(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        tuned.merge()
        after = tuned(**batch).logits
        assert torch.allclose(before, after, atol=1e-4)
        tuned.unmerge()
        assert torch.equal(tuned(**batch).logits, before)
    tuned.detach()
    with torch.no_grad():
        again = model.language(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert torch.equal(again.logits, model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)
    assert not torch.equal(plain.logits, again.logits)


# -- recomputed blocks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", ["full(at='connector')", CHAIN, "full(at='connector') >> lora(rank=2, at='vision.attn.q')",
                                   "full(at='connector') >> houlsby(width=4, at='text.mlp.out')"])
@pytest.mark.parametrize("way", WAYS)
def test_recomputed_blocks_give_the_same_losses(way, chain):
    found = []
    for again in (False, True):
        model, batch = made(way), given(n=2)
        tuned = luthier.attach(model, chain).train()
        if again:
            tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        optimizer, losses = torch.optim.AdamW([p for _, p in tuned.trainable()], lr=1e-2), []
        for _ in range(3):
            loss = tuned(**batch, labels=batch["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append(losses)
    assert found[0] == pytest.approx(found[1], abs=1e-6) and found[0][-1] < found[0][0]


# -- files, other tools and commands ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A folder that `luthier bridge` wrote, the pair's name, and the data."""
    from test_hub_vl import pairs

    from luthier.cli import main
    base = tmp_path_factory.mktemp("tuned")
    eyes, mouth, data = folders.vit(base / "vit"), folders.llama(base / "llama"), pairs(base / "a")
    assert main(["bridge", eyes, mouth, "--with", "limber(tokens=2, dropout=0.0)", "--tune",
                 "full(at='connector') >> lora(rank=2, at='text.attn.q')", "--data", str(data), "--out", str(base / "out"),
                 "--epochs", "2", "--seed", "3", "--log", "none"]) == 0
    return base / "out", f"{eyes}+{mouth}:limber(tokens=2, dropout=0.0)", data


def test_a_tuned_bridge_is_the_same_in_a_fresh_process(tuned):
    out, _, data = tuned
    task, model = luthier.tune.reopen(out)
    batch = dict(input_ids=torch.tensor([[2, 12, 13]]), attention_mask=torch.ones(1, 3, dtype=torch.long),
                 pixel_values=torch.ones(1, 3, 16, 16))
    with torch.no_grad():
        mine = model(**batch).logits.flatten().tolist()
    code = ("import sys, json, torch, luthier.tune as t; task, m = t.reopen(sys.argv[1]); b = dict(input_ids=torch.tensor([[2, "
            "12, 13]]), "
            "attention_mask=torch.ones(1, 3, dtype=torch.long), pixel_values=torch.ones(1, 3, 16, 16)); m.requires_grad_(False); "
            "print(json.dumps([m(**b).logits.flatten().tolist(), task.predict(m, [sys.argv[2]])]))")
    picture = str(data.parent / "1.png")
    said = subprocess.run([sys.executable, "-c", code, str(out), picture], capture_output=True, text=True, check=True).stdout
    theirs, answer = json.loads(said.splitlines()[-1])
    assert theirs == mine and answer == task.predict(model, [picture])


def test_other_tools_and_back(tmp_path, tuned, capsys):
    """peft's format holds the connector, too; merged, the whole is a plain file that the bridge reads."""
    out, ref, _ = tuned
    task, model = luthier.tune.reopen(out)
    batch = dict(input_ids=torch.tensor([[2, 12, 13]]), attention_mask=torch.ones(1, 3, dtype=torch.long),
                 pixel_values=torch.ones(1, 3, 16, 16))
    with torch.no_grad():
        mine = model(**batch).logits
    assert run(capsys, "export", out, "--out", tmp_path / "peft")[0] == 0
    again = luthier.interop.read(tmp_path / "peft", task.build(seed=3))
    with torch.no_grad():
        assert torch.allclose(again.eval()(**batch).logits, mine, atol=1e-5)
    again.detach()
    code, _, told = run(capsys, "export", out, "--out", tmp_path / "other", "--model", ref)
    assert code == 2 and "same shapes with other weights" in " ".join(told.split())     # another seed's connector
    assert run(capsys, "merge", out, "--out", tmp_path / "plain")[0] == 0
    from safetensors.torch import load_file
    plain = task.build(seed=0)
    missing, extra = plain.load_state_dict(load_file(tmp_path / "plain" / "model.safetensors"), strict=False)
    assert not extra and all("head" in n or "embed" in n for n in missing)
    with torch.no_grad():
        assert torch.allclose(plain(**batch).logits, mine, atol=1e-5)


def test_looking_at_a_pair_by_its_name(tuned, capsys):
    out, ref, data = tuned
    code, said, _ = run(capsys, "sites", ref, "--select", "connector", "--json")
    assert code == 0 and [r["name"] for r in json.loads(said)] == ["connector.map.weight"]
    code, said, _ = run(capsys, "cost", ref, "full(at='connector') >> lora(rank=2, at='text.attn.q')", "--tokens", "8", "--json")
    assert code == 0 and json.loads(said)
    code, said, told = run(capsys, "predict", "--rack", out.parent, data.parent / "1.png", data.parent / "gone.png", "what",
                           "--adapter", "out", "--json")
    found = json.loads(said)
    task, model = luthier.tune.reopen(out)
    assert code == 2 and found[0] == task.predict(model, [(str(data.parent / "1.png"), "what")])[0]
    assert found[1]["error"].startswith("Input 1 (")


# -- the example ------------------------------------------------------------------------------------------------------------


def test_a_side_network_holds_less_than_lora_and_full_tuning(tuned, capsys):
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("side", Path(__file__).parents[1] / "examples" / "side_tuning_on_a_laptop.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.WAYS["side network"] = example.WAYS["side network"].replace("reduce=8", "reduce=4")
    found = example.main(str(tuned[2]), tuned[1], steps=2, limit=24, image_size=16)
    said = capsys.readouterr().out
    beside = {name: held - weights for name, (held, weights, _) in found.items()}
    assert beside["side network"] < beside["LoRA"] < beside["full tuning"] and all(name in said for name in found)
