"""``/v1/completions``: prompts as text or token ids, with OpenAI's shapes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from steeple.request import TokenLogprob
from steeple.serve.auth import tenant_of
from steeple.serve.errors import wrong
from steeple.serve.job import Job, Update
from steeple.serve.reply import reply
from steeple.serve.schemas import CompletionRequest
from steeple.serve.service import Service
from steeple.serve.texts import Texts
from steeple.serve.ticket import Ticket, make_ticket

DEFAULT_TOKENS = 16  # OpenAI's
LEAST = -9999.0  # JSON has no infinity


class CompletionShape:
    """Args: id of the answer; model: its name; texts: for the names of tokens."""

    def __init__(self, id: str, model: str, texts: Texts) -> None:
        self._frame = {"id": id, "object": "text_completion", "created": int(time.time()), "model": model}
        self._texts = texts
        self._offsets: dict[int, int] = {}

    def frame(self, choices: list[dict[str, Any]], *, stream: bool) -> dict[str, Any]:
        """See ``Shape``."""
        del stream  # both look alike
        return {**self._frame, "choices": choices}

    def opening(self, job: Job) -> dict[str, Any] | None:
        """See ``Shape``."""
        del job
        return None

    def delta(self, job: Job, update: Update) -> dict[str, Any]:
        """See ``Shape``."""
        return {
            "index": job.index,
            "text": update.text,
            "logprobs": self._logprobs(job, update.logprobs) if update.logprobs else None,
            "finish_reason": update.finish,
            **origins(update),
        }

    def choice(self, job: Job, text: str, finish: str) -> dict[str, Any]:
        """See ``Shape``."""
        wanted = job.request.params.logprobs is not None
        return {
            "index": job.index,
            "text": text,
            "logprobs": self._logprobs(job, job.request.logprobs) if wanted else None,
            "finish_reason": finish,
        }

    def _logprobs(self, job: Job, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        names = [self._texts.token_text(token.token_id) for token in tokens]
        offset, offsets = self._offsets.get(job.index, 0), []
        for token in tokens:
            offsets.append(offset)
            offset += len(self._texts.token_bytes(token.token_id).decode(errors="ignore"))
        self._offsets[job.index] = offset
        values = [max(token.logprob, LEAST) for token in tokens]
        best = None
        if job.request.params.logprobs:
            best = [
                # What was drawn is among the best even if it is none of them.
                {name: value, **{self._texts.token_text(t): max(p, LEAST) for t, p in token.top}}
                for token, name, value in zip(tokens, names, values, strict=True)
            ]
        return {"tokens": names, "token_logprobs": values, "top_logprobs": best, "text_offset": offsets}


def origins(update: Update) -> dict[str, Any]:
    """How each token of a chunk came, for those who asked."""
    if not update.origins:
        return {}
    each = zip(update.tokens, update.pieces, update.origins, strict=True)
    return {"speculative": {"tokens": [{"id": t, "text": piece, "origin": how} for t, piece, how in each]}}


async def completion_ticket(service: Service, body: CompletionRequest, tenant: str) -> tuple[Ticket, CompletionShape]:
    """What a body asks for, ready to run; ``ApiError`` if it cannot be honoured. Needs no HTTP."""
    service.check_model(body.model)
    prompts = await _prompts(service, body)
    ticket = await make_ticket(
        service, "cmpl", body, prompts, tenant=tenant, default_tokens=DEFAULT_TOKENS, field="prompt"
    )
    return ticket, CompletionShape(ticket.id, service.config.name, service.texts)


async def _prompts(service: Service, body: CompletionRequest) -> list[list[int]]:
    given: list[Any] = [body.prompt] if isinstance(body.prompt, str) else list(body.prompt)
    if given and isinstance(given[0], int):
        given = [given]
    if not given:
        raise wrong("prompt", "prompt is empty; give text or token ids.")
    if len(given) > service.config.max_sequences:
        raise wrong("prompt", f"prompt: {len(given)} prompts; this server takes {service.config.max_sequences}.")
    return [await service.texts.encode(one) if isinstance(one, str) else one for one in given]


def completion_routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/completions", tags=["OpenAI"])
    async def completions(http: HttpRequest, body: CompletionRequest) -> Response:
        """Complete prompts."""
        ticket, shape = await completion_ticket(service, body, tenant_of(http))
        return await reply(service, http, ticket, shape, body)

    return router
