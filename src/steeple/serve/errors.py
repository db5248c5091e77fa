"""Errors as OpenAI's clients expect them: a status and ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from steeple.errors import SteepleError

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
}
CLIENT, SERVER = "invalid_request_error", "server_error"


class ApiError(SteepleError):
    """What a client is answered instead of a completion. ``param`` names the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = TYPES.get(self.status, CLIENT if self.status < 500 else SERVER)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The answer itself."""
        return Response(encoded(self.body()), self.status, self.headers, "application/json")


def encoded(value: Any) -> bytes:
    """JSON in ASCII: a message may quote half a surrogate pair, which UTF-8 has no bytes for."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def wrong(param: str, message: str, code: str | None = None) -> ApiError:
    """A field that cannot be honoured."""
    return ApiError(400, message, param=param, code=code)


async def on_api_error(_request: Request, error: Exception) -> Response:
    """For FastAPI's ``add_exception_handler``."""
    assert isinstance(error, ApiError)  # it is registered for these
    return error.response()


async def on_http_error(_request: Request, error: Exception) -> Response:
    """Unknown paths, wrong methods, unreadable bodies."""
    assert isinstance(error, HTTPException)  # it is registered for these
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


async def on_invalid(_request: Request, error: Exception) -> Response:
    """The first thing that is wrong with a body, by the name of its field."""
    assert isinstance(error, RequestValidationError)  # it is registered for these
    return from_validation(error.errors()).response()


def from_validation(errors: Sequence[Any]) -> ApiError:
    """Pydantic's findings as one error. Values are not quoted: they may be long, or secret."""
    first = errors[0]
    context = first.get("ctx") or {}
    loc = list(first["loc"])
    place = loc[1:] if loc and loc[0] in ("body", "query", "path") else loc
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {context.get('error', 'it ends too early')}.", code="invalid_json")
    param = context.get("param") or _path(place)
    text = str(first["msg"]).removeprefix("Value error, ")
    if not param:
        return ApiError(400, f"the body is wrong: {text}. Send a JSON object with Content-Type: application/json.")
    return wrong(param, text if "param" in context else f"{param}: {text}.")


def _path(place: Sequence[str | int]) -> str | None:
    """``["messages", 0, "role"]`` -> ``messages[0].role``."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or None
