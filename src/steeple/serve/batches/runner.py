"""What drives batches: a task for each unfinished one, which takes it from state to state and survives a restart.

Everything that counts is in the database. A task reads its batch's state, does what that state asks for, and looks
again; so a process that was killed anywhere is continued by one that begins at the same line of code.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator

from steeple.errors import StorageError
from steeple.serve.batches.answer import Work, answered, prepare
from steeple.serve.batches.clerk import Clerk
from steeple.serve.batches.config import BatchStoreConfig
from steeple.serve.batches.contents import Files
from steeple.serve.batches.gate import Gate
from steeple.serve.batches.ledger import IN_PROGRESS, OPEN, VALIDATING, Batch, Ledger, Result, Task
from steeple.serve.batches.recorder import AGAIN, Recorder
from steeple.serve.batches.scan import parse
from steeple.serve.batches.store import Desk
from steeple.serve.errors import ApiError
from steeple.serve.service import Service

log = logging.getLogger(__name__)

PAGE = 256  # tasks looked up at a time
TRIES = 2  # of a request in whose middle the engine fails; more, and one bad request would wear the engine out
SWEEP = 60.0  # seconds between two looks for expired files
LATER = (429, 503)  # the engine takes nothing now; it says nothing about the request


class Place:
    """A place before the gate, left once. Args: places: of a batch; one of them has been taken."""

    def __init__(self, places: asyncio.Semaphore) -> None:
        self._places: asyncio.Semaphore | None = places

    def leave(self) -> None:
        """Somebody else may have it."""
        if self._places is not None:
            self._places.release()
            self._places = None


class Runner:
    """Args: service: the server's; desk, files, ledger: the store; config: bounds."""

    def __init__(self, service: Service, desk: Desk, files: Files, ledger: Ledger, config: BatchStoreConfig) -> None:
        self._service, self._desk, self._files, self._ledger = service, desk, files, ledger
        self._clerk = Clerk(desk, files, ledger, config.max_batch_lines, service.config.max_body)
        self._clerks = asyncio.Lock()  # one file is read or written at a time
        rows = service.loop.engine.parts.batch_size
        self._gate = Gate(service.loop, config.batch_in_flight or max(1, rows // 2))
        self._recorder = Recorder(desk, ledger)
        self._lives: dict[int, asyncio.Task[None]] = {}
        self._answering: dict[int, asyncio.Task[None]] = {}
        self._runs = False

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Continue what is unfinished, and run what comes, until the end of the block."""
        await self._desk(self._files.recover)
        self._runs = True
        others = [asyncio.create_task(self._gate.run()), asyncio.create_task(self._sweep())]
        for batch in await self._desk(self._ledger.unfinished):
            self.begin(batch)
        try:
            yield
        finally:
            self._runs = False
            tasks = [*others, *self._lives.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._recorder.close()

    def begin(self, batch: Batch) -> None:
        """Take a batch up."""
        if self._runs and batch.number not in self._lives:
            task = asyncio.create_task(self._live(batch.number))
            self._lives[batch.number] = task
            task.add_done_callback(lambda _: self._lives.pop(batch.number, None))

    def cancel(self, batch: Batch) -> None:
        """The batch is being cancelled: what it has in the engine is not wanted any more."""
        task = self._answering.get(batch.number)
        if task is not None:
            task.cancel()

    async def sweep(self) -> None:
        """Give back the room of deleted files."""
        await self._desk(self._files.sweep, time.time())

    async def _sweep(self) -> None:
        while True:
            with _logged("expired files could not be removed"):
                await self.sweep()
            await asyncio.sleep(SWEEP)

    async def _live(self, number: int) -> None:
        """A batch from the state in which it is to its end."""
        while True:
            with _logged(f"batch {number} is stuck"):
                batch = await self._desk(self._ledger.find, number)
                if batch.status not in OPEN:
                    log.info("%s: %s", batch.id, batch.status)
                    return
                await self._advance(batch)
                continue
            await asyncio.sleep(AGAIN)

    async def _advance(self, batch: Batch) -> None:
        if batch.status == IN_PROGRESS:
            await self._answer(batch)
            await self._desk(self._ledger.close, batch.number, int(time.time()))
            return
        async with self._clerks:
            if batch.status == VALIDATING:
                await self._clerk.validate(batch)
            else:
                await self._clerk.finish(batch)
                await self.sweep()  # the input may have been deleted meanwhile

    async def _answer(self, batch: Batch) -> None:
        """All requests without an answer, until there are none, the window is over or the batch is cancelled."""
        task = self._answering[batch.number] = asyncio.create_task(self._answer_all(batch))
        try:
            await asyncio.wait({task}, timeout=max(0.0, batch.expires_at - time.time()))
        finally:
            del self._answering[batch.number]
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled():
            task.result()

    async def _answer_all(self, batch: Batch) -> None:
        line, places = 0, asyncio.Semaphore(self._gate.most)
        async with asyncio.TaskGroup() as group:
            while page := await self._desk(self._ledger.pending, batch.number, line, PAGE):
                for task in page:
                    # Enough wait at the gate to fill the engine at once, and no more.
                    await places.acquire()
                    group.create_task(self._request(batch, task, Place(places)))
                line = page[-1].line

    async def _request(self, batch: Batch, task: Task, place: Place) -> None:
        """Answer one request, come what may."""
        try:
            raw = await self._desk(self._files.cut, batch.file, task.start, task.length)
            body = parse(raw)["body"]
            refusal = None
            for _ in range(TRIES):
                refusal = await self._try(batch, task, body, place)
                if refusal is None or refusal.status < 500:
                    break
        finally:
            place.leave()
        if refusal is None:
            return
        answer = answered(task.custom_id, refusal.status, refusal.body())
        await self._recorder.keep(Result(batch.number, task.line, False, answer))

    async def _try(self, batch: Batch, task: Task, body: object, place: Place) -> ApiError | None:
        """Run a request and keep its answer; what is wrong with it otherwise."""
        while True:
            try:
                # Under a name of its own, so that its owner's other requests do not stand behind it.
                work = await prepare(self._service, batch.endpoint, body, f"{batch.tenant} (batch)".strip())
                await self._run(batch, task, work, place)
                return None
            except ApiError as error:
                if error.status not in LATER:
                    return error
            except StorageError:
                raise
            except Exception as error:
                log.error("%s, line %d failed", batch.id, task.line, exc_info=error)
                return ApiError(500, "the server failed; its log says more.", code="internal_error")
            await asyncio.sleep(AGAIN)

    async def _run(self, batch: Batch, task: Task, work: Work, place: Place) -> None:
        # The place is held until the answer is on disk, so that a disk that is full stops the engine's work too.
        async with self._gate.place(batch.tenant, work.sequences):
            place.leave()
            answer = answered(task.custom_id, 200, await work.run())
            await self._recorder.keep(Result(batch.number, task.line, True, answer))


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    """Go on after an error, which is logged."""
    try:
        yield
    except Exception as error:
        log.error("%s; it is tried again", what, exc_info=error)
