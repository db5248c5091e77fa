"""The selector in a simulated world: near the best that could be known, above each drafter alone, and cheap where none
helps."""

from __future__ import annotations

import numpy as np
import pytest
from simulated import World

from steeple.select.costs import Prior
from steeple.select.goodput import Standing
from steeple.select.matching import NOBODY
from steeple.select.options import RULES, Options
from steeple.select.selector import EVERY, SELDOM, Selector

TWO = {"chance": [[0.9, 0.5], [0.05, 0.75]], "kinds": [0, 1] * 8}
OWN = {
    "chance": [[0.8, 0.5, 0.9], [0.05, 0.6, 0.85]],
    "kinds": [0, 1] * 8,
    "own": (2,),
    "start": (0.1e-3, 1e-3, 1e-3),
    "passes": (0, 3e-3, 4e-3),
    "node": (0, 0.05e-3, 0.05e-3),
}
WORLDS = {"two kinds": TWO, "own cache": OWN}
QUIET = {"noise": 0.0, "spikes": 0.0}


def a_selector(world: World, **options: object) -> Selector:
    return Selector([Prior() for _ in range(world.D)], Options(most=world.k, **options), clock=lambda: 0.0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", WORLDS)
def test_near_the_oracle_and_above_each_drafter_alone(name: str, rule: str) -> None:
    world = World(**WORLDS[name], **QUIET)
    selector = a_selector(world, rule=rule)
    world.run(selector, 100)
    rate = world.run(selector, 300)
    oracle = World(**WORLDS[name], **QUIET, seed=2)
    best = oracle.fixed(oracle.best(), 300)
    assert rate > 0.95 * best
    assert rate > 1.02 * max(world.single(d) for d in range(world.D))
    assert rate > 1.5 * world.plain


def test_noise_and_busy_moments_do_not_mislead() -> None:
    world = World(**TWO, noise=0.1, spikes=0.02)
    selector = a_selector(world)
    world.run(selector, 100)
    rate = world.run(selector, 300)
    oracle = World(**TWO, noise=0.1, spikes=0.02, seed=2)
    assert rate > 0.9 * oracle.fixed(oracle.best(), 300)


def test_each_kind_gets_its_drafter() -> None:
    world = World(**TWO, **QUIET)
    world.run(a_selector(world), 300)
    used = np.stack(world.used[150:])
    assert (used[:, ::2] == 0).mean() > 0.9
    assert (used[:, 1::2] == 0).mean() < 0.35, "more than trying explains"


def test_hopeless_drafters_cost_little() -> None:
    chance = [[0.05, 0.1], [0.03, 0.05]]
    world = World(chance, [0, 1] * 8, start=(1e-3, 2e-3), passes=(2e-3, 10e-3), row=0.5e-3, **QUIET)
    selector = a_selector(world)
    rate = world.run(selector, 1500)
    assert rate > 0.97 * world.plain
    drafted = (np.stack(world.used) >= 0).any(axis=1)
    assert drafted[:100].sum() > drafted[-100:].sum(), "what does not pay is tried more and more seldom"


def test_what_cannot_be_paid_is_not_tried() -> None:
    world = World([[0.05, 0.1]], [0] * 8, passes=(2e-3, 10e-3), row=0.5e-3, **QUIET)
    world.run(a_selector(world, explore=0.0), 300)
    drafted = (np.stack(world.used) >= 0).any(axis=1)
    assert drafted[:40].any()
    assert not drafted[40:].any()


def test_trying_takes_the_share_that_it_may() -> None:
    def tried(explore: float) -> float:
        world = World(**TWO, **QUIET)
        world.run(a_selector(world, explore=explore), 300)
        return float((np.stack(world.used[100:])[:, 1::2] >= 0).mean())

    assert tried(0.02) > tried(0.0) == 0.0


def test_less_and_less_is_earned_for_trying() -> None:
    world = World(**TWO, **QUIET)
    selector = a_selector(world, explore=0.02)

    def earned(round: int) -> float:
        selector._round, selector._account = round, 0.0
        before = world.seconds
        selector.learn(world.play(selector.choose(world.ids, world.standing)))
        return selector._account / (world.seconds - before)

    assert earned(0) == pytest.approx(0.02, rel=0.01)
    assert earned(1000) < 0.5 * 0.02
    assert earned(100_000) == pytest.approx(0.25 * 0.02)


def test_newcomers_get_what_is_usual_until_the_next_choice() -> None:
    world = World(**{**TWO, "kinds": [0] * 16}, **QUIET)
    selector = a_selector(world, explore=0.0)
    world.run(selector, 200)
    usual = world.used[-1][0]
    assert usual == 0
    selector._holds_until = selector._round + 10
    plan = selector.choose([*world.ids, "new"], lambda: pytest.fail("nothing is to be chosen anew"))
    assert plan.drafter[-1] == usual
    assert plan.depth[-1] == plan.depth[0] > 0
    assert "new" in selector.remembered
    selector.forget("new")
    assert "new" not in selector.remembered


def test_newcomers_wait_for_no_place_that_is_taken() -> None:
    world = World(**TWO, **QUIET)
    selector = a_selector(world, capacity=(3, 16))
    world.run(selector, 60)
    selector._holds_until = selector._round + 10
    asked = []

    def standing() -> Standing:
        asked.append(1)
        return Standing(np.full(17, 256.0), np.zeros((17, 2)), np.full(17, 100.0))

    plan = selector.choose([*world.ids, "new"], standing)
    assert asked, "places are matched anew"
    assert (plan.drafter == 0).sum() <= 3


def test_choosing_waits_where_it_takes_long() -> None:
    def asked(seconds: float) -> int:
        """Choices in 200 rounds, if each takes so long."""
        world, now, count = World(**TWO, **QUIET), [0.0], [0]

        def clock() -> float:
            now[0] += seconds / 2
            return now[0]

        def standing() -> Standing:
            count[0] += 1
            return world.standing()

        selector = Selector([Prior(), Prior()], Options(most=6, explore=0.0), clock=clock)
        for _ in range(200):
            selector.learn(world.play(selector.choose(world.ids, standing)))
        return count[0]

    assert asked(0.05) < asked(0.0)


@pytest.mark.parametrize("rule", ["thompson", "greedy"])
def test_a_drafter_that_turns_bad_is_left_and_found_again(rule: str) -> None:
    world = World(**TWO, **QUIET)
    selector = a_selector(world, rule=rule)
    world.run(selector, 200)
    assert (world.used[-1][::2] == 0).mean() > 0.5
    world.chance = [[0.05, 0.5], [0.05, 0.75]]
    world.run(selector, 150)
    assert np.mean([(used[::2] == 0).mean() for used in world.used[-60:]]) < 0.2
    world.chance = TWO["chance"]
    world.run(selector, 700)
    assert np.mean([(used[::2] == 0).mean() for used in world.used[-60:]]) > 0.6, "it was never tried again"


def test_reading_a_long_text_up_must_pay() -> None:
    """A drafter with a cache of its own is worth little if it must read first, and much once it has."""
    short = World(**OWN | {"chance": [[0.05, 0.05, 0.9], [0.05, 0.05, 0.9]]}, **QUIET, length=64)
    long = World(**OWN | {"chance": [[0.05, 0.05, 0.9], [0.05, 0.05, 0.9]], "catch_up": 1e-3}, **QUIET, length=30_000)
    for world in (short, long):
        world.run(a_selector(world), 60)
    assert (np.stack(short.used[30:]) == 2).mean() > 0.8
    # trials read one text of each, and no more: 30 seconds for a gain of some milliseconds a round
    assert (np.stack(long.used) == 2).any(axis=0).sum() <= 2


def test_places_of_a_drafter_are_not_overrun() -> None:
    world = World(**TWO, **QUIET)
    world.run(a_selector(world, capacity=(3, 16)), 150)
    counts = [(used == 0).sum() for used in world.used]
    assert max(counts) == 3
    assert np.mean(counts[50:]) > 2.5


def test_choices_hold_and_change_no_more_than_they_must() -> None:
    world = World(**TWO, **QUIET)
    selector = a_selector(world, rule="greedy", explore=0.0)
    world.run(selector, 100)
    asked = 0

    def standing() -> object:
        nonlocal asked
        asked += 1
        return world.standing()

    for _ in range(2 * SELDOM):
        selector.learn(world.play(selector.choose(world.ids, standing)))
    assert 1 <= asked <= 2 * SELDOM // EVERY


def test_what_is_drawn_depends_on_the_seed_and_the_past_alone() -> None:
    def plans(seed: int) -> np.ndarray:
        world = World(**TWO, **QUIET)
        world.run(a_selector(world, seed=seed, explore=0.3), 120)
        return np.stack(world.used)

    assert (plans(0) == plans(0)).all()
    assert (plans(0) != plans(1)).any()


def test_requests_come_and_go() -> None:
    world = World(**TWO, **QUIET)
    selector = a_selector(world)
    world.run(selector, 40)
    left = world.ids[0]
    selector.forget(left)
    assert left not in selector.remembered
    world.ids = [*world.ids[1:], "new"]
    world.run(selector, 40)
    assert selector.remembered == set(world.ids)
    for id in world.ids:
        selector.forget(id)
    assert not selector.remembered


def test_first_rounds_are_plain_then_everybody_has_a_turn() -> None:
    world = World(**TWO, **QUIET)
    world.run(a_selector(world), 6)
    first = [sorted(set(used.tolist())) for used in world.used]
    assert first[:2] == [[NOBODY]] * 2
    assert {0, 1} <= {d for used in first for d in used}
