"""Golden numbers of the methods that change weights: by hand, by a slow formula written another way, or by peft."""

import math

import pytest
import torch
from torch import nn

from luthier.attach import Run
from luthier.errors import BadChain, DoesNotFit, ScheduleNotStepped
from luthier.method import call
from luthier.methods.adapter.compacter import compacter, phm
from luthier.methods.lowrank.adalora import adalora
from luthier.methods.lowrank.dora import dora
from luthier.methods.lowrank.lora import lora
from luthier.methods.lowrank.randlora import randlora
from luthier.methods.lowrank.svfit import svfit
from luthier.methods.scale.bitfit import bitfit
from luthier.methods.scale.ia3 import ia3
from luthier.methods.scale.ssf import ssf
from luthier.methods.sparse.spiel import spiel
from luthier.methods.subspace.said import hadamard, said
from luthier.site import Site
from luthier.state import State, follow


def linear(d_in, d_out, bias=True):
    torch.manual_seed(d_in * d_out)
    return nn.Linear(d_in, d_out, bias=bias).requires_grad_(False)


def place(module, role="attn.q", pool=None, n_sites=1, name=None):
    d_out, d_in = module.weight.shape
    s = Site(name or f"block.0.{role}", "weight", module, "m", role, layout="linear", param="weight", d_in=d_in, d_out=d_out,
             bias="bias" if module.bias is not None else "")
    return s.bound(seed=0, step=0, pool={} if pool is None else pool, n_sites=n_sites, rank=0)


def state(m, site):
    return State(call(m, "init", site=site, seen=None), "0", site.name)


def stir(p, std=0.3):
    """Trained values, as it were."""
    g = torch.Generator().manual_seed(1)
    for t in p.parameters():
        t.data = t.data + std * torch.randn(t.shape, generator=g)
    return p


def both(m, module, role="attn.q", n=5):
    """(weight's W', b', x, base output, fast's output) of a trained state; None where there is no bias."""
    s = place(module, role)
    p = stir(state(m, s))
    x = torch.randn(n, 2, s.d_in)
    y, b = module(x), module.bias
    zeros = torch.zeros(s.d_out)
    new = call(m, "weight", W=s.W, p=p, b=zeros if b is None else b)
    W, b2 = new if isinstance(new, tuple) else (new, b)
    return W, b2, x, y, call(m, "fast", x=x, y=y, p=p, W=s.W, b=b)


EVERY = [lora(rank=2), lora(rank=3, alpha=1.0), dora(rank=2), svfit(rank=3), randlora(rank=2), adalora(rank=3, target=2),
         said(dim=9), spiel(density=0.2), bitfit(), ia3(), ssf()]


@pytest.mark.parametrize("m", EVERY, ids=repr)
def test_zero_change_at_init_and_gradient_to_every_parameter(m):
    module = linear(6, 5)
    s = place(module)
    p = state(m, s)
    W = call(m, "weight", W=s.W, p=p, b=module.bias)
    W, b = W if isinstance(W, tuple) else (W, module.bias)
    assert torch.equal(W, module.weight) and torch.equal(b, module.bias)
    if m.has("fast"):
        x = torch.randn(3, 6)
        assert torch.equal(call(m, "fast", x=x, y=module(x), p=p, W=s.W, b=module.bias), module(x))
    W = call(m, "weight", W=s.W, p=stir(p), b=module.bias)
    W, b = W if isinstance(W, tuple) else (W, module.bias)
    (W.square().sum() + b.square().sum()).backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in p.parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("role", ["attn.q", "mlp.down"])
@pytest.mark.parametrize("m", [m for m in EVERY if m.has("fast")], ids=repr)
def test_fast_equals_weight(m, role, bias):
    bias = bias or isinstance(m, bitfit)
    W, b, x, y, fast = both(m, linear(7, 5, bias), role)
    torch.testing.assert_close(fast, nn.functional.linear(x, W, b), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(fast, y, atol=1e-3)


@pytest.mark.parametrize("m, d_in, d_out, count", [
    (lora(rank=2), 7, 5, 2 * (7 + 5)), (dora(rank=2), 7, 5, 2 * (7 + 5) + 5), (svfit(rank=3), 7, 5, 3), (svfit(), 7, 5, 5),
    (randlora(rank=2), 7, 5, 3 * (2 + 5)), (randlora(rank=2), 4, 9, 2 * (2 + 4)), (randlora(), 4, 9, 1 * (4 + 4)),
    (adalora(rank=3, target=2), 7, 5, 3 * (7 + 5 + 1)), (said(dim=40), 7, 5, 40), (said(dim=40, layers=False), 7, 5, 40),
    (spiel(density=0.2), 7, 5, 7), (bitfit(), 7, 5, 5), (ia3(), 7, 5, 5), (ssf(), 7, 5, 10)], ids=repr)
def test_parameter_counts(m, d_in, d_out, count):
    assert sum(t.numel() for t in state(m, place(linear(d_in, d_out))).parameters()) == count


# -- lora, dora, svfit ----------------------------------------------------------------------------------------------


def fill(p, **tensors):
    for name, t in tensors.items():
        getattr(p, name).data = torch.as_tensor(t, dtype=torch.float32)
    return p


def test_lora_by_hand():
    m, W = lora(rank=1, alpha=2.0), torch.tensor([[1., 2], [3, 4]])
    p = fill(state(m, place(linear(2, 2))), A=[[1, 1]], B=[[1], [2]])
    assert torch.equal(m.weight(W, p), torch.tensor([[3., 4], [7, 8]]))
    assert torch.equal(m.fast(torch.tensor([1., 0]), torch.tensor([1., 3]), p), torch.tensor([3., 7]))


def test_lora_drops_inputs_in_training_only():
    m, x = lora(rank=1, alpha=1.0, dropout=0.5), torch.ones(4000, 1)
    p = fill(state(m, place(linear(1, 1))), A=[[1]], B=[[1]])
    seen = m.fast(x, torch.zeros(4000, 1), p.train())
    assert sorted(seen.unique().tolist()) == [0, 2] and abs(seen.mean() - 1) < 0.1
    assert torch.equal(m.fast(x, torch.zeros(4000, 1), p.eval()), x)
    with pytest.raises(BadChain):
        lora(dropout=1.5)


def test_dora_by_hand():
    """V = [[3, 4], [0, 0]] + [[0, 0], [5, 12]] has row norms 5 and 13; magnitudes 10 and 26 make it [[6, 8], [10, 24]]."""
    m, W = dora(rank=1, alpha=1.0), torch.tensor([[3., 4], [0, 0]])
    p = fill(state(m, place(linear(2, 2))), A=[[5, 12]], B=[[0], [1]], m=[[10], [26]])
    assert torch.equal(m.weight(W, p), torch.tensor([[6., 8], [10, 24]]))
    x, b = torch.tensor([1., 1]), torch.tensor([1., -1])
    torch.testing.assert_close(m.fast(x, W @ x + b, p, W, b), torch.tensor([15., 33]))
    # the norm is a constant: dW'/dB = (m / |V|) A, here with the upstream gradient [[0, 0], [1, 0]]
    m.weight(W, p)[1, 0].backward()
    torch.testing.assert_close(p.B.grad, torch.tensor([[0.], [2 * 5]]))
    torch.testing.assert_close(p.m.grad, torch.tensor([[0.], [5 / 13]]))


def test_dora_starts_at_the_norms_and_leaves_a_row_of_zeros():
    module = linear(2, 2)
    module.weight.data = torch.tensor([[3., 4], [0, 0]])
    p = state(dora(rank=1), place(module))
    assert p.m.flatten().tolist() == [5, 0]
    W = dora(rank=1).weight(module.weight, p)
    assert torch.equal(W, module.weight)
    W.square().sum().backward()
    assert all(t.grad.isfinite().all() for t in p.parameters())


def test_svfit_by_hand():
    module = linear(2, 2)
    module.weight.data = torch.tensor([[0., 3], [-2, 0]])                     # singular values 3 and 2
    m = svfit(rank=1)
    p = fill(state(m, place(module)), s=[1])
    torch.testing.assert_close(m.weight(module.weight, p), torch.tensor([[0., 4], [-2, 0]]))


def test_svfit_sets_the_leading_singular_values():
    module, m = linear(6, 9), svfit(rank=4)
    before = torch.linalg.svdvals(module.weight)
    p = fill(state(m, place(module)), s=[.4, .3, .2, .1])
    after = torch.linalg.svdvals(m.weight(module.weight, p))
    torch.testing.assert_close(after, before + torch.tensor([.4, .3, .2, .1, 0, 0]))
    assert p.fixed_names == {"U", "V"}                                        # only s is stored


# -- randlora, said: fixed random bases -------------------------------------------------------------------------------


@pytest.mark.parametrize("ternary", [False, True])
@pytest.mark.parametrize("d_in, d_out", [(5, 8), (8, 5), (6, 6)])
def test_randlora_is_the_sum_over_bases(d_in, d_out, ternary):
    m, module = randlora(rank=2, scale=3.0, ternary=ternary), linear(d_in, d_out)
    p = stir(state(m, place(module)))
    d, n = min(d_in, d_out), math.ceil(min(d_in, d_out) / 2)
    delta = sum(p.B[:, 2 * j:2 * j + 2] @ torch.diag(p.L[j]) @ p.A @ torch.diag(p.G[j]) for j in range(n))
    torch.testing.assert_close(m.weight(module.weight, p), module.weight + 3 * (delta if d_out >= d_in else delta.T))
    assert p.A.shape == (2, d) and p.B.shape == (max(d_in, d_out), 2 * n) and p.fixed_names == {"A", "B"}
    if not ternary:                                                            # (with r = 2, a column of A is easily all zero)
        assert torch.linalg.matrix_rank(m.weight(torch.zeros_like(module.weight), p)) == d
    else:
        assert len(p.B.unique()) == 3
    large = state(randlora(rank=64, ternary=ternary), place(linear(64, 256))).B
    assert abs(large.std() - 1) < 0.02 and abs((large == 0).float().mean() - 2 / 3 * ternary) < 0.02


def test_randlora_bases_are_shared_by_sites_of_one_shape():
    pool, m = {}, randlora(rank=2)
    a, b, c = (state(m, place(linear(*shape), pool=pool, name=f"block.{i}.attn.q"))
               for i, shape in enumerate([(6, 8), (8, 6), (6, 6)]))
    assert a.B.data_ptr() == b.B.data_ptr() and a.A.data_ptr() == b.A.data_ptr() != c.A.data_ptr() and a.L is not b.L


def test_hadamard_against_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    for L in (1, 2, 16, 64):
        x = torch.randn(L, dtype=torch.float64)
        torch.testing.assert_close(hadamard(x), torch.tensor(linalg.hadamard(L), dtype=torch.float64) @ x)


@pytest.mark.parametrize("d_in, d_out, dim", [(7, 5, 12), (4, 4, 9), (2, 2, 50)])
def test_said_is_the_matrix_product(d_in, d_out, dim):
    linalg = pytest.importorskip("scipy.linalg")
    m, module = said(dim=dim), linear(d_in, d_out)
    p = stir(state(m, place(module)), 1.0)
    L, D, d = len(p.G), d_in * d_out, dim - 1
    H = torch.tensor(linalg.hadamard(L), dtype=torch.float32)
    P = H @ torch.diag(p.G) @ torch.eye(L)[p.order] @ H @ torch.diag(p.B.float()) / (D * p.G.square().sum()).sqrt()
    torch.testing.assert_close(m.weight(module.weight, p) - module.weight, (p.scale * P[:D, :d] @ p.theta).view(d_out, d_in))
    assert L >= max(D, d) and L < 2 * max(D, d) and p.fixed_names == {"B", "G", "order"}
    assert set(p.B.tolist()) <= {-1, 1} and sorted(p.order.tolist()) == list(range(L))


def test_said_shares_one_vector_keeps_lengths_and_draws_each_site_anew():
    pool, m = {}, said(dim=402)
    a, b = (state(m, place(linear(32, 40), pool=pool, n_sites=2, name=f"block.{i}.attn.q")) for i in (0, 1))
    assert a.theta is b.theta and len(a.theta) == 400 and a.scale is not b.scale
    a.theta.data.normal_()
    da, db = (m.weight(torch.zeros(40, 32), p) for p in (a, b))
    assert abs(da.norm() / a.theta.norm() - 1) < 0.1 and abs(db.norm() / a.theta.norm() - 1) < 0.1
    assert abs((da * db).sum() / da.norm() / db.norm()) < 0.15                 # two sites, two unrelated projections
    again = state(said(dim=402), place(linear(32, 40), n_sites=2, name="block.0.attn.q"))
    assert torch.equal(again.G, a.G) and torch.equal(again.order, a.order)     # from the seed alone
    plain = state(said(dim=30, layers=False), place(linear(4, 4)))
    assert len(plain.theta) == 30 and not hasattr(plain, "scale")
    with pytest.raises(DoesNotFit, match="leaves 0"):
        state(said(dim=2), place(linear(4, 4), n_sites=2))


# -- bitfit, ia3, ssf -------------------------------------------------------------------------------------------------

W22, B2 = torch.tensor([[1., 2], [3, 4]]), torch.tensor([5., 6])


def test_scales_and_shifts_by_hand():
    p = fill(state(bitfit(), place(linear(2, 2))), d=[1, -1])
    assert [t.tolist() for t in bitfit().weight(W22, p, B2)] == [[[1, 2], [3, 4]], [6, 5]]
    assert call(bitfit(), "init", site=place(linear(2, 2, bias=False))) is None
    p = fill(state(ia3(), place(linear(2, 2), "attn.k")), out=[2, 3])
    assert [t.tolist() for t in ia3().weight(W22, p, B2)] == [[[2, 4], [9, 12]], [10, 18]]
    p = fill(state(ia3(), place(linear(2, 2), "mlp.down")), into=[2, 3])
    assert [t.tolist() for t in ia3().weight(W22, p, B2)] == [[[2, 6], [6, 12]], [5, 6]]
    p = fill(state(ssf(), place(linear(2, 2))), gamma=[2, 3], beta=[1, -1])
    assert [t.tolist() for t in ssf().weight(W22, p, B2)] == [[[2, 4], [9, 12]], [11, 17]]


def test_ssf_is_applied_to_the_features_of_linear_conv_and_norm():
    gamma, beta = torch.randn(6), torch.randn(6)
    for layout, module, x in [("linear", nn.Linear(4, 6), torch.randn(3, 4)),
                              ("conv", nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5)),
                              ("norm", nn.LayerNorm(6), torch.randn(3, 6))]:
        s = Site("s", "weight", module, "m", layout=layout, d_out=6, param="weight", bias="bias")
        p = fill(state(ssf(), s), gamma=gamma, beta=beta)
        W, b = ssf().weight(s.W, p, s.b)
        along = (1, -1, 1, 1) if x.dim() == 4 else (-1,)
        wanted = gamma.view(along) * module(x) + beta.view(along)
        got = torch.func.functional_call(module, {"weight": s.write(module.weight, W), "bias": b}, x)
        torch.testing.assert_close(got, wanted)


# -- compacter --------------------------------------------------------------------------------------------------------


def stream(d, name="block.0.mlp.out", pool=None):
    s = Site(name, "stream", nn.Linear(d, d), "m", "mlp.out", layout="out", d_in=d, d_out=d)
    return s.bound(seed=0, step=0, pool={} if pool is None else pool, n_sites=1, rank=0)


def test_phm_is_the_sum_of_kronecker_products():
    n, d_in, d_out = 3, 12, 6
    A, s, t, c = torch.randn(n, n, n), torch.randn(n, d_out // n), torch.randn(n, d_in // n), torch.randn(d_out)
    W, x = sum(torch.kron(A[i], torch.outer(s[i], t[i])) for i in range(n)), torch.randn(2, 5, d_in)
    torch.testing.assert_close(phm(x, A, s, t, c), x @ W.T + c)


@pytest.mark.parametrize("d, m", [(768, compacter()), (32, compacter(reduce=4, n=2)), (36, compacter(reduce=8, n=3))])
def test_compacter_counts(d, m):
    pool = {}
    a, b = (state(m, stream(d, f"block.{i}.mlp.out", pool)) for i in (0, 1))
    w = math.ceil(d / m.reduce / m.n) * m.n
    own = sum(t.numel() for n, t in a.named_parameters() if n != "A")
    assert own == 2 * (d + w) + w + d and a.A is b.A and a.A.numel() == m.n**3
    if d == 768:
        assert 10 * own < 2 * d * w + w + d                                   # at least ten times below an adapter of that width


def test_compacter_adapter_norm_and_switch():
    from luthier.tokens import Tokens
    m, h = compacter(reduce=2, n=2), torch.randn(2, 3, 8)
    p = state(m, stream(8))
    assert torch.equal(m.stream(Tokens(h), p).h, h)
    stir(p)
    D, U = (sum(torch.kron(p.A[i], torch.outer(s[i], t[i])) for i in range(2)) for s, t in ((p.Ds, p.Dt), (p.Us, p.Ut)))
    torch.testing.assert_close(m.stream(Tokens(h), p).h,
                               h + nn.functional.gelu(h @ D.T + p.Dc, approximate="tanh") @ U.T + p.Uc)
    norm = Site("block.0.mlp.norm", "weight", nn.LayerNorm(8), "m", layout="norm", d_in=1, d_out=8, param="weight", bias="bias")
    p = fill(state(m, norm), W=torch.ones(8, 1), b=2 * torch.ones(8))
    W, b = m.weight(norm.W, p, norm.b)
    assert torch.equal(W, torch.full((8, 1), 2.)) and torch.equal(b, torch.full((8,), 2.))
    assert call(compacter(norms=False), "init", site=norm) is None
    bare = Site("block.0.mlp.norm", "weight", nn.RMSNorm(8), "m", layout="norm", d_in=1, d_out=8, param="weight")
    assert [n for n, _ in state(m, bare).named_parameters()] == ["W"]          # no bias is added where there is none
    with pytest.raises(DoesNotFit, match="divisors of 9"):
        state(m, stream(9))


# -- adalora ----------------------------------------------------------------------------------------------------------


def test_adalora_budget_by_hand():
    m = adalora(rank=12, target=4, warmup=0.1, final=0.3)                       # falls between steps 10 and 70
    budgets = [m.budget(k, 100, 10) for k in (1, 10, 11, 40, 69, 70, 100)]
    assert budgets == [120, 120, int(80 * (59 / 60)**3 + 40), 50, 40, 40, 40]


def test_adalora_importance_by_hand():
    """One triplet, one step: |w·g| is 6 for P, 2 for λ, 1 for Q; smoothed 0.9, 0.3, 0.15; uncertainty 0.15·(5.1, 1.7, 0.85)."""
    m = adalora(rank=1, target=1, warmup=0.0, final=0.0, every=9)
    p = fill(state(m, place(linear(1, 1))), P=[[2]], lam=[1], Q=[[-1]])
    for t, g in ((p.P, 3), (p.lam, -2), (p.Q, 1)):
        t.grad = torch.full_like(t, g)
    m.step(Run({"s": p}, 1, 9))
    wanted = 0.9 * 0.765 + 0.3 * 0.255 + 0.15 * 0.1275
    torch.testing.assert_close(m.score(p), torch.tensor([wanted]))
    p.lam.grad = p.P.grad = p.Q.grad = None                                      # a site the batch never reached
    m.step(Run({"s": p}, 2, 9))
    torch.testing.assert_close(p.I[0], 0.85 * torch.tensor([0.9, 0.3, 0.15]))
    with pytest.raises(ScheduleNotStepped, match="total_steps"):
        m.step(Run({"s": p}, 1, None))


def test_adalora_penalty_by_hand():
    m = adalora(rank=1, target=1, penalty=0.5)
    p = fill(state(m, place(linear(2, 2))), P=[[2, 0]], Q=[[1, 1]])              # (4 - 1)² + (2 - 1)² = 10
    assert m.loss(Run({"a": p, "b": p})) == 0.5 * (10 + 10)


def test_adalora_keeps_the_best_lets_them_return_and_drops_the_rest_at_the_end():
    m = adalora(rank=3, target=1, warmup=0.0, final=0.5, beta1=0.5, beta2=0.5)
    ps = {n: state(m, place(linear(4, 4), name=n)) for n in "ab"}
    opt = torch.optim.Adam([t for p in ps.values() for t in p.parameters()], lr=0.1)
    torch.manual_seed(0)
    active, masks = [], []
    for k in range(1, 21):
        for i, p in enumerate(ps.values()):
            for t in p.parameters():
                t.grad = torch.randn(t.shape) * (1 + i)
        opt.step()
        m.step(Run(ps, k, 20))
        active.append(sum(int((p.lam != 0).sum()) for p in ps.values()))
        masks.append(torch.cat([p.lam != 0 for p in ps.values()])) if k < 20 else None
    assert active == [m.budget(k, 20, 2) for k in range(1, 21)] and active[-1] == 2
    lost = torch.zeros(6, dtype=torch.bool)
    assert any(bool((masks[k + 1] & ~masks[k]).any()) for k in range(len(masks) - 1)), lost      # some came back
    assert [len(p.P) for p in ps.values()] == [len(p.lam) for p in ps.values()] == [len(p.Q) for p in ps.values()]
    assert sum(len(p.lam) for p in ps.values()) == 2 and not len(ps["a"].I)
    moved = [x for p in ps.values() for x in p.moved.values()]
    before = {id(t): opt.state[t]["exp_avg"].clone() for t, _ in moved}
    follow(opt, moved)
    for t, kept in moved:
        assert torch.equal(opt.state[t]["exp_avg"], before[id(t)][kept])
    for p in ps.values():
        assert m.weight(torch.zeros(4, 4), p).shape == (4, 4)                  # also of rank 0


# -- spiel ------------------------------------------------------------------------------------------------------------


def test_spiel_weight_by_hand():
    m = spiel(density=0.5)
    p = fill(state(m, place(linear(2, 2))), v=[10, 20])
    p.idx = torch.tensor([3, 0], dtype=torch.int32)
    assert m.weight(W22, p).tolist() == [[21, 2], [3, 14]]
    assert p.idx.dtype == torch.int32


def test_spiel_drops_the_least_changed_and_grows_the_steepest():
    """Places 0-3 are active with |v| = 4 1 2 3; of the candidates 1 5 6 7 with sums 9 -8 7 1, three entries go: 1 2 3 by least
    change; 1 was dropped but has the largest sum, so it stays as it was, and 5 and 6 take the places of 2 and 3."""
    m = spiel(density=0.5)
    p = fill(state(m, place(linear(2, 4))), v=[4, -1, 2, -3])
    p.idx, p.cand = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 5, 6, 7])
    p.sum = torch.tensor([9., -8, 7, 1])
    m.replace(p, 3)
    assert p.idx.tolist() == [0, 1, 5, 6] and p.v.tolist() == [4, -1, 0, 0]
    assert p.moved["v"][1].tolist() == [0, 1, -1, -1]


def test_spiel_never_grows_an_active_entry_and_may_grow_fewer():
    m = spiel(density=0.5)
    p = fill(state(m, place(linear(2, 4))), v=[4, -1, 2, -3])
    p.idx, p.cand, p.sum = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 3, 2, 7]), torch.tensor([9., 8, 7, 6])
    m.replace(p, 2)                                                            # out: 1 and 2; 0 and 3 stay; 2 stays by its sum
    assert sorted(p.idx.tolist()) == [0, 2, 3, 7] and p.v.tolist() == [4, 0, 2, -3]


@pytest.mark.parametrize("fast", [True, False])
def test_spiel_gathers_the_dense_gradient_and_keeps_its_count(fast):
    module = linear(8, 6)
    m, s = spiel(density=0.125, every=4, gather=2, rate=0.5), place(module)
    p, total = state(m, s).train(), 22
    opt = torch.optim.Adam(p.parameters(), lr=0.01)
    torch.manual_seed(0)
    xs = torch.randn(total, 10, 8)
    dense, seen = [], set()
    for k in range(1, total + 1):
        x = xs[k - 1]
        W = m.weight(s.W, p).detach().requires_grad_()
        dense.append(torch.autograd.grad(nn.functional.linear(x, W, module.bias).square().sum(), W)[0].flatten())
        gathering = len(p.sum)
        y = m.fast(x, module(x), p) if fast else nn.functional.linear(x, m.weight(s.W, p), module.bias)
        y.square().sum().backward()
        if gathering and k % 4 == 1:
            assert set(p.cand.tolist()) == set(dense[-1].abs().topk(6).indices.tolist())
            torch.testing.assert_close(p.sum, dense[-1][p.cand])
        elif gathering:
            torch.testing.assert_close(p.sum, (dense[-1] + dense[-2])[p.cand])
        torch.testing.assert_close(p.v.grad, dense[-1][p.idx])
        opt.step()
        before = p.idx.clone()
        m.step(Run({"s": p}, k, total))
        moved = list(p.moved.values())
        p.moved.clear()
        follow(opt, moved)
        opt.zero_grad()
        new = int((~torch.isin(p.idx, before)).sum())
        limit = 6 if k == 2 else int(0.5 * (1 - k / total) * 6) if k % 4 == 2 else 0
        assert new <= limit and len(p.idx) == len(p.v) == len(p.idx.unique()) == 6
        assert all(t.numel() in (1, 6) for t in opt.state[p.v].values())       # optimizer state scales with density
        seen |= set(p.idx.tolist())
    assert len(seen) > 6 and not len(p.cand) and not len(p.sum)


def test_spiel_gathers_nothing_in_eval():
    p = state(spiel(), place(linear(8, 6))).eval()
    spiel().weight(torch.zeros(6, 8), p).sum().backward()
    assert not len(p.cand)
    with pytest.raises(BadChain, match="less than every"):
        spiel(every=5, gather=5)
    with pytest.raises(ScheduleNotStepped, match="total_steps"):
        spiel().step(Run({"s": p}, 1, None))


def _process(rank, port, found):
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    import luthier

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    tuned = luthier.attach(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)),
                           'spiel(at="all", density=0.1, every=4, gather=2)').train()
    tuned.total_steps, wrapped = 9, DistributedDataParallel(tuned)
    opt = torch.optim.Adam([t for _, t in tuned.trainable()], lr=0.02)
    torch.manual_seed(rank)                                                     # each process sees other data
    same, seen = True, set()
    for _ in range(6):
        wrapped(torch.randn(5, 8)).square().sum().backward()
        opt.step()
        tuned.step(opt)
        opt.zero_grad()
        for t in [t for p in tuned.states.values() for t in (p.idx, p.v.data)]:
            both = [torch.zeros_like(t) for _ in range(2)]
            distributed.all_gather(both, t)
            same = same and torch.equal(*both)
            seen.add(tuple(t.tolist()))
    found[rank] = same and len(seen) > 6
    distributed.destroy_process_group()


def test_spiel_chooses_the_same_entries_in_every_process():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    found = torch.multiprocessing.get_context("spawn").Manager().dict()
    torch.multiprocessing.spawn(_process, (port, found), nprocs=2)
    assert dict(found) == {0: True, 1: True}
