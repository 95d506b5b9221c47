"""Placement, freezing, schedules and lean backward passes: against sums by hand and against plain autograd."""

import math

import pytest
import torch

from luthier.errors import BadChain, UnknownName
from luthier.schedule import SCHEDULES, schedule
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
