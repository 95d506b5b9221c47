"""Bridges that make a dual encoder of a vision and a text encoder: heads, losses, cached states, and the choice of encoders."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import luthier
from luthier import tasks, tiny
from luthier.bridges import bridge, parse
from luthier.errors import BadData, DoesNotFit
from luthier.save import fingerprint
from luthier.tasks.dual import Named
from luthier.train import train
from luthier.tune import bare

TOKENS = tiny.build("named").tokenizer


def made(way="sail(dim=6, wide=2)", eyes="vit", words="bert", seed=0):
    return bridge(tiny.build(eyes), tiny.build(words), way, seed=seed)


def given(n=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 60, (n, 7), generator=g)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return dict(input_ids=ids, attention_mask=mask, pixel_values=torch.randn(n, 3, 16, 16, generator=g))


def near(a, b):
    assert torch.allclose(a, b, atol=1e-5), (a - b).abs().max()


# -- SAIL ------------------------------------------------------------------------------------------------------------


def gated(x, side):
    x = F.layer_norm(x, x.shape[-1:])
    A, B, G = (getattr(side, n) for n in ("gate", "up", "proj"))
    return ((x @ A.weight.T + A.bias).clamp(0, 6) * (x @ B.weight.T + B.bias)) @ G.weight.T + G.bias


def test_sails_heads_by_hand():
    m, b = made(), given()
    h = m.vision(b["pixel_values"]).last_hidden_state
    x = gated(torch.cat([h[:, 0], h[:, 1:].mean(1)], -1), m.connector.image)
    w = m.language.base_model(b["input_ids"], b["attention_mask"]).last_hidden_state
    t = gated(torch.stack([w[0].mean(0), w[1, :4].mean(0), w[2].mean(0)]), m.connector.text)
    near(m.get_image_features(b["pixel_values"]), x)
    near(m.get_text_features(b["input_ids"], b["attention_mask"]), t)
    cos = F.normalize(t, dim=-1) @ F.normalize(x, dim=-1).T
    out = m(**b)
    near(out.logits_per_text, 20 * cos - 10)
    near(out.logits_per_image, out.logits_per_text.T)
    assert m.connector.image.gate.weight.shape == (2 * 64, 64) and m.connector.text.proj.weight.shape == (6, 2 * 32)
    bound = math.sqrt(6 / (64 + 128))                        # Xavier's
    assert 0.9 * bound < m.connector.image.gate.weight.abs().max() <= bound and not m.connector.image.gate.bias.any()


def test_a_vector_or_a_map_is_one_vector():
    m, b = made(eyes="resnet"), given()
    h = m.vision(b["pixel_values"]).last_hidden_state
    near(m.see(b["pixel_values"])[:, 0], h.mean((2, 3)))
    assert m.connector.image.norm.weight.shape == (h.shape[1],)


def test_the_probe_is_linear():
    m, b = made("sail(gated=False, dim=5)"), given()
    h = m.vision(b["pixel_values"]).last_hidden_state
    x = F.layer_norm(torch.cat([h[:, 0], h[:, 1:].mean(1)], -1), (64,))
    side = m.connector.image.proj
    near(m.get_image_features(b["pixel_values"]), x @ side.weight.T + side.bias)


def test_sails_loss_by_hand():
    """Image 0 has captions 0 and 2 (its second); image 1 has 1 and 3."""
    logits = torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 1.0], [-1.0, 2.0]])
    same = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    sign = [[1, -1], [-1, 1], [1, -1], [-1, 1]]
    both = zip(sum(sign, []), logits.flatten().tolist(), strict=True)
    want = sum(math.log1p(math.exp(-s * v)) for s, v in both)
    assert abs(parse("sail()").loss(logits, same).item() - want / 8) < 1e-6


def test_the_scale_stays_below_a_hundred():
    m = made("sail(scale=100, dim=4)")
    with torch.no_grad():
        m.connector.logit_scale.add_(1.0)
    near(m.connector(torch.ones(1)), torch.tensor([90.0]))


# -- projectors, and what is chosen before they train ------------------------------------------------------------------------


def test_projectors_by_hand():
    m, b = made("projectors(dim=6)"), given()

    def token(x, c):
        n = F.layer_norm(x, x.shape[-1:])
        return n @ c.straight.weight.T + c.straight.bias + F.gelu(n @ c.up.weight.T + c.up.bias) @ c.proj.weight.T + c.proj.bias
    h, c = m.vision(b["pixel_values"]).last_hidden_state, m.connector.image
    near(m.get_image_features(b["pixel_values"]), token(h[:, 1:], c.patch).mean(1) + token(h[:, 0], c.whole))
    w, c = m.language.base_model(b["input_ids"], b["attention_mask"]).last_hidden_state, m.connector.text
    t = token(w, c.word)
    t = torch.stack([t[0].mean(0), t[1, :4].mean(0), t[2].mean(0)]) @ c.enter.weight.T + c.enter.bias
    t = F.layer_norm(t + F.gelu(t) @ c.proj.weight.T + c.proj.bias, (6,))
    near(m.get_text_features(b["input_ids"], b["attention_mask"]), t)
    assert abs(m.connector.logit_scale.exp().item() - 1 / 0.07) < 1e-4 and not m.has_loss


def test_projectors_train_as_clip_does(file):
    task, m = opened(made(), file, extra=False), made("projectors(dim=6)")
    batch = next(task.batches("train", 4))
    y, same = m(**{k: v for k, v in batch.items() if k != "labels"}).logits_per_text, batch["labels"].float()
    want = sum(-(t / t.sum(1, keepdim=True) * z.log_softmax(1)).sum(1).mean() for z, t in ((y, same), (y.T, same.T))) / 2
    near(task.loss(m, batch), want)


def test_cka_is_that_of_the_kernels():
    from luthier.procedures.matching import cka
    g = torch.Generator().manual_seed(0)
    X, Y = torch.randn(9, 4, generator=g), torch.randn(9, 7, generator=g)
    H = torch.eye(9) - 1 / 9
    K, L = H @ X @ X.T @ H, H @ Y @ Y.T @ H                  # HSIC of centred kernels
    near(torch.tensor(cka(X, Y)), (K * L).sum() / ((K * K).sum() * (L * L).sum()).sqrt())
    turn = torch.linalg.qr(torch.randn(4, 4, generator=g))[0]
    assert abs(cka(X, 3 * X @ turn + 5) - 1) < 1e-6


def test_encoders_are_ranked(file, monkeypatch):
    from luthier.bridges.dual import Dual
    from luthier.procedures.matching import cka, rank, states
    heard, real = [], Dual.hear

    def hear(self, input_ids, attention_mask=None):
        heard.append(len(input_ids))
        return real(self, input_ids, attention_mask)
    monkeypatch.setattr(Dual, "hear", hear)
    rows = rank("scenes:retrieval", ["effnet-lite0", "tiny-clip"], ["minilm"], steps=2, limit=12, image_size=32, dim=8)
    assert [r["recall@1"] for r in rows] == sorted((r["recall@1"] for r in rows), reverse=True)
    assert {r["vision"] for r in rows} == {"effnet-lite0", "tiny-clip"} and all(0 < r["cka"] < 1 for r in rows)
    assert sum(n for n in heard if n > 1) <= 24              # twelve captions to train on, twelve to say how well: once each
    m = made("sail()").requires_grad_(False)
    task = opened(m, file, extra=False)
    X, Y = states(task, m)
    h = [m.vision(b["pixel_values"]).last_hidden_state[0, 1:].mean(0) for b in task.batches("train", 1, shuffle=False)]
    near(X, torch.stack(h))
    assert len(X) == len(Y) and 0 < cka(X, Y) < 1


def test_concepts_choose_by_turns():
    from luthier.tasks.balance import assign
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.7, 0.9, 0.2], [0.6, 0.1, 0.3], [0.5, 0.2, 0.4]])
    # the last candidates: 0.5, 0.1, 0.1: concept 1 chooses first, then 2, then 0
    assert assign(scores, 1) == [[0], [1], [3]]
    assert assign(scores, 2) == [[], [1, 0], [3, 2]]


def test_pairs_balanced_over_concepts():
    plain = tasks.open("scenes:retrieval", model="tiny-clip", limit={"train": 400, "val": 5, "test": 5})
    task = tasks.open("scenes:retrieval", model="tiny-clip", concepts="scenes:classify-shape", judge="tiny-clip", shots=4,
                      limit={"val": 5, "test": 5})
    assert task.size() == 20 and "at most 4 for each of 5 concepts" in " ".join(task.notes)
    told = task.column(task.tables["train"], "caption")
    shares = [sum(shape in c for c in told) for shape in ("circle", "square", "triangle", "diamond", "cross")]
    assert min(shares) >= 4 and plain.size() == 400
    with pytest.raises(BadData, match="judge="):
        tasks.open("scenes:retrieval", model="tiny-clip", concepts="scenes:classify-shape", shots=4)


# -- a dual encoder among others -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["bert", "llama", "t5"])
def test_only_the_heads_train_and_all_of_them(words):
    m, b = made(words=words), given()
    before = fingerprint(m.vision), fingerprint(m.language)
    tuned = luthier.attach(m, 'full(at="connector")').train()
    out = tuned(**b)
    m.objective(out.logits_per_text, torch.eye(3)).backward()
    assert sum(p.numel() for _, p in tuned.trainable()) == sum(p.numel() for p in m.connector.parameters())
    assert all(p.grad is not None and p.grad.any() for _, p in tuned.trainable())
    assert not any(p.grad is not None for part in (m.vision, m.language) for p in part.parameters())
    torch.optim.SGD([p for _, p in tuned.trainable()], lr=1.0).step()
    assert not torch.equal(tuned(**b).logits_per_text, out.logits_per_text)
    assert (fingerprint(m.vision), fingerprint(m.language)) == before


def test_names_are_told_by_a_bridged_pair():
    """The scale that trains is the one that is used."""
    dual, x = made(), given()["pixel_values"]
    m = Named(dual, TOKENS, ["red round", "blue flat"]).eval()
    t = F.normalize(dual.get_text_features(m.texts, m.mask), dim=-1)
    f = F.normalize(dual.get_image_features(x), dim=-1)
    near(m(x).logits, 20 * f @ t.T - 10)
    tuned = luthier.attach(m, 'full(at="connector")')
    state = next(p for n, p in tuned.trainable() if "logit_scale" in n)
    with torch.no_grad():
        state.fill_(math.log(3))
    near(tuned(x).logits, 3 * f @ t.T - 10)
    assert m.fresh[0] is dual.connector


def test_what_nothing_tunes_drops_nothing_where_that_is_known():
    m = made()
    luthier.attach(m, 'full(at="connector") >> lora(at="text.attn.q", rank=2)').train()
    assert not m.vision.training and m.language.training and m.connector.training
    named = Named(made(), TOKENS, ["red round", "blue flat"])
    luthier.attach(named, 'full(at="connector") >> lora(at="vision.attn.q", rank=2)').train()
    assert named.dual.vision.training


def test_words_are_looked_up_in_a_bridged_text_tower():
    m = Named(made(), TOKENS, ["red round", "blue flat"]).eval()
    x = given()["pixel_values"]
    bare, tuned = m(x).logits, luthier.attach(m, "coop(n=2)")
    out = tuned(x).logits
    out.sum().backward()
    assert all(p.grad.any() for _, p in tuned.trainable()) and not torch.allclose(out, bare, atol=1e-3)


def test_it_reads_by_its_own_kind_of_pooling():
    b, m = given(), made(words="llama")                      # a decoder: the last token that is not padding
    h = m.language.base_model(b["input_ids"], attention_mask=b["attention_mask"]).last_hidden_state
    near(m.hear(b["input_ids"], b["attention_mask"]), torch.stack([h[0, 6], h[1, 3], h[2, 6]]))


def test_what_fits_is_said():
    with pytest.raises(DoesNotFit, match="sees no images.*minilm"):
        luthier.zoo.about("minilm+minilm:sail()")
    with pytest.raises(DoesNotFit, match="writes no text.*smollm2"):
        luthier.zoo.about("dinov2-s+minilm")
    with pytest.raises(DoesNotFit, match="reads no text"):
        luthier.zoo.about("dinov2-s+dinov2-s:sail()")
    with pytest.raises(DoesNotFit, match="does not read texts"):
        bridge(tiny.build("vit"), torch.nn.Linear(2, 2), "sail()")
    assert luthier.zoo.about("dinov2-s+minilm:sail()").kind == "vision-language"


# -- retrieval -------------------------------------------------------------------------------------------------------------

N = 24


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    g, folder = np.random.default_rng(0), tmp_path_factory.mktemp("pairs")
    with open(folder / "pairs.jsonl", "w") as lines:
        for i in range(N):
            a, b = g.choice(["red", "blue", "green", "white"]), g.choice(["circle", "square", "cross"])
            Image.fromarray(g.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
            row = {"image": f"{i}.png", "caption": f"a photo of a {a} {b}", "extra": f"a {b} {a}", "label": f"{a} {b}"}
            lines.write(json.dumps(row) + "\n")
    return folder / "pairs.jsonl"


def opened(m, file, extra=True, **more):
    columns = dict(image="image", caption="caption") | (dict(extra="extra") if extra else {})
    task = tasks.open(file, model=m, task="image-text-retrieval", columns=columns, tokenizer=TOKENS, image_size=16, **more)
    task.roles = {k: v for k, v in task.roles.items() if k in columns}
    return task


def test_a_second_caption_is_a_second_positive_in_training_alone(file):
    m = made()
    task, plain = opened(m, file), opened(m, file, extra=False)
    batch = next(task.batches("train", 5))
    size = len(batch["pixel_values"])
    assert batch["input_ids"].shape[0] == 2 * size == len(batch["labels"]) and batch["labels"].shape[1] == size
    assert batch["labels"][:size].diagonal().all() and batch["labels"][size:].diagonal().all()
    assert torch.equal(batch["labels"][:size], next(plain.batches("train", 5))["labels"])
    out = task.forward(m, batch)
    want = -F.logsigmoid(out.logits_per_text * (2 * batch["labels"].float() - 1)).mean()
    near(task.loss(m, batch), want)
    assert len(next(task.batches("test", 2))["input_ids"]) == 2
    scores = task.evaluate(m)
    assert scores == plain.evaluate(m) and 0 <= scores["recall@1"] <= 1


@pytest.mark.parametrize("chain, kept", [('full(at="connector")', {"image_states", "text_states"}),
                                         ('full(at="connector") >> lora(at="text.attn.q", rank=2)', {"image_states"}),
                                         ('full(at="connector") >> lora(at="vision.attn.q", rank=2)', {"text_states"})])
def test_what_frozen_encoders_make_is_computed_once(chain, kept, file):
    m = made()
    task, tuned = opened(m, file), luthier.attach(m, chain)
    calls = []
    for part in (m.vision, m.language):
        part.register_forward_pre_hook(lambda module, args, part=part: calls.append(part))
    m.language.base_model.register_forward_pre_hook(lambda module, args: calls.append(m.language))
    plain = [task.loss(tuned, b) for b in task.batches("train", 4, epoch=1)]
    with task.seeing(tuned):
        first = [task.loss(tuned, b) for b in task.batches("train", 4, epoch=1)]
        calls.clear()
        batches = list(task.batches("train", 4, epoch=1))
        again = [task.loss(tuned, b) for b in batches]
    assert kept <= batches[0].keys() and not {"image_states", "text_states"} - kept & batches[0].keys()
    assert ("image_states" in kept) == (m.vision not in calls) and ("text_states" in kept) == (m.language not in calls)
    assert torch.equal(torch.stack(first), torch.stack(again))
    near(torch.stack(plain), torch.stack(again))
    assert "pixel_values" in next(task.batches("train", 4))


def test_it_learns_and_comes_back_from_disk(tmp_path, file):
    m = made()
    task, tuned = opened(m, file), luthier.attach(m, 'full(at="connector")')
    start = task.evaluate(tuned, "train")["loss"]
    train(tuned, task, epochs=30, batch_size=8, lr=3e-3, progress=False, log=False)
    assert task.evaluate(tuned, "train")["loss"] < 0.8 * start
    tuned.save(tmp_path / "kept")
    b = given()
    again = luthier.load(made(), tmp_path / "kept")
    near(again.eval()(**b).logits_per_text, tuned.eval()(**b).logits_per_text)
    near(tuned.merge()(**b).logits_per_text, again(**b).logits_per_text)


def test_a_merged_pair_is_one_folder_that_any_task_opens(tmp_path, file):
    m = made()
    tuned = luthier.attach(m, 'full(at="connector")')
    with torch.no_grad():
        for _, p in tuned.trainable():
            p.add_(0.01)
    b = given()
    want = tuned.eval()(**b).logits_per_text
    tuned.merge()
    m.write(tmp_path / "dual")
    again = luthier.zoo.load(str(tmp_path / "dual"))
    near(again(**b).logits_per_text, want)
    assert luthier.zoo.about(str(tmp_path / "dual")).kind == "vision-language" and again.fresh is None
    task = opened(str(tmp_path / "dual"), file)
    assert "recall@1" in task.evaluate(task.build())
    task, model = bare(str(tmp_path / "dual"))
    task._tokenizer = TOKENS                                 # the tiny models have none beside them
    image, text = str(file.parent / "0.png"), "a red circle"
    ranked, = (x["texts"] for x in task.predict(model, [image, text]) if "texts" in x)
    assert [r["text"] for r in ranked] == [text] and -1 <= ranked[0]["score"] <= 1
