"""The engine: the step of law 2 - draft, forward, verify, commit - and nothing else.

It takes token ids and gives token ids (and text where a request streams or has stop strings); people, files and HTTP
live above it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from steeple.cache.batch import Span, make_batch
from steeple.cache.paged import PagedCache
from steeple.draft.base import Drafter
from steeple.engine.judge import Judge, Judgement
from steeple.engine.output import TextStream
from steeple.engine.scheduler import Scheduler, Work
from steeple.engine.stats import EngineStats
from steeple.errors import InternalError, RequestError
from steeple.model.decoder import Decoder
from steeple.model.run import Runner
from steeple.ops.attention import PagedAttention
from steeple.request import FinishReason, Request
from steeple.types import Batch, Draft, concat_drafts


@dataclass(frozen=True, slots=True)
class Committed:
    """What a step wrote for one request. ``text`` is there for requests that stream or have stop strings."""

    request: Request
    tokens: tuple[int, ...]
    text: TextStream | None


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine runs on; ``steeple.engine.build`` makes it."""

    decoder: Decoder
    cache: PagedCache
    attention: PagedAttention
    drafter: Drafter | None
    tokenizer: Any
    batch_size: int
    step_tokens: int
    max_context: int


class Engine:
    """Runs requests to their end, a step at a time. One thread calls ``add``, ``step`` and ``abort``.

    ``budget`` says how many nodes a request may draft in the next round, at most ``drafter.needs.nodes``. It may be
    replaced between steps; it must look at the past only, never at tokens drawn but not yet judged.
    """

    def __init__(self, parts: EngineParts) -> None:
        self.parts = parts
        self.cache = parts.cache
        self.drafter = parts.drafter
        self.stats = EngineStats()
        self._most_nodes = parts.drafter.needs.nodes if parts.drafter is not None else 0
        self.budget: Callable[[Request], int] = lambda _request: self._most_nodes
        self._runner = Runner(parts.decoder, parts.cache, parts.attention)
        self._judge = Judge(self._runner)
        self._keep = parts.drafter.needs.hidden if parts.drafter is not None else ()
        self._eos = frozenset(parts.decoder.config.eos_token_ids)
        self._texts: dict[str, TextStream] = {}
        self._requests: dict[str, Request] = {}
        self.scheduler = Scheduler(
            parts.cache, batch_size=parts.batch_size, step_tokens=parts.step_tokens, forget=self._forget
        )

    def add(self, request: Request, *, stream: bool = False) -> None:
        """Queue a request. ``RequestError`` or ``CapacityError`` if it cannot be served; nothing else is touched."""
        limit = self.parts.max_context
        if request.id in self._requests:
            raise RequestError(f"request id {request.id!r} is in use; give every request an id of its own.")
        if request.prompt_len == 0:
            raise RequestError(f"request {request.id}: the prompt is empty; give at least one token.")
        if request.prompt_len >= limit:
            raise RequestError(
                f"request {request.id}: the prompt has {request.prompt_len} tokens and leaves no room to write in a "
                f"context of {limit}; shorten it to {limit - 1} tokens or fewer."
            )
        vocab = self.parts.decoder.config.vocab_size
        if not 0 <= int(request.tokens.min()) <= int(request.tokens.max()) < vocab:
            raise RequestError(f"request {request.id}: the prompt holds token ids outside 0..{vocab - 1}.")
        request.limit = min(request.prompt_len + request.params.max_tokens, limit)
        self.scheduler.add(request)
        self._requests[request.id] = request
        if stream or request.params.stop:
            self._texts[request.id] = TextStream(self.parts.tokenizer, request.params.stop)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED, error: str | None = None) -> None:
        """End a request at once; what it has written stays with it. An id that is not running is ignored."""
        request = self._requests.get(request_id)
        if request is not None:
            request.finish(reason, error)
            self._leave(request)

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    def step(self) -> list[Committed]:
        """One step for all requests that fit. Returns what it wrote; finished requests have left the engine.

        An error leaves all requests as they were before the step: pending keys are not counted, texts untouched.
        """
        started = time.perf_counter()
        plan = self.scheduler.next(self.budget)
        if not plan:
            if not self.idle:
                raise InternalError("requests wait, but none of them can run")
            return []
        fresh = [w.request.ready for w in plan]
        draft_start = time.perf_counter()
        draft = self._propose(plan, fresh)
        draft_end = time.perf_counter()
        batch = make_batch(
            [self._span(work) for work in plan], draft, self.cache.block_size, self._runner.decoder.device
        )
        forward_start = time.perf_counter()
        hidden = self._runner.forward(batch, keep=self._keep)
        forward_end = time.perf_counter()
        places = [b for b, work in enumerate(plan) if work.samples]
        judgement = self._judge.judge(batch, [plan[b].request for b in places], places, draft, hidden)
        kept: list[list[int]] = [[] for _ in plan]
        for place, nodes in zip(places, judgement.kept, strict=True):
            kept[place] = nodes
        out = self._commit(plan, batch, fresh, places, judgement, kept)
        if self.drafter is not None:
            self.drafter.observe([w.request for w in plan], batch, kept, hidden)
        for work in plan:
            if work.request.finished:
                self._leave(work.request)
            else:
                work.request.check()
        self.stats.time(all(fresh), time.perf_counter() - started, draft_end - draft_start, forward_end - forward_start)
        return out

    def _propose(self, plan: Sequence[Work], fresh: Sequence[bool]) -> Draft:
        """The forest over the plan; requests still reading their prompt have no nodes."""
        wanting = [b for b, ready in enumerate(fresh) if ready]
        if self.drafter is None or not any(plan[b].nodes for b in wanting):
            return Draft.empty(len(plan), self._runner.decoder.device)
        part = self.drafter.propose([plan[b].request for b in wanting], [plan[b].nodes for b in wanting])
        return concat_drafts([(wanting, part)], len(plan))

    def _span(self, work: Work) -> Span:
        request = work.request
        tokens = request.tokens[request.cached : work.stop]
        return Span(request.id, request.cached, tokens, self.cache.table(request.id))

    def _commit(
        self,
        plan: Sequence[Work],
        batch: Batch,
        fresh: Sequence[bool],
        places: Sequence[int],
        judgement: Judgement,
        kept: Sequence[Sequence[int]],
    ) -> list[Committed]:
        """Append the verdict to the texts, then let the cache keep the accepted paths."""
        shapes = _draft_shapes(batch)
        out = []
        for work in plan:
            self.stats.prompt_tokens += work.stop - work.request.cached - (1 if work.samples else 0)
            work.request.cached = work.stop
        for place, tokens, logprobs in zip(places, judgement.tokens, judgement.logprobs, strict=True):
            request = plan[place].request
            written = self._write(request, tokens)
            request.logprobs.extend(logprobs[: len(written)])
            request.cached += len(kept[place])
            if fresh[place]:
                depth, nodes = shapes[place]
                request.stats.record(depth, nodes, min(len(kept[place]), len(written)))
                request.stats.committed += len(written)
            self.stats.committed += len(written)
            out.append(Committed(request, tuple(written), self._texts.get(request.id)))
        self.cache.commit(batch, kept, [w.request.tokens for w in plan])
        return out

    def _write(self, request: Request, tokens: Sequence[int]) -> list[int]:
        """Append tokens until one of them ends the request; the rest of the verdict is dropped."""
        params = request.params
        text = self._texts.get(request.id)
        written: list[int] = []
        for token in tokens:
            written.append(token)
            ends = (token in self._eos and not params.ignore_eos) or token in params.stop_token_ids
            if text is not None and not ends and text.push(token):
                ends = True
            if ends:
                request.finish(FinishReason.STOP)
            elif len(request) + len(written) >= request.limit:
                request.finish(FinishReason.LENGTH)
            if request.finished:
                break
        request.append(written)
        if request.first_token_at is None:
            request.first_token_at = time.perf_counter()
        return written

    def _leave(self, request: Request) -> None:
        self.scheduler.remove(request)
        self._requests.pop(request.id, None)
        self._texts.pop(request.id, None)
        self.stats.speculation.merge(request.stats)
        self.stats.preemptions += request.preemptions

    def _forget(self, request: Request) -> None:
        if self.drafter is not None:
            self.drafter.forget(request)

    def check_integrity(self) -> None:
        """When idle: no block is held, no drafter remembers a request. Raises ``InternalError`` otherwise."""
        if not self.idle:
            raise InternalError("check_integrity is for an idle engine; requests are still running")
        self.cache.check_integrity(idle=True)
        if self.drafter is not None:
            self.drafter.check_integrity()


def _draft_shapes(batch: Batch) -> list[tuple[int, int]]:
    """Depth and number of nodes of each request's draft."""
    layout = batch.layout
    ends, first, text = layout.cu_rows[1:].tolist(), layout.node_row.tolist(), layout.text_len.tolist()
    positions = layout.positions.numpy()
    shapes = []
    for end, start, length in zip(ends, first, text, strict=True):
        shapes.append((int(positions[start:end].max()) - length + 1 if end > start else 0, end - start))
    return shapes
