"""Around every request: its log line, its key, and bounds on how much it may send and for how long."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steeple.serve.auth import OPEN, TENANT, Keys
from steeple.serve.errors import ApiError

log = logging.getLogger(__name__)

BODY_SECONDS = 60.0  # until a body must be there
SLOWEST = 1e6  # bytes a second of what a body may be larger than usual


class Watch:
    """A line in the log for every request, an id in every answer, and an answer even where the server is at fault.

    Neither bodies nor headers nor what follows a ? are logged.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, name = time.perf_counter(), 0, secrets.token_hex(8)

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            log.error("%s %s failed", scope["method"], _shown(scope), exc_info=error, extra={"request": name})
            if not status:
                answer = ApiError(500, "the server failed; its log says more.", code="internal_error").response()
                await answer(scope, receive, watched)
        finally:
            seconds = time.perf_counter() - begun
            facts = {"request": name, "status": status, "seconds": round(seconds, 4), "tenant": scope.get(TENANT, "")}
            level = logging.DEBUG if scope["path"] in OPEN else logging.INFO
            log.log(level, "%s %s %d %.3f s", scope["method"], _shown(scope), status, seconds, extra=facts)


def _shown(scope: Scope) -> str:
    """The path without control characters, so that nobody writes lines of their own into the log."""
    return ascii(scope["path"][:200])[1:-1]


class Gate:
    """Lets in who has a key. Args: keys: none of them lets in everybody."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["path"] not in OPEN and scope["method"] != "OPTIONS":
            try:
                scope[TENANT] = self._keys.tenant(scope["headers"])
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Bounds:
    """Bounds on a body. Args: most: bytes; larger: path -> bytes, for paths that take more."""

    def __init__(self, app: ASGIApp, most: int, larger: dict[str, int] | None = None) -> None:
        self._app, self._most, self._larger = app, most, larger or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = self._larger.get(scope["path"], self._most)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > most:
            await _too_large(most).response()(scope, receive, send)
            return
        seconds = BODY_SECONDS + max(0, most - self._most) / SLOWEST
        taken, until = 0, time.monotonic() + seconds
        whole = False

        async def bounded() -> Message:
            nonlocal taken, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, f"the body did not come within {seconds:.0f} s.") from error
            taken += len(message.get("body", b""))
            if taken > most:
                raise HTTPException(413, _too_large(most).message)
            whole = not message.get("more_body", False)
            return message

        await self._app(scope, bounded, send)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes; send less.", code="request_too_large")
