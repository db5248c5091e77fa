"""Prices learnt from rounds: coefficients that made the times are found again, and busy moments do not count."""

from __future__ import annotations

import numpy as np
import pytest

from steeple.select.costs import Costs, Drafted, Fit, Prior


def test_seconds_of_new_rounds_are_predicted() -> None:
    rng, fit = np.random.default_rng(0), Fit([1.0, 1.0, 1.0])
    true = np.array([5e-3, 0.2e-3, 1e-6])

    def features() -> list[float]:
        return [1.0, float(rng.integers(8, 64)), float(rng.integers(1000, 50_000))]

    for _ in range(60):
        x = features()
        fit.note(x, float(true @ x) * float(np.exp(0.02 * rng.standard_normal())))
    np.testing.assert_allclose(fit.coefficients, true, rtol=0.15)
    x = features()
    assert float(fit.coefficients @ x) == pytest.approx(float(true @ x), rel=0.05)


def test_busy_moments_do_not_count() -> None:
    rng, fit = np.random.default_rng(1), Fit([0.0, 0.0])
    for round in range(80):
        rows = float(rng.integers(8, 64))
        fit.note([1.0, rows], (4e-3 + 1e-4 * rows) * (20.0 if round % 9 == 3 else 1.0))
    assert float(fit.coefficients @ np.array([1.0, 32.0])) == pytest.approx(7.2e-3, rel=0.1)


def test_what_no_round_tells_apart_stays_as_it_was_known() -> None:
    """Rows varied once; then they are always the same, for longer than rounds are remembered."""
    fit = Fit([1e-3, 1e-3])
    for rows in range(8, 40):
        fit.note([1.0, float(rows)], 10e-3 + 0.5e-3 * rows)
    for _ in range(300):
        fit.note([1.0, 32.0], 26e-3)
        _ = fit.coefficients
    np.testing.assert_allclose(fit.coefficients, [10e-3, 0.5e-3], rtol=0.2)


def test_a_prior_that_is_far_too_high_gives_way() -> None:
    fit = Fit([0.0, 7e-3])
    fit.note([1.0, 4.0], 1e-4)
    fit.note([1.0, 4.0], 1e-4)
    assert float(fit.coefficients @ np.array([1.0, 6.0])) < 1e-3


def test_a_machine_that_slows_down_is_followed() -> None:
    fit = Fit([0.0])
    for seconds in [1e-3] * 60 + [2e-3] * 60:
        fit.note([1.0], seconds)
    assert float(fit.coefficients[0]) == pytest.approx(2e-3, rel=0.2)


def test_drafters_cost_a_share_of_the_target_until_they_were_seen() -> None:
    costs = Costs([Prior(0.25, 0.5), Prior(0.0, 0.0)])
    for rows in (16, 48, 32) * 6:
        costs.note(10e-3 + 0.2e-3 * rows, rows, 16, 0.0, {})
    rates = costs.rates(16, 0.0)
    assert rates.step == pytest.approx(13.2e-3, rel=0.05)
    assert rates.row == pytest.approx(0.2e-3, rel=0.1)
    assert rates.passes[0] == pytest.approx(2.5e-3, rel=0.1)
    assert rates.catch_up[0] == pytest.approx(0.1e-3, rel=0.1)
    assert rates.passes[1] == 0.0
    assert costs.measured.tolist() == [0, 0]
    rng = np.random.default_rng(0)
    for _ in range(120):
        passes, caught = int(rng.integers(1, 8)), int(rng.integers(0, 200))
        done = Drafted(passes, bool(rng.integers(2)), 16 * passes, caught, 0.0)
        seconds = 1e-3 * passes + 0.05e-3 * caught + (0.4e-3 * passes if done.ragged else 0.0)
        costs.note(10e-3, 32, 16, 0.0, {0: (done, seconds)})
    rates = costs.rates(16, 0.0)
    assert rates.catch_up[0] == pytest.approx(0.05e-3, rel=0.2)
    level = float(rates.start[0] + 4 * rates.passes[0] + 64 * rates.node[0])
    assert level == pytest.approx(4e-3, rel=0.12)
    assert level + 4 * float(rates.ragged[0]) == pytest.approx(5.6e-3, rel=0.12)
    assert costs.measured[0] > 20
