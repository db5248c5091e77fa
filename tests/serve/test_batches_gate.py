"""The gate of batches: behind everybody else, fair between tenants, never too many inside."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

from steeple.serve.batches.gate import POLL, Gate
from steeple.serve.loop import EngineLoop


class Visits:
    """A gate before an engine of 8 rows that does what it is told, and who is inside."""

    def __init__(self, most: int = 4) -> None:
        parts = SimpleNamespace(batch_size=8)
        self.engine = SimpleNamespace(ready=True, waiting=0, running=0, engine=SimpleNamespace(parts=parts))
        self.gate = Gate(cast(EngineLoop, cast(Any, self.engine)), most)
        self.inside: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        guard = asyncio.create_task(self.gate.run())
        try:
            yield
        finally:
            for task in (guard, *self.tasks.values()):
                task.cancel()
            await asyncio.gather(guard, *self.tasks.values(), return_exceptions=True)

    async def come(self, name: str, sequences: int = 1) -> None:
        """Comes to the gate; the tenant is the name's first letter."""
        self._ends[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._visit(name, sequences))
        await asyncio.sleep(0)

    async def _visit(self, name: str, sequences: int) -> None:
        async with self.gate.place(name[0], sequences):
            self.inside.append(name)
            try:
                await self._ends[name].wait()
            finally:
                self.inside.remove(name)

    async def go(self, name: str) -> None:
        self._ends[name].set()
        await self.tasks[name]

    async def settled(self) -> list[str]:
        for _ in range(8):
            await asyncio.sleep(POLL)
        return sorted(self.inside)


def test_no_more_than_so_many_are_inside() -> None:
    async def run() -> None:
        visits = Visits(most=2)
        async with visits.open():
            for name in ("a1", "a2", "a3"):
                await visits.come(name)
            assert await visits.settled() == ["a1", "a2"]
            await visits.go("a1")
            assert await visits.settled() == ["a2", "a3"]

    asyncio.run(run())


def test_whoever_waits_for_an_answer_is_first() -> None:
    async def run() -> None:
        visits = Visits()
        async with visits.open():
            for running, waiting, ready in ((8, 0, True), (3, 1, True), (0, 0, False)):
                vars(visits.engine).update(running=running, waiting=waiting, ready=ready)
                name = f"a{running}"
                await visits.come(name)
                assert await visits.settled() == []
            vars(visits.engine).update(running=6, waiting=0, ready=True)
            await visits.settled()
            assert visits.inside == ["a8", "a3", "a0"]

    asyncio.run(run())


def test_tenants_share() -> None:
    async def run() -> None:
        visits = Visits(most=2)
        async with visits.open():
            visits.engine.running = 8
            for name in ("a1", "a2", "a3", "b1"):
                await visits.come(name)
            assert await visits.settled() == []
            visits.engine.running = 0
            assert await visits.settled() == ["a1", "b1"]
            await visits.go("b1")
            assert await visits.settled() == ["a1", "a2"]

    asyncio.run(run())


def test_a_wide_request_goes_in_alone() -> None:
    async def run() -> None:
        visits = Visits(most=4)
        async with visits.open():
            await visits.come("a1")
            assert await visits.settled() == ["a1"]
            await visits.come("a2", 20)
            await visits.come("a3")
            assert await visits.settled() == ["a1"]  # nobody passes the wide one
            await visits.go("a1")
            assert await visits.settled() == ["a2"]
            await visits.go("a2")
            assert await visits.settled() == ["a3"]

    asyncio.run(run())


def test_who_gives_up_leaves_no_gap() -> None:
    async def run() -> None:
        visits = Visits(most=1)
        async with visits.open():
            for name in ("a1", "a2", "a3"):
                await visits.come(name)
            assert await visits.settled() == ["a1"]
            visits.tasks["a2"].cancel()  # while it waits
            visits.tasks["a1"].cancel()  # while it is inside
            assert await visits.settled() == ["a3"]
            await visits.go("a3")
            await visits.come("a4")
            assert await visits.settled() == ["a4"]

    asyncio.run(run())
