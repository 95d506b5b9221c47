"""Placement, freezing, schedules and lean backward passes: against sums by hand and against plain autograd."""

import math

import pytest
import torch

from luthier import tiny
from luthier.attach import attach
from luthier.errors import BadChain, DoesNotFit, UnknownName
from luthier.procedures.apet import apet as thrown
from luthier.schedule import SCHEDULES, schedule
from luthier.site import find
from luthier.train import rate


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# -- schedules ------------------------------------------------------------------------------------------------------
def test_uba_by_hand_and_at_its_ends():
    for phi in (0.3, 1, 2, 5, 20):
        f = schedule(f"uba(phi={phi})")
        assert f(0) == 1 and abs(f(1)) < 1e-12
        assert math.isclose(f(0.5), 2 / (2 + phi))                     # c = 1: 2 / (2φ + 2 - φ)
        assert all(a > b for a, b in zip(map(f, (0, 0.2, 0.4, 0.8)), map(f, (0.2, 0.4, 0.8, 1)), strict=True))
        bottom = schedule(f"uba(phi={phi}, floor=0.25)")
        assert bottom(0) == 1 and math.isclose(bottom(1), 0.25) and math.isclose(bottom(0.5), 0.25 + 0.75 * 2 / (2 + phi))
    cosine = schedule("cosine")
    assert all(math.isclose(schedule("uba(phi=2)")(k / 40), cosine(k / 40), abs_tol=1e-15) for k in range(41))
    early, late = schedule("uba(phi=10)"), schedule("uba(phi=0.5)")
    assert all(early(k / 40) < cosine(k / 40) < late(k / 40) for k in range(1, 40))


def test_every_schedule_in_a_run():
    for text in ("linear", "cosine", "uba(phi=3)", "step", "constant", "step(at=(0.5,), by=0.5)"):
        rates = [rate(k, 100, 0.2, schedule=text, warmup=0.1) for k in range(100)]
        assert rates[:2] == [0.2 / 10, 2 * 0.2 / 10] and max(rates) == rates[10] == 0.2
        assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert [rate(k, 4, 1.0, schedule="step(at=(0.5,), by=0.5)", warmup=0) for k in range(4)] == [1, 1, 0.5, 0.5]
    assert rate(54, 100, 1.0, schedule="linear", warmup=0.1) == pytest.approx(46 / 90)


@pytest.mark.parametrize("text, error", [
    ("ubar(phi=1)", UnknownName), ("uba", BadChain), ("uba(2)", BadChain), ("uba(phi=0)", BadChain), ("uba(phi='a')", BadChain),
    ("uba(phi=1, eta=2)", BadChain), ("cosine(floor=2)", BadChain), ("f(x)(y)", BadChain), ("uba(phi=__import__('os'))", BadChain)])
def test_what_is_no_schedule_is_said(text, error):
    with pytest.raises(error):
        schedule(text)
    assert set(SCHEDULES) >= {"constant", "linear", "cosine", "step", "uba"}


# -- APET -----------------------------------------------------------------------------------------------------------
def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_apet_moves_exactly_its_count_of_places_wherever_they_lie():
    for count in (1, 777, 5000):
        model = tiny.build("bert")
        base, tuned = flat(model), attach(model, f"apet(count={count})", seed=3)
        assert sum(p.numel() for _, p in tuned.trainable()) == count
        for _, p in tuned.trainable():
            p.data.fill_(0.5)
        change = flat(tuned.merge().model) - base
        assert int((change != 0).sum()) == count
        close(change[change != 0], torch.full((count,), 0.5), 1e-6)
        assert torch.equal(flat(tuned.detach()), base)


def test_apet_places_are_uniform_over_the_model_and_follow_the_seed():
    model, total, found = tiny.build("bert"), {}, []
    for seed in range(20):
        tuned = attach(model, "apet(count=2000, at='linear')", seed=seed)
        for p in tuned.states.values():
            total[p.site_name] = total.get(p.site_name, 0) + len(p.v)
        found.append(torch.cat([p.idx for p in tuned.states.values()]))
        tuned.detach()
    assert not torch.equal(found[0][:50], found[1][:50])
    sizes = {s.name: s.W.numel() + s.d_out for s in find(model, "linear")}
    for name, n in sizes.items():
        expected = 20 * 2000 * n / sum(sizes.values())
        assert abs(total[name] - expected) < 5 * expected**0.5, name
    with pytest.raises(DoesNotFit, match="hold"):
        attach(model, "apet(count=100000000)")


def test_apet_throws_whole_modules_at_random_sites():
    model, seen = tiny.build("bert"), set()
    for seed in range(4):
        chain = thrown(model, 6000, seed=seed)
        tuned = attach(model, chain)
        assert 3000 < sum(p.numel() for _, p in tuned.trainable()) <= 6000
        own = sum(p.numel() for key, q in tuned.states.items() if ":full@" in key for p in q.parameters())
        assert 0 < own <= 3000
        seen.add(repr(chain))
        tuned.detach()
    assert len(seen) == 4 and repr(thrown(model, 6000, seed=1)) in seen
    assert [type(m).__name__ for m in thrown(model, 2000, modules=("lora(rank=2)",), inner=0)] == ["lora"]
    with pytest.raises(DoesNotFit, match="larger"):
        thrown(model, 3, inner=0)
