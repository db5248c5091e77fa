"""Second thoughts before a round: who takes what a lookup has found, and who falls back on what."""

from __future__ import annotations

import numpy as np
import pytest

from steeple.select.acceptance import Acceptance, Curves
from steeple.select.costs import Drafted, Prior, Rates
from steeple.select.foresight import Foresight
from steeple.select.goodput import Goodput, Plan, Standing
from steeple.select.matching import NOBODY
from steeple.select.options import Options
from steeple.select.selector import Outcome, Selector

LOOKUP, MODEL, OTHER = 0, 1, 2
IDS = ["a", "b", "c", "d"]
K = 6


def curves(lookup: float, model: float, offers: float) -> Curves:
    """Each node stays with the same chance; the lookup finds something with ``offers``."""
    level = np.arange(1, K + 1)
    one = np.stack([offers * lookup**level, model**level, 0.2**level])
    offered = np.array([offers, 1.0, 1.0])
    return Curves(np.repeat(one[None], len(IDS), axis=0), np.repeat(offered[None], len(IDS), axis=0))


def problem(found: Curves, row: float = 0.02) -> Goodput:
    zero = np.zeros(3)
    rates = Rates(1.0, row, zero, np.array([0.0, 0.05, 0.05]), zero, np.array([0.0, 0.01, 0.01]), zero, zero)
    many = np.full(len(IDS), 100.0)
    return Goodput(found, rates, Standing(many, np.zeros((len(IDS), 3)), many))


def plan_of(goodput: Goodput, drafter: list[int], depth: list[int]) -> Plan:
    return goodput.of(np.array(drafter), np.array(depth))


def revised(goodput: Goodput, plan: Plan, offered: list[bool], ids: list[str] = IDS) -> list[tuple[int, int]]:
    found = Foresight(IDS, goodput, plan, [LOOKUP]).revise(ids, plan, {LOOKUP: np.array(offered)})
    return list(zip(found.drafter.tolist(), found.depth.tolist(), strict=True))


def test_what_a_lookup_found_is_taken_where_it_promises_more() -> None:
    goodput = problem(curves(lookup=0.9, model=0.6, offers=0.2))
    plan = plan_of(goodput, [MODEL] * 4, [3] * 4)
    deepest = int(goodput.sure(LOOKUP, plan.rate)[0][0])
    assert revised(goodput, plan, [True, False, True, False]) == [(LOOKUP, deepest), (MODEL, 3)] * 2


def test_a_poor_lookup_is_left_alone() -> None:
    goodput = problem(curves(lookup=0.2, model=0.8, offers=0.9))
    plan = plan_of(goodput, [MODEL] * 4, [3] * 4)
    assert revised(goodput, plan, [True] * 4) == [(MODEL, 3)] * 4


def test_who_finds_nothing_takes_the_best_drafter_at_work() -> None:
    goodput = problem(curves(lookup=0.9, model=0.7, offers=0.5))
    plan = plan_of(goodput, [LOOKUP, LOOKUP, MODEL, OTHER], [5, 5, 2, 4])
    found = revised(goodput, plan, [False, True, False, False])
    assert found[0] == (MODEL, 2)
    assert found[1][0] == LOOKUP
    assert found[2:] == [(MODEL, 2), (OTHER, 4)]
    alone = plan_of(goodput, [LOOKUP] * 4, [5] * 4)
    assert revised(goodput, alone, [False] * 4) == [(NOBODY, 0)] * 4


def test_a_request_that_was_to_draft_nothing_takes_what_was_found() -> None:
    goodput = problem(curves(lookup=0.9, model=0.1, offers=0.1))
    plan = goodput.plain()
    assert [d for d, _ in revised(goodput, plan, [True, False, False, True])] == [LOOKUP, NOBODY, NOBODY, LOOKUP]


def test_depth_is_what_rows_are_worth() -> None:
    cheap, dear = (problem(curves(lookup=0.8, model=0.5, offers=0.5), row=row) for row in (0.001, 0.08))
    depths = [int(goodput.sure(LOOKUP, 4.0)[0][0]) for goodput in (cheap, dear)]
    assert depths[0] == K
    # a row costs 0.08 s at 4 tokens a second: the node must stay with a chance of 0.32
    assert depths[1] == 5
    worth = dear.sure(LOOKUP, 4.0)[1][0]
    assert worth == pytest.approx(sum(0.8**j for j in range(1, 6)) - 5 * 0.32)


def test_order_and_strangers() -> None:
    goodput = problem(curves(lookup=0.9, model=0.6, offers=0.2))
    plan = plan_of(goodput, [MODEL, MODEL, OTHER, NOBODY], [3, 3, 3, 0])
    ids = ["c", "new", "a"]
    now = Plan(np.array([OTHER, MODEL, MODEL]), np.array([3, 2, 3]), 1.0, 1.0)
    foresight = Foresight(IDS, goodput, plan, [LOOKUP])
    found = foresight.revise(ids, now, {LOOKUP: np.array([False, True, True])})
    assert found.drafter.tolist() == [OTHER, MODEL, LOOKUP]
    assert found.depth.tolist()[:2] == [3, 2]


def test_offers_are_counted_whoever_is_asked() -> None:
    counts = Acceptance(2, 4, foreseen=[0])
    for _ in range(60):
        counts.note_offers(["a", "b"], 0, np.array([True, False]))
        counts.note(["a"], np.array([0]), np.array([4]), np.array([4]))
    offers = counts.curves(["a", "b", "c"]).offers[:, 0]
    assert offers[0] > 0.9
    assert offers[1] < 0.15
    assert 0.4 < offers[2] < 0.6


def test_trials_are_done_as_they_stand_and_offers_are_learnt_meanwhile() -> None:
    selector = Selector([], Options(most=4), foreseen=())
    assert selector.revise([], Plan(np.zeros(0), np.zeros(0), 0.0, 1.0), {}).drafter.shape == (0,)
    selector = _warm()
    ids, standing = ["a", "b"], lambda: Standing(np.full(2, 50.0), np.zeros((2, 2)), np.full(2, 100.0))
    revised_rounds = 0
    for _ in range(200):
        plan = selector.choose(ids, standing)
        now = selector.revise(ids, plan, {0: np.array([True, False])})
        if (now.drafter != plan.drafter).any():
            revised_rounds += 1
            assert now.drafter[1] != 0, "asked where it has nothing"
        _tell(selector, ids, now)
    assert revised_rounds > 20
    selector._resume = dict(selector._held)  # as in the rounds of a trial
    assert selector.revise(ids, plan, {0: np.array([True, False])}) is plan


def _warm() -> Selector:
    return Selector([Prior(0.0, 0.0), Prior(0.3, 0.3)], Options(most=4, explore=0.2), foreseen=[0])


def _tell(selector: Selector, ids: list[str], plan: Plan) -> None:
    """A lookup finds something only for the first request, and all of it stays; of a model the first token stays."""
    proposed = np.where((plan.drafter == 0) & (np.arange(2) == 1), 0, plan.depth)
    accepted = np.where(plan.drafter == 0, proposed, np.minimum(proposed, 1))
    draft = {}
    for d in set(plan.drafter[plan.depth > 0].tolist()):
        own = plan.depth[plan.drafter == d]
        passes = int(own.max())
        done = Drafted(passes, bool(own.min() < own.max()), int(own.sum()), 0, 50.0 * float(own.sum()))
        draft[d] = (done, 1e-5 if d == 0 else 1e-4 * passes)
    rows = 2 + int(proposed.sum())
    outcome = Outcome(ids, plan.drafter, plan.depth, proposed, accepted, draft, 1e-3 + 1e-5 * rows, 100.0)
    selector.learn(outcome)


def test_a_draft_is_weighed_with_the_lookups_that_it_gives_way_to() -> None:
    """Expected tokens and seconds of a round, enumerated over what each lookup finds."""
    found = curves(lookup=0.9, model=0.6, offers=0.4)
    rates = problem(found)._rates
    many = np.full(len(IDS), 100.0)
    standing = Standing(many, np.zeros((len(IDS), 3)), many)
    blind, seeing = Goodput(found, rates, standing), Goodput(found, rates, standing, foreseen=[LOOKUP])
    plan = seeing.of(np.full(4, MODEL), np.full(4, 3))
    plain = len(IDS) / rates.step
    deep, worth = (float(value[0]) for value in blind.sure(LOOKUP, plain))
    assert worth > blind.worth(np.full(4, MODEL), np.full(4, 3), plain)[0]
    own, looked = sum(0.6**j for j in range(1, 4)), sum(0.9**j for j in range(1, int(deep) + 1))
    assert plan.tokens == pytest.approx(4 * (1 + 0.4 * looked + 0.6 * own))
    own_seconds, looked_seconds = 3 * (rates.row + 0.01), deep * rates.row
    assert plan.seconds == pytest.approx(1.0 + 3 * 0.05 + 4 * (0.4 * looked_seconds + 0.6 * own_seconds))
    alone = [np.full(4, LOOKUP), np.full(4, 5)]
    assert seeing.of(*alone).tokens == blind.of(*alone).tokens
    assert seeing.plain().tokens == 4.0


def test_a_model_that_fills_the_gaps_is_worth_its_passes() -> None:
    """Alone the lookup is best; with lookups first the model pays all the same, and that is what is chosen."""
    found = curves(lookup=0.95, model=0.8, offers=0.5)
    rates = problem(found)._rates
    many = np.full(len(IDS), 100.0)
    standing = Standing(many, np.zeros((len(IDS), 3)), many)
    best = Goodput(found, rates, standing, foreseen=[LOOKUP]).best()
    assert MODEL in best.drafter
    singles = [Goodput(found, rates, standing).of(np.full(4, d), np.full(4, k)).rate for d in (0, 1) for k in range(7)]
    assert best.rate > 1.02 * max(singles)
