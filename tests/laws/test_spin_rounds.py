"""Rounds in which each request has a drafter of its own: everyone drafts, nobody's state is harmed, all is reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from checks import GREEDY, PROCESSORS, plain_outputs, prompts
from lab import BAD, CACHES, CPU, TARGET, DiceSelector, make_engine, make_requests, run

from steeple.draft.base import Surroundings
from steeple.draft.ngram import NGramConfig
from steeple.draft.parts import Parts
from steeple.draft.small_lm import SmallLM, SmallLMConfig
from steeple.draft.spin_round import Choices, Spin
from steeple.engine.engine import Engine
from steeple.request import Request
from steeple.select.matching import NOBODY
from steeple.select.selector import Outcome, Selector


def spin_of(engine: Engine) -> Spin:
    spin = engine.drafter.drafter
    assert isinstance(spin, Spin)
    return spin


@pytest.mark.parametrize("cache", ["paged", "odd_blocks_tight"])
def test_everyone_drafts_and_greedy_output_stays(cache: str) -> None:
    engine = make_engine("spin_rolled", CACHES[cache], batch_size=5, step_tokens=12)
    outputs = run(engine, make_requests(prompts(), GREEDY), join_every=1)
    assert outputs == plain_outputs()
    die = spin_of(engine).lengths.selector
    assert isinstance(die, DiceSelector)
    assert {d for d, depth in die.seen if depth} == {0, 1, 2, 3}
    assert {depth for _, depth in die.seen} == {0, 1, 2, 3, 4}
    assert (NOBODY, 0) in die.seen


def test_greedy_requests_keep_their_tokens_beside_sampled_ones() -> None:
    each = [own if i % 2 else replace(PROCESSORS["temperature"], max_tokens=20) for i, own in enumerate(GREEDY)]
    engine = make_engine("spin_rolled")
    outputs = run(engine, make_requests(prompts(), each, seeds=True))
    assert outputs[1::2] == plain_outputs()[1::2]


def test_rows_that_a_part_must_read_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``behind`` says is what the small model then reads, whoever drafted the rounds before."""
    read: list[int] = []
    whole = SmallLM._catch_up

    def counting(self: SmallLM, rows: object) -> object:
        cached = [self._states[id].cached for id in rows.ids]
        read.append(int(sum(rows.lengths) - sum(cached) - len(cached)))
        return whole(self, rows)

    monkeypatch.setattr(SmallLM, "_catch_up", counting)

    def build(around: Surroundings) -> Spin:
        parts = Parts("spin", [NGramConfig(k=4).build(around), SmallLM(SmallLMConfig(k=4), TARGET, around)])
        return Spin(parts, Choices(DiceSelector(2, 4), parts.parts), CPU)

    engine = make_engine(build, CACHES["private"], batch_size=4)
    choices, told = spin_of(engine).lengths, []
    plain_timed = choices.timed

    def timed(drafter: int, requests: Sequence[Request], asked: Sequence[int], behind: int, seconds: float) -> None:
        if drafter == 1:
            told.append(behind)
        assert drafter == 1 or behind == 0
        plain_timed(drafter, requests, asked, behind, seconds)

    monkeypatch.setattr(choices, "timed", timed)
    run(engine, make_requests(prompts(), GREEDY))
    assert told == read
    assert max(told) > 20, "a prompt was read"
    assert min(told) <= 1


class Told:
    """A selector's ears."""

    def __init__(self, selector: Selector) -> None:
        self.heard: list[Outcome] = []
        self._learn = selector.learn

    def __call__(self, outcome: Outcome) -> None:
        self.heard.append(outcome)
        self._learn(outcome)


def test_what_is_reported_is_what_was_committed() -> None:
    engine = make_engine("spin", batch_size=4)
    selector = spin_of(engine).lengths.selector
    told = selector.learn = Told(selector)
    requests = make_requests(prompts(), GREEDY)
    run(engine, requests)
    accepted = sum(int(outcome.accepted.sum()) for outcome in told.heard)
    # kept nodes behind the end of a text are reported, but not committed
    assert 0 <= accepted - sum(r.stats.accepted for r in requests) <= len(requests) * 4
    assert sum(int(o.proposed.sum()) for o in told.heard) == sum(r.stats.drafted for r in requests)
    timed = [o for o in told.heard if o.rest is not None]
    assert timed
    assert all(o.rest > 0 for o in timed)
    assert all(set(o.draft) == set(o.drafter[o.asked > 0].tolist()) for o in told.heard)
    for outcome in told.heard:
        assert outcome.asked.sum() == sum(done.nodes for done, _ in outcome.draft.values())
    assert selector.costs.steps == min(len(timed), 96)


def test_the_clock_decides_and_every_drafter_gets_its_turn() -> None:
    engine = make_engine("spin", batch_size=8)
    assert run(engine, make_requests(prompts(), GREEDY)) == plain_outputs()
    assert (spin_of(engine).lengths.selector.acceptance.rounds > 0).all()


def test_requests_that_are_cancelled_leave_nothing() -> None:
    engine = make_engine("spin", batch_size=8)
    requests = make_requests(prompts(), GREEDY)
    for request in requests:
        engine.add(request)
    for step in range(12):
        engine.step()
        if step > 5:
            engine.abort(requests[step - 6].id)
    for request in requests:
        engine.abort(request.id)
    engine.check_integrity()


class Stumbles:
    """A selector that gives every request to part 1, which has no room for most of them."""

    remembered = frozenset[str]()

    def __init__(self) -> None:
        self.die, self.empty = DiceSelector(2, 4), 0

    def choose(self, ids: Sequence[str], standing: object) -> object:
        plan = self.die.choose(ids, standing)
        return replace(plan, drafter=np.ones(len(ids), dtype=np.int64), depth=np.full(len(ids), 4))

    def learn(self, outcome: Outcome) -> None:
        self.die.learn(outcome)
        self.empty += int(((outcome.asked > 0) & (outcome.proposed == 0)).sum())

    def forget(self, id: str) -> None: ...


def test_a_part_that_proposes_nothing_is_reported_so() -> None:
    stumbles = Stumbles()

    def build(around: Surroundings) -> Spin:
        parts = Parts("spin", [SmallLM(SmallLMConfig(k=4), BAD, around), NGramConfig(k=4, min_match=4).build(around)])
        return Spin(parts, Choices(stumbles, parts.parts), CPU)

    engine = make_engine(build)
    assert run(engine, make_requests(prompts(), GREEDY)) == plain_outputs()
    assert stumbles.empty > 10
