"""The open loop: every request is started when the schedule says, whatever became of those before it.

A generator that waits for answers before it sends again slows down with the server and so leaves out the requests that
would have waited (coordinated omission). Here a request's clock starts at its intended time. A limit on requests in
flight is a queue on this side, first come first served, and the wait in it belongs to the latency.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from steeple.bench.serve.client import Server, Serving
from steeple.bench.serve.record import Record
from steeple.bench.serve.workload import Call


@dataclass(frozen=True, slots=True)
class Drive:
    """What happened at one point: a record per call, in the order of the schedule. ``start``: the clock's time 0."""

    start: float
    records: list[Record]

    @property
    def duration(self) -> float:
        """Seconds from the start until the last request was over."""
        return max(record.ended for record in self.records) - self.start


async def drive(
    server: Server, serving: Serving, calls: Sequence[Call], limit: int, ended: Callable[[int], None]
) -> Drive:
    """Send ``calls`` (sorted by time), at most ``limit`` of them in flight (0: all). Every call comes back as a record.

    Args: ended: told after every end how many requests are over.
    """
    loop = asyncio.get_running_loop()
    places = asyncio.Semaphore(limit) if limit else contextlib.nullcontext()
    start = loop.time()
    records: list[Record] = []
    over = 0

    async def one(call: Call, record: Record) -> None:
        nonlocal over
        async with places:
            await server.complete(serving, call, record)
        over += 1
        ended(over)

    async with asyncio.TaskGroup() as group:
        for call in calls:
            due = start + call.at
            if (wait := due - loop.time()) > 0:
                await asyncio.sleep(wait)
            record = Record(call.index, due, dispatched=loop.time())
            records.append(record)
            group.create_task(one(call, record))
    return Drive(start, records)
