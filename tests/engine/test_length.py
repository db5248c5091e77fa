"""The depth of drafts, chosen from past rounds: with times and acceptance that are made up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from steeple.engine.length import GoodputLengths
from steeple.request import Request
from steeple.types import SamplingParams

ROUNDS = 400


def ready(id: str, length: int = 100) -> Request:
    request = Request(id, [1] * length, SamplingParams(max_tokens=10_000))
    request.append([1])
    request.cached = length
    return request


def play(
    seconds: Callable[[int], float], chance: float | list[float], *, requests: int = 8, rounds: int = ROUNDS
) -> tuple[list[int], float, float]:
    """Rounds of a batch whose times and acceptance are given: the depths chosen, tokens written, seconds taken."""
    rng = np.random.default_rng(0)
    chances = [chance] * requests if isinstance(chance, float) else chance
    batch = [ready(f"r{i}") for i in range(len(chances))]
    lengths = GoodputLengths(8)
    depths, tokens, total = [], 0.0, 0.0
    for _ in range(rounds):
        lengths.begin(batch)
        budget = [lengths(r) for r in batch]
        kept = [int(np.cumprod(rng.random(n) < p).sum()) for n, p in zip(budget, chances, strict=True)]
        taken = seconds(max(budget)) * (1 + 0.05 * rng.standard_normal())
        for request, n, accepted in zip(batch, budget, kept, strict=True):
            request.stats.record(n, n, accepted)
        lengths.learn(batch, budget, kept, taken)
        depths.append(max(budget))
        tokens += sum(kept) + len(batch)
        total += taken
    return depths, tokens, total


def rate(seconds: Callable[[int], float], chance: float, depth: int) -> float:
    return sum(chance**j for j in range(depth + 1)) / seconds(depth)


@pytest.mark.parametrize("chance", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("slope", [0.02, 0.1, 0.3, 1.0])
def test_it_comes_near_the_best_depth(chance: float, slope: float) -> None:
    def seconds(depth: int) -> float:
        return 1.0 + slope * depth

    depths, tokens, total = play(seconds, chance)
    best = max(rate(seconds, chance, depth) for depth in (0, 1, 2, 3, 4, 6, 8))
    assert tokens / 8 / total > 0.96 * best
    plain = rate(seconds, chance, 0)
    assert tokens / 8 / total > 0.97 * plain, "slower than plain decoding"
    assert len(set(depths)) > 1, "nothing was ever tried"


def test_a_draft_that_never_pays_is_tried_less_and_less() -> None:
    depths, _, _ = play(lambda depth: 1.0 + 3.0 * depth, 0.2)
    tried = [i for i, depth in enumerate(depths) if depth]
    assert tried[0] <= 4
    assert len(tried) <= 8
    waits = [int(gap) for gap in np.diff(tried) if gap > 1]
    assert waits == sorted(waits)
    assert waits[-1] > 1.8 * waits[0]


def test_plain_rounds_are_timed_again_while_drafting_pays() -> None:
    depths, _, _ = play(lambda depth: 1.0 + 0.01 * depth, 0.9)
    assert 2 <= depths.count(0) <= ROUNDS / 40


def test_a_change_of_times_is_noticed() -> None:
    """Twice as many requests on the machine, say: what paid does not pay any more."""
    now = [0.01]
    calls = [0]

    def seconds(depth: int) -> float:
        calls[0] += 1
        if calls[0] == 200:
            now[0] = 2.0
        return 1.0 + now[0] * depth

    depths, _, _ = play(seconds, 0.7, rounds=400)
    assert np.mean(depths[100:200]) > 4
    assert np.mean(depths[300:]) < 0.5


def test_requests_that_accept_little_get_fewer_nodes() -> None:
    batch = [ready("good"), ready("bad")]
    lengths = GoodputLengths(8)
    rng = np.random.default_rng(1)
    given: list[list[int]] = []
    for _ in range(120):
        lengths.begin(batch)
        budget = [lengths(r) for r in batch]
        kept = [int(np.cumprod(rng.random(n) < p).sum()) for n, p in zip(budget, (0.9, 0.05), strict=True)]
        for request, n, accepted in zip(batch, budget, kept, strict=True):
            request.stats.record(n, n, accepted)
        lengths.learn(batch, budget, kept, 1.0 + 0.1 * max(budget))
        given.append(budget)
    good, bad = np.mean(given[40:], axis=0)
    assert good > 2 * bad + 1


def test_a_request_out_of_luck_is_not_given_up() -> None:
    """Rounds without a draft are no evidence against it, and now and then it is tried again."""
    batch, lengths = [ready("lucky"), ready("unlucky")], GoodputLengths(8)
    rng = np.random.default_rng(3)
    given: list[list[int]] = []
    for round in range(300):
        lengths.begin(batch)
        budget = [lengths(r) for r in batch]
        kept = [int(np.cumprod(rng.random(n) < 0.8).sum()) for n in budget]
        if round < 30:
            kept[1] = 0
        for request, n, accepted in zip(batch, budget, kept, strict=True):
            request.stats.record(n, n, accepted)
        lengths.learn(batch, budget, kept, 1.0 + 0.2 * max(budget))
        given.append(budget)
    assert min(n for _, n in given[20:31]) < min(n for n, _ in given[20:31]), "bad luck was not noticed"
    assert np.mean([n for _, n in given[250:]]) > 0.9 * np.mean([n for n, _ in given[250:]])


def test_another_batch_or_context_is_measured_anew() -> None:
    lengths = GoodputLengths(4)
    small, large = [ready("a")], [ready(f"r{i}", 1000) for i in range(30)]
    for batch, slope in ((small, 0.01), (large, 5.0)):
        for _ in range(20):
            lengths.begin(batch)
            depth = lengths(batch[0])
            lengths.learn(batch, [depth] * len(batch), [depth] * len(batch), 1.0 + slope * depth)
    lengths.begin(large)
    assert lengths(large[0]) == 0
    lengths.begin(small)
    assert lengths(small[0]) == 4


def test_steps_with_prompts_teach_acceptance_but_no_time() -> None:
    lengths = GoodputLengths(4)
    batch = [ready("a")]
    for _ in range(20):
        lengths.begin(batch)
        depth = lengths(batch[0])
        assert depth == 0, "plain decoding is timed first, and no time has come"
        lengths.learn(batch, [4], [4], None)


def test_nobody_ready_is_no_round() -> None:
    lengths = GoodputLengths(4)
    fresh = Request("a", [1, 2], SamplingParams())
    lengths.begin([fresh])
    lengths.learn([fresh], [0], [0], 1.0)
