"""The weight methods on small real architectures: against peft with the same tensors, in training, through files, counted."""

import copy

import pytest
import torch

import luthier
from luthier._compat import torchvision
from luthier.errors import NotMergeable

torchvision()
transformers = pytest.importorskip("transformers")
IDS = dict(input_ids=torch.arange(18).view(2, 9) * 7 % 61, labels=torch.arange(18).view(2, 9) * 5 % 61)
PIXELS = dict(pixel_values=torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
              labels=torch.tensor([0, 1, 2, 0]))


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2)).eval()


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0)).eval()


def vit():
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8,
        num_labels=3)).eval()


def resnet():
    torch.manual_seed(0)
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3, layer_type="basic")).eval()


def batch(model):
    return PIXELS if hasattr(model.config, "num_channels") else IDS


def stir(tuned, std=0.1):
    g = torch.Generator().manual_seed(1)
    for _, t in tuned.trainable():
        t.data += std * torch.randn(t.shape, generator=g)
    return tuned


# -- peft, with the same tensors ----------------------------------------------------------------------------------------

LLAMA = ("attn.q attn.v mlp.down", ["q_proj", "v_proj", "down_proj"])
GPT2 = ("attn.o mlp.up", ["attn.c_proj", "c_fc"])
VIT = ("attn.q attn.o mlp.up", ["q_proj", "o_proj", "fc1"])


def lora_pair(peft, names, dora=False):
    def put(mod, p):
        mod.lora_A["default"].weight.data = p.A.data
        mod.lora_B["default"].weight.data = p.B.data
        if dora:
            mod.lora_magnitude_vector["default"].weight.data = p.m.data[:, 0]
    return peft.LoraConfig(r=4, lora_alpha=6, target_modules=names, use_dora=dora), put


def randlora_pair(peft, names):
    from peft.tuners._buffer_dict import BufferDict

    def put(mod, p):
        mod.randlora_lambda["default"].data, mod.randlora_gamma["default"].data = p.L.data.T, p.G.data
        n, r = p.L.shape
        B = p.B.view(-1, n, r).mT.reshape(-1, n, r)           # peft pairs column j r + i of B with row i n + j of A
        mod.randlora_A, mod.randlora_B = BufferDict({"default": p.A[:, None]}), BufferDict({"default": B})
    return peft.RandLoraConfig(r=4, randlora_alpha=8, target_modules=names, save_projection=False), put


def adalora_pair(peft, names):
    def put(mod, p):
        mod.lora_A["default"].data, mod.lora_B["default"].data = p.Q.data, p.P.data.T
        mod.lora_E["default"].data = p.lam.data[:, None]
    return peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, target_modules=names, total_step=9), put


def ia3_pair(peft, names):
    def put(mod, p):
        mod.ia3_l["default"].data = p.into.data[None] if hasattr(p, "into") else p.out.data[:, None]
    down = [n for n in names if n == "down_proj"]
    return peft.IA3Config(target_modules=names, feedforward_modules=down), put


@pytest.mark.parametrize("make, at, names", [(llama, *LLAMA), (gpt2, *GPT2), (vit, *VIT)], ids=["llama", "gpt2", "vit"])
@pytest.mark.parametrize("text, pair", [
    ("lora(rank=4, alpha=6.0)", lora_pair), ("dora(rank=4, alpha=6.0)", lambda p, n: lora_pair(p, n, True)), ("ia3()", ia3_pair),
    ("randlora(rank=4, scale=2.0)", randlora_pair), ("adalora(rank=4, target=2, alpha=6.0)", adalora_pair)],
    ids=["lora", "dora", "ia3", "randlora", "adalora"])
def test_same_outputs_and_gradients_as_peft(make, at, names, text, pair):
    peft = pytest.importorskip("peft")
    tuned = stir(luthier.attach(make(), text[:-1] + ("" if text[-2] == "(" else ", ") + f"at={at!r})"))
    config, put = pair(peft, names)
    theirs = peft.get_peft_model(make(), config).eval()
    for s in luthier.find(tuned, at):
        put(theirs.base_model.model.get_submodule(s.path), next(p for p in tuned.states.values() if p.site_name == s.name))
    x = {k: v for k, v in batch(tuned.base).items() if k != "labels"}
    close = dict(rtol=1e-4, atol=1e-5)                                          # peft's AdaLoRA divides by r + 1e-5
    ours, wanted = tuned(**x).logits, theirs(**x).logits
    assert not torch.allclose(ours, make()(**x).logits, atol=1e-3)
    torch.testing.assert_close(ours, wanted, **close)
    ours.square().mean().backward()
    wanted.square().mean().backward()
    n = sum(t.numel() for _, t in tuned.trainable())
    assert n == sum(t.numel() for t in theirs.parameters() if t.requires_grad)
    mine = sum(t.grad.double().square().sum() for _, t in tuned.trainable())
    torch.testing.assert_close(mine, sum(t.grad.double().square().sum() for t in theirs.parameters() if t.requires_grad), **close)


def test_adalora_scores_and_ranks_as_in_peft():
    """The same gradients for 30 steps of SGD: the same importance, the same masked singular values at every step."""
    peft = pytest.importorskip("peft")
    at, names, total = "attn.q attn.v", ["q_proj", "v_proj"], 30
    tuned = stir(luthier.attach(llama(), f"adalora(rank=4, target=2, at={at!r}, warmup=0.2, final=0.3, every=2)"))
    config, put = adalora_pair(peft, names)
    config = peft.AdaLoraConfig(init_r=4, target_r=2, target_modules=names, tinit=6, tfinal=9, deltaT=2, total_step=total)
    theirs = peft.get_peft_model(llama(), config)
    allocator, triples = theirs.base_model.rankallocator, []
    for s in luthier.find(tuned, at):
        p, mod = next(p for p in tuned.states.values() if p.site_name == s.name), theirs.base_model.model.get_submodule(s.path)
        put(mod, type(p)({"P": p.P.detach().clone(), "Q": p.Q.detach().clone(), "lam": p.lam.detach().clone()}, "", ""))
        triples.append((p, mod.lora_B["default"], mod.lora_E["default"], mod.lora_A["default"]))
    g = torch.Generator().manual_seed(3)
    tuned.total_steps, ranks = total, []
    for k in range(1, total):
        for p, B, E, A in triples:
            for mine, other, shape in ((p.P, B, B.T.shape), (p.lam, E, p.lam.shape), (p.Q, A, A.shape)):
                mine.grad = torch.randn(shape, generator=g)
                other.grad = mine.grad.clone().T.contiguous() if other is B else mine.grad.clone().view(other.shape)
                mine.data -= 0.05 * mine.grad
                other.data -= 0.05 * other.grad
        tuned.step()
        allocator.update_and_allocate(theirs.base_model.model, k, force_mask=k == total - 9)
        for p, _, E, _ in triples:
            torch.testing.assert_close(p.lam, E[:, 0], rtol=0, atol=0)
            name = next(n for n, t in theirs.base_model.model.named_parameters() if t is E)
            score = allocator._element_score(name)[:, 0]
            score = score + allocator._element_score(name.replace("lora_E", "lora_A")).mean(1)
            score = score + allocator._element_score(name.replace("lora_E", "lora_B")).mean(0)
            torch.testing.assert_close(tuned.chain[0].score(p), score)
        ranks.append([int((p.lam != 0).sum()) for p, *_ in triples])
    assert sum(ranks[-1]) == 2 * len(triples) and len(set(ranks[-1])) > 1       # to budget, and not uniform


# -- training -------------------------------------------------------------------------------------------------------------


def fit(tuned, steps, lr=0.02, each=lambda k: None, **batch):
    tuned.train()
    tuned.total_steps = steps
    opt = torch.optim.Adam([t for _, t in tuned.trainable()], lr=lr)
    for k in range(1, steps + 1):
        loss = tuned(**batch).loss
        loss.backward()
        opt.step()
        tuned.step(opt)
        opt.zero_grad()
        each(k)
    return loss.item(), opt


def test_adalora_follows_its_budget_and_becomes_orthogonal():
    tuned = luthier.attach(vit(), "adalora(rank=4, target=2, penalty=0.5)")
    m, n, active = tuned.chain[0], len(tuned.states), []
    first = tuned.penalty().item()
    def count(k):
        active.append(sum(int((p.lam != 0).sum()) for p in tuned.states.values()))

    loss, opt = fit(tuned, 60, lr=0.02, each=count, **PIXELS)
    assert active == [m.budget(k, 60, n) for k in range(1, 61)] and active[0] == 4 * n and active[-1] == 2 * n
    left = [len(p.lam) for p in tuned.states.values()]
    assert sum(left) == 2 * n and len(set(left)) > 1                            # dropped for good, ranks not uniform
    error = max((M @ M.T - torch.eye(len(M))).square().sum().item() for p in tuned.states.values() for M in (p.P, p.Q))
    assert error < 1e-2 and first > 1
    for _, t in tuned.trainable():
        assert opt.state[t]["exp_avg"].shape == t.shape
    before = luthier.attach(vit(), "adalora(rank=4, target=2)")(**PIXELS).loss.item()
    assert loss < before


@pytest.mark.parametrize("make", [llama, vit, resnet], ids=["llama", "vit", "resnet"])
def test_spiel_count_is_constant_and_training_helps(make):
    at = "conv" if make is resnet else "linear"
    tuned = luthier.attach(make(), f"spiel(density=0.05, every=6, gather=2, at={at!r})")
    x = batch(tuned.base)
    start, counts = tuned(**x).loss.item(), {n: len(p.v) for n, p in tuned.states.items()}
    first = {n: p.idx.clone() for n, p in tuned.states.items()}

    def check(k):
        assert all(len(p.idx.unique()) == len(p.v) == counts[n] for n, p in tuned.states.items())

    loss, opt = fit(tuned, 20, each=check, **x)
    assert loss < start and any(not torch.equal(p.idx, first[n]) for n, p in tuned.states.items())
    assert sum(counts.values()) == sum(max(1, round(0.05 * s.W.numel())) for s in luthier.find(tuned, at))
    assert all(v.numel() in (1, t.numel()) for _, t in tuned.trainable() for v in opt.state[t].values())
    if make is not resnet:                                                      # its statistics moved in training
        tuned.eval()
        logits = tuned(**x).logits
        tuned.fast = False
        torch.testing.assert_close(tuned(**x).logits, logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tuned.merge()(**x).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", ["adalora(rank=3, target=1)", "spiel(density=0.05, every=4, gather=2)"])
@pytest.mark.parametrize("steps", [5, 12])
def test_a_schedule_goes_through_a_file(text, steps, tmp_path):
    """In the middle of a run the statistics are stored, at its end nothing but what acts is."""
    tuned = luthier.attach(llama(), text)
    tuned.train()
    tuned.total_steps = 12
    opt = torch.optim.Adam([t for _, t in tuned.trainable()], lr=0.02)
    for _ in range(steps):
        tuned(**IDS).loss.backward()
        opt.step()
        tuned.step(opt)
        opt.zero_grad()
    tuned.eval().save(tmp_path / "t")
    again = luthier.load(llama(), tmp_path / "t").eval()
    assert torch.equal(again(**IDS).logits, tuned(**IDS).logits)
    a, b = tuned.states.state_dict(), again.states.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    rest = sum(t.numel() for k, t in a.items() if k.rpartition(".")[2] in ("I", "U", "cand", "sum"))
    assert (rest == 0) == (steps == 12)


def test_two_step_tuning_is_a_chain_of_two_loras():
    """A002: a domain update, then a task update on top of it, each of which comes off on its own."""
    model = llama()
    base = model(**IDS).logits
    domain = stir(luthier.attach(model, "lora(rank=2)", name="domain"))
    first = domain(**IDS).logits
    task = stir(luthier.attach(domain, "lora(rank=2)", name="task", seed=1))
    both = task(**IDS).logits
    assert not torch.allclose(both, first, atol=1e-4)
    with task.off():
        torch.testing.assert_close(model(**IDS).logits, first)
    p, q = (next(t.states.values().__iter__()) for t in (domain, task))
    s = luthier.find(model, "attn.q")[0]
    m = domain.chain[0]
    torch.testing.assert_close(m.weight(m.weight(s.W, p), q), s.W + 8 * (p.B @ p.A + q.B @ q.A))
    domain.detach()
    torch.testing.assert_close(model(**IDS).logits, _alone(task))
    task.detach()
    assert torch.equal(model(**IDS).logits, base)


def _alone(task):
    again = luthier.attach(llama(), "lora(rank=2)", seed=1)
    for (_, t), (_, u) in zip(again.trainable(), task.trainable(), strict=True):
        t.data = u.data
    return again(**IDS).logits


# -- counts on whole models -----------------------------------------------------------------------------------------------


def total(make, text):
    return sum(t.numel() for _, t in luthier.attach(make(), text).trainable())


def test_counts_on_whole_models():
    # ViT: two blocks of q k v o (32 x 32), up (64 x 32), down (32 x 64), two norms; patch embedding 32 x 192; final norm; head
    assert total(vit, "ssf()") == 2 * (2 * (4 * 32 + 64 + 32 + 2 * 32) + 32 + 32)
    assert total(vit, "bitfit()") == 2 * (4 * 32 + 64 + 32 + 2 * 32) + 32 + 32
    assert total(vit, "ia3()") == 2 * (32 + 32 + 64)
    assert total(vit, "said(dim=500)") == total(vit, "said(dim=500, layers=False)") == 500
    assert total(vit, "compacter(reduce=4, n=2)") == 2**3 + 4 * (2 * (32 + 8) + 8 + 32) + 5 * 2 * 32
    assert total(vit, "compacter(reduce=4, n=2, norms=False)") == 2**3 + 4 * (2 * (32 + 8) + 8 + 32)
    assert total(vit, "svfit()") == 2 * 2 * 32
    assert total(llama, "compacter(reduce=4, n=2)") == 2**3 + 4 * (2 * (32 + 8) + 8 + 32) + 5 * 32    # no bias in RMS norms
    assert total(gpt2, "dora(rank=4)") == 2 * 2 * (4 * 64 + 32)                  # rows of a fused weight
    # a convolution is a (d_out, d_in · kh · kw) matrix, a norm a (d, 1) one
    convs = [s for s in luthier.find(resnet(), "all") if s.layout == "conv"]
    assert total(resnet, 'lora(rank=2, at="conv")') == sum(2 * sum(s.W.shape) for s in convs if s.block is not None)
    assert total(resnet, "ssf()") == 2 * sum(s.d_out for s in luthier.find(resnet(), "all -head"))


def test_ssf_merges_exactly_where_there_are_biases_and_is_refused_where_not():
    for make in (vit, gpt2, resnet):
        tuned = stir(luthier.attach(make(), "ssf()")).eval()
        x = {k: v for k, v in batch(tuned.base).items() if k != "labels"}
        before, n = tuned(**x).logits, sum(t.numel() for t in tuned.base.parameters())
        torch.testing.assert_close(tuned.merge()(**x).logits, before, rtol=1e-4, atol=1e-5)
        assert make is resnet or n == sum(t.numel() for t in tuned.base.parameters())      # its convolutions gain a bias
    with pytest.raises(NotMergeable, match="bias"):
        stir(luthier.attach(llama(), "ssf()")).merge()


def test_compacter_trains_and_states_survive_deepcopy():
    tuned = luthier.attach(vit(), "compacter(reduce=4, n=2)")
    start = tuned(**PIXELS).loss.item()
    loss, _ = fit(tuned, 8, **PIXELS)
    assert loss < start
    twin = copy.deepcopy(tuned)
    assert len({id(p.A) for p in twin.states.values() if hasattr(p, "A")}) == 1
    assert torch.equal(twin(**PIXELS).logits, tuned(**PIXELS).logits)


def test_spiel_keeps_no_second_copy_of_the_weights():
    from luthier.cost import saved

    tuned = luthier.attach(vit(), "spiel(density=0.05)").train()
    held = [*tuned.parameters(), *tuned.buffers(), *PIXELS.values()]
    quick = saved(lambda: tuned(**PIXELS).loss, held)
    tuned.fast = False
    weights = sum(4 * s.W.numel() for s in luthier.find(tuned, "linear"))
    assert saved(lambda: tuned(**PIXELS).loss, held) > quick + weights / 2
