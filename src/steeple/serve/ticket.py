"""The sequences of one HTTP request: made, handed to the engine, waited for, cancelled."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from types import TracebackType

from steeple.errors import RequestError
from steeple.ops.rng import derive_seed
from steeple.request import Constraint, Request
from steeple.serve.constraint import LeastLength, LogitBias, combined
from steeple.serve.errors import ApiError, wrong
from steeple.serve.grammar import ANY_OBJECT
from steeple.serve.job import Job, Update
from steeple.serve.schemas import Generation
from steeple.serve.service import Service
from steeple.types import SamplingParams


class Ticket:
    """Use as a context manager: it submits its jobs, and whatever has not finished at its end is cancelled.

    ``ApiError`` 429 or 503 if they are not taken.
    """

    def __init__(self, service: Service, id: str, prompts: Sequence[Sequence[int]]) -> None:
        self.id = id
        self.prompts = prompts
        self.jobs: list[Job] = []
        self._service = service
        self._news: asyncio.Queue[tuple[Job, Update]] = asyncio.Queue()
        self._open = 0

    def __enter__(self) -> Ticket:
        self._service.loop.submit(self.jobs)
        self._open = len(self.jobs)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open:
            self._open = 0
            self._service.loop.cancel(self.jobs)

    def deliver(self, job: Job, update: Update) -> None:
        """News from the engine, in the thread of the event loop."""
        self._news.put_nowait((job, update))

    async def updates(self) -> AsyncIterator[list[tuple[Job, Update]]]:
        """News as they come, all that are there at once, until every job has had its last. ``ApiError`` if one fails.

        An error of one sequence ends them all.
        """
        while self._open:
            batch = [await self._news.get()]
            while not self._news.empty():
                batch.append(self._news.get_nowait())
            self._open -= sum(update.last for _, update in batch)
            failed = next((i for i, (_, update) in enumerate(batch) if update.error is not None), len(batch))
            if failed:
                yield batch[:failed]  # what came before an error is still told
            if failed < len(batch):
                error = batch[failed][1].error
                assert error is not None  # it was just looked for
                raise error

    @property
    def usage(self) -> dict[str, int]:
        """Tokens read and written so far."""
        prompt = sum(map(len, self.prompts))
        completion = sum(job.written for job in self.jobs)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def make_ticket(
    service: Service,
    kind: str,
    body: Generation,
    prompts: Sequence[Sequence[int]],
    *,
    tenant: str,
    default_tokens: int | None,
    field: str,
) -> Ticket:
    """The jobs that ``body`` asks for: ``n`` per prompt, with the seeds that the offline API would give them.

    Args:
        kind: what ids begin with.
        default_tokens: tokens to write if ``body`` does not say; None = what the context leaves.
        field: where the prompts came from, for errors.

    Raises ``ApiError`` 400 for whatever cannot be honoured.
    """
    count = len(prompts) * body.n
    if count > service.config.max_sequences:
        most = service.config.max_sequences
        raise wrong("n", f"{len(prompts)} prompts with n = {body.n} are {count} sequences; this server takes {most}.")
    lengths = [_length(service, body, prompt, default_tokens, field) for prompt in prompts]
    nodes, drafter = _speculation(service, body)
    constraints = await _constraints(service, body, count)
    ticket = Ticket(service, f"{kind}-{secrets.token_hex(12)}", prompts)
    loop = asyncio.get_running_loop()
    for place, prompt in enumerate(prompts):
        params = _params(body, lengths[place])
        base = secrets.randbits(63) if params.seed is None else params.seed
        for choice in range(body.n):
            index = place * body.n + choice
            own = replace(params, seed=derive_seed(base, choice))
            request = Request(f"{ticket.id}-{index}", prompt, own)
            request.constraint = constraints[index]
            job = Job(request, index, tenant, loop, ticket.deliver, body.stream, body.speculative.origins)
            job.nodes, job.drafter = nodes, drafter
            limits = [limit for limit in (service.config.timeout, body.timeout) if limit]
            job.deadline = request.arrived + min(limits) if limits else None
            ticket.jobs.append(job)
    return ticket


def _length(service: Service, body: Generation, prompt: Sequence[int], default_tokens: int | None, field: str) -> int:
    """Tokens that a prompt's completions may have."""
    asked, context = body.most_tokens, service.context
    if not prompt:
        raise wrong(field, f"{field} is empty; give at least one token.")
    service.texts.check(prompt, field)
    room = context - len(prompt)
    wanted = asked if asked is not None else default_tokens
    if room < 1 or (asked is not None and asked > room):
        raise wrong(
            field,
            f"{field} has {len(prompt)} tokens and {max(asked or 1, 1)} are to be written, but this server has room "
            f"for {context} in all; shorten it or lower max_tokens.",
            "context_length_exceeded",
        )
    most = service.config.max_new_tokens
    if most and asked is not None and asked > most:
        raise wrong("max_tokens", f"max_tokens = {asked}, but this server writes at most {most} for a request.")
    return min(room, most or room, room if wanted is None else wanted)


def _params(body: Generation, max_tokens: int) -> SamplingParams:
    try:
        return SamplingParams(
            temperature=body.temperature,
            top_k=max(body.top_k, 0),
            top_p=body.top_p,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            seed=body.seed,
            max_tokens=max_tokens,
            stop=body.stops,
            stop_token_ids=tuple(body.stop_token_ids),
            ignore_eos=body.ignore_eos,
            logprobs=body.top,
        )
    except RequestError as error:
        raise ApiError(400, str(error)) from error


def _speculation(service: Service, body: Generation) -> tuple[int | None, str]:
    """Most nodes per round (None = the server's), and the name the statistics go under."""
    asked = body.speculative
    served = service.config.drafter_name if service.loop.nodes else service.no_drafter
    if asked.drafter not in (None, served, service.no_drafter):
        raise wrong(
            "speculative.drafter",
            f"speculative.drafter: this server drafts with {served!r}; give that or {service.no_drafter!r}.",
        )
    if asked.k is not None and asked.k > service.loop.nodes:
        raise wrong("speculative.k", f"speculative.k = {asked.k}, but this server drafts at most {service.loop.nodes}.")
    if asked.drafter == service.no_drafter or asked.k == 0:
        return 0, service.no_drafter
    return asked.k, served


async def _constraints(service: Service, body: Generation, count: int) -> list[Constraint | None]:
    """What shapes each sequence. Biases are shared; a grammar has a state, so each has its own."""
    shared: list[Constraint] = []
    if body.logit_bias:
        shared.append(LogitBias(_biases(service, body)))
    if body.min_tokens:
        if body.most_tokens is not None and body.min_tokens > body.most_tokens:
            raise wrong("min_tokens", "min_tokens is greater than max_tokens; lower it.")
        shared.append(LeastLength(body.min_tokens))
    if not body.constrained or body.response_format is None:
        return [combined(shared)] * count
    wanted = body.response_format.json_schema
    schema, strict = (ANY_OBJECT, False) if wanted is None else (wanted.schema_, wanted.strict)
    grammars = await service.grammars.grammars(schema, count, strict=strict)
    return [combined([*shared, grammar]) for grammar in grammars]


def _biases(service: Service, body: Generation) -> dict[int, float]:
    found = {}
    for key, value in body.logit_bias.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < service.texts.vocab):
            raise wrong("logit_bias", f"logit_bias: {key[:20]!r} is no token id; give 0..{service.texts.vocab - 1}.")
        if not -100.0 <= value <= 100.0:
            raise wrong("logit_bias", f"logit_bias: the bias of token {key} is outside -100..100.")
        found[int(key)] = value
    return found
