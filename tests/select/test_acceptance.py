"""What is learnt of acceptance: chances that were simulated are found again, for all and for each request."""

from __future__ import annotations

import numpy as np
import pytest

from steeple.select.acceptance import PRIOR, Acceptance


def simulate(acceptance: Acceptance, chance: np.ndarray, rounds: int, depth: int, seed: int = 0) -> list[str]:
    """``rounds`` of drafts by drafter 0, where each request i goes on from depth to depth with ``chance[i, j]``."""
    rng = np.random.default_rng(seed)
    B, K = chance.shape
    ids = [f"r{i}" for i in range(B)]
    for _ in range(rounds):
        accepted = np.cumprod(rng.random((B, K)) < chance, axis=1).sum(axis=1)
        acceptance.note(ids, np.zeros(B, dtype=int), np.full(B, depth), np.minimum(accepted, depth))
    return ids


def test_the_population_converges_to_the_chances() -> None:
    chance = np.tile([0.9, 0.5, 0.7, 0.6], (64, 1))
    acceptance = Acceptance(1, 4)
    ids = simulate(acceptance, chance, 150, 4)
    np.testing.assert_allclose(acceptance.population()[0], chance[0], atol=0.04)
    mean = acceptance.curves(ids).survival[:, 0].mean(axis=0)
    np.testing.assert_allclose(mean, np.cumprod(chance[0]), atol=0.04)


def test_requests_that_differ_are_told_apart() -> None:
    chance = np.tile([[0.95], [0.3]], (16, 4))
    acceptance = Acceptance(1, 4)
    ids = simulate(acceptance, chance, 60, 4)
    first = acceptance.curves(ids).survival[:, 0, 0]
    assert first[::2].min() > first[1::2].max()
    np.testing.assert_allclose([first[::2].mean(), first[1::2].mean()], [0.95, 0.3], atol=0.1)
    # a newcomer is taken for one of all
    assert 0.4 < acceptance.curves(["new"]).survival[0, 0, 0] < 0.9


def test_depths_that_never_had_their_turn_are_not_trials() -> None:
    """Drafts are refused at their second node: of the third nothing is known."""
    acceptance = Acceptance(1, 3)
    simulate(acceptance, np.tile([1.0, 0.0, 1.0], (8, 1)), 50, 3)
    first, second, third = acceptance.population()[0]
    assert first > 0.95
    assert second < 0.05
    assert third == pytest.approx(second), "without evidence a depth is like the one before it"


def test_shorter_drafts_say_nothing_of_what_lies_deeper() -> None:
    acceptance = Acceptance(1, 3)
    simulate(acceptance, np.ones((8, 3)), 50, 1)
    assert acceptance._reached[0, 0] > 100
    assert (acceptance._reached[0, 1:] == 0).all(), "a node that was not drafted was counted as refused"


def test_a_drafter_that_proposes_nothing_is_known_for_it() -> None:
    acceptance = Acceptance(2, 2)
    for round in range(60):
        proposed = np.array([2 if round % 4 == 0 else 0, 2])
        acceptance.note(["a", "b"], np.array([0, 1]), proposed, proposed)
    curves = acceptance.curves(["a", "b"])
    assert curves.offers[0, 0] == pytest.approx(0.25, abs=0.1)
    assert curves.offers[1, 1] > 0.95
    assert acceptance.curves(["new"]).offers[0] == pytest.approx([0.25, 0.97], abs=0.1)
    assert curves.survival[0, 0, 0] == pytest.approx(curves.offers[0, 0], abs=0.05), "what is proposed is accepted"
    chance = acceptance.population()
    assert chance[0, 0] > 0.9, "an empty proposal is no refusal"


def test_old_rounds_fade() -> None:
    acceptance = Acceptance(1, 2)
    ids = simulate(acceptance, np.full((4, 2), 0.95), 200, 2)
    simulate(acceptance, np.full((4, 2), 0.05), 60, 2)
    assert acceptance.curves(ids).survival[:, 0, 0].max() < 0.4
    assert acceptance.population()[0, 0] < 0.4, "of the population as well"


def test_hope_goes_with_ignorance() -> None:
    acceptance = Acceptance(2, 2)
    ids = simulate(acceptance, np.full((8, 2), 0.6), 100, 2)
    mean = acceptance.curves(ids).survival[..., 0]
    high = acceptance.curves(ids, np.ones((8, 2)), np.ones(2)).survival[..., 0]
    low = acceptance.curves(ids, -np.ones((8, 2)), -np.ones(2)).survival[..., 0]
    assert (low < mean + 1e-9).all()
    assert (mean < high + 1e-9).all()
    assert (high - low)[:, 1].mean() > 1.5 * (high - low)[:, 0].mean(), "drafter 1 was never seen"


def test_nothing_is_left_of_the_forgotten() -> None:
    acceptance = Acceptance(1, 2)
    ids = simulate(acceptance, np.full((3, 2), 1.0), 40, 2)
    known = acceptance.curves(ids).survival[0, 0, 0]
    for id in ids:
        acceptance.forget(id)
    assert not acceptance.remembered
    fresh = Acceptance(1, 2).curves(["x"]).survival[0, 0, 0]
    assert fresh == pytest.approx(PRIOR * 0.9)
    # its slot is used again, without what was there
    acceptance.note(["y"], np.array([0]), np.array([0]), np.array([0]))
    assert acceptance._own[acceptance._slot["y"]].sum() == 0
    assert known > 0.9
