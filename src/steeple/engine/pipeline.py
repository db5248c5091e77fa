"""Pipelined rounds: while the target verifies one micro-batch, the drafter drafts the next on a thread of its own.

Sources: SPIN (2025, arXiv 2503.15921) for micro-batches, Minions (Wang et al. 2024, arXiv 2402.15678) for the bounded
pool of drafts. It pays where drafter and target have devices of their own, or leave each other room on one.

Of a step's three phases only ``_draft`` (the drafter) and ``_verify`` (the target) may run beside each other, for
disjoint sets of requests: one writes the slots behind its own texts, the other those of its own rows. Scheduler,
blocks, texts, ``observe`` and ``forget`` are the calling thread's while nothing is drafted. So drafters need no locks.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from steeple.cache.batch import BatchMaker
from steeple.draft.base import DecidesLengths, Lengths
from steeple.engine.engine import Committed, Drafted, Engine, EngineParts
from steeple.engine.judge import Judge
from steeple.engine.micro import MicroBatches
from steeple.engine.scheduler import Work
from steeple.errors import ConfigError, InternalError
from steeple.request import FinishReason, Request
from steeple.types import Batch, Draft


class _Lane(NamedTuple):
    """What a micro-batch is verified with. Both remember what they gathered for a set of requests, so each micro-batch
    has its own: the next of the same requests finds it."""

    maker: BatchMaker
    judge: Judge


@dataclass(slots=True, eq=False)
class _Flight:
    """A micro-batch between its plan and its commit. ``gone``: requests that lost their place in the meantime."""

    plan: list[Work]
    lane: _Lane
    drafted: Drafted | None = None
    gone: set[str] = field(default_factory=set)

    def drop_gone(self) -> None:
        """Go on without them."""
        if not self.gone:
            return
        places = [b for b, work in enumerate(self.plan) if work.request.id not in self.gone]
        self.plan = [self.plan[b] for b in places]
        if self.drafted is not None:
            draft = select_draft(self.drafted.draft, places)
            requests = [work.request for work in self.plan]
            self.drafted = Drafted(self.plan, requests, draft, self.drafted.seconds)
        self.gone.clear()

    @property
    def shape(self) -> tuple[int, int]:
        """What its time depends on most: requests, and nodes of the deepest draft."""
        return len(self.plan), max((work.nodes for work in self.plan), default=0)


class PipelinedEngine(Engine):
    """An engine whose requests take turns in micro-batches.

    Args:
        micro_batches: how many; 0 = raised until throughput drops, see ``MicroBatches``.

    A step commits one micro-batch, whose draft was made in an earlier step. Beside its verification the next ones are
    drafted: one at least, and more while the target is not done; but no more wait than there are micro-batches besides
    the one that is verified. With one micro-batch nothing overlaps, and a step is that of ``Engine``. An error in
    either phase leaves all requests as they were; what had been drafted is dropped.
    """

    def __init__(self, parts: EngineParts, micro_batches: int) -> None:
        super().__init__(parts)
        if isinstance(parts.drafter, DecidesLengths):
            raise ConfigError(
                f"EngineConfig.micro_batches = {micro_batches}, but this drafter plans a round for all requests "
                "together; give micro_batches = 1."
            )
        self.micro = MicroBatches(micro_batches)
        self._pool: deque[_Flight] = deque()  # drafted, waiting for the target
        self._flying: dict[str, _Flight] = {}
        self._lanes = deque([_Lane(self._maker, self._judge)])
        self._served: dict[str, int] = {}  # the step in which a request was last committed
        self._turn = 0
        self._alike = True
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="drafting")
        self._task: Future[None] | None = None
        self._stop = threading.Event()
        device = parts.decoder.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def step(self) -> list[Committed]:
        """See ``Engine``. Returns what one micro-batch wrote."""
        started = time.perf_counter()
        self._join()
        try:
            return self._step(started)
        except BaseException:
            self._drop_all()
            raise

    def _step(self, started: float) -> list[Committed]:
        inline = 0.0
        if not self._pool:
            first = self._plan() or self._plan_anybody()
            if first is None:
                return []
            first.drafted = self._draft(first.plan)
            inline = first.drafted.seconds
            self._pool.append(first)
        ahead = self._plan_ahead()
        flight = self._take()
        self._launch(ahead)
        judged = None
        try:
            if flight is not None and flight.drafted is not None:
                judged = self._verify(flight.drafted, *flight.lane)
        finally:
            waited = self._join()
        alike = all(beside.shape == flight.shape for beside in ahead) if flight is not None else False
        self._alike = alike and bool(ahead or inline)
        self._land(ahead)
        if flight is None or flight.drafted is None or judged is None:
            return []  # whoever was drafted for had lost their place
        self._retire(flight)
        for request in flight.drafted.requests:
            self._served[request.id] = self._turn
        self._turn += 1
        out = self._settle(flight.drafted._replace(seconds=inline + waited), judged, started)
        if all(work.ready for work in flight.plan):
            self.micro.note(sum(len(own.tokens) for own in out), len(self.scheduler.running), time.perf_counter())
        return out

    def _plan(self) -> _Flight | None:
        """The next micro-batch out of those requests that are in none: who waited longest, and a share of new ones."""
        running, count = self.scheduler.running, self.micro.count
        free = [r for r in running if r.id not in self._flying]
        share = -(-len(running) // count)
        if len(free) > share:
            order = sorted(free, key=lambda r: self._served.get(r.id, -1))
            turn = {r.id for r in order[:share]}
            free = [r for r in free if r.id in turn]
        joining = max(0, -(-self.scheduler.live // count) - len(free))
        if not free and not joining:
            return None
        if self._lengths is not None:
            self._lengths.begin(free)
        return self._flight(self.scheduler.next(self.budget, free, joining))

    def _plan_anybody(self) -> _Flight | None:
        """Where those whose turn it was found no room: nothing is in flight, so the oldest can run."""
        if self.idle:
            return None
        flight = self._flight(self.scheduler.next(self.budget))
        if flight is None:
            raise InternalError("requests wait, but none of them can run")
        return flight

    def _flight(self, plan: list[Work]) -> _Flight | None:
        if not plan:
            return None
        lane = self._lanes.popleft() if self._lanes else self._new_lane()
        flight = _Flight(plan, lane)
        self._flying.update((work.request.id, flight) for work in plan)
        return flight

    def _new_lane(self) -> _Lane:
        portion = self.parts.plan.load.portion if self.parts.plan is not None else 0
        maker = BatchMaker(self.cache.block_size, self.parts.decoder.device)
        return _Lane(maker, Judge(self._runner, portion))

    def _plan_ahead(self) -> list[_Flight]:
        """Micro-batches to draft for beside the next verification; none while enough of them wait for the target."""
        ahead: list[_Flight] = []
        while len(self._pool) + len(ahead) < self.micro.count:
            flight = self._plan()
            if flight is None:
                break
            ahead.append(flight)
        return ahead

    def _take(self) -> _Flight | None:
        """The micro-batch that has waited longest, without the requests that lost their place."""
        while self._pool:
            flight = self._pool.popleft()
            flight.drop_gone()
            if flight.plan:
                return flight
            self._retire(flight)
        return None

    def _retire(self, flight: _Flight) -> None:
        """It is over: its requests are free for another, its lane as well."""
        for work in flight.plan:
            if self._flying.get(work.request.id) is flight:
                del self._flying[work.request.id]
        self._lanes.append(flight.lane)

    def _launch(self, ahead: list[_Flight]) -> None:
        """Begin to draft, if there is anything to draft for."""
        for flight in list(ahead):
            flight.drop_gone()
            if not flight.plan:
                ahead.remove(flight)
                self._retire(flight)
        wanted = list(ahead)
        while wanted and not any(work.nodes for work in wanted[0].plan):
            wanted[0].drafted = self._draft(wanted[0].plan)  # prompts: there is nothing to draft
            del wanted[0]
        if not wanted:
            return
        self._stop.clear()
        ready = None if self._stream is None else torch.cuda.current_stream(self._stream.device).record_event()
        self._task = self._worker.submit(self._draft_all, wanted, torch.get_num_threads(), ready)

    def _draft_all(self, wanted: Sequence[_Flight], threads: int, ready: torch.cuda.Event | None) -> None:
        """On the worker: draft for the first, and for more as long as the target is busy."""
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)  # torch has a number per thread
        with self._beside(ready):
            for flight in wanted:
                flight.drafted = self._draft(flight.plan)
                if self._stop.is_set():
                    break

    @contextmanager
    def _beside(self, ready: torch.cuda.Event | None) -> Iterator[None]:
        """On a GPU: the drafter's own stream, behind what the target's has been given so far."""
        if self._stream is None or ready is None:
            yield
            return
        torch.cuda.set_device(self._stream.device)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            yield

    def _join(self) -> float:
        """Wait until nothing is drafted; seconds that took."""
        if self._task is None:
            return 0.0
        self._stop.set()
        start = time.perf_counter()
        wait((self._task,))
        return time.perf_counter() - start

    def _land(self, ahead: Sequence[_Flight]) -> None:
        """Drafts go to the pool, in order; who was not drafted for is free again. Raises what drafting raised."""
        task, self._task = self._task, None
        if task is not None:
            task.result()
        for flight in ahead:
            if flight.drafted is None:
                self._retire(flight)
                continue
            if self._stream is not None:
                here = torch.cuda.current_stream(self._stream.device)
                here.wait_stream(self._stream)
                draft = flight.drafted.draft
                for tensor in (draft.tokens, draft.row, draft.probs):
                    if tensor is not None:
                        tensor.record_stream(here)
            self._pool.append(flight)

    def _drop_all(self) -> None:
        """After an error: nothing is in flight, and requests are as they were."""
        self._join()
        self._task = None
        lanes = {id(flight): flight.lane for flight in (*self._pool, *self._flying.values())}
        self._lanes.extend(lanes.values())
        self._pool.clear()
        self._flying.clear()

    def _learn(
        self,
        lengths: Lengths,
        plan: Sequence[Work],
        batch: Batch,
        draft: Draft,
        kept: Sequence[Sequence[int]],
        seconds: float | None,
    ) -> None:
        """A step's time says something of a depth only if the draft beside it was of the same shape."""
        super()._learn(lengths, plan, batch, draft, kept, seconds if self._alike else None)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED, error: str | None = None) -> None:
        """See ``Engine``; a draft that waits for the target goes with its request."""
        self._join()
        super().abort(request_id, reason, error)

    def _forget(self, request: Request) -> None:
        super()._forget(request)
        self._served.pop(request.id, None)
        flight = self._flying.pop(request.id, None)
        if flight is not None:
            flight.gone.add(request.id)

    def check_integrity(self) -> None:
        """See ``Engine``; no request may be in flight."""
        super().check_integrity()
        if self._flying or self._served:
            raise InternalError(f"requests {[*self._flying, *self._served][:4]} are left in flight")


def select_draft(draft: Draft, places: Sequence[int]) -> Draft:
    """The forest of the requests at ``places`` alone, in that order. Laws are left as they are."""
    at = np.asarray(places, dtype=np.int64)
    counts, first = draft.counts.numpy()[at], draft.cu.numpy()[at]
    cu = np.concatenate(([0], np.cumsum(counts)))
    shift = np.repeat(first - cu[:-1], counts)
    nodes = torch.from_numpy(np.arange(int(cu[-1])) + shift)
    parent = draft.parent.numpy()[nodes.numpy()]
    on_device = nodes.to(draft.tokens.device)
    return Draft(
        draft.tokens[on_device],
        torch.from_numpy(np.where(parent < 0, -1, parent - shift)),
        torch.from_numpy(cu),
        draft.row[on_device],
        draft.probs,
        draft.chain,
    )
