"""The core on tiny models: plan first, several attachments, exact undo, shared and produced state, torch's own machinery."""

import copy
import time

import pytest
import torch
from torch import nn

import luthier
from luthier import attach, attached, plan, switch, tiny
from luthier._compat import torchvision
from luthier.errors import BadOrder, DoesNotFit, NoSuchSite, NotMergeable, ScheduleNotStepped
from luthier.method import REGISTRY, Method, method


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def jiggle(tuned, std=0.1):
    g = torch.Generator().manual_seed(3)
    for _, p in tuned.trainable():
        p.data.add_(std * torch.randn(p.shape, generator=g))
    return tuned


def traces(model):
    """What an attachment could leave behind."""
    return [n for n, m in model.named_modules() if "forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks
            or any(k.startswith("_luthier") for k in m.__dict__)]


@pytest.fixture
def toy():
    """A method of the test's own, registered for the length of the test."""
    before = dict(REGISTRY)
    luthier.discover()

    def make(cls):
        cls.__module__ = "__main__"
        return method(cls)

    yield make
    for name in set(REGISTRY) - set(luthier.discover()) | set(REGISTRY) - set(before):
        if REGISTRY[name].__module__ == "__main__":
            del REGISTRY[name]


# -- plan ---------------------------------------------------------------------------------------------------------


def test_plan_touches_nothing_and_says_what_is_wrong():
    model = tiny.build("llama")
    for chain, error, said in [("lora(at='attn.qq')", NoSuchSite, "Nearest: "), ("lora >> gptq", BadOrder, "Put gptq first"),
                               ("adaptformer(at='attn.q')", DoesNotFit, "weight site"),
                               ("lora(at='attn.out')", DoesNotFit, "stream site"),
                               ("lora >> full", BadOrder, "losing lora")]:
        with pytest.raises(error, match=said):
            plan(model, chain)
    assert not traces(model)


def test_a_refused_attachment_leaves_no_trace():
    model = tiny.build("llama")
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(luthier.LuthierError, match="no site"):
        attach(model, "lora >> bitfit")                     # a Llama has no biases
    with pytest.raises(DoesNotFit, match="calibration"):
        attach(model, "gptq >> lora")
    assert not traces(model) and flags == [p.requires_grad for p in model.parameters()]


def test_attaching_to_224_linears_takes_milliseconds():
    torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=32, num_attention_heads=4,
                                         num_key_value_heads=2, vocab_size=64))
    times = []
    for _ in range(5):
        start = time.process_time()                         # its own time, not what else the machine does
        tuned = attach(model, "lora(at='linear')")
        times.append(time.process_time() - start)
        assert len(tuned.states) == 224
        tuned.detach()
    assert min(times) < 0.25, times


# -- several on one base ------------------------------------------------------------------------------------------


def test_two_step_tuning_detaches_in_any_order():
    model, batch = tiny.build("llama"), tiny.batch("llama")
    base = logits(model, batch)
    domain = jiggle(attach(model, "lora", name="domain"))
    with_domain = logits(model, batch)
    task = jiggle(attach(model, "lora(rank=4)", name="task"), 0.2)
    both = logits(model, batch)
    assert attached(model) == {"domain": True, "task": True}
    assert not any(p.requires_grad for p in domain.states.parameters())      # the first step is frozen under the second
    switch(model, "domain")
    assert torch.equal(logits(model, batch), with_domain)
    switch(model)
    assert torch.equal(logits(model, batch), base)
    switch(model, "domain", "task")
    assert torch.equal(logits(model, batch), both)
    domain.detach()
    only_task = logits(model, batch)
    assert not torch.equal(only_task, base)
    task.detach()
    assert torch.equal(logits(model, batch), base) and not traces(model)
    task = jiggle(attach(model, "lora(rank=4)", name="task"), 0.2)
    assert torch.equal(logits(model, batch), only_task)


def test_two_attachments_equal_one_chain():
    model, batch = tiny.build("gpt2"), tiny.batch("gpt2")
    one = attach(model, "lora(at='linear') >> ssf >> houlsby(width=8)")
    jiggle(one)
    expect = logits(model, batch)
    values = [p.data.clone() for _, p in one.trainable()]
    one.detach()
    params = attach(model, "lora(at='linear') >> ssf").trainable()     # frozen, and so no longer listed, under the second
    params += attach(model, "houlsby(width=8)").trainable()
    for (_, p), v in zip(params, values, strict=True):
        p.data.copy_(v)
    assert torch.equal(logits(model, batch), expect)


def test_clashes_are_refused():
    model = tiny.build("llama")
    attach(model, "lora", name="a")
    with pytest.raises(BadOrder, match="already"):
        attach(model, "lora", name="a")
    with pytest.raises(BadOrder, match="losing lora"):
        attach(model, "full", name="b")
    b = attach(model, "lora", name="b")
    with pytest.raises(BadOrder, match="attached to"):
        b.merge()


def test_off_is_the_base_and_on_again_is_not():
    model, batch = tiny.build("vit"), tiny.batch("vit")
    base = logits(model, batch)
    tuned = jiggle(attach(model, "vpt(n=2) >> lora"))
    on = logits(tuned, batch)
    with tuned.off():
        assert torch.equal(logits(model, batch), base)
    assert torch.equal(logits(model, batch), on) and not torch.equal(on, base)


# -- undo ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "llama", "vit", "resnet"])
def test_merge_then_detach_restores_the_very_tensors(name, dtype):
    model, batch = tiny.build(name, dtype), tiny.batch(name, dtype)
    before = {n: (p, p.detach().clone(), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)}
    base = logits(model, batch)
    chain = "lora(at='conv')" if name == "resnet" else "lora(at='linear head')"
    tuned = jiggle(attach(model, chain)).merge()
    merged = logits(model, batch)
    assert not torch.equal(merged, base)
    with pytest.raises(NotMergeable):
        tuned.active = False
    tuned.detach()
    for n, p in model.named_parameters(remove_duplicate=False):
        q, value, flag = before[n]
        assert p is q and torch.equal(p, value) and p.requires_grad == flag, n
    assert torch.equal(logits(model, batch), base) and not traces(model)


def test_tied_weights_say_so_and_stay_tied_or_not():
    model, batch = tiny.build("gpt2"), tiny.batch("gpt2")
    tuned = jiggle(attach(model, "probe"))                  # the head of a GPT-2 is its embedding
    assert any("tied" in n for n in tuned.notes)
    table = model.transformer.wte.weight
    apart = logits(model, batch)
    tuned.merge()
    assert model.lm_head.weight is not model.transformer.wte.weight is table and not model.config.tie_word_embeddings
    torch.testing.assert_close(logits(model, batch), apart)
    tuned.detach()
    assert model.lm_head.weight is model.transformer.wte.weight is table and model.config.tie_word_embeddings

    tuned = attach(model, "full")
    assert sum(p.numel() for _, p in tuned.trainable()) == sum(p.numel() for p in model.parameters())
    together = logits(jiggle(tuned), batch)
    tuned.merge()
    assert model.lm_head.weight is model.transformer.wte.weight and model.config.tie_word_embeddings
    torch.testing.assert_close(logits(model, batch), together)
    tuned.detach()


# -- state --------------------------------------------------------------------------------------------------------


def test_state_may_be_shared_by_sites(toy):
    @toy
    class sharing(Method):
        at: str = "attn.q attn.v"

        def init(self, site):
            return dict(v=site.shared("v", lambda: site.zeros(site.d_in), group=site.role), s=site.ones(1))

        def weight(self, W, p):
            return W + p.s * p.v

    model = tiny.build("llama")
    tuned = attach(model, sharing())
    assert len(tuned.states) == 4 and len(tuned.trainable()) == 2 + 4      # one v a role, one s a site
    q = [s.v for n, s in tuned.states.items() if n.endswith("attn/q")]
    assert q[0] is q[1]
    assert copy.deepcopy(tuned).states["0:sharing@block/0/attn/q"].v is not q[0]
    tuned.to(torch.float64)
    assert tuned.states["0:sharing@block/0/attn/q"].v is tuned.states["0:sharing@block/1/attn/q"].v


def test_shared_frozen_tensors_stay_shared_when_cast(toy):
    @toy
    class basis(Method):
        at: str = "attn.q"

        def init(self, site):
            return dict(R=site.shared("R", lambda: site.fixed(site.random(site.d_out, site.d_in))), s=site.zeros(1))

        def weight(self, W, p):
            return W + p.s * p.R

    tuned = attach(tiny.build("llama"), basis()).to(torch.float64)
    a, b = tuned.states.values()
    assert a.R is b.R and a.R.dtype == torch.float64


def test_state_may_be_produced_from_a_context(toy):
    @toy
    class hyper(Method):
        at: str = "attn.q"

        def init(self, site):
            return dict(net=site.shared("net", lambda: site.normal(site.d_out, 3, std=0.1)))

        def produce(self, ctx, p):
            return dict(shift=p.net @ ctx["task"])

        def weight(self, W, p):
            return W + p.shift[:, None]

    model, batch = tiny.build("llama"), tiny.batch("llama")
    base, tuned = logits(model, batch), attach(model, hyper())
    tuned.context = {"task": torch.zeros(3)}
    assert torch.equal(logits(tuned, batch), base)
    out = []
    for i in range(2):
        tuned.context = {"task": torch.eye(3)[i]}
        out.append(logits(tuned, batch))
    assert not torch.allclose(*out)
    tuned(**batch).logits.sum().backward()
    assert tuned.trainable()[0][1].grad.abs().sum() > 0


def test_parameters_appear_and_vanish_with_optimizer_state_kept_for_survivors(toy):
    @toy
    class shrinking(Method):
        at: str = "attn.q"
        example = {}

        def init(self, site):
            return dict(v=site.ones(4, site.d_in))

        def weight(self, W, p):
            return W + p.v.sum(0)

        def step(self, run):
            for p in run.states.values():
                if run.k == 2:
                    p.resize("v", torch.cat([p.v[[3, 1]], torch.zeros(1, p.v.shape[1])]), torch.tensor([3, 1, -1]))

    model, batch = tiny.build("llama"), tiny.batch("llama")
    tuned = attach(model, shrinking())
    params = [p for _, p in tuned.trainable()]
    opt = torch.optim.AdamW(params, lr=0.1)
    for k in range(4):
        tuned(**batch).logits.square().mean().backward()
        opt.step()
        before = {p: opt.state[p]["exp_avg"].clone() for p in params}
        tuned.step(opt)
        if k == 1:
            for p in params:
                m = opt.state[p]["exp_avg"]
                assert m.shape == p.shape == (3, 32)
                assert torch.equal(m[0], before[p][3]) and torch.equal(m[1], before[p][1]) and not m[2].any()
        opt.zero_grad()


def test_a_schedule_nobody_steps_is_an_error():
    model, batch = tiny.build("llama"), tiny.batch("llama")
    tuned = attach(model, "adalora")
    tuned.train()
    for _ in range(3):
        tuned(**batch).logits.sum().backward()
    with pytest.raises(ScheduleNotStepped, match="tuned.step"):
        tuned.merge()
    tuned.total_steps = 10
    tuned.step()
    tuned.merge()


def test_calibration_runs_block_by_block_and_leaves_padding_out(toy):
    seen = []

    @toy
    class counting(Method):
        at: str = "mlp.up"
        exempt = {"identity_at_init": "halves the weight"}

        def observe(self, x):
            seen.append((len(x), x.abs().sum().item()))
            return x.T @ x

        def init(self, site, seen):
            return dict(H=seen)

        def weight(self, W, p):
            return W / 2

    model, batch = tiny.build("llama"), tiny.batch("llama")
    batch = {k: v for k, v in batch.items() if k != "labels"}
    tuned = attach(model, counting(), data=[batch, batch])
    real = int(batch["attention_mask"].sum())
    assert [n for n, _ in seen] == [real] * 4               # two blocks, two batches, no padding
    H = tuned.states["0:counting@block/1/mlp/up"].H
    tuned.detach()
    model.model.layers[0].mlp.up_proj.weight.data /= 2      # what block 1 meets once block 0 is halved
    x = []
    h = model.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda m, a: x.append(a[0][batch["attention_mask"].bool()]))
    logits(model, batch)
    h.remove()
    torch.testing.assert_close(H, 2 * x[0].T @ x[0])


def test_calibration_with_gradients(toy):
    @toy
    class fisher(Method):
        at: str = "mlp.up"

        def observe(self, x, g):
            return (g.T @ x).square()

        def init(self, site, seen):
            return dict(F=seen, s=site.zeros(1))

        def weight(self, W, p):
            return W + p.s

    model, batch = tiny.build("llama"), tiny.batch("llama")
    batch = {**batch, "labels": batch["input_ids"]}
    P = model.model.layers[1].mlp.up_proj.weight
    expect = 0                                              # of each sample alone
    for i in range(len(batch["input_ids"])):
        model(**{k: v[i:i + 1] for k, v in batch.items()}).loss.backward()
        expect = expect + P.grad.square()
        model.zero_grad(set_to_none=True)
    tuned = attach(model, fisher(), data=[batch])
    torch.testing.assert_close(tuned.states["0:fisher@block/1/mlp/up"].F, expect)
    assert all(p.grad is None for p in model.parameters())


# -- torch's own machinery ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", ["lora(at='linear') >> ssf", "vpt(n=2)", "ladder(reduce=4)", "prefix(n=2)"])
def test_deepcopy_is_whole_and_independent(chain):
    model, batch = tiny.build("vit"), tiny.batch("vit")
    base = logits(model, batch)
    tuned = jiggle(attach(model, chain))
    expect = logits(tuned, batch)
    twin, bare = copy.deepcopy(tuned), copy.deepcopy(model)
    assert torch.equal(logits(twin, batch), expect) and torch.equal(logits(bare, batch), expect)
    for _, p in twin.trainable():
        p.data.zero_()
    assert torch.equal(logits(tuned, batch), expect)
    assert torch.equal(logits(twin.detach(), batch), base)
    assert torch.equal(logits(tuned, batch), expect) and torch.equal(logits(tuned.detach(), batch), base)


@pytest.mark.parametrize("name, chain", [("llama", "lora(at='linear')"), ("llama", "prefix(n=2)"),
                                         ("vit", "vpt(n=2) >> houlsby(width=4)")])
def test_compiles_without_a_graph_break(name, chain):
    model, batch = tiny.build(name), tiny.batch(name)
    tuned = jiggle(attach(model, chain))
    expect = logits(tuned, batch)
    torch._dynamo.reset()
    assert torch._dynamo.explain(tuned)(**batch).graph_break_count == 0
    torch._dynamo.reset()
    torch.testing.assert_close(logits(torch.compile(tuned, backend="aot_eager"), batch), expect)
    torch._dynamo.reset()


@pytest.mark.parametrize("name, chain", [("llama", "dora(at='linear')"), ("llama", "prompt(n=2)"), ("vit", "ladder(reduce=4)")])
def test_gradient_checkpointing_gives_the_same_gradients(name, chain):
    model, batch = tiny.build(name), tiny.batch(name)
    tuned = jiggle(attach(model, chain)).train()

    def grads():
        tuned.zero_grad(set_to_none=True)
        tuned(**batch).logits.square().mean().backward()
        return [p.grad.clone() for _, p in tuned.trainable()]

    plain = grads()
    model.gradient_checkpointing_enable()
    for a, b in zip(plain, grads(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_hand_written_module():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return x + self.down(self.up(self.norm(x)).relu())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(8, 2)

        def forward(self, x):
            for b in self.blocks:
                x = b(x)
            return self.head(x.mean(1))

    torch.manual_seed(0)
    net, x = Net(), torch.randn(2, 5, 8)
    base = net(x).detach()
    tuned = attach(net, "lora(at='mlp.up mlp.down', rank=2) >> probe")
    assert torch.equal(tuned(x), base)
    jiggle(tuned)
    assert not torch.allclose(tuned(x), base)
    assert torch.equal(tuned.detach()(x), base)
