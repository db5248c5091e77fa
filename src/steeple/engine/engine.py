"""The engine: the step of law 2 - draft, forward, verify, commit - and nothing else.

It takes token ids and gives token ids (and text where a request streams or has stop strings); people, files and HTTP
live above it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from steeple.cache.batch import BatchMaker
from steeple.cache.paged import PagedCache
from steeple.draft.base import DecidesLengths, Drafter, Lengths
from steeple.engine.judge import Judge, Judgement
from steeple.engine.length import GoodputLengths
from steeple.engine.memory import MemoryPlan, MemoryReport, started
from steeple.engine.output import TextStream
from steeple.engine.scheduler import Scheduler, Work
from steeple.engine.stats import EngineStats
from steeple.errors import InternalError, RequestError
from steeple.model.accelerate import accelerate
from steeple.model.decoder import Decoder, Hidden
from steeple.model.run import Runner
from steeple.ops.attention import PagedAttention
from steeple.request import FinishReason, Request
from steeple.types import Batch, Draft, concat_drafts


class Committed(NamedTuple):
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
    graphs: bool = False
    plan: MemoryPlan | None = None


class Drafted(NamedTuple):
    """A step after its first phase: who runs, what is proposed for them, and the seconds that took."""

    plan: list[Work]
    requests: list[Request]
    draft: Draft
    seconds: float


class Judged(NamedTuple):
    """A step after its second phase. ``judgement`` is of the requests at ``places``, ``kept`` of all of the plan;
    ``seconds`` are those of the forward."""

    batch: Batch
    hidden: Hidden
    places: list[int]
    judgement: Judgement
    kept: Sequence[Sequence[int]]
    seconds: float


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
        if parts.plan is not None:
            self._most_nodes = min(self._most_nodes, parts.plan.load.nodes)
        self.budget: Callable[[Request], int] = lambda _request: self._most_nodes
        self._lengths: Lengths | None = None
        if parts.drafter is not None and parts.drafter.needs.adaptive:
            self._lengths = self.budget = GoodputLengths(self._most_nodes)
        elif isinstance(parts.drafter, DecidesLengths):
            self._lengths = self.budget = parts.drafter.lengths
        self._runner = Runner(parts.decoder, parts.cache, parts.attention)
        accelerate(self._runner, graphs=parts.graphs)
        self._judge = Judge(self._runner, parts.plan.load.portion if parts.plan is not None else 0)
        self.memory: MemoryReport | None = None
        if parts.plan is not None:
            self.memory = started(parts.plan, self._runner, parts.drafter)
        self._maker = BatchMaker(parts.cache.block_size, parts.decoder.device)
        self._none = Draft.empty(0)
        self._keep = parts.drafter.needs.hidden if parts.drafter is not None else ()
        self._scores = parts.drafter is not None and parts.drafter.needs.scores
        self._eos = frozenset(parts.decoder.config.eos_token_ids)
        self._texts: dict[str, TextStream] = {}
        self._requests: dict[str, Request] = {}
        self.scheduler = Scheduler(
            parts.cache,
            batch_size=parts.batch_size,
            step_tokens=parts.step_tokens,
            forget=self._forget,
            last_row=parts.drafter is not None and parts.drafter.needs.last_row,
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
        if not request.params.ignore_eos:
            request.stops |= self._eos
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

    @property
    def batch_invariant(self) -> bool:
        """Whether a row of the target rounds alike whatever the batch and the drafts beside it."""
        return self._runner.batch_invariant

    def step(self) -> list[Committed]:
        """One step for all requests that fit. Returns what it wrote; finished requests have left the engine.

        An error leaves all requests as they were before the step: pending keys are not counted, texts untouched.
        """
        started = time.perf_counter()
        if self._lengths is not None:
            self._lengths.begin(self.scheduler.running)
        plan = self.scheduler.next(self.budget)
        if not plan:
            if not self.idle:
                raise InternalError("requests wait, but none of them can run")
            return []
        drafted = self._draft(plan)
        judged = self._verify(drafted, self._maker, self._judge)
        return self._settle(drafted, judged, started)

    def _draft(self, plan: list[Work]) -> Drafted:
        """First phase: the drafter proposes. Touches the drafter, and in the cache the slots behind these texts."""
        requests = [work.request for work in plan]
        start = time.perf_counter()
        draft = self._propose(plan, requests)
        return Drafted(plan, requests, draft, time.perf_counter() - start)

    def _verify(self, drafted: Drafted, maker: BatchMaker, judge: Judge) -> Judged:
        """Second phase: the target's forward and the verdict. Touches the target alone, and the slots of its rows."""
        plan, requests, draft, _ = drafted
        batch = self._assemble(plan, requests, draft, maker)
        start = time.perf_counter()
        hidden = self._runner.forward(batch, keep=self._keep, scores=self._scores)
        seconds = time.perf_counter() - start
        places = [b for b, work in enumerate(plan) if work.ready or work.samples]
        sampling = requests if len(places) == len(plan) else [requests[b] for b in places]
        judgement = judge.judge(batch, sampling, places, draft, hidden)
        kept = judgement.kept
        if len(places) < len(plan):
            kept = [()] * len(plan)
            for place, nodes in zip(places, judgement.kept, strict=True):
                kept[place] = nodes
        return Judged(batch, hidden, places, judgement, kept, seconds)

    def _settle(self, drafted: Drafted, judged: Judged, started: float) -> list[Committed]:
        """Last phase: texts, cache, drafter and scheduler learn what came out. Nothing may run beside it.

        ``started``: the clock when the step began.
        """
        plan, requests, draft, drafting = drafted
        batch, hidden, places, judgement, kept, forward = judged
        out = self._commit(plan, batch, draft, places, judgement, kept)
        if self.drafter is not None:
            self.drafter.observe(requests, batch, kept, hidden)
        for request in requests:
            if request.finish_reason is not None:
                self._leave(request)
            else:
                request.check()
        decode = all(work.ready for work in plan)
        seconds = time.perf_counter() - started
        self.stats.time(decode, seconds, drafting, forward)
        if self._lengths is not None:
            self._learn(self._lengths, plan, batch, draft, kept, seconds if decode else None)
        return out

    def _learn(
        self,
        lengths: Lengths,
        plan: Sequence[Work],
        batch: Batch,
        draft: Draft,
        kept: Sequence[Sequence[int]],
        seconds: float | None,
    ) -> None:
        """Tell what the round says of depths; ``seconds`` are None where they say nothing."""
        depths = [depth for depth, _ in _draft_shapes(batch, draft)]
        rounds = [b for b, work in enumerate(plan) if work.ready]
        requests = [plan[b].request for b in rounds]
        lengths.learn(requests, [depths[b] for b in rounds], [len(kept[b]) for b in rounds], seconds)

    def _propose(self, plan: Sequence[Work], requests: Sequence[Request]) -> Draft:
        """The forest over the plan; requests still reading their prompt have no nodes."""
        if self.drafter is not None and any(work.nodes for work in plan):
            wanting = [b for b, work in enumerate(plan) if work.ready]
            part = self.drafter.propose([requests[b] for b in wanting], [plan[b].nodes for b in wanting])
            return part if len(wanting) == len(plan) else concat_drafts([(wanting, part)], len(plan))
        if self._none.cu.shape[0] != len(plan) + 1:
            self._none = Draft.empty(len(plan), self._runner.decoder.device)
        return self._none

    def _assemble(self, plan: Sequence[Work], requests: Sequence[Request], draft: Draft, maker: BatchMaker) -> Batch:
        """The rows of the step: of each request what its cache does not hold, and its nodes."""
        B = len(plan)
        starts = np.fromiter([r.cached for r in requests], np.int64, B)
        if all([work.ready for work in plan]):  # noqa: C419 (a list is faster)
            lengths = np.ones(B, dtype=np.int64)
            tokens = np.fromiter([r.newest for r in requests], np.int64, B)
        else:
            lengths = np.fromiter([work.stop for work in plan], np.int64, B) - starts
            tokens = np.concatenate([work.request.tokens[work.request.cached : work.stop] for work in plan])
        ids = [r.id for r in requests]
        return maker.make(ids, [self.cache.table(id) for id in ids], starts, lengths, tokens, draft)

    def _commit(
        self,
        plan: Sequence[Work],
        batch: Batch,
        draft: Draft,
        places: Sequence[int],
        judgement: Judgement,
        kept: Sequence[Sequence[int]],
    ) -> list[Committed]:
        """Append the verdict to the texts, then let the cache keep the accepted paths."""
        out = []
        committed = 0
        before = [work.request.cached for work in plan]
        for request, stop, _, ready in plan:
            if not ready:
                self.stats.prompt_tokens += stop - request.cached - (1 if stop == len(request) else 0)
            request.cached = stop
        shapes = _draft_shapes(batch, draft)
        for place, tokens in zip(places, judgement.tokens, strict=True):
            work = plan[place]
            request, accepted = work.request, len(kept[place])
            written = self._write(request, tokens)
            request.cached += accepted
            if work.ready:
                stats = request.stats
                stats.record(*shapes[place], min(accepted, len(written)))
                stats.committed += len(written)
            committed += len(written)
            text = self._texts.get(request.id) if self._texts else None
            out.append(Committed(request, tuple(written), text))
        if judgement.logprobs:
            for entry, logprobs in zip(out, judgement.logprobs, strict=True):
                entry.request.logprobs.extend(logprobs[: len(entry.tokens)])
        self.stats.committed += committed
        self._keep_keys(plan, batch, draft, before, kept)
        return out

    def _keep_keys(
        self,
        plan: Sequence[Work],
        batch: Batch,
        draft: Draft,
        before: Sequence[int],
        kept: Sequence[Sequence[int]],
    ) -> None:
        """The cache's part of the commit. Of a chain no key moves, so only full blocks are told of."""
        if not draft.chain:
            self.cache.commit(batch, kept, [work.request.tokens for work in plan])
            return
        size = self.cache.block_size
        for work, cached in zip(plan, before, strict=True):
            request = work.request
            if request.cached // size != cached // size:
                self.cache.name_full(request.id, request.tokens, request.cached)

    def _write(self, request: Request, tokens: Sequence[int]) -> Sequence[int]:
        """Append tokens until one of them ends the request; the rest of the verdict is dropped."""
        text = self._texts.get(request.id) if self._texts else None
        if request.first_token_at is None:
            request.first_token_at = time.perf_counter()
        if text is None and len(request) + len(tokens) < request.limit and request.stops.isdisjoint(tokens):
            request.append(tokens)
            return tokens
        written: list[int] = []
        for token in tokens:
            written.append(token)
            ends = token in request.stops
            if text is not None and not ends and text.push(token):
                ends = True
            if ends:
                request.finish(FinishReason.STOP)
            elif len(request) + len(written) >= request.limit:
                request.finish(FinishReason.LENGTH)
            if request.finished:
                break
        request.append(written)
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


def _draft_shapes(batch: Batch, draft: Draft) -> list[tuple[int, int]]:
    """Depth and number of nodes of each request's draft."""
    if not draft.tokens.shape[0]:
        return [(0, 0)] * len(batch.request_ids)
    counts = draft.counts.tolist()
    if draft.chain:
        return [(count, count) for count in counts]
    positions, text_len = batch.layout.positions.numpy(), batch.layout.text_len.tolist()
    first = batch.layout.node_row.tolist()
    return [
        (int(positions[row : row + count].max()) - length + 1 if count else 0, count)
        for row, count, length in zip(first, counts, text_len, strict=True)
    ]
