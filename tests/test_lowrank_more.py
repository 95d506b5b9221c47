"""Low-rank methods with schedules, gradient transforms and grown or cut ranks: golden numbers, files, whole small models."""

import pytest
import torch
from torch import nn

import luthier
from luthier import tiny
from luthier.attach import Run
from luthier.errors import BadChain, RunStopped, ScheduleNotStepped
from luthier.method import parse
from luthier.methods.lowrank.wara import dwt, idwt
from luthier.methods.quantize._pack import pack, unpack
from luthier.state import State, newborn
from luthier.train import train


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


# -- IncreLoRA ------------------------------------------------------------------------------------------------------------


def test_increlora_by_hand():
    m, = parse("increlora(target=2, alpha=4.0)")
    p = state(A=[[1.0, 2.0], [0.0, 1.0]], E=[3.0, 0.5], B=[[1.0, 0.0], [2.0, 2.0]], n=1).eval()
    # alpha / target = 2;  [1 2; 0 2] diag(3, .5) [1 2; 0 1] = [3 6; 0 0] + [0 1; 0 1]
    assert (m.weight(torch.zeros(2, 2, dtype=torch.float64), p) / 2).tolist() == [[3.0, 7.0], [0.0, 1.0]]
    E, = torch.autograd.grad(m.weight(torch.zeros(2, 2, dtype=torch.float64), p).sum(), p.E)
    assert E.tolist() == [6.0, 0.0]                                              # 2 (Σ b)(Σ a); that of the reserve is fixed


def test_increlora_averages_by_hand():
    m, = parse("increlora(beta1=0.5, beta2=0.75)")
    sites = [state(seen=torch.tensor([0.0, 0.0, 0.0])), state(seen=torch.tensor([0.0, 1.0, 2.0]))]
    for now, wanted in (((4.0, 3.0), (1.0, 3.5)), ((2.0, 0.0), (0.75, 1.5625))):
        for p, value in zip(sites, now, strict=True):
            p.seen[0] = value
        torch.testing.assert_close(m.scores(sites), torch.tensor(wanted))
    # first: mean 2, spread .5;  2, .375: .75     second: mean 2, spread 1.75;  1, 1.5625: 1.5625


def test_increlora_importance_is_that_of_the_dense_gradient():
    model, x = layer()
    tuned = stir(luthier.attach(model, "increlora(target=2, at='head')")).train()
    p, G = only(tuned), torch.randn(7, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for tuned.fast in (True, False):
        tuned(x).backward(G)
        D = tuned.chain[0].weight(0.0, p).detach()
        assert p.seen[0].item() == pytest.approx(float((D * (G.T @ x)).abs().sum()) / 20**0.5)
        p.seen.zero_()
    tuned.eval()(x).backward(G)
    assert p.seen[0] == 0                                                        # only in training


@pytest.mark.parametrize("text", ["", ", advance=False", ", restart=0", ", add=2, target=3"])
def test_increlora_grows_to_its_budget_and_leaves_outputs_where_they_were(text, tmp_path):
    tuned = luthier.attach(tiny.build("llama"), f"increlora(top=3, wait=4, every=4, restart=3, at='linear'{text})"
                           if "restart" not in text else f"increlora(top=3, wait=4, every=4{text})")
    m, sites, log, jumps = tuned.chain[0], len(tuned.states), [], []
    total, lay = (m.target - 1) * sites + sites, type(m).lay

    def watch(k):
        log.append(sum(p.n for p in tuned.states.values()))
        assert all(len(p.E) == len(p.A) == len(p.B) for p in tuned.states.values())

    def laid(self, p, rows, born):
        tuned.eval()
        before = tiny.output(tuned, tiny.batch("llama"))
        lay(self, p, rows, born)
        jumps.append(float((tiny.output(tuned, tiny.batch("llama")) - before).abs().max() / before.abs().max()))
        tuned.train()

    type(m).lay = laid
    try:
        losses, opt = fit(tuned, "llama", 40, each=watch)
    finally:
        type(m).lay = lay
    grown = [b - a for a, b in zip([sites, *log], log, strict=False)]
    step = min(3, (total - sites) // m.add) * m.add
    assert log[-1] == total and log[6] == sites and log[7] == sites + step       # first at step 8: after `wait`, at a multiple
    assert {k + 1 for k, n in enumerate(grown) if n} <= {8, 12, 16, 20, 24, 28, 32, 36} and max(grown) <= 3 * m.add
    assert max(jumps) < 1e-4 and losses[-1] < losses[0]
    assert all(len(p.E) == p.n for p in tuned.states.values()) and len({p.n for p in tuned.states.values()}) > 1
    assert all(opt.state[t]["exp_avg"].shape == t.shape for _, t in tuned.trainable())
    again = through_a_file(tuned, "llama", tmp_path / "i")
    assert [p.n for p in again.states.values()] == [p.n for p in tuned.states.values()]


def test_increlora_reserve_learns_in_advance_or_waits():
    moved = []
    for advance in (True, False):
        tuned = luthier.attach(tiny.build("vit"), f"increlora(wait=99, advance={advance}, penalty=0.0)")
        first = [p.A[1].clone() for p in tuned.states.values()]
        tuned.total_steps = 99
        fit(tuned, "vit", 5)
        moved.append(max((p.A[1] - a).abs().max().item() for p, a in zip(tuned.states.values(), first, strict=True)))
        E = torch.cat([p.E[1:] for p in tuned.states.values()])
        torch.testing.assert_close(E.detach(), torch.full_like(E, 1e-5 * advance), rtol=0, atol=0)
    assert moved[0] > 1e-2 and moved[1] == 0


def test_young_entries_move_as_under_an_optimizer_of_their_own():
    """Entry 1 is born at step 30 of a parameter; `newborn` gives it the steps of an Adam that began there."""
    g = torch.Generator().manual_seed(0)
    grads = torch.randn(60, 2, generator=g, dtype=torch.float64)
    p, q = (nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (2, 1))
    ours, own = (torch.optim.Adam([t], lr=0.1, betas=(0.8, 0.99), eps=1e-30) for t in (p, q))
    for k, grad in enumerate(grads, 1):
        p.grad, before = grad.clone(), p.detach().clone()
        p.grad[1] *= k > 30
        ours.step()
        if k > 30:
            p.data[1] = before[1] + newborn(ours, k, k - 30) * (p.data[1] - before[1])
            q.grad = grad[1:].clone()
            own.step()
    torch.testing.assert_close(p[1:], q, rtol=1e-9, atol=0)
    assert newborn(torch.optim.SGD([p], lr=0.1), 5, 1) == newborn(None, 5, 1) == 1


def test_increlora_restarts_the_rate_of_what_it_adds():
    m, = parse("increlora(restart=4)")
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    opt.param_groups[0]["lr"] = 0.1                                              # the run's own schedule has fallen to a fifth
    born = torch.tensor([10.0])
    curve = [m.rate(Run({}, k=k, total=20, optimizer=opt), born).item() * 0.1 for k in range(11, 21)]
    wanted = [0.125, 0.25, 0.375, 0.5] + [0.5 * left / 6 for left in (6, 5, 4, 3, 2, 1)]
    assert curve == pytest.approx(wanted)


def test_increlora_paces_only_what_it_added():
    tuned = luthier.attach(tiny.build("vit"), "increlora(top=99, wait=0, every=2, restart=4, penalty=0.0, target=3)").train()
    tuned.total_steps, moves = 40, []
    opt = torch.optim.SGD([t for _, t in tuned.trainable()], lr=1e-2)
    for _ in range(7):
        before = {p: (p.A.clone(), p.n) for p in tuned.states.values()}
        for p in tuned.states.values():
            p.seen[0] = 1.0
            for t in (p.A, p.E, p.B):
                t.grad = torch.ones_like(t)
        opt.step()
        tuned.step(opt)
        p = only(tuned)
        moves.append(((before[p][0] - p.A[: len(before[p][0])]).mean(1) / 1e-2).tolist())
    # two rows from the start (one of them the reserve); at steps 2 and 4 one more is laid in, which starts slowly
    rise = [0.25, 0.5, 0.75, 1.0]
    assert all(m[:2] == pytest.approx([1.0, 1.0], abs=1e-4) for m in moves)
    assert [m[2] for m in moves[2:6]] == pytest.approx(rise, abs=1e-4) and len(moves[1]) == 2
    assert all(len(m) == 3 for m in moves[4:])                                   # with the last growth the reserve goes


# -- WaRA -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["haar", "db2"])
@pytest.mark.parametrize("d", [2, 4, 7, 48])
def test_wavelets_are_orthogonal_and_invert(name, d):
    eye = torch.eye(d, dtype=torch.float64)
    S = dwt(eye, name).flatten(-2)                                               # row i: the coefficients of unit vector i
    torch.testing.assert_close(S @ S.T, eye)
    torch.testing.assert_close(idwt(dwt(eye, name), name, d), eye)
    x = torch.randn(3, 5, d, generator=torch.Generator().manual_seed(0))
    assert (idwt(dwt(x, name), name, d) - x).abs().max() < 1e-6
    high = dwt(torch.ones(48), name)[1]
    assert high.abs().max() < 1e-6                                               # a constant has no detail
    if name == "db2":
        assert dwt(torch.arange(48.0), name)[1, :-1].abs().max() < 1e-4          # nor has a line, away from the seam


def test_wavelet_coefficients_by_hand():
    x, r = torch.tensor([1.0, 3.0, 2.0, -2.0], dtype=torch.float64), 2**0.5
    torch.testing.assert_close(dwt(x, "haar"), torch.tensor([[4 / r, 0.0], [-2 / r, 4 / r]], dtype=torch.float64))
    h = torch.tensor([0.48296291, 0.83651630, 0.22414387, -0.12940952], dtype=torch.float64)         # Daubechies' table
    low = torch.stack([h @ x, h @ x.roll(-2)])
    high = torch.stack([(h.flip(0) * torch.tensor([1, -1, 1, -1])) @ v for v in (x, x.roll(-2))])
    torch.testing.assert_close(dwt(x, "db2"), torch.stack([low, high]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["haar", "db2"])
@pytest.mark.parametrize("shape", [(4, 6), (5, 7)])
def test_wara_is_the_two_dimensional_transform_of_the_paper(name, shape):
    """LL, LH, HL and HH of the tokens x features input, A and B on the features of each, the inverse over both axes."""
    m, (d_out, d_in) = parse(f"wara(rank=2, alpha=6.0, wavelet={name!r})")[0], shape
    g = torch.Generator().manual_seed(1)
    A, B, X, W = (torch.randn(s, generator=g, dtype=torch.float64) for s in (
        (2, -(-d_in // 2)), (-(-d_out // 2), 2), (8, d_in), shape))
    p = state(A=A.tolist(), B=B.tolist())
    tokens = dwt(dwt(X, name).permute(1, 2, 0), name)                            # (feature band, feature, token band, token)
    each = torch.einsum("fdts,ro,do->frts", tokens, B, A.T)
    back = idwt(each, name, 8).permute(2, 0, 1)                                  # over tokens, then over features
    wanted = X @ W.T + 3 * idwt(back, name, d_out)
    torch.testing.assert_close(X @ m.weight(W, p).T, wanted)
    torch.testing.assert_close(m.fast(X, X @ W.T, p), wanted)


def test_wara_counts_refuses_and_goes_through_a_file(tmp_path):
    ours, theirs = (sum(t.numel() for _, t in luthier.attach(tiny.build("gpt2"), c).trainable())
                    for c in ("wara(rank=4)", "lora(rank=4)"))
    assert 2 * ours == theirs
    with pytest.raises(BadChain, match="haar, db2"):
        parse("wara(wavelet='sym4')")
    tuned = luthier.attach(tiny.build("vit"), "wara(rank=2, wavelet='db2')")
    losses, _ = fit(tuned, "vit", 15)
    assert losses[-1] < losses[0]
    through_a_file(tuned, "vit", tmp_path / "w")


# -- DSEE -----------------------------------------------------------------------------------------------------------------


def test_dsee_by_hand():
    m, = parse("dsee(rank=2, alpha=4.0)")
    p = state(A=[[1.0, 2.0]], B=[[1.0], [0.0]], v=[0.5, -1.0], idx=torch.tensor([0, 3]), c=[3.0], left=torch.tensor([1]),
              groups=2, S1=pack(torch.tensor([[1, 0], [0, 1]]), 1), pruned=True)
    W = torch.tensor([[10.0, 20.0], [30.0, 40.0]], dtype=torch.float64)
    # S1 W = [10 0; 0 40];  alpha / r = 2 times B A + S2 = [1 2; 0 0] + [.5 0; 0 -1];  the first of two column gates is gone
    assert m.weight(W, p).tolist() == [[0.0, 12.0], [0.0, 114.0]]
    p.pruned = False
    assert m.weight(W, p).tolist() == [[0.0, 72.0], [0.0, 114.0]]


def test_dsee_finds_the_places_that_stick_out_of_a_low_rank():
    g = torch.Generator().manual_seed(0)
    W = torch.randn(40, 3, generator=g) @ torch.randn(3, 30, generator=g)
    planted = torch.randperm(W.numel(), generator=g)[:12].sort().values
    W.view(-1)[planted] += 15 * torch.randn(12, generator=g).sign()
    model = nn.Sequential(nn.Linear(30, 40))
    model[0].weight.data = W
    found = {how: only(luthier.attach(model, f"dsee(rank=3, sparse=12, sparsity=0.0, at='head', tune={role!r}, support={how!r})",
                                      name=how)).idx for how in ("grebsmo", "magnitude", "random")
             for role in [luthier.find(model, "head")[0].role.rpartition(".")[2]]}
    assert torch.equal(found["grebsmo"].long(), planted)
    assert torch.equal(found["magnitude"].long(), W.abs().flatten().topk(12).indices.sort().values)
    assert len(found["random"].unique()) == 12 and not torch.equal(found["random"], found["grebsmo"])
    with pytest.raises(BadChain, match="grebsmo"):
        parse("dsee(support='omp')")


def test_dsee_prunes_the_smallest_of_all_sites_once_and_tunes_on(tmp_path):
    tuned = luthier.attach(tiny.build("llama"), "dsee(rank=2, sparse=7, sparsity=0.4, prune=0.5)")
    m, sites, seen = tuned.chain[0], {s.name: s for s in luthier.find(tuned, "linear")}, {}

    def watch(k):
        if k == 10:
            seen["before"] = {p: (p.A.clone(), p.v.clone()) for p in tuned.states.values() if hasattr(p, "A")}

    step = type(m).step

    def noted(self, run):
        if run.k == 10:
            seen["size"] = {n: self.update(sites[n].W, p).abs() for n, p in run.states.items()}
        step(self, run)

    type(m).step = noted
    try:
        losses, _ = fit(tuned, "llama", 20, each=watch)
    finally:
        type(m).step = step
    kept = {p.site_name: unpack(p.S1, 1, sites[p.site_name].W.shape[1]).bool() for p in tuned.states.values()}
    total, gone = sum(k.numel() for k in kept.values()), sum(int((~k).sum()) for k in kept.values())
    assert gone == round(0.4 * total)
    assert max(seen["size"][n][~k].max() for n, k in kept.items()) <= min(seen["size"][n][k].min() for n, k in kept.items())
    assert all(not torch.equal(p.A, A) and not torch.equal(p.v, v) for p, (A, v) in seen["before"].items())
    assert {p.site_name.rpartition(".")[2] for p in tuned.states.values() if hasattr(p, "A")} == {"q", "v"}
    again = through_a_file(tuned, "llama", tmp_path / "d")
    again.merge()
    for name, k in kept.items():                                                # the merged weight of an untuned site is sparse
        W = sites[name].read(again.base.get_submodule(sites[name].path).weight)
        assert name.endswith((".q", ".v")) or ((W == 0) == ~k).all()
    stored = {n.rpartition(".")[2] for n in again.states.state_dict()}
    assert stored == {"A", "B", "v", "idx", "S1"} and losses[-1] < losses[0]


def test_dsee_takes_heads_and_neurons_by_their_gates(tmp_path):
    text = "dsee(rank=2, sparse=0, sparsity=0.0, heads=0.25, neurons=0.5, l1=0.1, prune=0.5)"
    tuned, counts = luthier.attach(tiny.build("vit"), text), []
    gates = [p for p in tuned.states.values() if hasattr(p, "c")]
    torch.testing.assert_close(tuned.penalty(), torch.tensor(0.1 * sum(len(p.c) for p in gates)))
    for p in gates:
        p.c.data += torch.linspace(0, 0.5, len(p.c))                             # the first ones are the smallest
    _, opt = fit(tuned, "vit", 10, lr=1e-3, each=lambda k: counts.append([len(p.c) for p in gates]))
    assert counts[3] == [4, 48, 4, 48] and counts[4] == counts[-1] == [3, 24, 3, 24] and tuned.penalty() == 0
    assert [p.left.tolist() for p in gates[:2]] == [[1, 2, 3], list(range(24, 48))]
    assert all(opt.state[p.c]["exp_avg"].shape == p.c.shape for p in gates)
    assert not any(hasattr(p, "v") for p in tuned.states.values())
    again = through_a_file(tuned, "vit", tmp_path / "h").merge()
    for site in luthier.find(again.base, "attn.o mlp.down"):
        n = 8 if site.role == "attn.o" else 24
        assert not site.W[:, :n].any() and site.W[:, n:].any(0).all()


# -- a run that was stopped -----------------------------------------------------------------------------------------------


class Rows:
    """As much of a task as `train` asks for: a tiny llama and fixed random outputs."""

    def n_batches(self, split, size):
        return 5

    def batches(self, split, size, seed=0, epoch=0, start=0):
        for k in range(start, 5):
            yield tiny.batch("llama", seed=100 * epoch + k)

    def loss(self, model, batch):
        return (tiny.output(model, batch) - 1).square().mean()


@pytest.mark.parametrize("text", ["sora(rank=4, xi=0.01, peak=0.05)", "dylora(rank=4)", "dsee(rank=2, sparse=5, heads=0.25)",
                                  "increlora(top=4, wait=2, every=2, restart=3)"])
def test_resumed_in_the_middle_equals_uninterrupted(text, tmp_path):
    def run(out, stop=0, resume=False):
        tuned = luthier.attach(tiny.build("llama"), text)

        def watch(k, total, loss):
            if k == stop:
                raise KeyboardInterrupt

        try:
            train(tuned, Rows(), steps=14, lr=0.01, batch_size=3, out=out, every=3, resume=resume, progress=watch, log=False)
        except RunStopped:
            assert stop
        return tuned

    whole = run(tmp_path / "whole")
    run(tmp_path / "part", stop=10)                                              # the last checkpoint is that of step 9
    again = run(tmp_path / "part", resume=True)
    a, b = whole.states.state_dict(), again.states.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(tiny.output(whole, tiny.batch("llama")), tiny.output(again, tiny.batch("llama")))
