"""Golden numbers of the methods that quantise, merge and sparsify: by hand, or by an independent slow implementation."""

from types import SimpleNamespace as State

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from luthier import attach, load
from luthier.errors import BadChain, BadState, DoesNotFit, WrongBase
from luthier.method import parse
from luthier.methods.merge.dare import dare, mask
from luthier.methods.quantize._pack import pack, unpack
from luthier.methods.quantize.gptq import gptq


class Place:
    """What a verb reads of a site: the weight, the bias, a name."""

    def __init__(self, W, b=None, name="block.0.mlp.up"):
        self.W, self.b, self.name = W, b, name


# -- gptq -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("d", [1, 7, 8, 13, 64])
def test_pack_is_a_bit_string_lowest_bit_first(bits, d):
    codes = torch.randint(0, 2**bits, (3, d), generator=torch.Generator().manual_seed(d))
    codes[0] = 2**bits - 1
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, -(-d * bits // 8))
    for row, got in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum(c << bits * i for i, c in enumerate(row))                # the row as one long integer
        assert got == list(number.to_bytes(len(got), "little"))
    assert torch.equal(unpack(packed, bits, d), codes.byte())


def brain_surgeon(W, H, bits, group, damp, act_order):
    """OBQ as written: an explicit inverse, one elimination a column, no blocks, no Cholesky."""
    W0, W, span = W.clone(), W.clone(), group or W.shape[1]
    H = H + damp * H.diag().mean() * torch.eye(len(H)).to(H)
    inverse, Q, grids = torch.linalg.inv(H), torch.zeros_like(W), {}
    for j in H.diag().argsort(descending=True).tolist() if act_order else range(W.shape[1]):
        g = j // span
        if g not in grids:
            part = (W if group and not act_order else W0)[:, g * span:(g + 1) * span]
            low, high = part.min(1).values.clamp(max=0), part.max(1).values.clamp(min=0)
            grids[g] = (high - low) / (2**bits - 1), torch.round(-low * (2**bits - 1) / (high - low))
        scale, zero = grids[g]
        Q[:, j] = scale * (torch.clamp(torch.round(W[:, j] / scale) + zero, 0, 2**bits - 1) - zero)
        W -= torch.outer((W[:, j] - Q[:, j]) / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return Q


def layer(d=40, rows=6, n=200, seed=0):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g, dtype=torch.float64)
    return torch.randn(rows, d, generator=g, dtype=torch.float64), X


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_equals_brain_surgeon_with_explicit_inverses(bits, group, act_order):
    W, X = layer(d=150 if group == 0 else 40)                                 # more than one lazy block either way
    m = gptq(bits=bits, group=group, act_order=act_order)
    Q = m.weight(State(**m.init(Place(W), m.observe(X))))
    expected = brain_surgeon(W, 2 * X.T @ X, bits, group, m.damp, act_order)
    torch.testing.assert_close(Q, expected, rtol=0, atol=1e-12)


def test_gptq_statistic_adds_over_batches_and_is_at_least_single_precision():
    W, X = layer()
    torch.testing.assert_close(gptq().observe(X[:50]) + gptq().observe(X[50:]), 2 * X.T @ X)
    assert gptq().observe(X.bfloat16()).dtype == torch.float32


def test_gptq_by_hand():
    # Columns 0 and 1 are correlated, column 2 stands alone: H = [[2, 1], [1, 2]] and 1; H⁻¹ = [[2, -1], [-1, 2]] / 3 and 1.
    # Row (0.6, 1.6, 3.0), 2 bits: grid 0 1 2 3. 0.6 -> 1, e = -0.4; column 1 moves by -e · H⁻¹₀₁ / H⁻¹₀₀ = 0.4 · -1/2:
    # 1.6 -> 1.4 -> 1, where rounding alone says 2.
    W, H = torch.tensor([[0.6, 1.6, 3.0]]), torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    m = gptq(bits=2, damp=0.0)
    p = m.init(Place(W), H)
    assert p["codes"].tolist() == [[1 + (1 << 2) + (3 << 4)]] and p["scale"].tolist() == [[1.0]] and p["zero"].tolist() == [[0]]
    assert m.weight(State(**p)).tolist() == [[1.0, 1.0, 3.0]]


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group", [0, 16])
def test_gptq_beats_rounding_and_infinite_damping_is_rounding(bits, group):
    W, X = layer()
    def loss(m):
        return ((W - m.weight(State(**m.init(Place(W), m.observe(X))))) @ X.T).square().mean()
    nearest = gptq(bits=bits, group=group, damp=1e12)
    span = group or 40
    for lo in range(0, 40, span):
        part = W[:, lo:lo + span]
        low, high = part.min(1, keepdim=True).values.clamp(max=0), part.max(1, keepdim=True).values.clamp(min=0)
        s = (high - low) / (2**bits - 1)
        z = torch.round(-low / s)
        got = nearest.weight(State(**nearest.init(Place(W), nearest.observe(X))))[:, lo:lo + span]
        torch.testing.assert_close(got, s * ((torch.round(part / s) + z).clamp(0, 2**bits - 1) - z))
    assert loss(gptq(bits=bits, group=group)) < 0.8 * loss(nearest)


def test_gptq_edges():
    W, X = layer()
    X[:, 3] = 0                                          # a column that calibration never excites: rounded, not destroyed
    W[2] = 0                                             # a row of zeros stays a row of zeros
    W[4] = W[4].abs()
    m = gptq(bits=8)
    Q = m.weight(State(**m.init(Place(W), m.observe(X))))
    assert torch.isfinite(Q).all() and (Q[2] == 0).all()
    assert ((Q - W)[:, 3].abs() <= (W.amax(1).clamp(min=0) - W.amin(1).clamp(max=0)) / 255).all()
    with pytest.raises(DoesNotFit, match="more batches"):
        gptq(damp=0.0).init(Place(W), gptq().observe(X[:2]))
    for wrong in (dict(bits=1), dict(bits=9), dict(group=-1), dict(damp=-0.1), dict(damp=float("inf"))):
        with pytest.raises(BadChain):
            gptq(**wrong)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_bytes_are_near_bits_sixteenths_of_half_precision(bits):
    W = torch.randn(64, 512).half()
    state = gptq(bits=bits).init(Place(W), torch.eye(512))
    stored = sum(state[n].nbytes for n in ("codes", "scale", "zero"))
    assert stored == 64 * 512 * bits // 8 + 64 * 3       # codes, a half-precision scale and a byte of zero a row
    assert bits / 16 <= stored / (2 * W.numel()) < bits / 16 + 0.01
    assert gptq(bits=bits).weight(State(**state)).dtype == torch.float16


# -- a model of two layers, and experts of it -----------------------------------------------------------------


class Two(nn.Module):
    def __init__(self, d=4, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.first, self.second = nn.Linear(d, d), nn.Linear(d, 2, bias=False)
        for p in self.parameters():
            p.data = torch.randint(-8, 8, p.shape, generator=g) / 4             # sums with small binary fractions are exact

    def forward(self, x):
        return self.second(self.first(x).relu())


def expert(folder, name, change):
    """A file of parameter name -> weight: the base plus `change`."""
    model = Two()
    save_file({n: (p + change.get(n, torch.zeros_like(p))).detach() for n, p in model.named_parameters()},
              folder / f"{name}.safetensors")
    return str(folder / f"{name}.safetensors")


def changed(tuned):
    """parameter name -> what merging the chain adds to it."""
    base = {n: p.detach().clone() for n, p in tuned.model.named_parameters()}
    with torch.no_grad():
        found = {n: p.detach() - base[n] for n, p in tuned.merge().model.named_parameters()}
    tuned.unmerge()
    return found


def row(*values, at=0, shape=(4, 4)):
    t = torch.zeros(shape)
    t[at] = torch.tensor(values)
    return t


# -- ties -----------------------------------------------------------------------------------------------------


def test_ties_by_hand(tmp_path):
    # Three experts over eight entries that change (24 + 4 entries in all, density 4/28 keeps the top four of each):
    #            first.weight[0]              second.weight[0]
    #   a        0.9  -0.1   0.5   0.0        0.8   0.0   0.7   0.05      keeps 0.9  0.5  0.8  0.7
    #   b       -0.3   0.6   0.4   0.2        0.6   0.0  -0.9   0.0       keeps 0.6  0.4  0.6 -0.9
    #   c       -0.4   0.7  -0.8   0.0        0.0   0.5   0.1   0.0       keeps -0.4 0.7 -0.8  0.5
    # Signs by mass: 0.5 > 0, 1.3 > 0, 0.1 > 0, 0; 1.4 > 0, 0.5 > 0, -0.2 < 0, 0. Means of those who agree:
    #            0.9   0.65  0.45  0.0        0.7   0.5  -0.9   0.0
    a = dict(first=row(0.9, -0.1, 0.5, 0.0), second=row(0.8, 0.0, 0.7, 0.05, shape=(2, 4)))
    b = dict(first=row(-0.3, 0.6, 0.4, 0.2), second=row(0.6, 0.0, -0.9, 0.0, shape=(2, 4)))
    c = dict(first=row(-0.4, 0.7, -0.8, 0.0), second=row(0.0, 0.5, 0.1, 0.0, shape=(2, 4)))
    paths = tuple(expert(tmp_path, n, {f"{k}.weight": v for k, v in t.items()}) for n, t in dict(a=a, b=b, c=c).items())
    got = changed(attach(Two(), parse(f"ties(experts={paths!r}, density={4 / 28})")))
    close = dict(atol=1e-6, rtol=0)
    torch.testing.assert_close(got["first.weight"], row(0.9, 0.65, 0.45, 0.0), **close)
    torch.testing.assert_close(got["second.weight"], row(0.7, 0.5, -0.9, 0.0, shape=(2, 4)), **close)
    torch.testing.assert_close(got["first.bias"], torch.zeros(4), **close)
    half = changed(attach(Two(), parse(f"ties(experts={paths!r}, density={4 / 28}, scale=0.5)")))
    torch.testing.assert_close(half["first.weight"], 0.5 * row(0.9, 0.65, 0.45, 0.0), **close)


def test_ties_keeps_all_or_nothing_at_the_ends_of_density(tmp_path):
    paths = tuple(expert(tmp_path, n, {"first.weight": row(*v), "first.bias": torch.tensor(v)})
                  for n, v in dict(a=(0.5, 0.25, -0.25, 1.0), b=(0.25, -0.5, 0.25, 3.0)).items())
    everything = changed(attach(Two(), parse(f"ties(experts={paths!r}, density=1.0)")))
    expected = torch.tensor([0.375, -0.5, 0.0, 2.0])       # the third entry balances exactly: nobody is elected
    torch.testing.assert_close(everything["first.bias"], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(everything["first.weight"][0], expected, atol=1e-6, rtol=0)
    nothing = changed(attach(Two(), parse(f"ties(experts={paths!r}, density=0.0)")))
    assert all((t == 0).all() for t in nothing.values())
    alone = changed(attach(Two(), parse(f"ties(experts={paths[:1]!r}, density=1.0)")))
    torch.testing.assert_close(alone["first.bias"], torch.tensor([0.5, 0.25, -0.25, 1.0]), atol=1e-6, rtol=0)


# -- dare -----------------------------------------------------------------------------------------------------


def test_dare_drops_rescales_and_keeps_the_expectation(tmp_path):
    change = torch.arange(1.0, 17).reshape(4, 4)
    path = expert(tmp_path, "a", {"first.weight": change})
    def one(seed, **more):
        text = f"dare(experts={(path,)!r}, drop=0.75, seed={seed}, {', '.join(f'{k}={v!r}' for k, v in more.items())})"
        return changed(attach(Two(), parse(text)))["first.weight"]
    kept = mask(7, 0, "first.weight/tau", (4, 4), 0.75)
    torch.testing.assert_close(one(7), 4 * change * kept, atol=1e-4, rtol=0)              # the mask, made anew from its seed
    torch.testing.assert_close(one(7, rescale=False), change * kept, atol=1e-5, rtol=0)
    n = 400
    mean = sum(one(seed) for seed in range(n)) / n
    spread = change * (0.75 / 0.25 / n) ** 0.5           # an entry's standard error: τ · sqrt(p / (1 - p) / n)
    assert ((mean - change).abs() < 4 * spread).all()


def test_dare_combines_by_average_sum_or_election(tmp_path):
    paths = tuple(expert(tmp_path, n, {"first.bias": torch.tensor(v)})
                  for n, v in dict(a=(0.4, 0.2, -0.2, 1.0), b=(0.2, -0.4, 0.6, 0.0)).items())
    for combine, expected in dict(mean=(0.3, -0.1, 0.2, 0.5), sum=(0.6, -0.2, 0.4, 1.0), elect=(0.3, -0.4, 0.6, 1.0)).items():
        got = changed(attach(Two(), dare(experts=paths, drop=0.0, combine=combine)))["first.bias"]
        torch.testing.assert_close(got, torch.tensor(expected), atol=1e-6, rtol=0)
    nothing = changed(attach(Two(), dare(experts=paths, drop=1.0)))
    assert all(torch.isfinite(t).all() and (t == 0).all() for t in nothing.values())
    assert not torch.equal(mask(0, 0, "x", (64,), 0.5), mask(0, 1, "x", (64,), 0.5))      # each expert has its own mask
    with pytest.raises(BadChain, match="'mean', 'sum', 'elect'"):
        dare(combine="median")


# -- experts --------------------------------------------------------------------------------------------------


def test_experts_are_read_from_every_form_alike(tmp_path):
    model, change = Two(), {"first.weight": row(1.0, 2.0, 3.0, 4.0), "first.bias": torch.tensor([1.0, 0.0, 0.0, -1.0])}
    file = expert(tmp_path, "plain", change)
    wrapped = tmp_path / "wrapped"
    wrapped.mkdir()
    save_file({f"model.{n}": (p + change.get(n, 0)).detach() for n, p in Two().named_parameters()}, wrapped / "model.safetensors")
    sites = tmp_path / "sites.safetensors"
    tuned = attach(model, "full()")
    with torch.no_grad():
        for p in tuned.states.values():
            for own, what in (("W", "weight"), ("b", "bias")):
                if (delta := change.get(f"{p.site_name.removesuffix('.weight')}.{what}")) is not None:
                    getattr(p, own).add_(delta)
    tuned.save(tmp_path / "saved")
    tuned.detach()
    for path in (file, wrapped, tmp_path / "saved"):
        got = changed(attach(Two(), dare(experts=(str(path),), drop=0.0)))
        for n in ("first.weight", "first.bias"):
            torch.testing.assert_close(got[n], change[n], atol=1e-6, rtol=0)
    save_file({"head": Two().second.weight.detach() + 1}, sites)                          # names of sites
    got = changed(attach(Two(), dare(at="head", experts=(str(sites),), drop=0.0)))
    assert torch.equal(got["second.weight"], torch.ones(2, 4))


def test_experts_are_frozen_in_the_state_and_not_needed_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expert(tmp_path, "a", {"first.weight": row(1.0, -2.0, 3.0, 4.0)})
    model, x = Two(), torch.randn(5, 4)
    tuned = attach(model, "ties(experts='a.safetensors', density=0.5)")
    y = tuned(x)
    tuned.save(tmp_path / "state")
    tuned.detach()
    (tmp_path / "a.safetensors").unlink()
    assert torch.equal(load(model, tmp_path / "state")(x), y)
    assert dare(experts=("runs",)).experts == ("./runs",)


def test_experts_that_do_not_fit_are_refused(tmp_path):
    good = expert(tmp_path, "good", {})
    def refuse(error, match, *experts, at="all"):
        model = Two()
        with pytest.raises(error, match=match):
            attach(model, dare(experts=experts, at=at))
        assert "forward" not in model.first.__dict__
    refuse(BadChain, "no experts")
    refuse(BadState, "Nearest: good.safetensors", str(tmp_path / "goood.safetensors"))
    (tmp_path / "pickled").mkdir()
    torch.save({"first.weight": torch.zeros(4, 4)}, tmp_path / "pickled" / "pytorch_model.bin")
    refuse(BadState, "never read", str(tmp_path / "pickled"))
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:-7])
    refuse(BadState, "no whole safetensors", good, str(tmp_path / "torn.safetensors"))
    save_file({"first.weight": torch.zeros(4, 4), "first.bias": torch.zeros(4)}, tmp_path / "part.safetensors")
    refuse(BadState, "holds nothing for head .second.weight", str(tmp_path / "part.safetensors"))
    save_file({n: torch.zeros(3, *p.shape[1:]) for n, p in Two().named_parameters()}, tmp_path / "other.safetensors")
    refuse(WrongBase, "this very base", str(tmp_path / "other.safetensors"))
    tuned = attach(Two(), "sparse(density=0.5)")
    tuned.save(tmp_path / "delta")
    refuse(BadState, "luthier merge", str(tmp_path / "delta"))


# -- sparse ---------------------------------------------------------------------------------------------------


def test_sparse_keeps_the_most_changed_places_of_all_sites_together(tmp_path):
    W, b = row(0.9, -0.1, 0.5, 0.0), torch.tensor([0.0, -0.7, 0.2, 0.0])
    second = row(0.0, 0.0, 0.0, -0.6, at=1, shape=(2, 4))
    path = expert(tmp_path, "a", {"first.weight": W, "first.bias": b, "second.weight": second})
    model = Two()
    tuned = attach(model, f"sparse(density={4 / 28}, change={path!r})")
    first, second = (tuned.states[k] for k in sorted(tuned.states))
    assert first.idx.tolist() == [0, 2, 16 + 1]                                            # W[0, 0], W[0, 2], b[1]
    assert second.idx.tolist() == [7]                                                      # W[1, 3]
    assert sum(p.numel() for _, p in tuned.trainable()) == 4                               # density exactly K, over all sites
    with torch.no_grad():
        first.v.copy_(torch.tensor([1.0, 2.0, 3.0]))
        second.v.fill_(-1.0)
    got = changed(tuned)
    assert torch.equal(got["first.weight"], row(1.0, 0.0, 2.0, 0.0))
    assert torch.equal(got["first.bias"], torch.tensor([0.0, 3.0, 0.0, 0.0]))
    assert torch.equal(got["second.weight"], row(0.0, 0.0, 0.0, -1.0, at=1, shape=(2, 4)))


@pytest.mark.parametrize("density", [0.04, 0.3, 0.5, 1.0])
def test_sparse_at_random_places_is_exact_and_seeded(density):
    def at(seed):
        tuned = attach(Two(), f"sparse(density={density})", seed=seed)
        return {k: p.idx.tolist() for k, p in tuned.states.items()}
    found = at(0)
    assert sum(map(len, found.values())) == round(density * 28) and all(len(set(v)) == len(v) for v in found.values())
    assert found == at(0) and (density == 1.0 or found != at(1))
    with pytest.raises(DoesNotFit):
        attach(Two(), "sparse(density=0.0)")


def test_sparse_changes_add_up_in_any_order(tmp_path):
    x, made = torch.randn(6, 4), {}
    for seed in (1, 2):
        tuned = attach(Two(), "sparse(density=0.4)", seed=seed)
        with torch.no_grad():
            for _, p in tuned.trainable():
                p.normal_(generator=torch.Generator().manual_seed(seed))
        tuned.save(tmp_path / str(seed))
        made[seed] = changed(tuned)
    outputs = []
    for order in ((1, 2), (2, 1)):
        model = Two()
        for seed in order:
            state = attach(model, "sparse(density=0.4)", seed=seed, name=str(seed))
            for k, p in state.states.items():
                p.v.data.copy_(load(Two(), tmp_path / str(seed)).states[k].v)
        outputs.append(model(x))
    total = Two()
    with torch.no_grad():
        for n, p in total.named_parameters():
            p.add_(made[1][n] + made[2][n])
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], total(x))


# -- full and probe -------------------------------------------------------------------------------------------


def test_full_trains_like_plain_training():
    x, y = torch.randn(32, 4), torch.randn(32, 2)
    plain, tuned = Two(), attach(Two(), "full()")
    for model, parameters in ((plain, plain.parameters()), (tuned, [p for _, p in tuned.trainable()])):
        optimizer = torch.optim.Adam(parameters, lr=0.01)
        for _ in range(5):
            (model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(tuned(x), plain(x), rtol=0, atol=0)
    assert sum(p.numel() for _, p in tuned.trainable()) == sum(p.numel() for p in plain.parameters())
    torch.testing.assert_close(tuned.detach()(x), Two()(x), rtol=0, atol=0)
