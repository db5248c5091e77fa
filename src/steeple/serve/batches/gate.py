"""Who of the batches may go into the engine, and when: after everybody who waits for an answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

from steeple.serve.loop import EngineLoop

POLL = 0.005  # seconds between two looks at the engine while somebody waits here


@dataclass(frozen=True, slots=True, eq=False)
class Waiter:
    """A request at the gate. ``sequences``: how many rows of the engine's batch it wants."""

    tenant: str
    sequences: int
    admitted: asyncio.Future[None]


class Gate:
    """Lets requests in while rows of the engine's batch are free, nobody else waits for one, and few are inside.

    Between tenants, who has the fewest sequences inside is next; within a tenant, who came first. A request with more
    sequences than may be inside goes in alone.

    Args: loop: the engine's; most: sequences inside at once.
    """

    def __init__(self, loop: EngineLoop, most: int) -> None:
        self.most = most
        self._loop = loop
        self._waiting: dict[str, deque[Waiter]] = {}
        self._inside: dict[str, int] = {}
        self._wanted = asyncio.Event()
        self._moved = asyncio.Event()

    @contextlib.asynccontextmanager
    async def place(self, tenant: str, sequences: int) -> AsyncIterator[None]:
        """Wait for a place, and hold it."""
        waiter = Waiter(tenant, sequences, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(tenant, deque()).append(waiter)
        self._wanted.set()
        self._moved.set()
        try:
            await waiter.admitted
            yield
        finally:
            self._leave(waiter)

    async def run(self) -> None:
        """Let in whoever may. Runs until it is cancelled."""
        while True:
            await self._wanted.wait()
            self._admit()
            if not self._waiting:
                self._wanted.clear()
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL):
                    await self._moved.wait()
            self._moved.clear()

    def _leave(self, waiter: Waiter) -> None:
        tenant, queue = waiter.tenant, self._waiting.get(waiter.tenant)
        if queue is not None and waiter in queue:
            queue.remove(waiter)
            if not queue:
                del self._waiting[tenant]
        else:
            self._inside[tenant] -= waiter.sequences
            if not self._inside[tenant]:
                del self._inside[tenant]
        self._moved.set()

    def _admit(self) -> None:
        free = self._free()
        while free > 0 and self._waiting:
            tenant = min(self._waiting, key=lambda one: self._inside.get(one, 0))
            queue = self._waiting[tenant]
            wanted, inside = queue[0].sequences, sum(self._inside.values())
            if inside and wanted > min(free, self.most - inside):
                return  # nobody passes it, or it would wait for ever
            waiter = queue.popleft()
            if not queue:
                del self._waiting[tenant]
            self._inside[tenant] = self._inside.get(tenant, 0) + wanted
            free -= wanted
            if not waiter.admitted.done():
                waiter.admitted.set_result(None)

    def _free(self) -> int:
        """Rows that nobody uses or waits for."""
        loop = self._loop
        if not loop.ready or loop.waiting:
            return 0
        return loop.engine.parts.batch_size - loop.running
