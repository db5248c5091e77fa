"""A request's counters and what is counted for it."""

from __future__ import annotations

import pytest

from steeple.errors import InternalError
from steeple.request import FinishReason, Request, SpeculationStats
from steeple.types import SamplingParams


def a_request(prompt: int = 5, **params: object) -> Request:
    return Request("r", list(range(prompt)), SamplingParams(**params))


def test_text_grows_and_keeps_its_parts_apart() -> None:
    request = a_request(max_tokens=2000)
    written = []
    for i in range(1, 50):
        request.append([i] * i)
        written += [i] * i
    assert request.tokens.tolist() == [0, 1, 2, 3, 4, *written]
    assert request.output.tolist() == written
    assert (len(request), request.written, request.prompt_len) == (5 + len(written), len(written), 5)


def test_the_law_of_the_two_counters() -> None:
    request = a_request()
    request.check()
    request.cached = 4
    request.check()
    for wrong in (5, -1):
        request.cached = wrong
        with pytest.raises(InternalError, match=f"cached = {wrong} with 5 tokens"):
            request.check()


def test_ready_is_after_the_first_token_with_only_the_root_unread() -> None:
    request = a_request()
    assert (request.ready, request.unread) == (False, 5)
    request.cached = 4  # found in a shared prefix: nothing is written yet
    assert (request.ready, request.unread) == (False, 1)
    request.cached = 5
    request.append([7])
    assert (request.ready, request.unread) == (True, 0)
    request.cached = 0  # preempted
    assert (request.ready, request.unread) == (False, 5)
    request.cached = 5
    assert request.ready


def test_the_first_end_counts() -> None:
    request = a_request()
    assert not request.finished
    request.finish(FinishReason.STOP)
    at = request.finished_at
    request.finish(FinishReason.ERROR, "too late")
    assert (request.finish_reason, request.error, request.finished_at) == (FinishReason.STOP, None, at)


def test_seeds_differ_unless_given() -> None:
    assert a_request().seed != a_request().seed
    assert a_request(seed=-3).seed == -3


def test_rounds_are_counted_by_depth() -> None:
    stats = SpeculationStats()
    stats.record(3, 4, 2)
    stats.record(0, 0, 0)
    stats.record(1, 1, 1)
    stats.committed = 6
    assert (stats.rounds, stats.drafted, stats.accepted) == (3, 5, 3)
    assert stats.accepted_at == [2, 1, 0]
    assert stats.proposed_at == [2, 1, 1]
    assert stats.tau == 2.0
    assert stats.acceptance_by_position == pytest.approx([2 / 3, 1 / 3, 0])


def test_counts_of_requests_add_up() -> None:
    one, other = SpeculationStats(), SpeculationStats()
    one.record(1, 1, 1)
    other.record(3, 3, 2)
    other.committed = 3
    one.merge(other)
    assert (one.rounds, one.drafted, one.accepted, one.committed) == (2, 4, 3, 3)
    assert one.accepted_at == [2, 1, 0]
    assert one.proposed_at == [2, 1, 1]


def test_nothing_counted_is_zero() -> None:
    assert SpeculationStats().tau == 0
    assert SpeculationStats().acceptance_by_position == []
