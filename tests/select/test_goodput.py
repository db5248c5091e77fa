"""The best round, against every round there is."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from steeple.select.acceptance import Curves
from steeple.select.costs import Rates
from steeple.select.goodput import Goodput, Plan, Standing
from steeple.select.matching import NOBODY, match


def problem(seed: int, B: int, D: int, K: int, *, ragged: bool = False) -> tuple[Curves, Rates, Standing]:
    rng = np.random.default_rng(seed)
    offers = rng.uniform(0.5, 1.0, (B, D))
    survival = offers[:, :, None] * np.cumprod(rng.uniform(0.1, 1.0, (B, D, K)), axis=2)
    rates = Rates(
        step=rng.uniform(5e-3, 20e-3),
        row=rng.uniform(0, 2e-3),
        start=rng.uniform(0, 2e-3, D),
        passes=rng.uniform(0, 3e-3, D),
        ragged=rng.uniform(0.5e-3, 2e-3, D) if ragged else np.zeros(D),
        node=rng.uniform(0, 0.5e-3, D),
        catch_up=rng.uniform(0, 0.1e-3, D),
        read=rng.uniform(0, 1e-6, D),
    )
    standing = Standing(
        rng.integers(10, 300, B).astype(float), rng.integers(0, 50, (B, D)).astype(float), np.full(B, 8.0)
    )
    return Curves(survival, offers), rates, standing


def rate_of(curves: Curves, rates: Rates, standing: Standing, choice: list[tuple[int, int]]) -> float:
    """Tokens per second of a round, written down anew: ``choice[i]`` is (drafter, depth)."""
    tokens, seconds = float(len(choice)), rates.step
    groups: dict[int, list[int]] = {}
    for i, (d, k) in enumerate(choice):
        if not k:
            continue
        groups.setdefault(d, []).append(k)
        tokens += curves.survival[i, d, :k].sum()
        seconds += k * (rates.row * curves.offers[i, d] + rates.node[d] + rates.read[d] * standing.lengths[i])
        seconds += rates.catch_up[d] * standing.behind[i, d] / standing.left[i]
    for d, depths in groups.items():
        more = rates.ragged[d] if min(depths) < max(depths) else 0.0
        seconds += rates.start[d] + (rates.passes[d] + more) * max(depths)
    return tokens / seconds


def every_round(B: int, D: int, K: int) -> itertools.product:
    choices = [(NOBODY, 0), *((d, k) for d in range(D) for k in range(1, K + 1))]
    return itertools.product(choices, repeat=B)


def chosen(plan: Plan) -> list[tuple[int, int]]:
    return list(zip(plan.drafter.tolist(), plan.depth.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_the_best_round_is_that_of_brute_force(seed: int) -> None:
    B, D, K = 4, 2, 3
    curves, rates, standing = problem(seed, B, D, K)
    best = max(rate_of(curves, rates, standing, list(choice)) for choice in every_round(B, D, K))
    plan = Goodput(curves, rates, standing).best()
    assert plan.rate == pytest.approx(rate_of(curves, rates, standing, chosen(plan)))
    assert plan.rate == pytest.approx(best, rel=2e-4)


def test_brute_force_has_something_to_choose() -> None:
    plans = [Goodput(*problem(seed, 4, 2, 3)).best() for seed in range(12)]
    shapes = {(len(set(p.drafter[p.depth > 0].tolist())), bool((p.depth == 0).any())) for p in plans}
    assert {drafters for drafters, _ in shapes} >= {1, 2}
    assert {some_without for _, some_without in shapes} == {False, True}
    assert any(0 < p.depth.min() < p.depth.max() for p in plans)


@pytest.mark.parametrize("seed", range(6))
def test_unequal_depths_are_chosen_only_if_they_pay(seed: int) -> None:
    B, D, K = 4, 1, 3
    curves, rates, standing = problem(seed, B, D, K, ragged=True)
    plan = Goodput(curves, rates, standing).best()
    assert plan.rate == pytest.approx(rate_of(curves, rates, standing, chosen(plan)))
    best = max(rate_of(curves, rates, standing, list(choice)) for choice in every_round(B, D, K))
    assert plan.rate >= 0.98 * best
    levelled = [(d, int(plan.depth.max()) if k else 0) for d, k in chosen(plan)]
    assert plan.rate >= rate_of(curves, rates, standing, levelled) * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_climbing_finds_what_comparing_all_finds(seed: int) -> None:
    curves, rates, standing = problem(seed, 12, 3, 5)
    goodput = Goodput(curves, rates, standing)
    price = goodput.best().rate * 0.97
    value, fixed = goodput._value(price), goodput._fixed(price)

    def worth(depths: np.ndarray) -> float:
        at = np.maximum(value[:, np.arange(3), depths].max(axis=1), 0.0)
        return float(at.sum() - fixed[np.arange(3), depths].sum())

    assert worth(goodput._climb(value, fixed)) == pytest.approx(worth(goodput._compare_all(value, fixed)))


def test_one_request_may_go_deep_among_shallow_ones() -> None:
    """Equal depths for all would not pay, so the depth of the drafter must not be chosen as if all shared it."""
    _, rates, standing = problem(1, 4, 1, 6)
    chance = np.array([[0.98], [0.75], [0.75], [0.75]])
    curves = Curves((chance[:, :, None]) ** np.arange(1, 7), np.ones((4, 1)))
    nothing = {name: np.zeros(1) for name in ("start", "node", "catch_up", "read")}
    rates = replace(rates, step=10e-3, row=1.1e-3, passes=np.full(1, 0.1e-3), **nothing)
    plan = Goodput(curves, rates, standing).best()
    assert plan.rate == pytest.approx(
        max(rate_of(curves, rates, standing, list(choice)) for choice in every_round(4, 1, 6)), rel=2e-4
    )
    assert plan.depth[0] > plan.depth[1:].max() >= plan.depth[1:].min() > 0


def test_nothing_is_drafted_where_nothing_pays() -> None:
    curves, rates, standing = problem(0, 6, 2, 3)
    hopeless = Goodput(Curves(curves.survival * 0.01, curves.offers), rates, standing)
    plan = hopeless.best()
    assert (plan.drafter == NOBODY).all()
    assert plan.rate == pytest.approx(6 / rates.step)


def test_many_drafters_keep_to_their_places() -> None:
    curves, rates, standing = problem(3, 20, 5, 6)
    rates = replace(rates, step=0.2)
    free = Goodput(curves, rates, standing).best()
    assert max(np.bincount(free.drafter[free.drafter >= 0])) > 3
    bound = Goodput(curves, rates, standing, (3,) * 5).best()
    assert max(np.bincount(bound.drafter[bound.drafter >= 0])) <= 3
    assert bound.rate <= free.rate * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_the_matching_is_that_of_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    B, D = 5, 3
    value = rng.normal(0.5, 1.0, (B, D))
    value[rng.random((B, D)) < 0.1] = -np.inf
    capacity = rng.integers(0, 3, D).tolist()
    best = 0.0
    for choice in itertools.product(range(-1, D), repeat=B):
        if all(choice.count(d) <= capacity[d] for d in range(D)):
            best = max(best, sum(value[i, d] for i, d in enumerate(choice) if d >= 0))
    found = match(value, capacity)
    assert all((found == d).sum() <= capacity[d] for d in range(D))
    assert sum(value[i, d] for i, d in enumerate(found.tolist()) if d >= 0) == pytest.approx(best)
