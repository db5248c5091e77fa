"""Runs of a bench of choices: a stream through an engine, what each request brought, and who drafted for it."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from steeple.draft.base import Drafter, DrafterConfig, Surroundings
from steeple.draft.parts import Parts, build_parts, parts_memory
from steeple.draft.spin_round import Choices, Chooser, Revises, Spin
from steeple.engine import Engine
from steeple.engine.stats import EngineStats
from steeple.errors import InternalError
from steeple.plan.memory_parts import DraftMemory, Lay
from steeple.request import Request
from steeple.select.foresight import Bools
from steeple.select.goodput import Plan, Standing
from steeple.select.matching import NOBODY
from steeple.select.selector import Outcome

Share = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Run:
    """A stream from end to end.

    seconds: wall time, prompts included; decode_seconds: of steps that read no prompt. tau: of each request. rounds:
    over all requests. shares: rounds of each (request, drafter number). outputs: of each request.
    """

    tokens: int
    seconds: float
    decode_seconds: float
    decode_steps: int
    rounds: int
    committed: int
    tau: tuple[float, ...]
    shares: Mapping[Share, int]
    outputs: tuple[tuple[int, ...], ...]

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the whole run over its wall time."""
        return self.tokens / self.seconds

    @property
    def step_seconds(self) -> float:
        """Mean of the steps that read no prompt."""
        return self.decode_seconds / max(self.decode_steps, 1)


class Counted:
    """A chooser whose choices are counted. Rounds that were to have no draft count for ``NOBODY``."""

    def __init__(self, chooser: Chooser) -> None:
        self._chooser = chooser
        self.shares: Counter[Share] = Counter()

    def choose(self, ids: Sequence[str], standing: Callable[[], Standing]) -> Plan:
        """See ``Chooser``."""
        return self._chooser.choose(ids, standing)

    def revise(self, ids: Sequence[str], plan: Plan, offered: Mapping[int, Bools]) -> Plan:
        """See ``Revises``."""
        return self._chooser.revise(ids, plan, offered) if isinstance(self._chooser, Revises) else plan

    def learn(self, outcome: Outcome) -> None:
        """See ``Chooser``."""
        for id, drafter, asked in zip(outcome.ids, outcome.drafter.tolist(), outcome.asked.tolist(), strict=True):
            self.shares[id, drafter if asked else NOBODY] += 1
        self._chooser.learn(outcome)

    def forget(self, id: str) -> None:
        """See ``Chooser``."""
        self._chooser.forget(id)

    @property
    def remembered(self) -> frozenset[str]:
        """See ``Chooser``."""
        return self._chooser.remembered


class Fixed:
    """A chooser that was told: for each request a drafter and a depth, for all of its rounds."""

    remembered = frozenset[str]()

    def __init__(self, told: Mapping[str, tuple[int, int]]) -> None:
        self._told = told

    def choose(self, ids: Sequence[str], standing: Callable[[], Standing]) -> Plan:
        """See ``Chooser``."""
        del standing
        pairs = np.array([self._told[id] for id in ids], dtype=np.int64)
        return Plan(pairs[:, 0], pairs[:, 1], float("nan"), float("nan"))

    def learn(self, outcome: Outcome) -> None:
        """It knows all it needs."""

    def forget(self, id: str) -> None:
        """It forgets nothing."""


@dataclass(frozen=True)
class FixedConfig:
    """Settings of an oracle: its drafters, and whom each request is given to (drafter number, depth)."""

    drafters: tuple[DrafterConfig, ...]
    told: Mapping[str, tuple[int, int]]
    k: int

    def build(self, around: Surroundings) -> Drafter:
        """``Spin`` with choices that were made before."""
        parts: Parts = build_parts("oracle", self.drafters, around)
        return Spin(parts, Choices(Fixed(self.told), parts.parts), around.device)

    def memory(self, around: Surroundings, lay: Lay) -> DraftMemory:
        """That of its drafters."""
        return parts_memory(self.drafters, around, lay)


def run_stream(engine: Engine, requests: Sequence[Request]) -> Run:
    """All requests through the engine, joining as others end. ``InternalError`` if one of them fails."""
    engine.stats = EngineStats()
    choices = engine.drafter.lengths if isinstance(engine.drafter, Spin) else None
    counted = None
    if choices is not None:
        learner, counted = choices.selector, Counted(choices.selector)
        choices.selector = counted
    gc.collect()
    started = time.perf_counter()
    for request in requests:
        engine.add(request)
    while not engine.idle:
        engine.step()
    seconds = time.perf_counter() - started
    engine.check_integrity()
    if choices is not None:
        choices.selector = learner
    for request in requests:
        if request.error is not None:
            raise InternalError(f"request {request.id} of the bench failed: {request.error}")
    stats, spent = engine.stats, engine.stats.speculation
    return Run(
        tokens=sum(r.written for r in requests),
        seconds=seconds,
        decode_seconds=stats.draft_seconds + stats.verify_seconds + stats.other_seconds,
        decode_steps=stats.decode_steps,
        rounds=spent.rounds,
        committed=spent.committed,
        tau=tuple(r.stats.tau for r in requests),
        shares=dict(counted.shares) if counted is not None else {},
        outputs=tuple(tuple(r.output.tolist()) for r in requests),
    )


def median_run(runs: Sequence[Run]) -> Run:
    """The run in the middle by its speed, with the median's seconds."""
    ordered = sorted(runs, key=lambda run: run.seconds / run.tokens)
    middle = ordered[len(ordered) // 2]
    return replace(middle, seconds=float(np.median([run.seconds / run.tokens for run in runs])) * middle.tokens)
