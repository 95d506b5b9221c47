"""Low-rank methods with schedules, gradient transforms and grown or cut ranks: golden numbers, files, whole small models."""

import pytest
import torch
from torch import nn

import luthier
from luthier import tiny
from luthier.errors import BadChain, ScheduleNotStepped
from luthier.method import parse
from luthier.state import State


def state(**tensors):
    """A state outside any model; plain lists become trained tensors."""
    return State({k: nn.Parameter(torch.tensor(v, dtype=torch.float64)) if isinstance(v, list) else v
                  for k, v in tensors.items()}, "0:test", "head")


def layer(d_in=5, d_out=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(d_in, d_out, dtype=torch.float64))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)
    return model, torch.randn(7, d_in, generator=g, dtype=torch.float64)


def only(tuned):
    return next(iter(tuned.states.values()))


def stir(tuned, by=0.3, seed=1):
    g = torch.Generator().manual_seed(seed)
    for _, t in tuned.trainable():
        t.data += by * torch.randn(t.shape, generator=g, dtype=t.dtype)
    return tuned


def fit(tuned, name, steps, lr=0.02, each=lambda k: None, optimizer=torch.optim.Adam):
    """Steps of training a tiny model to some fixed random outputs."""
    batch = tiny.batch(name)
    want = torch.randn(tiny.output(tuned, batch).shape, generator=torch.Generator().manual_seed(2))
    tuned.train()
    tuned.total_steps = tuned.total_steps or steps
    opt, losses = optimizer([t for _, t in tuned.trainable()], lr=lr), []
    for k in range(1, steps + 1):
        loss = (tiny.output(tuned, batch) - want).square().mean() + tuned.penalty()
        loss.backward()
        losses.append(loss.item())
        opt.step()
        tuned.step(opt)
        opt.zero_grad()
        each(k)
    return losses, opt


def through_a_file(tuned, name, folder):
    """What a loaded copy computes and holds is the saved one's, to the bit; merged it computes the same."""
    y = tiny.output(tuned.eval(), tiny.batch(name)).detach()
    tuned.save(folder)
    again = luthier.load(tiny.build(name), folder).eval()
    assert torch.equal(tiny.output(again, tiny.batch(name)), y)
    a, b = tuned.states.state_dict(), again.states.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    torch.testing.assert_close(tiny.output(again.merge(), tiny.batch(name)), y, rtol=1e-4, atol=1e-4)
    return again.unmerge()


# -- SoRA -----------------------------------------------------------------------------------------------------------------


def test_sora_by_hand():
    m, = parse("sora(rank=2, alpha=4.0)")
    p = state(A=[[1.0, 2.0], [3.0, 4.0]], g=[0.5, -1.0], B=[[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
    # alpha / r = 2;  Bᵀ diag(g) A = [1 0; 0 1; 2 1] diag(.5, -1) [1 2; 3 4]
    delta = torch.tensor([[0.5, 1.0], [-3.0, -4.0], [-2.0, -2.0]], dtype=torch.float64)
    W = torch.arange(6.0, dtype=torch.float64).view(3, 2)
    torch.testing.assert_close(m.weight(W, p), W + 2 * delta, rtol=0, atol=0)


def test_sora_gates_find_the_lasso_solution():
    """Gradient steps of η on ½‖g - a‖² and T_ξ end at the minimum of ½‖g - a‖² + λ‖g‖₁ with λ = ξ / η, known in closed form."""
    model, _ = layer()
    tuned = luthier.attach(model, "sora(rank=6, xi=0.05, at='head')")
    p, eta, a = only(tuned), 0.25, torch.tensor([1.0, -0.6, 0.19, -0.21, 0.0, 0.2], dtype=torch.float64)
    opt, tuned.total_steps = torch.optim.SGD([p.g], lr=eta), 10**6
    for _ in range(300):
        opt.zero_grad()
        (0.5 * (p.g - a).square().sum()).backward()
        opt.step()
        tuned.step(opt)
    wanted = torch.tensor([0.8, -0.4, 0.0, -0.01, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(p.g.detach(), wanted, rtol=0, atol=1e-9)
    assert (p.g[[2, 4, 5]] == 0).all()                                          # zeros to the bit


def test_sora_schedule_by_hand():
    m, = parse("sora(xi=0.1, peak=0.5, stages=3)")
    assert [round(m.threshold(k, 9), 9) for k in range(1, 10)] == [0.1] * 3 + [0.3] * 3 + [0.5] * 3
    assert {parse("sora(xi=0.1)")[0].threshold(k, 9) for k in range(1, 10)} == {0.1}
    with pytest.raises(ScheduleNotStepped, match="total_steps"):
        luthier.attach(tiny.build("vit"), "sora()").step()


def test_sora_penalty_is_the_mean_gate():
    tuned = luthier.attach(tiny.build("vit"), "sora(rank=3, penalty=2.0)")
    gates = torch.cat([p.g for p in tuned.states.values()])
    torch.testing.assert_close(tuned.penalty(), 2 * gates.abs().mean())
    assert luthier.attach(tiny.build("vit"), "sora(rank=3)").penalty() == 0


def test_sora_deletes_zeroed_ranks_and_computes_the_same(tmp_path):
    tuned = luthier.attach(tiny.build("llama"), "sora(rank=6, xi=0.01)")
    seen = {}

    def watch(k):
        seen[k] = [int((p.g != 0).sum()) for p in tuned.states.values()]
        if k == 29:
            assert all(len(p.g) == 6 for p in tuned.states.values())

    losses, opt = fit(tuned, "llama", 30, each=watch)
    ranks = [len(p.g) for p in tuned.states.values()]
    assert ranks == seen[30] and sum(ranks) < 6 * len(ranks) and len(set(ranks)) > 1 and losses[-1] < losses[0]
    for p in tuned.states.values():
        assert p.A.shape[0] == p.B.shape[0] == len(p.g) and (p.g != 0).all()
    assert all(opt.state[t]["exp_avg"].shape == t.shape for _, t in tuned.trainable())
    through_a_file(tuned, "llama", tmp_path / "s")


def test_a_cut_sora_is_the_gated_one():
    tuned = stir(luthier.attach(tiny.build("llama"), "sora(rank=6, xi=0.0)"))
    for i, p in enumerate(tuned.states.values()):
        p.g.data[: 2 * i] = 0                                                   # 0, 2, 4 and all 6 gates of four sites
    before, tuned.total_steps = tiny.output(tuned, tiny.batch("llama")), 1
    tuned.step()
    assert [len(p.g) for p in tuned.states.values()] == [6, 4, 2, 0]
    torch.testing.assert_close(tiny.output(tuned, tiny.batch("llama")), before, rtol=1e-5, atol=1e-5)


# -- DyLoRA ---------------------------------------------------------------------------------------------------------------


def test_dylora_by_hand():
    m, = parse("dylora(rank=3, alpha=6.0)")
    A, B = [[1.0, 0.0], [2.0, 1.0], [5.0, 5.0]], [[1.0, 1.0, 7.0], [0.0, 3.0, 7.0]]
    p, x = state(A=A, B=B, b=2), torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    # alpha / b = 3 and two of three ranks:  [1 1; 0 3] [1 0; 2 1] = [3 1; 6 3]
    W = torch.zeros(2, 2, dtype=torch.float64)
    assert m.weight(W, p).tolist() == [[9.0, 3.0], [18.0, 9.0]]
    assert m.fast(x, torch.zeros(1, 2, dtype=torch.float64), p).tolist() == [[6.0, 9.0]]


@pytest.mark.parametrize("frozen", [False, True])
def test_dylora_trains_the_drawn_block_or_its_last_row_alone(frozen):
    model, x = layer()
    tuned = stir(luthier.attach(model, f"dylora(rank=5, alpha=2.0, frozen={frozen}, at='head')", seed=4)).train()
    p, drawn = only(tuned), set()
    for _ in range(40):
        b = p.b
        drawn.add(b)
        y = tuned(x)
        torch.testing.assert_close(y, nn.functional.linear(x, model[0].weight, model[0].bias)
                                   + 2 / b * x @ p.A[:b].T @ p.B[:, :b].T)
        A, B = torch.autograd.grad(y.square().sum(), (p.A, p.B))
        first = b - 1 if frozen else 0
        rows = [i for i in range(5) if A[i].any()]
        assert rows == [i for i in range(5) if B[:, i].any()] == list(range(first, b))
        tuned.step()
    assert drawn == {1, 2, 3, 4, 5}


def test_dylora_draws_from_its_distribution_and_the_same_rank_everywhere():
    tuned = luthier.attach(tiny.build("vit"), "dylora(rank=4, low=2)", seed=1)
    for _ in range(5):
        assert len({p.b for p in tuned.states.values()}) == 1
        tuned.step()
    m, = parse("dylora(rank=4, low=2)")
    counts = torch.bincount(torch.tensor([m.draw(7, k) for k in range(3000)]), minlength=5) / 3000
    torch.testing.assert_close(counts, torch.tensor([0, 0, 1 / 3, 1 / 3, 1 / 3]), rtol=0, atol=0.03)
    m, = parse("dylora(rank=3, geometric=0.5)")
    counts = torch.bincount(torch.tensor([m.draw(7, k) for k in range(3000)]), minlength=4) / 3000
    torch.testing.assert_close(counts, torch.tensor([0, 4 / 7, 2 / 7, 1 / 7]), rtol=0, atol=0.03)
    with pytest.raises(BadChain, match="low"):
        parse("dylora(rank=2, low=3)")


def test_dylora_serves_every_rank_merged_and_from_a_file(tmp_path):
    tuned = luthier.attach(tiny.build("llama"), "dylora(rank=4)")
    losses, _ = fit(tuned, "llama", 20)
    assert losses[-1] < losses[0]
    batch, outs = tiny.batch("llama"), []
    for b in (1, 2, 3, 4):
        tuned.eval().context = {"rank": b}
        outs.append(tiny.output(tuned, batch).detach())
        own = luthier.attach(tiny.build("llama"), f"lora(rank={b})")                # a LoRA that holds the first b ranks
        for p, q in zip(tuned.states.values(), own.states.values(), strict=True):
            q.A.data, q.B.data = p.A.data[:b], p.B.data[:, :b]
        torch.testing.assert_close(tiny.output(own, batch), outs[-1], rtol=1e-4, atol=1e-4)
        tuned.train().merge()                                                       # merged in training, but for inference
        torch.testing.assert_close(tiny.output(tuned.eval(), batch), outs[-1], rtol=1e-4, atol=1e-4)
        tuned.unmerge()
    assert not torch.allclose(outs[0], outs[3], atol=1e-3)
    again = through_a_file(tuned, "llama", tmp_path / "d")
    again.context = {"rank": 2}
    torch.testing.assert_close(tiny.output(again, batch), outs[1])
    again.context = {"rank": 5}
    with pytest.raises(BadChain, match="1 to 4"):
        again(**batch)


# -- ALLoRA ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
def test_allora_scales_the_gradient_row_by_row_and_nothing_else(fast):
    model, x = layer()
    tuned = luthier.attach(model, "allora(rank=2, eta=3.0, at='head')")
    plain = luthier.attach(layer()[0], "lora(rank=2, alpha=2.0, at='head')")
    tuned.fast, p, q = fast, only(stir(tuned)), only(plain)
    q.A.data, q.B.data = p.A.data.clone(), p.B.data.clone()
    x = x.view(7, 1, 5).requires_grad_()
    y, z = tuned(x), plain(x)
    torch.testing.assert_close(y, z)                                                # the forward pass is LoRA's
    G = torch.randn(7, 1, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    A, B, X = torch.autograd.grad(y, (p.A, p.B, x), G)
    torch.testing.assert_close(X, torch.autograd.grad(z, x, G)[0])                   # layers below get the true gradient
    full = G.flatten(0, 1).T @ x.detach().flatten(0, 1)                              # that of B A
    s = torch.tensor([1 / (sum(v * v for v in row) ** 0.5 + 1 / 9) ** 0.5 for row in (p.B @ p.A).tolist()], dtype=torch.float64)
    torch.testing.assert_close(A, p.B.T @ (s[:, None] * full))
    torch.testing.assert_close(B, s[:, None] * full @ p.A.T)
    assert len(set(s.tolist())) == 4


def test_allora_leaves_zero_eta_times_as_fast():
    steps = []
    for text in ("lora(rank=3, alpha=3.0, at='head')", "allora(rank=3, eta=4.0, at='head')"):
        model, x = layer()
        tuned = luthier.attach(model, text)
        only(tuned).A.data = torch.randn(3, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        opt = torch.optim.SGD([p for _, p in tuned.trainable()], lr=1e-3)
        tuned(x).square().sum().backward()
        opt.step()
        steps.append(only(tuned).B.detach())
    plain, scaled = steps
    torch.testing.assert_close(scaled, 4 * plain)


def test_allora_slows_a_large_row():
    m, = parse("allora(eta=2.0)")
    p = state(A=[[3.0, 4.0]], B=[[0.0], [0.35], [-19.95]])                           # rows of norm 0, 1.75, 99.75
    torch.testing.assert_close(m.scale(p), torch.tensor([2.0, 2**-0.5, 0.1], dtype=torch.float64))


def test_allora_trains_and_goes_through_a_file(tmp_path):
    tuned = luthier.attach(tiny.build("gpt2"), "allora(rank=2)")
    losses, _ = fit(tuned, "gpt2", 15)
    assert losses[-1] < losses[0]
    through_a_file(tuned, "gpt2", tmp_path / "a")


# -- PEGO -----------------------------------------------------------------------------------------------------------------


def test_pego_by_hand():
    m, = parse("pego(rank=1, n=2, preserve=0.5, diverse=0.25)")
    p = state(A=[[[1.0, 0.0]], [[1.0, -2.0]]], B=[[[1.0, 2.0, 0.0]], [[0.0, 3.0, 1.0]]])
    W = torch.tensor([[1.0, 1.0], [0.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
    one, two = [[1.0, 0.0], [2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [3.0, -6.0], [1.0, -2.0]]
    delta = torch.tensor([one, two], dtype=torch.float64)
    torch.testing.assert_close(m.weight(W, p), W + delta.sum(0), rtol=0, atol=0)
    # W oneᵀ = [1 2 0; 0 0 0; 1 2 0]: 6;  W twoᵀ = [0 -3 -1; 0 -12 -4; 0 3 1]: 24;  one twoᵀ = [0 3 1; 0 6 2; 0 0 0]: 12
    keep, part = m.terms(W, p)
    assert (keep.item(), part.item()) == (30.0, 12.0)


@pytest.mark.parametrize("text, terms", [("", (1e-3, 1e-3)), (", preserve=0.0", (0, 1e-3)), (", diverse=0.0", (1e-3, 0)),
                                         (", preserve=0.0, diverse=0.0", (0, 0))])
def test_pego_losses_over_all_sites_each_switched_off(text, terms):
    tuned = stir(luthier.attach(tiny.build("gpt2"), f"pego(rank=2, n=3{text})"))      # W: rows of a fused, transposed weight
    wanted = 0.0
    for site in luthier.find(tuned, "attn.q attn.v"):
        p = next(p for p in tuned.states.values() if p.site_name == site.name)
        deltas = [p.B[i].T @ p.A[i] for i in range(3)]
        wanted += terms[0] * sum((site.W @ d.T).abs().sum() for d in deltas)
        wanted += terms[1] * sum((deltas[i] @ deltas[j].T).abs().sum() for i, j in ((0, 1), (0, 2), (1, 2)))
    torch.testing.assert_close(torch.as_tensor(tuned.penalty()), torch.as_tensor(wanted))


def test_pego_terms_fall_when_they_are_in_the_loss(tmp_path):
    found = []
    for weights in ("preserve=0.01, diverse=0.01", "preserve=0.0, diverse=0.0"):
        tuned = luthier.attach(tiny.build("vit"), f"pego(rank=2, n=2, {weights})")
        fit(tuned, "vit", 25)
        m, sites = parse("pego(n=2)")[0], {s.name: s for s in luthier.find(tuned, "attn.q attn.v")}
        found.append([sum(t) for t in zip(*(m.terms(sites[p.site_name].W, p) for p in tuned.states.values()), strict=True)])
    assert all(a < b / 2 for a, b in zip(*found, strict=True))
    through_a_file(tuned, "vit", tmp_path / "p")
