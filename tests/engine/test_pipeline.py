"""Micro-batches: that drafting and verification really run at once, and what becomes of drafts that wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steeple.cache.paged import PagedCache
from steeple.draft.base import Drafter, Needs, Surroundings, chains
from steeple.engine import Engine, EngineConfig, build_engine, load_model
from steeple.engine import pipeline as pipeline_module
from steeple.engine.pipeline import PipelinedEngine, select_draft
from steeple.errors import ConfigError, InternalError
from steeple.model.decoder import Hidden
from steeple.request import Request
from steeple.types import Batch, Draft, SamplingParams, concat_drafts

PATIENCE = 20.0  # seconds until a rendezvous counts as missed


@dataclass(frozen=True, kw_only=True)
class RepeatConfig:
    """Settings of a drafter that proposes the newest tokens again; ``before(requests)`` is called first."""

    k: int = 3
    before: Callable[[Sequence[Request]], None] = field(default=lambda _requests: None)

    def build(self, around: Surroundings) -> Drafter:
        return Repeat(self)


class Repeat:
    def __init__(self, config: RepeatConfig) -> None:
        self._config, self.needs = config, Needs(nodes=config.k)
        self.proposed: list[tuple[str, ...]] = []
        self.observed: list[tuple[str, ...]] = []

    def prepare(self, cache: PagedCache) -> None: ...

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> Draft:
        self._config.before(requests)
        self.proposed.append(tuple(r.id for r in requests))
        return chains([r.tokens[-n:] if n else r.tokens[:0] for r, n in zip(requests, budget, strict=True)], "cpu")

    def observe(self, requests: Sequence[Request], batch: Batch, kept: Sequence[Sequence[int]], hidden: Hidden) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.observed.append(tuple(r.id for r in requests))

    def forget(self, request: Request) -> None:
        assert threading.current_thread() is threading.main_thread()

    def check_integrity(self) -> None: ...


@pytest.fixture(scope="module")
def folder(target_folder: Path) -> Path:
    return target_folder


def an_engine(folder: Path, count: int, drafter: Any = None, **settings: object) -> Engine:
    config = EngineConfig(micro_batches=count, **{"kv_tokens": 2048, "batch_size": 8, **settings})  # type: ignore[arg-type]
    return build_engine(load_model(str(folder), config), config, drafter or RepeatConfig())


def some_requests(many: int = 6, **params: object) -> list[Request]:
    settings = {"max_tokens": 12, "ignore_eos": True, **params}
    return [
        Request(f"r{i}", [3 + i, 4, 5 + i % 2] * (1 + i % 3), SamplingParams(**settings))  # type: ignore[arg-type]
        for i in range(many)
    ]


def finish(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    for request in requests:
        engine.add(request, stream=bool(request.params.stop))
    while not engine.idle:
        engine.step()
    engine.check_integrity()
    return [r.output.tolist() for r in requests]


def until_drafting(engine: Engine) -> PipelinedEngine:
    """Steps until a draft with nodes waits for the target."""
    assert isinstance(engine, PipelinedEngine)
    for _ in range(50):
        engine.step()
        if any(flight.drafted is not None and flight.drafted.draft.tokens.numel() for flight in engine._pool):
            return engine
    raise AssertionError("no draft ever waits")


def test_drafting_and_verification_run_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides meet at a barrier, which neither passes alone."""
    meeting, met = threading.Barrier(2), []

    def meet(_requests: Sequence[Request]) -> None:
        if threading.current_thread() is not threading.main_thread():
            meeting.wait(PATIENCE)
            met.append(threading.current_thread().name)

    engine = an_engine(folder, 2, RepeatConfig(before=meet))
    assert isinstance(engine, PipelinedEngine)
    forward = engine._runner.forward

    def forward_and_meet(*args: Any, **kwargs: Any) -> Hidden:
        hidden = forward(*args, **kwargs)
        if engine._task is not None:  # something is drafted beside this forward
            meeting.wait(PATIENCE)
        return hidden

    monkeypatch.setattr(engine._runner, "forward", forward_and_meet)
    outputs = finish(engine, some_requests())
    assert len(met) > 5, "hardly anything was drafted beside a verification"
    assert outputs == finish(an_engine(folder, 1), some_requests())


def test_more_is_drafted_while_the_target_is_busy_but_never_more_than_may_wait(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafts, sizes, waiting = threading.Semaphore(0), [], []
    engine = an_engine(folder, 3, RepeatConfig(before=lambda _requests: drafts.release()))
    assert isinstance(engine, PipelinedEngine)
    launch, forward = engine._launch, engine._runner.forward
    wanted = 0

    def watched(ahead: list[Any]) -> None:
        nonlocal wanted
        while drafts.acquire(blocking=False):
            pass
        launch(ahead)
        wanted = sum(any(work.nodes for work in flight.plan) for flight in ahead) if engine._task is not None else 0
        sizes.append(wanted)

    def until_all_are_drafted(*args: Any, **kwargs: Any) -> Hidden:
        for _ in range(wanted):
            assert drafts.acquire(timeout=PATIENCE), "the drafter stopped while the target was busy"
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine, "_launch", watched)
    monkeypatch.setattr(engine._runner, "forward", until_all_are_drafted)
    requests = some_requests(9)
    for request in requests[:3]:
        engine.add(request)
    while not engine.idle:
        engine.step()
        waiting.append(len(engine._pool))
        if len(waiting) == 8:
            engine._drop_all()  # as after an error: two must be drafted now to fill the pool
        if len(waiting) == 14:
            for request in requests[3:]:  # in flight are three of one request each; these would make a fourth
                engine.add(request)
    engine.check_integrity()
    assert max(sizes) == 2
    assert max(waiting) == 2
    assert sizes.count(1) > 5, "with two that wait there is room for one more"


@pytest.mark.parametrize("count", [2, 3])
def test_a_failing_draft_leaves_requests_as_they_were(folder: Path, count: int) -> None:
    fails = threading.Event()

    def maybe(_requests: Sequence[Request]) -> None:
        if fails.is_set() and threading.current_thread() is not threading.main_thread():
            raise InternalError("planted")

    engine = until_started(an_engine(folder, count, RepeatConfig(before=maybe)), requests := some_requests())
    state = [(r.tokens.tolist(), r.cached) for r in requests]
    fails.set()
    with pytest.raises(InternalError, match="planted"):
        engine.step()
    assert [(r.tokens.tolist(), r.cached) for r in requests] == state
    fails.clear()
    while not engine.idle:
        engine.step()
    engine.check_integrity()
    assert [r.output.tolist() for r in requests] == finish(an_engine(folder, 1), some_requests())


def until_started(engine: Engine, requests: Sequence[Request]) -> PipelinedEngine:
    for request in requests:
        engine.add(request)
    return until_drafting(engine)


def test_a_failing_verification_leaves_requests_as_they_were(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = until_started(an_engine(folder, 2), requests := some_requests())
    while not engine.idle:
        state = [(r.tokens.tolist(), r.cached) for r in requests]
        with monkeypatch.context() as patch:
            patch.setattr(engine._runner, "forward", lambda *_, **__: (_ for _ in ()).throw(InternalError("planted")))
            with pytest.raises(InternalError, match="planted"):
                engine.step()
        assert [(r.tokens.tolist(), r.cached) for r in requests] == state
        assert not engine._pool
        assert not engine._flying
        engine.step()
    engine.check_integrity()
    assert [r.output.tolist() for r in requests] == finish(an_engine(folder, 1), some_requests())


@pytest.mark.parametrize("count", [2, 3])
def test_a_draft_that_waits_is_dropped_with_its_request(folder: Path, count: int) -> None:
    expected = finish(an_engine(folder, 1), some_requests())
    engine = until_started(an_engine(folder, count), requests := some_requests())
    waiting = [work.request for flight in engine._pool for work in flight.plan]
    aborted = waiting[0]
    engine.abort(aborted.id)
    written = aborted.output.tolist()
    while not engine.idle:
        assert all(own.request is not aborted for own in engine.step())
    engine.check_integrity()
    assert aborted.output.tolist() == written
    for request, output in zip(requests, expected, strict=True):
        assert request.output.tolist() == (written if request is aborted else output)


def test_all_can_be_aborted_while_drafts_wait(folder: Path) -> None:
    engine = until_started(an_engine(folder, 2), requests := some_requests())
    for request in requests:
        engine.abort(request.id)
    assert engine.idle
    engine.check_integrity()
    assert engine.step() == []
    assert finish(engine, more := some_requests()) == finish(an_engine(folder, 1), some_requests())
    assert len(more) == len(requests)


def test_a_preempted_request_takes_its_draft_along(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = []

    def counted(draft: Draft, places: Sequence[int]) -> Draft:
        dropped.append(draft.cu.shape[0] - 1 - len(places))
        return select_draft(draft, places)

    monkeypatch.setattr(pipeline_module, "select_draft", counted)
    tight = {"kv_tokens": 72, "block_size": 4, "max_context": 64}
    engine = an_engine(folder, 2, **tight)
    outputs = finish(engine, some_requests(8, max_tokens=30))
    assert engine.stats.preemptions
    assert any(dropped), "no draft was waiting when its request was preempted"
    assert outputs == finish(an_engine(folder, 1), some_requests(8, max_tokens=30))


@pytest.mark.parametrize("count", [2, 3, 0])
def test_stops_lengths_and_seeds(folder: Path, count: int) -> None:
    plain = an_engine(folder, 1)
    text = finish(plain, some_requests(1, max_tokens=12))[0]
    each: list[dict[str, object]] = [
        {"stop_token_ids": (text[4],)},
        {"temperature": 1.0, "seed": 5, "max_tokens": 25},
        {"temperature": 0.7, "top_k": 5, "seed": 6, "logprobs": 2},
        {"max_tokens": 1},
        {"repetition_penalty": 1.4},
        {"max_tokens": 2},
    ]

    def requests() -> list[Request]:
        made = [some_requests(1, **own)[0] for own in each]
        for i, request in enumerate(made):
            request.id = f"q{i}"
        return made

    ours, theirs = requests(), requests()
    assert finish(an_engine(folder, count, step_tokens=4), ours) == finish(an_engine(folder, 1), theirs)
    assert [r.finish_reason for r in ours] == [r.finish_reason for r in theirs]
    assert [[t.token_id for t in r.logprobs] for r in ours] == [[t.token_id for t in r.logprobs] for r in theirs]


def test_micro_batches_are_even_and_take_turns(folder: Path) -> None:
    engine = until_started(an_engine(folder, 3), requests := some_requests(7))
    sizes, turns = set(), {r.id: 0 for r in requests}
    while all(not r.finished for r in requests):
        out = engine.step()
        sizes.add(len(out))
        for own in out:
            turns[own.request.id] += 1
        if sum(turns.values()) % 10 < 3:
            engine._drop_all()  # as after an error: all are free, and those who waited longest come first
    assert sizes <= {1, 2, 3}
    assert min(turns.values()) > 2
    assert max(turns.values()) - min(turns.values()) <= 2


def test_one_micro_batch_is_the_plain_engine(folder: Path) -> None:
    assert type(an_engine(folder, 1)) is Engine
    config = EngineConfig(micro_batches=3, kv_tokens=512)
    assert type(build_engine(load_model(str(folder), config), config)) is Engine, "there is nothing to draft beside"


@pytest.mark.parametrize("count", [-1, 9, 2.0])
def test_the_number_has_a_range(count: object) -> None:
    with pytest.raises(ConfigError, match=r"EngineConfig\.micro_batches"):
        EngineConfig(micro_batches=count)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
def test_a_part_of_a_forest_is_what_it_was_put_together_from(seed: int) -> None:
    numbers = np.random.default_rng(seed)

    def tree(nodes: int) -> Draft:
        parent = torch.tensor([int(numbers.integers(-1, i)) if i else -1 for i in range(nodes)], dtype=torch.int64)
        tokens = torch.from_numpy(numbers.integers(50, size=nodes))
        row = torch.from_numpy(numbers.integers(-1, 2, size=nodes))
        return Draft(tokens, parent, torch.tensor([0, nodes]), row, torch.from_numpy(numbers.random((2, 50))))

    trees = [tree(int(n)) for n in numbers.integers(5, size=6)]
    whole = concat_drafts([((b,), own) for b, own in enumerate(trees)], 6)
    places = [5, 0, 3]
    part = select_draft(whole, places)
    cu = part.cu.tolist()
    assert part.counts.tolist() == [trees[b].tokens.shape[0] for b in places]
    for i, b in enumerate(places):
        own, nodes = trees[b], slice(cu[i], cu[i + 1])
        assert part.tokens[nodes].tolist() == own.tokens.tolist()
        assert [p - cu[i] if p >= 0 else -1 for p in part.parent[nodes].tolist()] == own.parent.tolist()
        for found, expected in zip(part.row[nodes].tolist(), own.row.tolist(), strict=True):
            assert (found < 0) == (expected < 0)
            if found >= 0:
                assert part.probs is not None
                assert own.probs is not None
                assert torch.equal(part.probs[found], own.probs[expected])
