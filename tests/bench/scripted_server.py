"""A server that answers by a script, and an event loop whose clock jumps: seconds are exact and cost nothing."""

from __future__ import annotations

import asyncio
import json
import selectors
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

DONE = b"data: [DONE]\n\n"


class _Jumping(selectors.DefaultSelector):
    """Where others would sleep this one moves the clock."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("everybody waits for somebody else")
        self.now += max(timeout, 0.0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Starts at 0 s. Times that are sums of powers of two are exact."""

    def __init__(self) -> None:
        self.selector = _Jumping()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.now


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def text(piece: str = "x", finish: str | None = None, count: int | None = None) -> bytes:
    """A chunk of a completion; ``count``: tokens so far, as with continuous usage."""
    value: dict[str, Any] = {"choices": [{"index": 0, "text": piece, "finish_reason": finish}]}
    if count is not None:
        value["usage"] = {"prompt_tokens": 5, "completion_tokens": count}
    return event(value)


def usage(written: int, read: int = 5, speculation: dict[str, Any] | None = None) -> bytes:
    value: dict[str, Any] = {"choices": [], "usage": {"prompt_tokens": read, "completion_tokens": written}}
    return event(value | ({"metrics": {"speculative_decoding": speculation}} if speculation else {}))


Step = tuple[float, bytes | Exception]


@dataclass
class Answer:
    """Seconds to wait before the status, then pieces, each after its own wait; an exception breaks the connection."""

    steps: Sequence[Step] = ()
    status: int = 200
    wait: float = 0.0
    body: bytes = b""


def answer(*waits: float, speculation: dict[str, Any] | None = None) -> Answer:
    """A whole answer: a token after each wait, the last with the reason, then usage and the end."""
    chunks = [(wait, text(finish="length" if i + 1 == len(waits) else None)) for i, wait in enumerate(waits)]
    return Answer([*chunks, (0.0, usage(len(waits), speculation=speculation) + DONE)])


class _Stream(httpx.AsyncByteStream):
    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for wait, piece in self._steps:
            await asyncio.sleep(wait)
            if isinstance(piece, Exception):
                raise piece
            yield piece


@dataclass
class Scripted(httpx.AsyncBaseTransport):
    """Args: script: from the number of a request to its answer; an exception refuses the connection.

    ``pages``: what other paths say, 404 for those that are not there; a function is called at every visit.
    """

    script: Callable[[int], Answer | Exception]
    pages: dict[str, Any] = field(
        default_factory=lambda: {"/v1/models": {"data": [{"id": "fake", "owned_by": "nobody"}]}}
    )
    asked: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    headers: list[httpx.Headers] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        self.paths.append(path)
        self.headers.append(request.headers)
        body = await request.aread()
        if not path.endswith("/completions"):
            page = self.pages.get(path)
            page = page(json.loads(body or b"null")) if callable(page) else page
            if isinstance(page, httpx.Response):
                return page
            if isinstance(page, str):
                return httpx.Response(200, text=page)
            return httpx.Response(404) if page is None else httpx.Response(200, json=page)
        number = len(self.asked)
        self.asked.append(json.loads(body))
        self.times.append(asyncio.get_running_loop().time())
        found = self.script(number)
        if isinstance(found, Exception):
            raise found
        await asyncio.sleep(found.wait)
        if found.status != 200:
            return httpx.Response(found.status, content=found.body)
        return httpx.Response(200, stream=_Stream(found.steps), headers={"content-type": "text/event-stream"})
