"""One replica with continuous batching, advanced by stretches of equal steps instead of step by step.

Between two changes of the batch (an arrival, a finished prompt, a finished request, a full cache) the number of
decoding requests stays and their context grows by the same amount every step. On a stretch of the table the step time
is then an arithmetic progression, so that any number of steps is one formula. ``twin.py`` does the same step by step.

The rules of a step. When memory does not suffice for the next step, the youngest request gives up its cache and waits
in front; it reads its text again. Requests are admitted in order while there are places and their prompt fits. Admitted
prompts share ``chunk`` tokens of a step, the oldest first; the step that ends a prompt gives the first token. Every
decoding request does one round per step.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from steeple.config import check_range
from steeple.errors import ConfigError
from steeple.plan.fleet.drafting import Drafting
from steeple.plan.fleet.load import Load
from steeple.plan.fleet.steps import StepTable

IDLE = math.inf
SLACK = 1e-6  # positions; contexts are sums of fractions
BINS = 64  # of step times, per factor of e
BIN_SHIFT = 16 * BINS  # the first bin is e**-16 s
BIN_COUNT = 26 * BINS


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a replica takes.

    Attributes:
        max_batch: requests that it holds at once.
        kv_tokens: positions of its cache.
        chunk: prompt tokens of a step.
        watermark: share of the cache that admission leaves free.
    """

    max_batch: int = 256
    kv_tokens: int = 400_000
    chunk: int = 2048
    watermark: float = 0.01

    def __post_init__(self) -> None:
        for name in ("max_batch", "kv_tokens", "chunk"):
            check_range("Limits", name, getattr(self, name), 1, 10**12)
        check_range("Limits", "watermark", self.watermark, 0.0, 0.9)


class Work:
    """The requests as every replica sees them: plain lists, since they are read one by one.

    Attributes:
        read: tokens to read before the request decodes (on); grows when it is preempted.
        rounds: rounds that are left after that.
        growth: positions that its context grows by in a round.
        first, done: when its first and last token were there, seconds; NaN before.
    """

    def __init__(self, load: Load, drafting: Drafting, rng: np.random.Generator | None) -> None:
        after_first = load.output - 1
        rounds = drafting.rounds(after_first, rng)
        self.read: list[float] = load.prompt.astype(float).tolist()
        self.rounds: list[int] = rounds.tolist()
        self.growth: list[float] = (after_first / np.maximum(rounds, 1)).tolist()
        self.first = [math.nan] * len(load)
        self.done = [math.nan] * len(load)


class Replica:
    """A replica. Its next change is at ``end``: ``commit`` carries out what is planned until then, ``plan`` goes on."""

    def __init__(self, work: Work, table: StepTable, limits: Limits) -> None:
        if table.prompts[-1] < limits.chunk:
            raise ConfigError(f"Limits.chunk = {limits.chunk} is more than its step table has; make both from one.")
        self.work, self.table, self.limits = work, table, limits
        self.rows, self.capacity = table.rows, limits.kv_tokens + SLACK
        self.open_to = limits.kv_tokens * (1.0 - limits.watermark)
        self.waiting: deque[int] = deque()
        self.prompts: deque[list[float]] = deque()  # [request, tokens read]
        self.decoding: dict[int, int] = {}  # request -> round in which it ends; in order of admission
        self.ends: list[tuple[int, int]] = []  # heap of (round, request); outdated entries stay
        self.context = self.growth = self.reading = 0.0
        self.round = self.steps = self.planned = self.ending = 0
        self.clock, self.end = 0.0, IDLE
        self._stretch = (0.0, 0.0)
        self.busy = self.decode_seconds = self.token_steps = 0.0
        self.preempted = 0
        self.gaps = [0] * BIN_COUNT

    def arrive(self, request: int, now: float) -> bool:
        """Take a request in. Returns whether ``end`` has changed."""
        self.waiting.append(request)
        if self.end == IDLE:
            self.clock = now
            self.plan()
            return True
        if self.prompts or len(self.waiting) > 1 or not self._fits(request):
            return False  # a step with prompts is a single one; and who waits already waits for a change
        return self._cut(now)

    def commit(self) -> list[int]:
        """Carry out the planned steps. Returns the requests that are answered by them."""
        steps, count, spent = self.planned, len(self.decoding), self.end - self.clock
        self.clock = self.end
        self.busy += spent
        self.steps += steps
        self.round += steps
        answered: list[int] = []
        if count:
            place = int(math.log(spent / steps) * BINS) + BIN_SHIFT
            self.gaps[min(max(place, 0), BIN_COUNT - 1)] += steps * count
            self.decode_seconds += spent * count
            self.token_steps += steps * count
            self.context += steps * self.growth
            if self.ends[0][0] <= self.round:
                self._finish(answered)
        if self.ending:
            self._begin(answered)
        return answered

    def plan(self) -> None:
        """Decide the next steps and when they end."""
        if self.context + len(self.decoding) * self.rows + self.reading > self.capacity:
            self._preempt()
        while self.waiting and self._fits(self.waiting[0]):
            request = self.waiting.popleft()
            self.prompts.append([request, 0.0])
            self.reading += self.work.read[request] + self.rows
        if self.prompts:
            self._plan_mixed()
        elif self.decoding:
            self._plan_decoding()
        else:
            self.end = IDLE

    def _fits(self, request: int) -> bool:
        count = len(self.decoding) + len(self.prompts)
        if not count:
            return True
        used = self.context + len(self.decoding) * self.rows + self.reading
        return count < self.limits.max_batch and used + self.work.read[request] + self.rows <= self.open_to

    def _plan_mixed(self) -> None:
        """One step that reads prompts, the oldest first."""
        left, past, ending = float(self.limits.chunk), 0.0, 0
        for entry in self.prompts:
            request, done = entry
            missing = self.work.read[int(request)] - done
            past += done
            if missing > left:
                entry[1] += left
                left = 0.0
                break
            left -= missing
            ending += 1
            if left <= 0.0:
                break
        self.planned, self.ending = 1, ending
        seconds = self.table.mixed(self.limits.chunk - left, len(self.decoding), self.context + past)
        self.end = self.clock + seconds

    def _plan_decoding(self) -> None:
        """Steps until somebody ends, the cache is full, or the stretch of the table ends."""
        count = len(self.decoding)
        seconds, slope, low, high = self.table.segment(count, self.context)
        steps = self.ends[0][0] - self.round
        if self.growth > 0.0:
            room = min(self.capacity - count * self.rows, high) - self.context
            steps = max(1, min(steps, int(room / self.growth) + 1))
        first, more = seconds + slope * (self.context - low), slope * self.growth
        self.planned, self._stretch = steps, (first, more)
        self.end = self.clock + steps * first + more * (steps * (steps - 1) // 2)

    def _cut(self, now: float) -> bool:
        """End the planned steps at the first boundary that is not before ``now``."""
        first, more = self._stretch
        passed = now - self.clock
        steps = max(1, min(self.planned, math.ceil(passed / first)))
        if more > 0.0:
            half = first - more / 2
            steps = max(1, min(steps, math.ceil((math.sqrt(half * half + 2 * more * passed) - half) / more)))
        # rounding may be off by one step either way
        while steps > 1 and (steps - 1) * first + more * ((steps - 1) * (steps - 2) // 2) >= passed:
            steps -= 1
        while steps < self.planned and steps * first + more * (steps * (steps - 1) // 2) < passed:
            steps += 1
        if steps == self.planned:
            return False
        self.planned = steps
        self.end = self.clock + steps * first + more * (steps * (steps - 1) // 2)
        return True

    def _finish(self, answered: list[int]) -> None:
        work = self.work
        while self.ends and self.ends[0][0] <= self.round:
            at, request = heappop(self.ends)
            if self.decoding.get(request) != at:
                continue  # it was preempted since
            del self.decoding[request]
            work.done[request] = self.clock
            answered.append(request)
            self.context -= work.read[request] + work.growth[request] * work.rounds[request]
            self.growth -= work.growth[request]
        if not self.decoding:
            self.context = self.growth = 0.0  # forgets what rounding left

    def _begin(self, answered: list[int]) -> None:
        """Those whose prompt has ended have their first token and decode, or are done with it."""
        work = self.work
        for _ in range(self.ending):
            request = int(self.prompts.popleft()[0])
            self.reading -= work.read[request] + self.rows
            if work.first[request] != work.first[request]:
                work.first[request] = self.clock
            if not work.rounds[request]:
                work.done[request] = self.clock
                answered.append(request)
                continue
            end = self.round + work.rounds[request]
            self.decoding[request] = end
            heappush(self.ends, (end, request))
            self.context += work.read[request]
            self.growth += work.growth[request]
        self.ending = 0
        if not self.prompts:
            self.reading = 0.0

    def _preempt(self) -> None:
        """The youngest give up their cache until the next step fits; the last one stays."""
        work = self.work
        while len(self.decoding) + len(self.prompts) > 1:
            if self.context + len(self.decoding) * self.rows + self.reading <= self.capacity:
                return
            self.preempted += 1
            if self.prompts:
                request = int(self.prompts.pop()[0])
                self.reading -= work.read[request] + self.rows
            else:
                request, end = self.decoding.popitem()
                past = work.rounds[request] - (end - self.round)
                self.context -= work.read[request] + work.growth[request] * past
                self.growth -= work.growth[request]
                work.read[request] += work.growth[request] * past
                work.rounds[request] -= past
            self.waiting.appendleft(request)
