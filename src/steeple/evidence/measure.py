"""One timed run: requests through an engine to their end, and which of its rounds count.

Glossary. *round*: a decode step. *counted round*: a round in which all requests of the cell decode, have behind them
their first round (where a drafter with a cache of its own reads the prompt) and have room for a full draft. So tau,
step time and tokens per second speak of one steady state; the whole run, prompts and stragglers included, is ``total``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from steeple.engine import Committed, Engine
from steeple.engine.stats import EngineStats
from steeple.errors import ConfigError, InternalError
from steeple.request import Request


@dataclass(slots=True)
class Timing:
    """Sums over the counted rounds of a run, seconds; ``accepted[j]``: rounds whose node at depth j was accepted.

    ``drafted`` nodes of all requests together; everything from ``total_seconds`` on is of the whole run.
    """

    rounds: int = 0
    request_rounds: int = 0
    committed: int = 0
    drafted: int = 0
    draft: float = 0.0
    verify: float = 0.0
    other: float = 0.0
    accepted: list[int] = field(default_factory=list)
    total_seconds: float = 0.0
    total_tokens: int = 0
    prompt_seconds: float = 0.0

    def count(self, committed: Sequence[Committed]) -> None:
        """Add what a round wrote."""
        self.request_rounds += len(committed)
        for item in committed:
            self.committed += len(item.tokens)
            for depth in range(len(item.tokens) - 1):
                self.accepted[depth] += 1

    @property
    def seconds(self) -> float:
        return self.draft + self.verify + self.other

    @property
    def tokens_per_second(self) -> float:
        return self.committed / self.seconds

    @property
    def step(self) -> float:
        """Mean seconds of a counted round."""
        return self.seconds / self.rounds


@dataclass(frozen=True, slots=True)
class Run:
    """Times, and what each request wrote."""

    timing: Timing
    outputs: list[list[int]]


def run_requests(engine: Engine, requests: Sequence[Request], *, nodes: int | None = None, tokens: int = 0) -> Run:
    """Run ``requests`` together, alone in the engine. ``InternalError`` if one of them ends with an error.

    Args:
        nodes: of a full draft, where ``engine.budget`` gives fewer than the drafter can; by default the drafter's.
        tokens: end the run, and what is left of the requests, once they have written so many on average or one of
            them has no room for a full draft; 0 lets each write to its own end. Without stragglers almost every round
            counts, and each drafter writes about as much, whatever its luckiest request does.
    """
    engine.stats = EngineStats()
    if nodes is None:
        nodes = engine.drafter.needs.nodes if engine.drafter is not None else 0
    timing = Timing(accepted=[0] * nodes)
    started = time.perf_counter()
    for request in requests:
        engine.add(request)
    while not engine.idle:
        if tokens and _enough(requests, nodes, tokens):
            for request in requests:
                engine.abort(request.id)
            break
        counts = _counts(requests, nodes)
        before = _Clock.read(engine.stats, requests)
        committed = engine.step()
        if counts:
            before.book(engine.stats, requests, timing)
            timing.count(committed)
    timing.total_seconds = time.perf_counter() - started
    timing.total_tokens = sum(request.written for request in requests)
    timing.prompt_seconds = engine.stats.prompt_seconds
    engine.check_integrity()
    for request in requests:
        if request.error is not None:
            raise InternalError(f"request {request.id} of the bench failed: {request.error}")
    return Run(timing, [request.output.tolist() for request in requests])


def require_counted(run: Run, what: str) -> None:
    """Raise ``ConfigError`` if no round of ``run`` counts: some requests ended before all decoded together."""
    if run.timing.rounds == 0:
        raise ConfigError(
            f"{what}: in no round did all requests decode together with room for a full draft; "
            "raise max_tokens, or let step_tokens hold all prompts (0)."
        )


def _counts(requests: Sequence[Request], nodes: int) -> bool:
    return all(
        not r.finished and len(r) - r.cached == 1 and r.stats.rounds > 0 and r.limit - len(r) > nodes for r in requests
    )


def _enough(requests: Sequence[Request], nodes: int, tokens: int) -> bool:
    written = sum(request.written for request in requests)
    return written >= tokens * len(requests) or any(r.written and r.limit - len(r) <= nodes for r in requests)


@dataclass(frozen=True, slots=True)
class _Clock:
    """The engine's and the requests' sums before a step."""

    draft: float
    verify: float
    other: float
    drafted: int

    @staticmethod
    def read(stats: EngineStats, requests: Sequence[Request]) -> _Clock:
        drafted = sum(request.stats.drafted for request in requests)
        return _Clock(stats.draft_seconds, stats.verify_seconds, stats.other_seconds, drafted)

    def book(self, stats: EngineStats, requests: Sequence[Request], timing: Timing) -> None:
        """Add what the step took and what it drafted."""
        timing.rounds += 1
        timing.drafted += sum(request.stats.drafted for request in requests) - self.drafted
        timing.draft += stats.draft_seconds - self.draft
        timing.verify += stats.verify_seconds - self.verify
        timing.other += stats.other_seconds - self.other
