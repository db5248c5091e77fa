"""The slow twin of ``replica.py``: one replica step by step, each step asked of the model of time itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from steeple.plan.fleet.replica import BIN_COUNT, BIN_SHIFT, BINS, IDLE, SLACK, Limits, Work
from steeple.plan.fleet.steps import StepTable


@dataclass
class Held:
    """A request in a replica: tokens read of its text, tokens to read, rounds done since, rounds to do."""

    request: int
    read: float
    text: float
    past: int
    rounds: int

    def context(self, growth: float) -> float:
        return self.read + self.past * growth


class SlowReplica:
    """Same rules, same signature and same results as ``Replica``, up to rounding."""

    def __init__(self, work: Work, table: StepTable, limits: Limits) -> None:
        self.work, self.table, self.limits = work, table, limits
        self.waiting: list[int] = []
        self.held: list[Held] = []  # in order of admission
        self.taken: dict[int, float] = {}  # prompt tokens of the planned step, by request
        self.clock, self.end = 0.0, IDLE
        self.busy = self.decode_seconds = self.token_steps = 0.0
        self.steps = self.preempted = 0
        self.gaps = [0] * BIN_COUNT

    def arrive(self, request: int, now: float) -> bool:
        """Take a request in. Returns whether ``end`` has changed."""
        self.waiting.append(request)
        if self.end < IDLE:
            return False
        self.clock = now
        self.plan()
        return True

    def plan(self) -> None:
        """Decide the next step."""
        while len(self.held) > 1 and self._used() > self.limits.kv_tokens + SLACK:
            self._give_up(self._youngest())
        while self.waiting and self._fits(self.waiting[0]):
            request = self.waiting.pop(0)
            self.held.append(Held(request, 0.0, self.work.read[request], 0, self.work.rounds[request]))
        if not self.held:
            self.end = IDLE
            return
        left = float(self.limits.chunk)
        self.taken, context = {}, 0.0
        for held in self._reading():
            if left <= 0.0:
                break
            self.taken[held.request] = min(left, held.text - held.read)
            left -= self.taken[held.request]
            context += held.read
        decoding = self._decoding()
        context += sum(held.context(self.work.growth[held.request]) for held in decoding)
        seconds = self.table.step.seconds(self.limits.chunk - left, len(decoding), context, self.table.rows)
        if decoding:
            seconds += self.table.draft.seconds(len(decoding), context)
        self.end = self.clock + seconds

    def commit(self) -> list[int]:
        """Carry out the step. Returns the requests that are answered by it."""
        spent = self.end - self.clock
        self.clock = self.end
        self.busy += spent
        self.steps += 1
        decoding, reading = self._decoding(), self._reading()
        if decoding:
            self.gaps[int(np.clip(int(math.log(spent) * BINS) + BIN_SHIFT, 0, BIN_COUNT - 1))] += len(decoding)
        self.decode_seconds += spent * len(decoding)
        self.token_steps += len(decoding)
        for held in decoding:
            held.past += 1
        for held in reading:
            held.read += self.taken.get(held.request, 0.0)
            if held.read == held.text and math.isnan(self.work.first[held.request]):
                self.work.first[held.request] = self.clock
        over = [h for h in self.held if h.read == h.text and h.past == h.rounds]
        self.held = [h for h in self.held if h not in over]
        for held in over:
            self.work.done[held.request] = self.clock
        return [h.request for h in over]

    def _reading(self) -> list[Held]:
        return [h for h in self.held if h.read < h.text]

    def _decoding(self) -> list[Held]:
        return [h for h in self.held if h.read == h.text]

    def _used(self) -> float:
        growth = self.work.growth
        decoding = sum(h.context(growth[h.request]) for h in self._decoding())
        return decoding + sum(h.text for h in self._reading()) + len(self.held) * self.table.rows

    def _fits(self, request: int) -> bool:
        if not self.held:
            return True
        needed = self._used() + self.work.read[request] + self.table.rows
        return len(self.held) < self.limits.max_batch and needed <= self.limits.kv_tokens * (1 - self.limits.watermark)

    def _youngest(self) -> Held:
        """Who reads is younger than who decodes."""
        return (self._reading() or self._decoding())[-1]

    def _give_up(self, held: Held) -> None:
        self.preempted += 1
        self.held.remove(held)
        if held.read == held.text:
            self.work.read[held.request] = held.context(self.work.growth[held.request])
            self.work.rounds[held.request] -= held.past
        self.waiting.insert(0, held.request)
