"""Server-sent events: a response that is written as it comes about, and that ends at once when its reader is gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


class Disconnected(Exception):
    """The client has hung up; there is nobody to answer."""


def event(value: Any) -> bytes:
    """One event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``; it is cancelled, and ``Disconnected`` raised, if the client hangs up before."""
    own = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait({own, gone}, return_when=asyncio.FIRST_COMPLETED)
        if own.done():
            return own.result()
        raise Disconnected
    finally:
        for task in (own, gone):
            task.cancel()
        await asyncio.gather(own, gone, return_exceptions=True)


class EventStream(Response):
    """Args: events: closed in any case, so that what it holds is let go of; write_timeout: seconds that the client may
    take for a piece before it counts as gone.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], write_timeout: float) -> None:
        super().__init__(None, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._timeout = events, write_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the events end or the client is gone."""
        del scope
        async with contextlib.aclosing(self._events):
            with contextlib.suppress(Disconnected, TimeoutError):
                await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for piece in self._events:
            async with asyncio.timeout(self._timeout):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
