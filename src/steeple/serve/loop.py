"""The engine in a thread of its own: the only one that adds, steps and aborts. Others hand in jobs and get news."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

from steeple.engine import Committed, Engine
from steeple.errors import CapacityError, RequestError
from steeple.request import FinishReason, Request
from steeple.serve.errors import ApiError
from steeple.serve.fair import FairQueue
from steeple.serve.job import Job, Update
from steeple.serve.tally import Tally

log = logging.getLogger(__name__)

MOST_FAILURES = 3  # failed steps, one after the other, until the engine is given up
SPARE = 64  # deadlines kept before those of finished jobs are swept out
News = list[tuple[Job, Update]]


class Capped:
    """The engine's budget of nodes, lowered for the requests that ask for less. It looks at nothing that is drawn."""

    def __init__(self, inner: Callable[[Request], int]) -> None:
        self._inner = inner
        self.caps: dict[str, int] = {}

    def __call__(self, request: Request) -> int:
        nodes = self._inner(request)
        return min(nodes, self.caps[request.id]) if request.id in self.caps else nodes


class EngineLoop:
    """Runs ``engine`` until it is closed. Use as a context manager, or call ``start`` and ``close``.

    Args:
        engine: nobody else may drive it. Its ``budget`` is wrapped, for requests with a depth of their own.
        queue_size: sequences that may wait before the engine.
        retry_after: seconds that a client is told to wait when the queue is full.

    Idle, the thread waits on a condition. A step that raises ends the requests that were in the engine with an error;
    the loop goes on unless blocks are lost or steps keep failing, and then ``trouble`` says so.
    """

    def __init__(
        self, engine: Engine, *, queue_size: int = 1024, retry_after: int = 5, tally: Tally | None = None
    ) -> None:
        self.engine = engine
        self.tally = tally if tally is not None else Tally()
        self.trouble = ""
        self._retry_after = retry_after
        self._wake = threading.Condition()
        self._queue: FairQueue[Job] = FairQueue(queue_size)
        self._cancelled: list[Job] = []
        self._stop_at: float | None = None
        self._draining = False
        self._thread = threading.Thread(target=self._run, name="steeple-engine", daemon=True)
        # What follows belongs to the engine's thread.
        self._running: dict[str, Job] = {}
        self._deadlines: list[tuple[float, int, Job]] = []
        self._order = itertools.count()
        self._news: News = []
        self._failures = 0
        self._budget = Capped(engine.budget)
        engine.budget = self._budget

    def __enter__(self) -> EngineLoop:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(0.0)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def nodes(self) -> int:
        """Most tokens drafted per round and request; 0 without a drafter."""
        parts = self.engine.parts
        if parts.drafter is None:
            return 0
        return min(parts.drafter.needs.nodes, parts.plan.load.nodes) if parts.plan else parts.drafter.needs.nodes

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs and can be trusted."""
        return self._thread.is_alive() and not self.trouble

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self.alive and not self._draining

    @property
    def running(self) -> int:
        """Sequences in the engine's batch."""
        return len(self.engine.scheduler.running)

    @property
    def waiting(self) -> int:
        """Sequences that wait, before the engine and in it."""
        return len(self._queue) + len(self.engine.scheduler.waiting)

    @property
    def tenants(self) -> dict[str, int]:
        """How many sequences of each tenant wait before the engine."""
        with self._wake:
            return self._queue.tenants

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all jobs or none. From any thread. ``ApiError`` 429 if the queue is full, 503 if none are taken."""
        with self._wake:
            if not self.ready:
                raise self._unavailable()
            if len(jobs) > self._queue.size:
                raise ApiError(400, f"{len(jobs)} sequences in one request; this server takes {self._queue.size}.")
            if not self._queue.put(jobs):
                self.tally.turned_away += len(jobs)
                raise ApiError(
                    429,
                    f"{len(self._queue)} requests wait already; try again in {self._retry_after} s.",
                    code="queue_full",
                    headers={"Retry-After": str(self._retry_after)},
                )
            for job in jobs:
                if job.deadline is not None:
                    heapq.heappush(self._deadlines, (job.deadline, next(self._order), job))
            self._wake.notify()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Nobody waits for these any more: they leave before the next step. From any thread."""
        with self._wake:
            self._cancelled.extend(jobs)
            self._wake.notify()

    def drain(self, seconds: float) -> None:
        """Take no new jobs; those that are here have so many seconds. From any thread; returns at once."""
        with self._wake:
            self._draining = True
            stop_at = time.perf_counter() + seconds
            self._stop_at = stop_at if self._stop_at is None else min(stop_at, self._stop_at)
            self._wake.notify()

    def close(self, seconds: float) -> None:
        """``drain``, and wait until the thread has ended."""
        self.drain(seconds)
        if self._thread.is_alive():
            self._thread.join()

    def _unavailable(self) -> ApiError:
        why = "the engine has failed" if self.trouble else "the server is shutting down"
        return ApiError(503, f"{why}; no new requests are taken.", code="unavailable")

    # ------------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:
            log.error("the engine's thread ended", exc_info=error)
            self._give_up("the engine's thread ended")
        finally:
            with self._wake:
                self._draining = True
            self._clear(self._unavailable())
            self._post()

    def _turn(self) -> bool:
        """One step and what goes with it; False once there is nothing left to do for good."""
        with self._wake:
            while not self._busy():
                self._wake.wait()
            cancelled, self._cancelled = self._cancelled, []
            for job in cancelled:
                self._queue.remove(job)
            late = self._late()
            arrivals = [] if self.trouble else self._queue.take(self._room())
            done = self._stop_at is not None and (self.engine.idle and not arrivals)
            overdue = self._stop_at is not None and time.perf_counter() >= self._stop_at
        for job in cancelled:
            self._end(job, FinishReason.CANCELLED, "cancelled", None)
        for job in arrivals:
            self._admit(job)
        for job in late:
            self._end(job, FinishReason.ERROR, "timeout", _timed_out())
        if self.trouble or overdue or done:
            self._clear(self._unavailable())
        if not self.engine.idle and not self.trouble:
            self._step()
        self._post()
        return not (done or overdue)

    def _busy(self) -> bool:
        stepping = not self.engine.idle and not self.trouble
        return bool(self._queue or self._cancelled or self._stop_at is not None or stepping)

    def _room(self) -> int:
        """The engine's own queue is kept short, so that turns are taken as late as possible."""
        scheduler = self.engine.scheduler
        return self.engine.parts.batch_size - len(scheduler.running) - len(scheduler.waiting)

    def _late(self) -> list[Job]:
        """Jobs whose deadline has passed; those that still wait leave the queue."""
        now, late = time.perf_counter(), []
        if len(self._deadlines) > SPARE + 2 * (len(self._queue) + len(self._running)):  # mostly of jobs that are over
            self._deadlines = [entry for entry in self._deadlines if not entry[2].over]
            heapq.heapify(self._deadlines)
        while self._deadlines and self._deadlines[0][0] <= now:
            job = heapq.heappop(self._deadlines)[2]
            self._queue.remove(job)
            late.append(job)
        return late

    def _admit(self, job: Job) -> None:
        self._running[job.request.id] = job
        job.admitted = time.perf_counter()
        if job.nodes is not None:
            self._budget.caps[job.request.id] = job.nodes
        try:
            self.engine.add(job.request, stream=job.stream)
        except (RequestError, CapacityError) as error:
            self._end(job, FinishReason.ERROR, "refused", ApiError(400, str(error)))

    def _step(self) -> None:
        try:
            committed = self.engine.step()
            now = time.perf_counter()
            for one in committed:
                self._tell(one, now)
        except Exception as error:
            log.error("a step of the engine failed", exc_info=error)
            self._fail()
        else:
            self._failures = 0

    def _tell(self, committed: Committed, now: float) -> None:
        job = self._running[committed.request.id]
        update = job.advance(committed, self.engine.parts.tokenizer)
        self.tally.wrote(job, now)
        if update is not None:
            self._news.append((job, update))
            if update.finish is not None:
                self._leave(job, update.finish.value)

    def _end(self, job: Job, reason: FinishReason, outcome: str, error: ApiError | None) -> None:
        """End a job that did not end by itself, unless it has."""
        if job.over:
            return
        self._news.append((job, Update(finish=reason, error=error)))
        self._leave(job, outcome)
        job.request.finish(reason, None if error is None else error.message)
        self.engine.abort(job.request.id)

    def _leave(self, job: Job, outcome: str) -> None:
        job.over = True
        self._running.pop(job.request.id, None)
        self._budget.caps.pop(job.request.id, None)
        self.tally.ended(job, outcome)

    def _fail(self) -> None:
        """A step raised: nothing it was to write is kept, and whatever was in the engine is answered."""
        self._failures += 1
        self.tally.failures += 1
        answer = ApiError(500, "the engine failed in the middle of this request; send it again.", code="engine_error")
        try:
            for job in list(self._running.values()):
                self._end(job, FinishReason.ERROR, "error", answer)
            self.engine.check_integrity()
        except Exception as worse:
            log.error("the engine cannot be put in order again", exc_info=worse)
            self._give_up("the engine lost count of its blocks")
        if self._failures >= MOST_FAILURES:
            self._give_up(f"{self._failures} steps failed, one after the other")

    def _give_up(self, why: str) -> None:
        log.error("%s; no requests are taken until the server is started again", why)
        with self._wake:
            self.trouble = why
        self._clear(self._unavailable())

    def _clear(self, answer: ApiError) -> None:
        """Answer everybody who is still here."""
        with self._wake:
            left = [*self._running.values(), *self._queue.take(len(self._queue))]
        for job in left:
            try:
                self._end(job, FinishReason.ERROR, "error", answer)
            except Exception as error:  # it has been answered; the engine is not to be trusted, and says so
                log.error("a request could not be ended in order", exc_info=error)
                self.trouble = self.trouble or "a request could not be ended in order"

    def _post(self) -> None:
        """Hand the news over, all of a step at once: waking another thread costs more than what it is told."""
        news, self._news = self._news, []
        by_loop: dict[asyncio.AbstractEventLoop, News] = defaultdict(list)
        for entry in news:
            by_loop[entry[0].loop].append(entry)
        for loop, entries in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, entries)
            except RuntimeError:  # the loop is closed: nobody waits there any more
                for job, _ in entries:
                    self._end(job, FinishReason.CANCELLED, "cancelled", None)
                self._news.clear()


def _deliver(news: News) -> None:
    for job, update in news:
        job.deliver(job, update)


def _timed_out() -> ApiError:
    return ApiError(408, "the request took longer than its time limit and was given up.", code="timeout")
