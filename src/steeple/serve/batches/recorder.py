"""Answers on their way to disk: those that come while others are being written go together in the next transaction."""

from __future__ import annotations

import asyncio
import logging

from steeple.errors import StorageError
from steeple.serve.batches.ledger import Ledger, Result
from steeple.serve.batches.store import Desk

log = logging.getLogger(__name__)

AGAIN = 1.0  # seconds until something is tried again
LAST = 5.0  # seconds that the last answers get at shutdown


class Recorder:
    """Args: desk: runs calls on the store; ledger: where answers are kept."""

    def __init__(self, desk: Desk, ledger: Ledger) -> None:
        self._desk, self._ledger = desk, ledger
        self._waiting: list[tuple[Result, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None

    async def keep(self, result: Result) -> None:
        """Returns once ``result`` is on disk, however long that takes."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((result, written))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        await written

    async def close(self) -> None:
        """Write what is left; answers that cannot be written now are made again after the next start."""
        if self._writer is not None:
            await asyncio.wait({self._writer}, timeout=LAST)
            self._writer.cancel()

    async def _write(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            await self._commit([result for result, _ in group])
            for _, written in group:
                if not written.done():
                    written.set_result(None)

    async def _commit(self, results: list[Result]) -> None:
        while True:
            try:
                await self._desk(self._ledger.record, results)
                return
            except StorageError as error:
                log.error("%d answers wait for the disk: %s", len(results), error)
            await asyncio.sleep(AGAIN)
