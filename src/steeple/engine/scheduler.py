"""Which requests run in a step and how many rows each gets: join, chunk, preempt, leave. Numbers only, no tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from steeple.cache.paged import PagedCache
from steeple.errors import CapacityError
from steeple.request import Request


class Work(NamedTuple):
    """One request's share of a step: text up to position ``stop``, and ``nodes`` draft nodes if that ends its text.

    ``ready``: the request stood between two rounds when the step was planned.
    """

    request: Request
    stop: int
    nodes: int
    ready: bool

    @property
    def samples(self) -> bool:
        """Whether the newest token is among the rows, so that the step commits tokens."""
        return self.stop == len(self.request)


# How many nodes a request may get this round, from the past alone: never from drawn tokens.
Budget = Callable[[Request], int]


class Scheduler:
    """Args: cache of the target; batch_size: most running requests; step_tokens: most rows of a step, which only
    prompts give way to: a decoding request always gets its row and its nodes, whatever its neighbours do.
    ``forget(request)`` is called when a request loses its place in the cache. ``last_row``: the row before the newest
    token is computed even where its keys are found; see ``Needs``.
    """

    def __init__(
        self,
        cache: PagedCache,
        *,
        batch_size: int,
        step_tokens: int,
        forget: Callable[[Request], None],
        last_row: bool = False,
    ) -> None:
        self._cache, self._batch_size, self._step_tokens, self._forget = cache, batch_size, step_tokens, forget
        self._last_row = last_row
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._room: dict[str, int] = {}  # positions that the cache has reserved for each running request

    @property
    def live(self) -> int:
        """Requests that run, and those that would run if memory allows."""
        return min(len(self.running) + len(self.waiting), self._batch_size)

    def add(self, request: Request) -> None:
        """Queue a request; ``CapacityError`` if it could never fit, alone with the whole cache."""
        longest = request.limit
        needed, total = self._cache.blocks_for(longest), self._cache.pool.count
        if needed > total:
            size = self._cache.block_size
            spare = (needed - total) * size * self._cache.spec.bytes_per_token
            raise CapacityError(
                f"request {request.id}: {longest} positions (prompt {request.prompt_len} + "
                f"max_tokens {request.params.max_tokens}) do not fit into the cache of {total * size}; "
                f"{spare / 2**20:.1f} MiB are missing. Lower max_tokens or the prompt, or raise kv_tokens."
            )
        self.waiting.append(request)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def next(self, budget: Budget, among: Sequence[Request] | None = None, joining: int | None = None) -> list[Work]:
        """The work of the next step, oldest request first. Blocks for all of it are reserved.

        Args:
            among: of the running requests only these, in their order; default all. Others may be preempted for them.
            joining: most waiting requests that may join; default as many as fit.
        """
        plan: list[Work] = []
        rows = 0
        running = len(self.running)
        turn = list(self.running) if among is None else among
        ready = [r.ready for r in turn]
        room = max(self._step_tokens - sum(ready), 1)
        for request, decodes in zip(turn, ready, strict=True):
            if len(self.running) < running and request not in self.running:  # preempted for an older one
                continue
            if not decodes and rows >= room:
                continue
            work = _round(request, budget) if decodes else _chunk(request, room - rows)
            if work.stop + work.nodes <= self._room[request.id] or self._make_room(request, work):
                plan.append(work)
                rows += 0 if decodes else work.stop - request.cached
        if len(self.running) < running:  # short of memory: whoever was just preempted would only come straight back
            return plan
        most = self._batch_size if joining is None else min(self._batch_size, running + joining)
        while self.waiting and len(self.running) < most and rows < room:
            admitted = self._admit(self.waiting[0], room - rows, budget)
            if admitted is None:
                break
            self.running.append(self.waiting.popleft())
            plan.append(admitted)
            rows += admitted.stop - admitted.request.cached
        return plan

    def _make_room(self, request: Request, work: Work) -> bool:
        while not self._cache.reserve(request.id, work.stop + work.nodes):
            victim = self.running[-1]
            self.preempt(victim)
            if victim is request:
                return False
        self._note_room(request, work.stop + work.nodes)
        return True

    def _note_room(self, request: Request, length: int) -> None:
        """The cache has reserved ``length`` positions, in whole blocks; up to there nobody need ask it again."""
        self._room[request.id] = self._cache.blocks_for(length) * self._cache.block_size

    def _admit(self, request: Request, room: int, budget: Budget) -> Work | None:
        """Reserve for the whole text at once, so that a prompt never preempts another half way."""
        written = len(request) > request.prompt_len
        request.cached = self._cache.attach(request.id, request.tokens, 2 if written and self._last_row else 1)
        work = _round(request, budget) if request.ready else _chunk(request, room)
        keep_free = len(self.running)  # a block for each running request to grow into
        wanted = self._cache.missing(request.id, len(request) + work.nodes) + keep_free
        if self.running and wanted > self._cache.pool.available:
            self._cache.free(request.id)
            request.cached = 0
            return None
        self._cache.reserve(request.id, len(request) + work.nodes)
        self._note_room(request, len(request) + work.nodes)
        return work

    def preempt(self, request: Request) -> None:
        """Take the request's blocks; it waits at the front and is computed again from its text."""
        self.running.remove(request)
        self._release(request)
        request.preemptions += 1
        self.waiting.appendleft(request)

    def remove(self, request: Request) -> None:
        """The request ended, wherever it was."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._release(request)

    def _release(self, request: Request) -> None:
        self._cache.free(request.id)
        self._room.pop(request.id, None)
        request.cached = 0
        self._forget(request)


def _round(request: Request, budget: Budget) -> Work:
    """The root and the nodes of a request that stands between two rounds."""
    length, nodes = len(request), budget(request)
    if nodes <= 0:
        return Work(request, length, 0, True)
    # Node k is judged with the k before it; the last committed token of a request needs no successor.
    return Work(request, length, min(nodes, request.limit - length - 1), True)


def _chunk(request: Request, room: int) -> Work:
    """As much of a text that is still to be read as there is room for."""
    return Work(request, request.cached + min(request.unread, room), 0, False)
