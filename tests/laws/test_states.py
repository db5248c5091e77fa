"""Law: whatever happens to requests in whatever order, every block comes back, and greedy output is plain decoding.

A hypothesis state machine on a real engine with very few blocks: requests join, step, are cancelled, draft more or
less, are preempted, and the target's forward fails now and then.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule
from lab import CPU, ROWS, CacheKind, make_engine, run, tiny_decoder
from torch import Tensor

from steeple.errors import CapacityError, InternalError
from steeple.ops.native_attention import attention_backend
from steeple.request import FinishReason, Request
from steeple.types import KVLayout, SamplingParams

TARGET = tiny_decoder(7, layers=1, vocab=7)
BAD = tiny_decoder(8, layers=1, vocab=7, hidden=8)
ROOM = CacheKind(block_size=2, blocks=14)
EDGES = ROOM.block_size * ROOM.blocks


class Fragile:
    """Attention that fails when told to."""

    def __init__(self) -> None:
        self._attention = attention_backend(CPU)
        self.allocate, self.read_kv = self._attention.allocate, self._attention.read_kv
        self.write_kv, self.move_kv = self._attention.write_kv, self._attention.move_kv
        self.calls_left = -1

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor, layout: KVLayout, **options: float) -> Tensor:
        if self.calls_left == 0:
            self.calls_left = -1
            raise InternalError("planted")
        self.calls_left -= 1
        return self._attention(q, keys, values, layout, **options)


@functools.cache
def plain(prompt: tuple[int, ...], params: SamplingParams) -> list[int]:
    """What the request writes alone, without a drafter."""
    return run(make_engine(target=TARGET), [Request("alone", prompt, params)])[0]


class Lives(RuleBasedStateMachine):
    """Requests of one engine, followed until each has ended."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.everybody: list[Request] = []
        self.reported: dict[str, list[int]] = {}

    @initialize(row=st.sampled_from(ROWS), batch_size=st.integers(1, 5), step_tokens=st.integers(1, 9))
    def start(self, row: str, batch_size: int, step_tokens: int) -> None:
        self.attention = Fragile()
        self.engine = make_engine(
            row,
            ROOM,
            target=TARGET,
            bad=BAD,
            k=3,
            batch_size=batch_size,
            step_tokens=step_tokens,
            attention=self.attention,
        )
        self.most = self.engine.parts.drafter.needs.nodes if self.engine.parts.drafter is not None else 0

    @rule(
        target=requests,
        prompt=st.lists(st.integers(0, 6), min_size=1, max_size=9),
        max_tokens=st.integers(1, 14),
        kind=st.sampled_from(
            [
                SamplingParams(),
                SamplingParams(repetition_penalty=1.5, frequency_penalty=0.4),
                SamplingParams(stop_token_ids=(3,)),
                SamplingParams(temperature=1.0, top_p=0.9),
            ]
        ),
    )
    def add(self, prompt: list[int], max_tokens: int, kind: SamplingParams) -> Request:
        number = len(self.everybody)
        request = Request(f"r{number}", prompt, replace(kind, max_tokens=max_tokens, seed=number))
        self.everybody.append(request)
        self.reported[request.id] = []
        self.engine.add(request)
        return request

    @rule(extra=st.integers(1, 20))
    def add_too_long(self, extra: int) -> None:
        with pytest.raises(CapacityError, match="max_tokens"):
            self.engine.add(Request("too-long", [1], SamplingParams(max_tokens=EDGES - 1 + extra)))

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            for committed in self.engine.step():
                self.reported[committed.request.id].extend(committed.tokens)

    @rule(request=consumes(requests))
    def abort(self, request: Request) -> None:
        ended, output = request.finish_reason, request.output.tolist()
        self.engine.abort(request.id)
        assert request.finish_reason == (ended or FinishReason.CANCELLED)
        assert request.output.tolist() == output, "cancelling changed what was written"

    @rule(nodes=st.integers(0, 8))
    def set_budget(self, nodes: int) -> None:
        limit = min(nodes, self.most)
        self.engine.budget = lambda request: limit if len(request) % 3 else 0

    @precondition(lambda self: not self.engine.idle)
    @rule(calls=st.integers(0, 3))
    def fail(self, calls: int) -> None:
        before = [(r.tokens.tolist(), r.finish_reason) for r in self.everybody]
        self.attention.calls_left = calls
        failed = False
        try:
            self.step(1)
        except InternalError as error:
            if "planted" not in str(error):
                raise
            failed = True
        after = [(r.tokens.tolist(), r.finish_reason) for r in self.everybody]
        assert not failed or after == before, "a failed step left traces"
        self.attention.calls_left = -1

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "engine"):
            return
        cache, scheduler = self.engine.cache, self.engine.scheduler
        cache.check_integrity()
        assert len(scheduler.running) <= self.engine.parts.batch_size
        assert {r.id for r in scheduler.running + list(scheduler.waiting)} == {
            r.id for r in self.everybody if not r.finished
        }
        for request in self.everybody:
            if not request.finished:
                request.check()
            running = request in scheduler.running
            assert cache.has(request.id) == running, "blocks are held by exactly those that run"
            assert not running or len(cache.table(request.id)) >= cache.blocks_for(request.cached)
            assert self.reported[request.id] == request.output.tolist()
            assert request.written <= request.params.max_tokens
        assert self.engine.stats.committed == sum(r.written for r in self.everybody)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(500):
            if self.engine.idle:
                break
            self.step(1)
        self.engine.check_integrity()
        assert self.engine.cache.pool.held == 0
        for request in self.everybody:
            expected = plain(tuple(request.tokens[: request.prompt_len].tolist()), request.params)
            output = request.output.tolist()
            if not request.params.greedy:
                continue
            if request.finish_reason is FinishReason.CANCELLED:
                expected = expected[: len(output)]
            assert output == expected, f"{request.id} is not what plain decoding writes"


TestLives = Lives.TestCase
TestLives.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
