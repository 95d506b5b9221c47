"""Golden numbers of the methods that quantise, merge and sparsify: by hand, or by an independent slow implementation."""

from types import SimpleNamespace as State

import pytest
import torch

from luthier.errors import BadChain, DoesNotFit
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
    stored = sum(t.numel() * t.element_size() for t in state.values())
    assert stored == 64 * 512 * bits // 8 + 64 * 3       # codes, a half-precision scale and a byte of zero a row
    assert bits / 16 <= stored / (2 * W.numel()) < bits / 16 + 0.01
    assert gptq(bits=bits).weight(State(**state)).dtype == torch.float16
