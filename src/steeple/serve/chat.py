"""``/v1/chat/completions``: conversations, through the model's own chat template or a plain one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from steeple.request import TokenLogprob
from steeple.serve.auth import tenant_of
from steeple.serve.completions import LEAST, origins
from steeple.serve.job import Job, Update
from steeple.serve.reply import reply
from steeple.serve.schemas import ChatRequest
from steeple.serve.service import Service
from steeple.serve.texts import Texts
from steeple.serve.ticket import Ticket, make_ticket


class ChatShape:
    """Args: id of the answer; model: its name; texts: for the names of tokens."""

    def __init__(self, id: str, model: str, texts: Texts) -> None:
        self._id, self._created, self._model = id, int(time.time()), model
        self._texts = texts

    def frame(self, choices: list[dict[str, Any]], *, stream: bool) -> dict[str, Any]:
        """See ``Shape``."""
        kind = "chat.completion.chunk" if stream else "chat.completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def opening(self, job: Job) -> dict[str, Any] | None:
        """See ``Shape``."""
        delta = {"role": "assistant", "content": ""}
        return {"index": job.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, job: Job, update: Update) -> dict[str, Any]:
        """See ``Shape``."""
        return {
            "index": job.index,
            "delta": {"content": update.text} if update.text or not update.last else {},
            "logprobs": self._logprobs(update.logprobs) if update.logprobs else None,
            "finish_reason": update.finish,
            **origins(update),
        }

    def choice(self, job: Job, text: str, finish: str) -> dict[str, Any]:
        """See ``Shape``."""
        wanted = job.request.params.logprobs is not None
        return {
            "index": job.index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(job.request.logprobs) if wanted else None,
            "finish_reason": finish,
        }

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = [
            {**self._token(token.token_id, token.logprob), "top_logprobs": [self._token(t, p) for t, p in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._texts.token_bytes(token)
        return {"token": self._texts.token_text(token), "logprob": max(logprob, LEAST), "bytes": list(raw)}


async def chat_ticket(service: Service, body: ChatRequest, tenant: str) -> tuple[Ticket, ChatShape]:
    """What a body asks for, ready to run; ``ApiError`` if it cannot be honoured. Needs no HTTP."""
    service.check_model(body.model)
    prompt = await service.texts.chat(body.messages)
    ticket = await make_ticket(
        service, "chatcmpl", body, [prompt], tenant=tenant, default_tokens=None, field="messages"
    )
    return ticket, ChatShape(ticket.id, service.config.name, service.texts)


def chat_routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/chat/completions", tags=["OpenAI"])
    async def chat(http: HttpRequest, body: ChatRequest) -> Response:
        """Continue a conversation."""
        ticket, shape = await chat_ticket(service, body, tenant_of(http))
        return await reply(service, http, ticket, shape, body)

    return router
