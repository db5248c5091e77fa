"""What the server counts, in plain numbers: the engine's thread writes them, whoever shows them only reads."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from steeple.request import SpeculationStats
from steeple.serve.job import ACCEPTED, BONUS, PLAIN, RECOVERED, Job, Round

FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
WHOLE = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
REMEMBERED, LETTERS_KEPT, ROUNDS_KEPT, SECONDS_KEPT = 64, 4096, 1024, 120
LETTERS = {ACCEPTED: "a", RECOVERED: "r", BONUS: "b", PLAIN: "p"}


class Buckets:
    """A histogram. Args: bounds: upper ends of the buckets, seconds; one without end follows them."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Pairs of an upper end and how many values are at most that, as Prometheus wants them."""
        names = [*map(repr, self.bounds), "+Inf"]
        return list(zip(names, accumulate(self.counts), strict=True))


@dataclass(slots=True)
class Second:
    """What happened within one second of ``perf_counter`` time."""

    at: int
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0


@dataclass(slots=True)
class Tally:
    """Sums over the server's life. ``outcomes``: finished requests by how they ended.

    ``turned_away``: sequences that found the queue full.
    """

    clock: Callable[[], float] = time.perf_counter
    outcomes: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    generation_tokens: int = 0
    failures: int = 0
    turned_away: int = 0
    drafts: int = 0
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    by_drafter: dict[str, SpeculationStats] = field(default_factory=dict)
    first_token: Buckets = field(default_factory=lambda: Buckets(FIRST))
    between_tokens: Buckets = field(default_factory=lambda: Buckets(BETWEEN))
    per_token: Buckets = field(default_factory=lambda: Buckets(BETWEEN))
    whole: Buckets = field(default_factory=lambda: Buckets(WHOLE))
    seconds: deque[Second] = field(default_factory=lambda: deque(maxlen=SECONDS_KEPT))
    recent: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def wrote(self, job: Job, now: float) -> None:
        """A step wrote for ``job``; its newest round says what."""
        latest = job.rounds[-1]
        self.generation_tokens += latest.written
        if len(job.rounds) == 1:
            self.prompt_tokens += job.request.prompt_len
            self.first_token.add(now - job.request.arrived)
        else:
            self.between_tokens.add(now - job.heard)
            self._speculated(job, latest)
        job.heard = now
        job.times.append(now - job.request.arrived)
        second = self._now(now)
        second.tokens += latest.written
        second.drafted += latest.drafted
        second.accepted += latest.accepted
        second.rounds += 1

    def _speculated(self, job: Job, latest: Round) -> None:
        self.drafts += latest.drafted > 0
        for stats in (self.speculation, self.by_drafter.setdefault(job.drafter, SpeculationStats())):
            stats.record(latest.depth, latest.drafted, latest.accepted)
            stats.committed += latest.written

    def _now(self, now: float) -> Second:
        at = int(now)
        if not self.seconds or self.seconds[-1].at != at:
            self.seconds.append(Second(at))
        return self.seconds[-1]

    def ended(self, job: Job, outcome: str) -> None:
        """A job is over: stop, length, cancelled, timeout, error or refused."""
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        request = job.request
        end = request.finished_at if request.finished_at is not None else self.clock()
        if request.written:
            self.whole.add(end - request.arrived)
            assert request.first_token_at is not None  # something is written
            if request.written > 1:
                self.per_token.add((end - request.first_token_at) / (request.written - 1))
        self.recent.append(_summary(job, outcome, end))

    def rate(self, seconds: int = 10) -> dict[str, float]:
        """Per second, over the last whole ``seconds``: tokens, drafted and accepted tokens, and tau."""
        now = int(self.clock())
        last = [s for s in list(self.seconds) if now - seconds <= s.at < now]
        tokens, rounds = sum(s.tokens for s in last), sum(s.rounds for s in last)
        return {
            "tokens_per_second": tokens / seconds,
            "drafted_per_second": sum(s.drafted for s in last) / seconds,
            "accepted_per_second": sum(s.accepted for s in last) / seconds,
            "tokens_per_round": tokens / rounds if rounds else 0.0,
        }


def _summary(job: Job, outcome: str, end: float) -> dict[str, Any]:
    """A finished request for people to look at: numbers, and a letter per token; none of its text."""
    request = job.request
    letters: list[str] = []
    for one in job.rounds:
        if len(letters) >= LETTERS_KEPT:
            break
        letters += [LETTERS[origin] for origin in one.origins]
    first = request.first_token_at
    return {
        "id": request.id,
        "outcome": outcome,
        "prompt_tokens": request.prompt_len,
        "completion_tokens": request.written,
        "drafter": job.drafter,
        "tokens_per_round": request.stats.tau,
        "waiting_seconds": (end if job.admitted is None else job.admitted) - request.arrived,
        "first_token_seconds": None if first is None else first - request.arrived,
        "seconds": end - request.arrived,
        "preemptions": request.preemptions,
        "origins": "".join(letters[:LETTERS_KEPT]),
        "round_seconds": [round(at, 4) for at in job.times[:ROUNDS_KEPT]],
    }
