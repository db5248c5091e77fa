"""One request of a batch, through the same code as its endpoint, and its line in the output."""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from steeple.jobs.batch_api import CHAT, COMPLETIONS
from steeple.serve.chat import chat_ticket
from steeple.serve.completions import completion_ticket
from steeple.serve.errors import encoded, from_validation, wrong
from steeple.serve.reply import METRICS, Shape, whole
from steeple.serve.schemas import ChatRequest, CompletionRequest, Generation
from steeple.serve.service import Service
from steeple.serve.ticket import Ticket

Made = Awaitable[tuple[Ticket, Shape]]
FORMS: dict[str, tuple[type[Generation], Callable[[Service, Any, str], Made]]] = {
    COMPLETIONS: (CompletionRequest, completion_ticket),
    CHAT: (ChatRequest, chat_ticket),
}
ENDS = {
    "batch_expired": "the completion window was over before this request was run.",
    "batch_cancelled": "the batch was cancelled before this request was run.",
}


@dataclass(frozen=True, slots=True)
class Work:
    """A request that is in order and ready to run, once."""

    service: Service
    ticket: Ticket
    shape: Shape
    metrics: str | bool | None
    timeout: float | None

    @property
    def sequences(self) -> int:
        """How many the engine gets."""
        return len(self.ticket.jobs)

    async def run(self) -> dict[str, Any]:
        """The answer's body. ``ApiError`` if it fails or is not taken."""
        now = time.perf_counter()
        for job in self.ticket.jobs:
            job.request.arrived = now  # it has waited for its turn, which is no latency
            job.deadline = None if self.timeout is None else now + self.timeout
        return await whole(self.service, self.ticket, self.shape, self.metrics)


async def prepare(service: Service, endpoint: str, body: Any, tenant: str) -> Work:
    """What HTTP would do with ``body`` at ``endpoint``; ``ApiError`` with what it would answer to a bad one.

    The server's own time limit, which protects whoever waits for an answer, does not count.
    """
    form, make = FORMS[endpoint]
    try:
        parsed = form.model_validate(body)
    except ValidationError as error:
        raise from_validation(error.errors()) from None
    if parsed.stream:
        raise wrong("stream", "stream is not for batches; leave it out.")
    ticket, shape = await make(service, parsed, tenant)
    return Work(service, ticket, shape, METRICS.get(parsed.metrics), parsed.timeout)


def answered(custom_id: str, status: int, body: dict[str, Any]) -> str:
    """The line of a request that got an answer."""
    response = {"status_code": status, "request_id": f"req_{secrets.token_hex(12)}", "body": body}
    return _line(custom_id, response, None)


def not_run(custom_id: str, code: str) -> str:
    """The line of a request that was not run. Args: code: a key of ``ENDS``."""
    return _line(custom_id, None, {"code": code, "message": ENDS[code]})


def _line(custom_id: str, response: dict[str, Any] | None, error: dict[str, Any] | None) -> str:
    id = f"batch_req_{secrets.token_hex(12)}"
    return encoded({"id": id, "custom_id": custom_id, "response": response, "error": error}).decode()
