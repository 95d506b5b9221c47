"""The fast path beside a layer and what is kept for the backward pass: against the plain formula, in float64, gradients too."""

import copy

import pytest
import torch
from torch import nn

import luthier
from luthier import cost, remat, thin, tiny
from luthier.method import Method


def close(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


class Three(nn.Module):
    """q, k and v of one input, k perhaps of another; then a layer of its own."""

    def __init__(self, d=12, bias=True, other=False):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias) for _ in range(4))
        self.other = other

    def forward(self, input):
        x = input.tanh()
        return self.o(self.q(x) * self.k(x.flip(-1) if self.other else x).sigmoid() + self.v(x))


def gradients(tuned, x, fast):
    tuned.fast = fast
    out = tuned(x)
    wanted = [p for _, p in tuned.trainable()] + ([x] if x.requires_grad else [])
    return out, torch.autograd.grad(out.square().sum(), wanted)


def stirred(model, chain):
    tuned = luthier.attach(model, chain)
    g = torch.Generator().manual_seed(1)
    for _, p in tuned.trainable():
        p.data += 0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return tuned.train()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("chain", [
    "lora(at='linear', rank=3)", "dora(at='linear', rank=3)", "lora(at='linear', rank=2) >> lora(at='linear', rank=3, alpha=5)",
    "dora(at='linear', rank=2) >> lora(at='linear', rank=3)", "lora(at='linear', rank=2) >> dora(at='linear', rank=2)",
    "lora(at='attn.q attn.v', rank=3)", "lora(at='linear', rank=3) >> ssf(at='linear')"])
def test_same_numbers_and_gradients_as_the_formula(chain, bias, other):
    torch.manual_seed(0)
    tuned = stirred(Three(bias=bias, other=other).double(), chain)
    for shape in ((2, 5, 12), (7, 12), (12,)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        want, slow = gradients(tuned, x, fast=False)
        for _ in range(3):                                  # the second time the mates know each other
            got, quick = gradients(tuned, x, fast=True)
            close(got, want)
            for a, b in zip(quick, slow, strict=True):
                close(a, b)
        with torch.no_grad():
            tuned.fast = True
            close(tuned(x), want)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "vit"])
@pytest.mark.parametrize("chain", ["lora(rank=3)", "dora(rank=3)", "lora(at='linear', rank=2)"])
def test_fused_and_turned_layers(name, chain):
    model, batch = tiny.build(name).double(), tiny.batch(name)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    tuned = stirred(model, chain).eval()
    found = []
    for fast in (False, True, True):
        tuned.fast = fast
        out = tuned(**batch)
        out = getattr(out, "logits", None) if getattr(out, "logits", None) is not None else out.last_hidden_state
        found.append((out, *torch.autograd.grad(out.square().sum(), [p for _, p in tuned.trainable()])))
    for got in found[1:]:
        for a, b in zip(got, found[0], strict=True):
            close(a, b, 1e-8)


def products(tuned, x):
    """Shapes of the thin first products of a forward pass."""
    seen, made = [], thin.down
    try:
        thin.down = lambda rows, As, p=0.0: seen.append([len(A) for A in As]) or made(rows, As, p)
        out = tuned(x)
    finally:
        thin.down = made
    return seen, out


def test_one_product_for_all_that_share_an_input():
    tuned, x = stirred(Three(), "lora(at='linear', rank=3)"), torch.randn(4, 12)
    assert products(tuned, x)[0] == [[3, 3, 3], [3]]
    assert products(copy.deepcopy(tuned), x)[0] == [[3, 3, 3], [3]]         # nothing of a running graph is copied
    tuned.model.other = True                                # k is given another input than q and v
    seen, out = products(tuned, x)
    tuned.fast = False
    close(out, tuned(x), 1e-5)
    tuned.fast, tuned.model.other = True, False
    with tuned.off():
        tuned(x)
    assert products(tuned, x)[0] == [[3, 3, 3], [3]]


def test_dropout_is_what_it_says_and_keeps_no_mask():
    torch.manual_seed(0)
    for p in (0.05, 0.5, 1.0):
        x = torch.ones(200, 300)
        y = thin._dropping(x, p, 7)(x)
        kept = y != 0
        assert abs(float(kept.float().mean()) - (1 - p)) < 0.01 and torch.equal(y, thin._dropping(x, p, 7)(x))
        assert torch.equal(y[kept], x[kept])
        if p < 1:
            assert not torch.equal(kept, thin._dropping(x, p, 8)(x) != 0)
    tuned = stirred(Three().double(), "lora(at='attn.q', rank=3, dropout=0.5)")
    x, p = torch.randn(6, 12, dtype=torch.float64), next(iter(tuned.states.values()))
    state = torch.get_rng_state()
    out = tuned(x)
    grads = torch.autograd.grad(out.square().sum(), [p.A, p.B])
    torch.set_rng_state(state)
    seed, m = thin._seed(), tuned.model
    h = x.tanh()
    q = m.q.weight @ h.T + m.q.bias[:, None] + 2 * 16 / 3 * p.B @ p.A @ thin._dropping(h, 0.5, seed)(h).T
    want = nn.functional.linear(q.T * nn.functional.linear(h, m.k.weight, m.k.bias).sigmoid()
                                + nn.functional.linear(h, m.v.weight, m.v.bias), m.o.weight, m.o.bias)
    close(out, want)
    for a, b in zip(grads, torch.autograd.grad(want.square().sum(), [p.A, p.B]), strict=True):
        close(a, b)
    tuned.eval()
    close(tuned(x), tuned(x))


@pytest.mark.parametrize("chain", ["lora(at='linear', rank=3, dropout=0.4)",
                                   "lora(at='attn.k attn.v', rank=2, dropout=0.3) >> lora(at='linear', rank=2)"])
def test_dropout_is_the_same_when_a_block_is_run_again(chain):
    """Checkpointing, whose first pass has no gradients (reentrant) or has them: the gradient is that of the loss."""
    torch.manual_seed(0)
    tuned, found = stirred(nn.Sequential(nn.Linear(12, 12), Three()).double(), chain), []
    block, x = tuned.model[1].forward, torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    for reentrant in (None, False, True):
        tuned.model[1].forward = block if reentrant is None else \
            lambda input, how=reentrant: torch.utils.checkpoint.checkpoint(block, input, use_reentrant=how)
        torch.manual_seed(7)
        out = tuned(x)
        p = [t for _, t in tuned.trainable()]
        out.square().sum().backward()
        found.append((out, x.grad, *(t.grad for t in p)))
        for t in (x, *p):
            t.grad = None
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            close(a, b)


@pytest.mark.parametrize("chain", ["lora(at='linear', rank=2)", "dora(at='linear', rank=2)",
                                   "dora(at='linear', rank=2) >> dora(at='attn.q', rank=2)"])
def test_second_derivatives(chain):
    tuned = stirred(Three().double(), chain)
    x = torch.randn(3, 12, dtype=torch.float64)
    found = []
    for fast in (False, True):
        tuned.fast = fast
        p = [t for _, t in tuned.trainable()]
        g = torch.autograd.grad(tuned(x).square().sum(), p, create_graph=True)
        found.append(torch.autograd.grad(sum(v.square().sum() for v in g), p))
    for a, b in zip(*found, strict=True):
        close(a, b)


@pytest.mark.parametrize("chain", ["lora(at='linear')", "dora(at='linear')", "ia3(at='linear')", "ssf(at='linear')",
                                   "bitfit(at='linear')"])
def test_under_autocast_a_layer_s_output_keeps_its_type(chain):
    tuned, x = stirred(Three(), chain), torch.randn(4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        outs = [tuned(x) for tuned.fast in (False, True)]
        with torch.no_grad():
            outs.append(tuned(x))
    assert [o.dtype for o in outs] == 3 * [torch.bfloat16]
    for o in outs[1:]:
        torch.testing.assert_close(o, outs[0], rtol=0.05, atol=0.1)


# -- what is kept ------------------------------------------------------------------------------------------------------


def saved(tuned, batch):
    held = [*tuned.parameters(), *tuned.buffers(), *batch.values()]
    return cost.saved(lambda: tuned(**batch).loss, held)


@pytest.mark.parametrize("name, chain", [
    ("llama", "lora(at='linear')"), ("llama", "full()"), ("gpt2", "lora(at='linear')"), ("bert", "lora(at='linear')"),
    ("vit", "dora(at='linear')"), ("vit", "houlsby(width=8)"), ("t5", "lora(at='linear')")])
def test_recipes_change_no_gradient(name, chain, monkeypatch):
    monkeypatch.setattr(remat, "LEAST", 1)
    model, batch = tiny.build(name), tiny.batch(name)
    if "labels" not in batch:
        batch = {**batch, "labels": torch.zeros(model(**batch).logits.shape[:-1], dtype=torch.long)}
    tuned = stirred(model, chain).eval()
    found, bytes_kept = [], []
    for lean in (False, True):
        tuned.lean = lean
        bytes_kept.append(saved(tuned, batch))
        found.append(torch.autograd.grad(tuned(**batch).loss, [p for _, p in tuned.trainable()], allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    # a ReLU keeps its own output and a ViT's norms are few: there recipes have little to save
    assert bytes_kept[1] < (0.9 if name in ("llama", "gpt2", "bert") else 0.99) * bytes_kept[0]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)

    def forward(self, input):
        return self.down(self.act(self.up(self.norm(input)))) + input


def test_hooks_around_it_see_what_is_kept_and_only_that():
    tuned, x, seen = stirred(Block(), "lora(at='linear')"), torch.randn(128, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(tuple(t.shape)) or t, lambda t: t):
        out = tuned(x)
    assert (128, 64) in seen and seen.count((128, 128)) == 1             # the norm's input, and the activation's, which is up's
    tuned.lean = False
    want = torch.autograd.grad(tuned(x).square().sum(), x)
    close(torch.autograd.grad(out.square().sum(), x)[0], want[0], 1e-5)


def test_a_tensor_changed_in_place_is_noticed():
    tuned, x = stirred(Block(), "lora(at='linear')"), torch.randn(128, 64, requires_grad=True)
    y = x * 1.0
    out = tuned(y)
    y.detach().mul_(2)                                      # the norm's own input, which the gradient needs
    with pytest.raises(RuntimeError, match="in place.*tuned.fast = False"):
        out.sum().backward()


def test_one_attachment_inside_another_and_off():
    first = stirred(Block(), "lora(at='linear')")
    both = luthier.attach(first, "lora(at='head')").train()
    x = torch.randn(128, 64, requires_grad=True)
    a = torch.autograd.grad(both(x).square().sum(), x)[0]
    both.lean = first.lean = False
    close(a, torch.autograd.grad(both(x).square().sum(), x)[0], 1e-5)


def test_a_method_from_outside_gets_the_fast_path():
    class twice(Method):
        at: str = "linear"

        def init(self, site):
            return dict(A=site.normal(2, site.d_in), B=site.normal(site.d_out, 2))

        def weight(self, W, p):
            return W + 2 * p.B @ p.A

        def low_rank(self, p):
            return dict(A=p.A, B=p.B, scale=2.0)

    import dataclasses

    tuned = luthier.attach(Three().double(), dataclasses.dataclass(frozen=True, repr=False)(twice)()).train()
    x = torch.randn(4, 12, dtype=torch.float64)
    (a, ga), (b, gb) = (gradients(tuned, x, fast) for fast in (False, True))
    close(a, b)
    for u, v in zip(ga, gb, strict=True):
        close(u, v)


@pytest.mark.parametrize("chain", ["lora(at='linear', rank=2)", "lora(at='attn.q', rank=2) >> dora(at='linear', rank=2)"])
def test_functional_transforms_and_batched_gradients(chain):
    tuned = stirred(Three().double(), chain)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    want, = torch.autograd.grad(tuned(x).square().sum(), x)
    close(torch.func.grad(lambda x: tuned(x).square().sum())(x.detach()), want)
    close(torch.func.vmap(tuned)(x.detach()[:, None])[:, 0], tuned(x))
    rows = torch.autograd.functional.jacobian(tuned, x.detach())
    close(torch.autograd.functional.jacobian(tuned, x.detach(), vectorize=True), rows)
    close((2 * tuned(x)[..., None, None] * rows).sum((0, 1)), want)
