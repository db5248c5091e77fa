"""From a ticket to its answer, whole or as a stream; what differs between endpoints is a ``Shape``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Protocol

from fastapi import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from steeple.request import SpeculationStats
from steeple.serve.errors import ApiError
from steeple.serve.job import Job, Update
from steeple.serve.schemas import Generation
from steeple.serve.service import Service
from steeple.serve.sse import DONE, Disconnected, EventStream, event, unless_gone
from steeple.serve.ticket import Ticket

HUNG_UP = 499  # nobody reads it; it is for the log
METRICS: dict[str | bool, str | bool] = {"detailed": "detailed", "1": True, "true": True, True: True}
METRICS_HEADER = "x-steeple-metrics"


class Shape(Protocol):
    """How one endpoint writes what was generated."""

    def frame(self, choices: list[dict[str, Any]], *, stream: bool) -> dict[str, Any]:
        """The object around choices."""
        ...

    def opening(self, job: Job) -> dict[str, Any] | None:
        """The choice of the chunk that comes before the first text, if there is one."""
        ...

    def delta(self, job: Job, update: Update) -> dict[str, Any]:
        """The choice of a chunk."""
        ...

    def choice(self, job: Job, text: str, finish: str) -> dict[str, Any]:
        """A whole choice."""
        ...


async def reply(service: Service, http: HttpRequest, ticket: Ticket, shape: Shape, body: Generation) -> Response:
    """Run the ticket and answer, as one object or as a stream. ``ApiError`` if it fails before anything is sent."""
    wanted: str | bool = body.metrics or http.headers.get(METRICS_HEADER, "")
    metrics = METRICS.get(wanted)
    try:
        if not body.stream:
            return JSONResponse(await unless_gone(http.receive, whole(service, ticket, shape, metrics)))
        events = _events(service, ticket, shape, body, metrics)
        # The first news decide between an answer and an error with a status of its own.
        first = await unless_gone(http.receive, anext(events))
    except Disconnected:
        return Response(status_code=HUNG_UP)
    return EventStream(_chain(first, events), service.config.write_timeout)


async def whole(service: Service, ticket: Ticket, shape: Shape, metrics: str | bool | None) -> dict[str, Any]:
    """The answer as one object. Needs no HTTP. ``ApiError`` if the ticket fails."""
    texts: dict[int, tuple[Job, Update]] = {}
    with ticket:
        async for batch in ticket.updates():
            texts.update({job.index: (job, update) for job, update in batch})
    ended = [texts[index] for index in sorted(texts)]
    choices = [shape.choice(job, update.text, update.finish or "") for job, update in ended]
    answer = {**shape.frame(choices, stream=False), "usage": ticket.usage}
    if metrics:
        answer["metrics"] = speculation(service, ticket, detailed=metrics == "detailed")
    return answer


async def _events(
    service: Service, ticket: Ticket, shape: Shape, body: Generation, metrics: str | bool | None
) -> AsyncGenerator[bytes]:
    """The stream's pieces. Once it has begun, an error is an event of its own."""
    options = body.stream_options
    always = options is not None and options.continuous_usage_stats
    finally_ = options is not None and options.include_usage
    begun = False
    with ticket:
        try:
            async for batch in ticket.updates():
                opening = b""
                if not begun:
                    openings = [choice for job in ticket.jobs if (choice := shape.opening(job)) is not None]
                    opening = b"".join(event(_chunk(shape, [c], ticket, always, finally_)) for c in openings)
                begun = True
                shown = (shape.delta(job, update) for job, update in batch if _says(update))
                pieces = b"".join(event(_chunk(shape, [c], ticket, always, finally_)) for c in shown)
                if opening or pieces:
                    yield opening + pieces
        except ApiError as error:
            if not begun:
                raise
            yield event(error.body()) + DONE
            return
    yield _closing(service, ticket, shape, finally_, metrics) + DONE


def _says(update: Update) -> bool:
    return bool(update.text or update.logprobs or update.origins or update.last)


def _chunk(shape: Shape, choices: list[dict[str, Any]], ticket: Ticket, always: bool, finally_: bool) -> dict[str, Any]:
    chunk = shape.frame(choices, stream=True)
    if always:
        chunk["usage"] = ticket.usage
    elif finally_:
        chunk["usage"] = None
    return chunk


def _closing(service: Service, ticket: Ticket, shape: Shape, usage: bool, metrics: str | bool | None) -> bytes:
    """The chunk without choices, for those who asked for what it holds."""
    if not usage and not metrics:
        return b""
    chunk = shape.frame([], stream=True)
    if usage:
        chunk["usage"] = ticket.usage
    if metrics:
        chunk["metrics"] = speculation(service, ticket, detailed=metrics == "detailed")
    return event(chunk)


async def _chain(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    try:
        yield first
        async for piece in rest:
            yield piece
    finally:
        await rest.aclose()


def speculation(service: Service, ticket: Ticket, *, detailed: bool) -> dict[str, Any]:
    """What speculation did for a finished ticket, under vLLM's names.

    ``acceptance_histogram[j]``: verification steps that accepted exactly j tokens, of the steps that had a draft.
    """
    stats = SpeculationStats()
    steps = [one.accepted for job in ticket.jobs for one in job.rounds if one.drafted]
    for job in ticket.jobs:
        stats.merge(job.request.stats)
    histogram = [0] * (max(steps, default=-1) + 1)
    for accepted in steps:
        histogram[accepted] += 1
    found: dict[str, Any] = {
        "mean_acceptance_length": 1 + stats.accepted / len(steps) if steps else None,
        "draft_acceptance_rate": stats.accepted / stats.drafted if stats.drafted else None,
        "acceptance_histogram": histogram,
        "num_spec_steps": len(steps),
        "num_accepted_draft_tokens": stats.accepted,
        "num_draft_tokens": stats.drafted,
        "num_spec_tokens": service.loop.nodes,
    }
    if detailed:
        found["per_step_accepted"] = [[one.accepted for one in job.rounds if one.drafted] for job in ticket.jobs]
    return {"speculative_decoding": found}
