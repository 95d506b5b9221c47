"""Segmentation by text: the task, towers that a model runs without gradients, and VLSM-Adapter."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import linear, relu

from luthier import attach, check, tasks, tiny
from luthier.errors import BadData, DoesNotFit
from luthier.thaw import frozen
from luthier.train import train
from luthier.tune import reopen

DENSE, SHALLOW = "vlsm_dense(width=6, cond=4)", "vlsm_shallow(width=6, cond=4)"


@pytest.fixture
def seg():
    return tiny.build("clipseg"), tiny.batch("clipseg")


def bare(model, batch, chain=None, tuned=None):
    """CLIPSeg step by step, with the adapters where the authors' code has them; nothing of it runs without gradients."""
    st = {k.partition("@")[2]: p for k, p in tuned.states.items()} if tuned else {}
    clip, layers = model.clip, model.config.extract_layers

    def a(h, name):
        p = st.get(name)
        return h if p is None else h + relu(linear(relu(h @ p.W1.T + p.b1), p.W2, p.b2))

    def tower(h, blocks, name, **mask):
        kept = []
        for i, b in enumerate(blocks):
            h = h + a(b.self_attn(b.layer_norm1(h), **mask)[0], f"{name}/block/{i}/attn/out")
            h = h + a(b.mlp(b.layer_norm2(h)), f"{name}/block/{i}/mlp/out")
            kept.append(h)
        return kept
    v = clip.vision_model
    seen = tower(v.pre_layrnorm(v.embeddings(batch["pixel_values"])), v.encoder.layers, "vision", attention_mask=None)
    t, ids = clip.text_model, batch["input_ids"]
    T = ids.shape[1]
    causal = torch.full((T, T), -torch.inf).triu(1)[None, None].expand(len(ids), 1, T, T)
    told = tower(t.embeddings(ids), t.encoder.layers, "text", attention_mask=causal)
    end = range(len(ids)), (ids == 3).int().argmax(1)
    c = a(clip.text_projection(t.final_layer_norm(told[-1])[end]), "clip/text_projection/weight")
    if chain == SHALLOW:
        n = len(layers)
        c = c + sum(a(told[e][end], f"text/block/{e}/out") for e in layers)
        seen = {e: a(seen[e], f"decoder/reduces/{n - 1 - k}/weight") for k, e in enumerate(layers)}
    return model.decoder([seen[e] for e in layers], c).logits


def test_bare_is_the_model(seg):
    model, batch = seg
    assert torch.allclose(bare(model, batch), model(**batch).logits, atol=1e-5)


@pytest.mark.parametrize("chain", (DENSE, SHALLOW))
def test_adapters_sit_where_the_authors_have_them(seg, chain):
    model, batch = seg
    tuned = attach(model, chain).eval()
    for _, p in tuned.trainable():
        p.data.add_(0.1)
    with torch.no_grad():
        found = tuned(**batch).logits
        with tuned.off():
            assert torch.allclose(bare(model, batch, chain, tuned), found, atol=1e-4)
            base = model(**batch).logits
    assert (found - base).abs().max() > 1e-2
    tuned.detach()
    assert torch.equal(model(**batch).logits, base)


@pytest.mark.parametrize("chain", (DENSE, SHALLOW))
def test_gradients_are_those_of_a_model_that_never_turns_them_off(seg, chain):
    model, batch = seg
    tuned = attach(model, chain).train()
    for _, p in tuned.trainable():
        p.data.add_(0.1)
    tuned(**batch).logits.square().mean().backward()
    mine = {n: p.grad.clone() for n, p in tuned.trainable()}
    tuned.zero_grad()
    with tuned.off():
        bare(model, batch, chain, tuned).square().mean().backward()
    for n, p in tuned.trainable():
        assert torch.allclose(mine[n], p.grad, atol=1e-5, rtol=1e-3), n
    learns = [n for n, g in mine.items() if g.abs().max() > 0]
    for place in ("block/0", "text", "text_projection", *(["reduces"] if chain == SHALLOW else [])):
        assert any(place in n for n in learns), place


def test_numbers_by_hand(seg):
    model, batch = seg
    tuned = attach(model, DENSE)
    places = 2 * 2 * 2                     # two towers, layers 0 and 1 of three (the decoder reads up to 2), two a layer
    assert sum(p.numel() for _, p in tuned.trainable()) == places * (2 * 6 * 32 + 6 + 32) + 2 * 4 * 32 + 4 + 32
    tuned.detach()
    tuned = attach(model, SHALLOW)
    assert sum(p.numel() for _, p in tuned.trainable()) == 6 * (2 * 6 * 32 + 6 + 32) + 2 * 4 * 32 + 4 + 32


@pytest.mark.parametrize("chain", ("vlsm_dense(width=6, cond=0)", "vlsm_shallow(width=6, cond=0)",
                                   "vlsm_dense(width=6, at='vision.attn.out vision.mlp.out')",
                                   "vlsm_shallow(width=6, at='*.reduces.*.weight')"))
def test_parts_come_off(seg, chain):
    model, batch = seg
    tuned = attach(model, chain).train()
    tuned(**batch).logits.square().mean().backward()
    assert all(p.grad is not None for _, p in tuned.trainable())
    cond = [n for n in tuned.states if "text_projection" in n and any(True for _ in tuned.states[n].parameters())]
    assert not cond
    assert not [n for n in tuned.states if "at=" in chain and "@text" in n]


def test_widths_that_differ_are_refused():
    import transformers as t
    config = copy.deepcopy(tiny.build("clipseg").config)
    config.projection_dim = 16
    with pytest.raises(DoesNotFit, match="16 wide"):
        attach(t.CLIPSegForImageSegmentation(config), SHALLOW)


@pytest.mark.parametrize("name", ("vlsm_dense", "vlsm_shallow"))
def test_contracts(name):
    found = check.run_all([name], models=["clipseg"])
    assert not [r for r in found if r.verdict == "FAIL"], check.table(found)


# -- towers without gradients ---------------------------------------------------------------------------------------------

class Frozen(nn.Module):
    """Runs its tower without gradients, by a method that is decorated."""

    def __init__(self):
        super().__init__()
        self.tower, self.head = tiny.build("vit").vit, nn.Linear(32, 2)

    @torch.no_grad()
    def look(self, x):
        return self.tower(x).last_hidden_state

    def forward(self, pixel_values):
        with torch.no_grad():              # holds no blocks: stays as it is
            scale = self.head.weight.abs().mean()
        return self.head(self.look(pixel_values).mean(1) * 2) / scale


def test_a_decorated_method_is_reached_and_nothing_else():
    model, x = Frozen(), tiny.batch("vit")["pixel_values"]
    tuned = attach(model, "full(at='block.0.attn.q head')").train()
    y = tuned(x)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in tuned.trainable() if not n.endswith("b"))
    tuned.zero_grad()
    with torch.no_grad():                  # the caller's own counts as ever
        assert not tuned(x).requires_grad
    tuned.detach()
    assert not model.look(x).requires_grad


def test_only_towers_count():
    for name in tiny.MODELS:
        model = tiny.build(name)
        tuned = attach(model, "full(at='all')")
        assert not tuned._host.frozen, name
        tuned.detach()
    model = tiny.build("clipseg")
    assert {c.co_name for c in frozen(model, attach(model, DENSE)._host.towers)} == {"forward", "get_conditional_embeddings"}


class Cut(Frozen):
    def forward(self, pixel_values):
        return self.look(pixel_values).detach()


def test_what_cannot_learn_is_refused():
    tuned = attach(Cut(), "full(at='block.0.attn.q')").train()
    with pytest.raises(DoesNotFit, match="would learn nothing"):
        tuned(tiny.batch("vit")["pixel_values"])


class SealedBelow(Frozen):
    """What trains stands in the sealed tower and above it, so that the outputs do depend on something."""

    @torch.inference_mode()
    def look(self, x):
        return self.tower(x).last_hidden_state

    def forward(self, pixel_values):
        return self.head(self.look(pixel_values).mean(1).clone())


def test_a_tower_under_inference_mode_is_refused_before_a_step():
    x = tiny.batch("vit")["pixel_values"]
    for chain in ("full(at='block.0.attn.q head')", "houlsby(at='block.0.out', width=2) >> full(at='head')"):
        tuned = attach(SealedBelow(), chain).train()
        with pytest.raises(DoesNotFit, match=r"under torch\.inference_mode"):
            tuned(x)
        assert tuned.eval()(x).shape == (len(x), 2)
    above = attach(SealedBelow(), "full(at='head')").train()
    above(x).square().mean().backward()
    assert all(p.grad is not None for _, p in above.trainable())


def test_recorded_states_are_those_after_a_change(seg):
    model, batch = seg
    before = model(**batch).logits         # transformers hooks its recorders on now: before ours
    tuned = attach(model, "houlsby(at='vision.block.1.out', width=4)").eval()
    tuned.trainable()[2][1].data.add_(0.5)
    late = tuned(**batch).logits
    fresh = tiny.build("clipseg")
    other = attach(fresh, "houlsby(at='vision.block.1.out', width=4)").eval()
    other.trainable()[2][1].data.add_(0.5)
    assert torch.equal(other(**batch).logits, late) and not torch.equal(late, before)


# -- the task -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny CLIPSeg on disk, its tokenizer and sizes beside it."""
    path, model = tmp_path_factory.mktemp("clipseg"), tiny.build("clipseg")
    model.clip.logit_scale = nn.Parameter(torch.tensor(2.6))
    model.save_pretrained(path)
    tiny.build("named").tokenizer.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)))
    return str(path)


def picture(path, mode="RGB", size=(20, 12), colour=None):
    Image.new(mode, size, colour if colour is not None else 255 if mode in ("L", "1") else (200, 10, 10)).save(path)
    return path.name


def written(where, n=12, name="rows.jsonl", **odd):
    """A JSONL file of n rows beside its images; odd: {row: changes}, files that a change names are made by the caller."""
    rows = []
    for i in range(n):
        mask = Image.new("L", (20, 12), 0)
        mask.paste(255, (i, 2, i + 6, 8))
        mask.save(where / f"m{i}.png")
        image = Image.new("RGB", (20, 12), (20, 20, 30))
        image.paste((200, 10, 10), mask=mask)
        image.save(where / f"i{i}.png")
        rows.append(dict(image=f"i{i}.png", phrase="a red circle", mask=f"m{i}.png") | odd.get(f"row{i}", {}))
    (where / name).write_text("\n".join(map(json.dumps, rows)))
    return str(where / name)


def test_loss_and_scores_by_hand(folder):
    task = tasks.open("scenes:segment", model=folder, limit=4)
    M = torch.tensor([[[1.0, 1], [0, 0]], [[0, 0], [0, 0]]])
    y = torch.tensor([[[2.0, -1], [1, -3]], [[-2, -1], [-4, -3]]])
    p, e = torch.sigmoid(y).flatten(1), 1e-5
    dice = [(2 * float(p[0, :2].sum()) + e) / (float(p[0].sum()) + 2 + e), e / (float(p[1].sum()) + e)]
    bce = -sum(float(torch.log(q if m else 1 - q)) for q, m in zip(p.flatten(), M.flatten(), strict=True)) / 8
    assert float(task.loss_of(y, M)) == pytest.approx(1.5 * (1 - sum(dice) / 2) + bce, rel=1e-5)

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Parameter(torch.ones(()))

        def forward(self, **batch):
            return dict(logits=y)
    task.collate = lambda part: {"labels": torch.stack([e["mask"] for e in part])}
    scores = task.score(Fixed(), [{"mask": m} for m in M], 2)
    assert scores["dice"] == pytest.approx((2 * 1 / 4 + 1) / 2) and scores["iou"] == pytest.approx((1 / 3 + 1) / 2)


def test_scenes_say_what_is_masked():
    from luthier import scenes
    from luthier.tasks.pictures_masks import row
    empty = 0
    for i in range(60):
        image, phrase, mask = row(i, 0)
        image, mask = image(), mask()
        s, words = scenes.scene(i, 0, 64, 1, 4), phrase.split()[1:]
        fits = [all(w in (x.colour, x.shape, "shape") for w in words) for x in s.shapes]
        true = sum((m for m, f in zip(s.masks(), fits, strict=True) if f), np.zeros((64, 64), bool))
        assert image.shape == (64, 64, 3) and np.array_equal(mask > 0, true)
        assert bool(mask.any()) == bool(i % 5), (i, phrase)
        empty += not mask.any()
    assert empty == 12


def test_learning_from_ones_own_rows(folder, tmp_path):
    source = written(tmp_path, 20)
    task = tasks.open(source, model=folder)
    assert task.kind == "text-segmentation" and task.roles == dict(mask="mask", image="image", phrase="phrase")
    batch = next(task.batches("train", 4))
    assert batch["pixel_values"].shape == (4, 3, 16, 16) and batch["labels"].shape == (4, 16, 16)
    assert 0 < batch["labels"].mean() < 1 and batch["input_ids"][0, -1] == 3
    tuned = attach(task.build(), DENSE)
    first = task.loss(tuned, batch).item()
    train(tuned, task, steps=40, lr=2e-2, batch_size=4, progress=False, log=False)
    assert task.loss(tuned, batch).item() < first - 0.2
    assert set(task.evaluate(tuned, "test")) == {"dice", "iou", "loss", "n"}


def test_tune_predict_and_masks_on_disk(folder, tmp_path, capsys):
    from luthier.cli import main
    source, out = written(tmp_path), tmp_path / "tuned"
    main(["tune", source, "--model", folder, "--with", DENSE, "--out", str(out), "--epochs", "1"])
    capsys.readouterr()
    shown = [str(tmp_path / f"i{k}.png") for k in range(2)]
    main(["predict", str(out), *shown, "a red circle", "--out", str(tmp_path / "masks")])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "i0-a-red-circle.png" in said[0]
    for k in range(2):
        mask = Image.open(tmp_path / "masks" / f"i{k}-a-red-circle.png")
        assert mask.size == (20, 12) and mask.mode == "L" and set(np.unique(mask)) <= {0, 255}
    task, tuned = reopen(out)
    y = task.predict(tuned, [(str(tmp_path / "i0.png"), "a red circle")])[0]
    assert np.array_equal(y["mask"], np.asarray(Image.open(tmp_path / "masks" / "i0-a-red-circle.png")) > 0)
    for bad, why in ((str(tmp_path / "i0.png"), "names no image"), ((str(tmp_path / "i0.png"), ""), "names no phrase"),
                     (("no.png", "x"), "not an image")):
        with pytest.raises(BadData, match=why):
            task.predict(tuned, [bad])


def test_a_model_as_it_came_draws_masks_and_a_bad_input_fails_alone(folder, tmp_path, capsys):
    from luthier.cli import main
    written(tmp_path, 2)
    (tmp_path / "bad.png").write_bytes(b"no image")
    shown = [str(tmp_path / name) for name in ("i0.png", "bad.png", "i1.png")]
    assert main(["predict", folder, *shown, "a red circle", "--out", str(tmp_path), "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    names = [Path(y["mask"]).name for y in said[::2]]
    assert "Input 1" in said[1]["error"] and names == ["i0-a-red-circle.png", "i1-a-red-circle.png"]
    task = tasks.KINDS["text-segmentation"](folder, roles=dict(mask="mask", image="image", phrase="phrase"))
    assert task.predict(task.build(), [(shown[2], "a red circle")])[0]["share"] == said[2]["share"]


def test_odd_images_are_treated_and_told(folder, tmp_path):
    frames = [Image.new("RGB", (20, 12), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    Image.new("L", (20, 12), 1).save(tmp_path / "ones.png")              # a mask of ones, not of 255
    odd = dict(row0=dict(image=picture(tmp_path / "grey.png", "L")), row1=dict(image="moves.gif"), row2=dict(mask="ones.png"),
               row3=dict(image=picture(tmp_path / "cmyk.jpg", "CMYK", colour=(1, 2, 3, 4))), row4=dict(phrase="a red " * 90))
    task = tasks.open(written(tmp_path, 12, **odd), model=folder)
    said = " ".join(task.notes)
    assert "grey: made RGB" in said and "CMYK: made RGB" in said and "first frame is used" in said
    rows = [r for split in task.tables for r in (task.examples(split)[i] for i in range(task.size(split)))]
    assert sum(bool(r["mask"].all()) for r in rows) == 1                 # the ones
    assert max(len(r["ids"]) for r in rows) == 64 and "longer than 64 tokens" in " ".join(task.notes)


@pytest.mark.parametrize(("change", "why"), (
    (dict(image="none.png"), "No such file"), (dict(mask="none.png"), "No such file"), (dict(mask=""), "no mask is named"),
    (dict(phrase=" "), "phrase .* is empty"), (dict(mask="small.png"), "mask is 5 x 5 and the image 20 x 12"),
    (dict(image="cut.png"), "truncated|cannot")))
def test_one_bad_row_is_counted_and_many_are_refused(folder, tmp_path, change, why):
    picture(tmp_path / "small.png", "L", (5, 5))
    Image.effect_noise((20, 12), 90).convert("RGB").save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    written(tmp_path, 4, "rows_val.jsonl"), written(tmp_path, 4, "rows_test.jsonl")
    task = tasks.open(written(tmp_path, 130, "rows_train.jsonl", row7=change), model=folder)
    assert task.size("train") == 129 and "1 rows that cannot be used are left out" in " ".join(task.notes)
    with pytest.raises(BadData, match=why):
        tasks.open(written(tmp_path, 20, "other.jsonl", **{f"row{i}": change for i in range(10)}), model=folder)


def test_the_preprocessor_says_the_size(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "own")
    (tmp_path / "own" / "preprocessor_config.json").write_text(json.dumps(dict(size=dict(height=32, width=32))))
    assert tasks.open(written(tmp_path), model=str(tmp_path / "own")).side == 32
    assert tasks.open(written(tmp_path), model=folder).side == 16


def test_models_and_sizes_that_do_not_fit(folder):
    with pytest.raises(DoesNotFit, match="draws no masks"):
        tasks.open("scenes:segment", model="tiny-clip", limit=4).build()
    with pytest.raises(DoesNotFit, match="no multiple of the 4 pixels.*Use 28"):
        tasks.open("scenes:segment", model=folder, limit=4, image_size=30).build()
    task = tasks.open("scenes:segment", model=folder, limit=4, image_size=24)     # positions are interpolated
    assert task.build()(**{k: v for k, v in next(task.batches("val", 2)).items() if k != "labels"}).logits.shape == (2, 24, 24)
