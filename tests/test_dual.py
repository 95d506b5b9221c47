"""Dual encoders: classification by names, retrieval, and the methods that learn words, against plain implementations by hand."""

import hashlib
import itertools
import json
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from luthier import attach, tasks, tiny
from luthier.check import jiggle
from luthier.compare import compare
from luthier.errors import BadData, DoesNotFit
from luthier.method import parse
from luthier.site import sites
from luthier.tasks import metrics
from luthier.tasks.dual import Named
from luthier.train import train

WORDS = "<unk> <pad> <s> </s> a photo of . red blue round flat slow quick"


def model(names=None, template="a photo of a {}.", **more):
    """The tiny classifier by names, also with other names and templates. Its words are those above."""
    m = tiny.build("named")
    return m if names is None else Named(m.dual, m.tokenizer, names, template, **more).eval()


def pixels(n=3, seed=4):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def ids(m, text):
    return [2, *(WORDS.split().index(w) for w in text.split()), 3]


def speak(m, rows, ends):
    """Unit text features by hand. rows: word vectors (T, D) of each text; ends: where its end token stands."""
    text, found = m.dual.text_model, []
    for h, end in zip(rows, ends, strict=True):
        h = h[None] + text.embeddings.position_embedding.weight[:h.shape[0]]
        mask = torch.full((h.shape[1], h.shape[1]), -torch.inf).triu(1)[None, None]
        for layer in text.encoder.layers:
            h = layer(h, mask)
            h = h[0] if isinstance(h, tuple) else h
        found.append(m.dual.text_projection(text.final_layer_norm(h)[0, end]))
    return F.normalize(torch.stack(found), dim=-1)


def look(m, x):
    return F.normalize(m.dual.visual_projection(m.dual.vision_model(x).pooler_output), dim=-1)


def look_up(m, tokens):
    return m.dual.text_model.embeddings.token_embedding.weight[torch.tensor(tokens)]


def agree(a, b):
    assert torch.allclose(a, b, atol=2e-5), f"off by {(a - b).abs().max():.1e}"


# -- the classifier itself ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_zero_shot_by_hand():
    m, x = model(["red flat", "slow quick round"]), pixels()
    texts = [ids(m, f"a photo of a {n} .") for n in m.names]
    t = speak(m, [look_up(m, t) for t in texts], [len(t) - 1 for t in texts])
    agree(m(x).logits, m.dual.logit_scale.exp() * look(m, x) @ t.T)
    assert m.spans == ((5, 7), (5, 8)) and m(x, torch.tensor([0, 1, 0])).loss.ndim == 0


def test_names_must_have_tokens_and_fit():
    with pytest.raises(BadData, match="finds no token"):
        model(["", "red"])
    with pytest.raises(BadData, match="tokens long"):
        model(["red " * 80, "blue"])


# -- CoOp -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("middle", [False, True])
def test_coop_by_hand(own, middle):
    m, x, names = model(["red flat", "slow quick round"]), pixels(), ["red flat", "slow quick round"]
    tuned = jiggle(attach(m, f"coop(n=3, own={own}, middle={middle})"))
    v, = (p for n, p in tuned.trainable())
    assert v.shape == ((2, 3, 32) if own else (3, 32))
    rows, ends = [], []
    for c, name in enumerate(names):
        word, v_c = look_up(m, ids(m, name)[1:-1]), v[c] if own else v
        start, dot, end = look_up(m, [2]), look_up(m, [WORDS.split().index(".")]), look_up(m, [3])
        half = 1 if middle else 3
        rows.append(torch.cat([start, v_c[:half], word, v_c[half:], dot, end]))
        ends.append(len(rows[-1]) - 1)
    agree(tuned(pixel_values=x).logits, m.dual.logit_scale.exp() * look(m, x) @ speak(m, rows, ends).T)


@torch.no_grad()
def test_coop_that_starts_from_words_starts_as_zero_shot():
    m, x = model(), pixels()
    zero = m(x).logits
    tuned = attach(m, 'coop(words="a photo of a")')
    assert sum(p.numel() for _, p in tuned.trainable()) == 4 * 32
    agree(tuned(pixel_values=x).logits, zero)
    assert not torch.allclose(jiggle(tuned)(pixel_values=x).logits, zero)
    with pytest.raises(DoesNotFit, match="brings no tokenizer"):
        attach(tiny.build("clip"), 'coop(words="a photo of a")')


def test_a_context_for_each_class_knows_no_other():
    with pytest.raises(DoesNotFit, match="has a context for each class"):
        attach(model(["red", "blue", "flat"], old=2), "coop(own=True)")
    with pytest.raises(DoesNotFit, match="64 positions"):
        attach(model(), "coop(n=60)")(pixel_values=pixels())


def test_training_leaves_clip_as_it_was_to_the_bit():
    m, x, y = model(), pixels(4), torch.arange(4)

    def digest():
        return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in m.state_dict().values())).hexdigest()
    before = digest()
    for chain in ("coop(n=3)", "cocoop(n=2, reduce=4)", "csp(dropout=0.3)"):
        tuned = attach(m, chain).train()
        optimizer = torch.optim.SGD([p for _, p in tuned.trainable()], lr=0.1)
        losses = []
        for _ in range(12):
            loss = F.cross_entropy(tuned(pixel_values=x).logits, y)
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < losses[0] and all(p.grad is None for p in m.parameters())
        tuned.detach()
    assert digest() == before


# -- CoCoOp ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_cocoop_by_hand_one_image_at_a_time():
    m, x, names = model(["red flat", "slow quick round"]), pixels(), ["red flat", "slow quick round"]
    tuned = jiggle(attach(m, "cocoop(n=3, reduce=4)"))
    p = dict(zip(("P", "W1", "b1", "W2", "b2"), (q for _, q in tuned.trainable()), strict=True))
    assert p["W1"].shape == (4, 16) and p["W2"].shape == (32, 4)
    want = []
    for f in look(m, x):
        v = p["P"] + p["W2"] @ torch.relu(p["W1"] @ f + p["b1"]) + p["b2"]
        rows = [torch.cat([look_up(m, [2]), v, look_up(m, [*ids(m, n)[1:-1], 7, 3])]) for n in names]
        want.append(m.dual.logit_scale.exp() * f @ speak(m, rows, [len(r) - 1 for r in rows]).T)
    agree(tuned(pixel_values=x).logits, torch.stack(want))


@torch.no_grad()
def test_cocoop_without_its_net_is_coop():
    x, m = pixels(), model()
    a, b = attach(m, "coop(n=3)"), attach(model(), "cocoop(n=3, reduce=4)")
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(a.trainable(), b.trainable(), strict=False))     # one draw
    for (n, p) in b.trainable():
        if n.endswith(("W2", "b2")):
            p.zero_()
    agree(b(pixel_values=x).logits, a(pixel_values=x).logits)
    for i in range(3):                                   # the same products, so the same bits
        assert torch.equal(b(pixel_values=x[i:i + 1]).logits, a(pixel_values=x[i:i + 1]).logits)


def test_cocoop_needs_the_image():
    with pytest.raises(DoesNotFit, match="image features"):
        attach(tiny.build("clip"), "cocoop()")


# -- CSP ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_csp_by_hand():
    """A word of several tokens becomes one; the second pair is never trained, and changes with its parts."""
    parts = dict(attributes=["red", "slow quick"], objects=["flat", "round"], pairs=[[0, 0], [1, 1], [1, 0]])
    names = ["red flat", "slow quick round", "slow quick flat"]
    m, x = model(names, parts=parts, old=2), pixels()
    tuned = attach(m, "csp()")
    (A, B), table = (p for _, p in tuned.trainable()), m.dual.text_model.embeddings.token_embedding.weight
    agree(A, torch.stack([table[8], (table[12] + table[13]) / 2]))
    assert sum(p.numel() for _, p in tuned.trainable()) == (2 + 2) * 32
    jiggle(tuned)
    rows = [torch.cat([look_up(m, [2, 4, 5, 6, 4]), A[a][None], B[o][None], look_up(m, [7, 3])]) for a, o in parts["pairs"]]
    agree(tuned(pixel_values=x).logits, m.dual.logit_scale.exp() * look(m, x) @ speak(m, rows, [8, 8, 8]).T)
    with pytest.raises(DoesNotFit, match="knows no such pairs"):
        attach(model(["red", "blue"]), "csp()")


def test_csp_drops_out_while_it_trains():
    m, x = model(), pixels()
    tuned = attach(m, "csp(dropout=0.5)").train()
    a, b = tuned(pixel_values=x).logits, tuned(pixel_values=x).logits
    assert not torch.equal(a, b) and torch.equal(tuned.eval()(pixel_values=x).logits, tuned(pixel_values=x).logits)


# -- words in other towers ------------------------------------------------------------------------------------------


def siglip(positions=16):
    import transformers as t

    with torch.random.fork_rng():
        torch.manual_seed(1)
        text = dict(**tiny.WIDTH, vocab_size=64, max_position_embeddings=positions, projection_size=32, bos_token_id=2,
                    eos_token_id=3)
        return t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=dict(**tiny.WIDTH, **tiny.PIXELS))).eval()


@torch.no_grad()
def test_siglip_is_padded_to_the_end_and_gives_padding_up():
    """Its text is read at the last of its positions, which is padding: padding takes the place of the template's words that
    go, and gives way to what is inserted. (The tiny tokenizer begins with <s>, to SigLIP one word of the template like the
    others.)"""
    m = tiny.build("named")
    m.tokenizer.model_input_names = ["input_ids"]
    named = Named(siglip(), m.tokenizer, ["red flat", "blue"]).eval()
    assert named.mask is None and named.texts.shape == (2, 16)
    x, tuned = pixels(), attach(named, "coop(n=4)")
    v, = (p for _, p in tuned.trainable())
    text, found = named.dual.text_model, []
    for name in ("red flat", "blue"):
        tokens = [WORDS.split().index(w) for w in name.split()]
        row = torch.cat([v, text.embeddings.token_embedding(torch.tensor([*tokens, 7, 3] + [1] * 16))])[:16]
        h = row[None] + text.embeddings.position_embedding.weight
        for layer in text.encoder.layers:
            h = layer(h, None)
            h = h[0] if isinstance(h, tuple) else h
        found.append(text.head(text.final_layer_norm(h)[:, -1]))
    t, f = F.normalize(torch.cat(found), dim=-1), F.normalize(named.dual.get_image_features(x).pooler_output, dim=-1)
    agree(tuned(pixel_values=x).logits, named.logit_scale.exp() * f @ t.T + named.logit_bias)
    with pytest.raises(DoesNotFit, match="16 positions"):             # no padding is left to give up
        attach(tuned.detach(), "coop(n=14)")(pixel_values=x)


def test_words_come_before_positions():
    found = sites(tiny.build("clip"))
    assert found["text.words"].module is found["text.embed.token"].module and "vision.words" not in found.by_name
    assert "words" not in sites(tiny.build("bert")).by_name


# -- tasks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP of one's own: 16 pixels, and a tokenizer that knows a dozen words."""
    path, m = tmp_path_factory.mktemp("clip"), tiny.build("named")
    m.dual.save_pretrained(path)
    m.tokenizer.save_pretrained(path)
    return str(path)


def picture(i):
    return np.random.RandomState(i).randint(0, 255, (16, 16, 3), dtype=np.uint8)


def arrays(labels, n=40):
    return {"images": np.stack([picture(i) for i in range(n)]), "labels": np.array([labels[i % len(labels)] for i in range(n)])}


def test_a_folder_of_images_by_class(tmp_path, folder):
    for i in range(24):
        place = tmp_path / ("red_round", "blue_flat")[i % 2]
        place.mkdir(exist_ok=True)
        Image.fromarray(picture(i)).save(place / f"{i}.png")
    task = tasks.open(tmp_path, model=folder, task="class-names", shots=3)
    facts = task.describe()
    assert facts["labels"] == ["blue flat", "red round"] and facts["train_counts"] == [3, 3]
    m = task.build()
    assert isinstance(m, Named) and m.names == ("blue flat", "red round")
    scores = task.evaluate(m)
    assert 0 <= scores["accuracy"] <= 1 and scores["n"] == 5
    again = tasks.restore(json.loads(json.dumps(task.spec())))
    said = again.predict(again.build(), [picture(1), picture(2)])
    assert said == task.predict(m, [picture(1), picture(2)]) and set(said[0]["scores"]) == {"blue flat", "red round"}


def test_names_that_collide_are_refused(folder):
    with pytest.raises(BadData, match="have one name, 'red round'"):
        tasks.open(arrays(["red_round", "red round"]), model=folder, task="class-names")
    with pytest.raises(BadData, match="tokenizer the names"):
        tasks.open(arrays(["zebra", "okapi"]), model=folder, task="class-names")
    with pytest.raises(BadData, match="holds {} once"):
        tasks.open(arrays(["red", "blue"]), model=folder, task="class-names", template="a photo")
    with pytest.raises(BadData, match="has no others"):
        tasks.open(arrays(["red", "blue"]), model=folder, task="class-names", metric="auc")


def test_no_dual_encoder_no_names(tmp_path):
    import folders

    with pytest.raises(BadData, match="task of class-names"):
        tasks.open(arrays(["red", "blue"]), model=folders.vit(tmp_path / "vit"), task="class-names")


def test_old_and_new_classes_and_domains(folder):
    data = tasks.open("scenes:classify-base-new", model=folder, shots=2, limit={"test": 80})
    assert data.metric == "harmonic" and data.old == 20 and len(data.labels) == 40 and data.size("train") == 40
    m = data.build().train()
    batch = next(data.batches("train", 8))
    assert m(batch["pixel_values"]).logits.shape == (8, 20)            # training sees the old classes alone
    s = data.evaluate(m)
    assert s["harmonic"] == pytest.approx(2 * s["base"] * s["new"] / max(s["base"] + s["new"], 1e-12))
    shift = tasks.open("scenes:classify-shift", model=folder, shots=1, limit={"test": 60})
    s = shift.evaluate(shift.build())
    assert {k for k in s if k.startswith("accuracy_")} == {f"accuracy_{k}" for k in tasks.source.arrays.scenes.STYLES}


def test_pairs_of_attribute_and_object(folder, tmp_path):
    rows = []
    for i, (a, o) in enumerate(itertools.product(["red", "blue"], ["round", "flat"])):
        for k in range(6):
            if (a, o) != ("blue", "flat") or k > 3:
                Image.fromarray(picture(10 * i + k)).save(tmp_path / f"{i}{k}.png")
                split = "test" if k > 3 else "train"
                rows.append((split, dict(image=f"{i}{k}.png", attribute=a, object=o)))
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps(r) for s, r in rows if s == split))
    task = tasks.open(tmp_path, model=folder, task="class-names", metric="auc")
    m = task.build()
    assert m.old == 3 and m.names[-1] == "blue flat" and m.parts["pairs"][-1] == [0, 0]
    assert m.parts["attributes"] == ["blue", "red"]
    assert {"seen", "unseen", "auc", "base", "new"} <= task.evaluate(m).keys()
    tuned = attach(m, "csp()")
    assert [tuple(p.shape) for _, p in tuned.trainable()] == [(2, 32), (2, 32)]


def test_the_bias_sweep_against_trying_every_bias():
    g = torch.Generator().manual_seed(0)
    for n in (1, 3):
        scores, truth = torch.randn(40, 5, generator=g), torch.randint(0, 5, (40,), generator=g)
        scores = (scores * 4).round() / 4                # with ties
        curve = set()
        gaps = scores[:, :n].max(1).values - scores[:, n:].max(1).values
        for b in [*sorted({float(v) + 1e-4 for v in gaps}), -100.0]:
            moved = scores.clone()
            moved[:, n:] += b
            said = moved.argmax(1)
            curve.add((float((said == truth)[truth >= n].double().mean()), float((said == truth)[truth < n].double().mean())))
        curve = sorted(curve, key=lambda p: (p[0], -p[1]))
        area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(curve))
        found = metrics.swept(scores, truth, n)
        assert found["auc"] == pytest.approx(area)
        assert found["best_harmonic"] == pytest.approx(max(2 * a * b / max(a + b, 1e-12) for a, b in curve))


def test_retrieval(tmp_path, folder):
    texts = [f"a {a} {o} ." for a in ("red", "blue", "slow", "quick") for o in ("round", "flat", "photo")]
    rows = []
    for i in range(12):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.png")
        rows.append(dict(image=f"{i}.png", caption=[texts[i], texts[i] + " a"] if i % 2 else texts[i]))
    rows[3]["caption"] = [texts[3], " "]                 # one empty caption: counted, left out
    for split, part in (("train", rows), ("test", rows[::-1]), ("val", rows[:4])):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    task = tasks.open(tmp_path, model=folder, task="image-text-retrieval")
    assert task.size("train") == 17 and any("1 empty captions" in n for n in task.describe()["notes"])
    m = task.build()
    batch = next(task.batches("train", 6))
    same = batch["labels"]
    assert same.dtype == torch.bool and same.diagonal().all()
    with torch.no_grad():
        out = task.forward(m, batch)
        y, t = out.logits_per_text, same.float()
        want = sum(-(t / t.sum(1, keepdim=True) * z.log_softmax(1)).sum(1).mean() for z, t in ((y, t), (y.T, t.T))) / 2
        agree(task.loss(m, batch), want)
    s = task.evaluate(m)
    assert s["n"] == 17 and s["recall@1"] <= s["recall@5"] <= s["recall@10"]
    near = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    match = torch.tensor([[True, False, False], [False, True, False]])
    assert [metrics.recall(near, match, k) for k in (1, 2)] == [0.5, 1.0]
    with pytest.raises(BadData, match="caption"):
        (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(r | {"caption": ""}) for r in rows))
        tasks.open(tmp_path, model=folder, task="image-text-retrieval")


def test_none_is_the_model_as_it_is(folder):
    assert repr(parse("none")) == "none" and len(parse("none")) == 0
    found = compare("scenes:classify-shape", folder, "none, coop(n=2), bitfit()", seeds=[0], epochs=1, batch_size=4, shots=1,
                    limit={"test": 30})
    scores = {e["job"]["chain"]: e["result"]["score"] for e in found["entries"].values() if e["job"]["kind"] == "score"}
    task = tasks.open("scenes:classify-shape", model=folder, shots=1, limit={"test": 30})
    assert scores["none"] == task.evaluate(task.build())["accuracy"] and set(scores) == {"none", "coop(n=2)", "bitfit()"}


# -- R-AMT ------------------------------------------------------------------------------------------------------------


def test_ramt_by_hand(tmp_path):
    """Masked weights, the gradient dropout entry by entry, and at the end a bit a weight."""
    m, x, y = model(), pixels(4), torch.arange(4)
    zero = m(x).logits.detach()
    tuned = attach(m, "ramt(drop=0.6, reg=0.01)")
    assert torch.equal(tuned(pixel_values=x).logits, zero)
    g, masks, other = torch.Generator().manual_seed(0), [p for _, p in tuned.trainable()], model()
    vision = other.dual.vision_model
    own = {n: w.detach() for n, w in vision.named_parameters() if n.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "out_proj")}
    own = {f"encoder.layers.{i}.self_attn.{k}.weight": own[f"encoder.layers.{i}.self_attn.{k}.weight"]
           for i in (0, 1) for k in ("q_proj", "k_proj", "v_proj", "out_proj")}
    assert len(masks) == 8
    for p in masks:
        p.data.copy_(-0.02 * (torch.rand(p.shape, generator=g) < 0.5))
    texts = F.normalize(other.speak().detach(), dim=-1)

    def plain(real):                                     # another model, with masked weights in place of its own
        masked = {n: w * r for (n, w), r in zip(own.items(), real, strict=True)}
        f = other.dual.visual_projection(torch.func.functional_call(vision, masked, (x,)).pooler_output)
        return other.logit_scale.exp().detach() * F.normalize(f, dim=-1) @ texts.T
    tuned.train()
    torch.manual_seed(7)
    logits = tuned(pixel_values=x).logits
    (F.cross_entropy(logits, y) + tuned.penalty()).backward()
    real = [((p.detach() + 0.01) > 0.005).float().requires_grad_() for p in masks]
    said = plain(real)
    agree(said, logits.detach())
    a = torch.autograd.grad(F.cross_entropy(said, y), real, retain_graph=True)
    b = torch.autograd.grad(-(zero.softmax(1) * said.log_softmax(1)).sum(1).mean(), real)
    torch.manual_seed(7)
    kept = 0
    for p, ce, kl in zip(masks, a, b, strict=True):
        v = p.detach() + 0.01
        ce = ce + 0.01 * v / v.norm()
        keep = (ce.sign() * (ce + kl) / (ce.abs() + kl.abs() + 1e-8) + 1) / 2 > torch.rand_like(kl)
        want = (0.4 + 0.6 * keep) * ce
        assert ((p.grad - want).abs() <= 1e-4 * ce.abs().max() + 1e-7).float().mean() > 0.999       # ties of P and U may differ
        kept += keep.float().mean() / 8
    assert 0.3 < kept < 0.98
    tuned.total_steps = 1
    tuned.step()
    after = tuned.eval()(pixel_values=x).logits.detach()
    agree(after, said.detach())
    tuned.save(tmp_path / "bits")
    size = (tmp_path / "bits" / "state.safetensors").stat().st_size
    assert sum(w.numel() for w in own.values()) / 8 == 8 * 32 * 4 and size < 8 * 32 * 4 + 4000
    from luthier import load

    assert torch.equal(load(tuned.detach(), tmp_path / "bits")(pixel_values=x).logits, after)


def test_a_loss_may_ask_what_the_bare_model_says():
    m, x = model(), pixels()
    tuned = jiggle(attach(m, "ramt(drop=1.0)")).train()
    assert tuned._run(0).bare is None                    # no training forward yet
    out = tuned(pixel_values=x).logits
    run = tuned._run(0)
    with tuned.off():
        want = tuned(pixel_values=x).logits
    assert torch.equal(run.outputs.logits, out) and torch.equal(run.bare().logits, want) and not torch.equal(out, want)
    tuned.penalty()
    assert tuned._run(0).bare is None                    # nothing of a step is kept behind it



# -- DPT --------------------------------------------------------------------------------------------------------------


def test_dpt_by_hand():
    """CoOp in the text, VPT below, and in the last block prompts made from the texts that the bare model likes best."""
    names = ["red flat", "slow quick round", "blue", "round quick"]
    m, x, y, other = model(names), pixels(5), torch.tensor([0, 1, 2, 3, 0]), model(names)
    tuned = attach(m, "dpt(n=3, prompts=2, k=2, alpha=0.7)")
    assert [type(s.method).__name__ for s in tuned._plan.steps] == ["coop", "vpt", "cavpt"]
    with torch.no_grad():
        for n, p in tuned.trainable():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
    tuned.train()
    logits = tuned(pixel_values=x).logits
    penalty = tuned.penalty(batch={"labels": y})
    state = {n.split("@")[0][2:] + n.rpartition(".")[2]: p.detach() for n, p in tuned.trainable()}
    with torch.no_grad():
        top = other(x).logits.topk(2).indices
        rows = [torch.cat([look_up(other, [2]), state["coopP"], look_up(other, [*ids(other, n)[1:-1], 7, 3])]) for n in names]
        raw, text = [], other.dual.text_model
        for row in rows:
            h = row[None] + text.embeddings.position_embedding.weight[:len(row)]
            for layer in text.encoder.layers:
                h = layer(h, torch.full((len(row), len(row)), -torch.inf).triu(1)[None, None])
                h = h[0] if isinstance(h, tuple) else h
            raw.append(other.dual.text_projection(text.final_layer_norm(h)[0, -1]))
        raw, vision, c = torch.stack(raw), other.dual.vision_model, {k[5:]: v for k, v in state.items() if k.startswith("cavpt")}
        h = vision.pre_layrnorm(vision.embeddings(x))
        low, high = vision.encoder.layers

        def run(block, h, prompts):
            out = block(torch.cat([h[:, :1], prompts, h[:, 1:]], 1), None)
            out = out[0] if isinstance(out, tuple) else out
            return torch.cat([out[:, :1], out[:, 1 + prompts.shape[1]:]], 1)
        h = run(low, h, state["vptP"].expand(5, -1, -1))
        query = raw[top] @ c["M"].T + c["m"]
        keys = torch.cat([h, c["free"].expand(5, -1, -1)], 1)
        near = ((query @ c["q"].T) @ (keys @ c["k"].T).transpose(1, 2) / 32**0.5).softmax(-1)
        made = near @ keys @ c["v"].T

        def norm(v, gain, bias):
            v = v - v.mean(-1, keepdim=True)
            return v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + bias
        said = norm(made, c["g1"], c["b1"]) @ c["C"].T
        h = run(high, h, norm(made + query, c["g2"], c["b2"]))
        f = F.normalize(other.dual.visual_projection(vision.post_layernorm(h[:, 0])), dim=-1)
        agree(logits, other.logit_scale.exp() * f @ F.normalize(raw, dim=-1).T)
        hits = [(b, j) for b in range(5) for j in range(2) if top[b, j] == y[b]]
        assert 0 < len(hits) < 5
        agree(penalty, 0.7 * sum(-said[b, j].log_softmax(-1)[y[b]] for b, j in hits) / len(hits))
    (F.cross_entropy(logits, y) + penalty).backward()
    assert all(p.grad is not None and p.grad.any() for _, p in tuned.trainable())
    assert (made[0] - made[1]).abs().max() > 1e-3        # prompts differ between images
    assert tuned.penalty() == 0.0                        # without labels there is nothing to say


def test_what_waits_for_itself_is_refused():
    with pytest.raises(DoesNotFit, match="wait for each other"):
        attach(model(), "cocoop(n=2, reduce=4) >> cavpt(k=2)")(pixel_values=pixels())
    with pytest.raises(DoesNotFit, match="has no classes"):
        attach(tiny.build("clip"), "cavpt()")


def test_the_example(tmp_path, monkeypatch, capsys, folder):
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("few_shot_coop", Path(__file__).parents[1] / "examples" / "few_shot_coop.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.chdir(tmp_path)
    before, after = example.main("scenes:classify-shape", folder, shots=2, steps=2)
    said = capsys.readouterr().out
    assert f"zero-shot: {before:.1%}" in said and "256 trained numbers" in said and (tmp_path / "coop-state").is_dir()


# -- what does not change is computed once ------------------------------------------------------------------------------


def counted(m):
    """How often each side runs, from now on."""
    calls = Counter()
    for side in ("text", "vision"):
        getattr(m.dual, f"{side}_model").register_forward_pre_hook(lambda m, args, side=side: calls.update([side]))
    return calls


def opened(folder, kept=True):
    task = tasks.open(arrays(["red", "blue", "slow"], 60), model=folder, task="class-names", limit=dict(train=24, test=6))
    if not kept:
        task.seeing = lambda model: nullcontext()
        task.outcomes = lambda *given: super(type(task), task).outcomes(*given)
    return task


CHAINS = dict(none="none", coop="coop(n=2)", own="coop(n=2, own=True)", cocoop="cocoop(n=2, reduce=4)",
              eyes="lora(at='vision.attn.q', rank=2)", ears="lora(at='text.attn.q', rank=2)",
              dpt="coop(n=2) >> cavpt(k=2, inner=4, free=2)", ramt="ramt(drop=0.5)")


@pytest.mark.parametrize("name", CHAINS)
def test_texts_are_read_once_and_still_eyes_look_once(folder, name):
    found, ran = [], []
    for kept in (True, False):
        task = opened(folder, kept)
        tuned = jiggle(attach(task.build(), CHAINS[name]))
        calls, said = counted(tuned.base), []
        for _ in range(2):                               # batches of one size: products round alike
            said.append(task.evaluate(tuned, "test", batch_size=2))
            ran.append(dict(calls))
            calls.clear()
        said.append(task.predict(tuned, [picture(i) for i in range(6)], batch_size=2))
        ran.append(dict(calls))
        found.append(said)
    assert found[0] == found[1]                          # to the bit
    per = 2 if name == "dpt" else 1                      # cavpt asks what the bare model says, too
    assert ran[3]["text"] == ran[4]["text"] == ran[5]["text"] == 3 * per
    assert ran[4]["vision"] == 3 * per
    for seen in (ran[0], ran[1], ran[2]):
        assert seen["text"] - (seen is ran[0]) == (3 if name == "cocoop" else per)
    looks = 0 if name in ("none", "coop", "own", "cocoop", "ears") else 3 * per
    assert ran[1].get("vision", 0) == looks and ran[2]["vision"] == 3 * per


@pytest.mark.parametrize("name", [n for n in CHAINS if n != "none"])
def test_training_on_what_was_seen_gives_the_same_losses(folder, name):
    found, states, ran = [], [], []
    for kept in (True, False):
        task = opened(folder, kept)
        tuned = attach(task.build(), CHAINS[name])
        calls = counted(tuned.base)
        found.append(train(tuned, task, epochs=3, batch_size=8, seed=0, progress=False, log=False)["loss"])
        states.append([p.detach().clone() for _, p in tuned.trainable()])
        ran.append(dict(calls))
    assert found[0] == found[1] and len(found[0]) == 9 and all(map(torch.equal, *states))
    looks = name in ("coop", "own", "cocoop", "ears")
    assert ran[0]["vision"] - 1 == 3 if looks else ran[0]["vision"] >= 9
    reads = dict(eyes=1, ramt=2).get(name)               # ramt asks what the bare model says, too
    assert ran[0]["text"] - 1 == reads if reads else ran[0]["text"] >= 9


def test_what_was_seen_depends_on_what_looks(folder):
    task = opened(folder)
    before = task.evaluate(attach(task.build(), "coop(n=2)"), "test")
    tuned = attach(task.build(), "coop(n=2)")
    with torch.no_grad():
        tuned.base.dual.visual_projection.weight.mul_(-1)
    assert task.evaluate(tuned, "test") != before
    tuned = attach(task.build(), "coop(n=2)")
    attach(tuned, "lora(at='vision.attn.q', rank=2)")    # beside it: the eyes are not still
    with task.seeing(tuned):
        assert "pixel_values" in next(task.batches("train", 4))


def test_a_model_spread_over_processes_looks_each_time(folder, monkeypatch):
    """Its whole forward alone gathers its tensors."""
    task = opened(folder)
    tuned = attach(task.build(), "coop(n=2)")
    monkeypatch.setattr("luthier.ranks.sharded", lambda p: True)
    calls = counted(tuned.base)
    with task.seeing(tuned):
        assert "pixel_values" in next(task.batches("train", 4)) and tuned.base.kept is None and not calls
