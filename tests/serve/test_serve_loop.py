"""The engine's thread: cancelling, deadlines, failures, a full queue, depths of its own, the end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Running, Start

from steeple.errors import InternalError
from steeple.request import FinishReason, Request
from steeple.serve.errors import ApiError
from steeple.serve.job import Job, Round, Update
from steeple.types import SamplingParams

LONG = SamplingParams(max_tokens=200, ignore_eos=True)
SHORT = SamplingParams(max_tokens=4, ignore_eos=True)


class Client:
    """Makes jobs and keeps what it hears of them, by their names. Its event loop runs in a thread."""

    def __init__(self) -> None:
        self.heard: dict[str, list[Update]] = {}
        self._changed = threading.Condition()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def job(self, name: str, params: SamplingParams = SHORT, **settings: Any) -> Job:
        made = Request(name, [5, 9, 200], params)
        job = Job(made, 0, settings.pop("tenant", ""), self.loop, self._hear, **settings)
        self.heard[name] = []
        return job

    def _hear(self, job: Job, update: Update) -> None:
        with self._changed:
            self.heard[job.request.id].append(update)
            self._changed.notify_all()

    def wait(self, what: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(what, timeout=20)

    def last(self, name: str) -> Update:
        self.wait(lambda: any(update.last for update in self.heard[name]))
        ends = [update for update in self.heard[name] if update.last]
        assert len(ends) == 1
        return ends[0]

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture
def client() -> Any:
    made = Client()
    yield made
    made.close()


def test_a_job_is_run_and_told(server: Running, client: Client) -> None:
    server.loop.submit([client.job("a")])
    assert client.last("a").finish is FinishReason.LENGTH
    assert len(client.heard["a"]) == 1  # it does not stream
    server.settle()


def test_a_stream_is_told_of_each_step(server: Running, client: Client) -> None:
    server.loop.submit([client.job("a", LONG, stream=True)])
    client.last("a")
    assert sum(len(update.tokens) for update in client.heard["a"]) == 200
    assert len(client.heard["a"]) > 20


def test_a_cancelled_job_leaves_at_once(server: Running, client: Client) -> None:
    job = client.job("a", LONG, stream=True)
    server.loop.submit([job])
    client.wait(lambda: len(client.heard["a"]) >= 2)
    server.loop.cancel([job])
    assert client.last("a").finish is FinishReason.CANCELLED
    assert job.request.written < 200
    server.settle()
    assert server.loop.tally.outcomes == {"cancelled": 1}


def test_a_job_is_cancelled_where_it_waits(start: Start, client: Client) -> None:
    server = start(engine={"batch_size": 1})
    running, waiting = client.job("a", LONG, stream=True), client.job("b")
    server.loop.submit([running, waiting])
    client.wait(lambda: bool(client.heard["a"]))
    server.loop.cancel([waiting])
    assert client.last("b").finish is FinishReason.CANCELLED
    assert waiting.request.written == 0
    server.loop.cancel([running])
    client.last("a")
    server.loop.cancel([running])  # for the second time
    server.loop.submit([client.job("c")])
    client.last("c")
    assert server.loop.tally.outcomes == {"cancelled": 2, "length": 1}


def test_deadlines_end_what_runs_and_what_waits(start: Start, client: Client) -> None:
    server = start(engine={"batch_size": 1})
    soon = time.perf_counter() + 0.2
    many = [client.job(str(i), LONG, deadline=soon) for i in range(30)]
    server.loop.submit([*many, client.job("patient", deadline=soon + 60)])
    assert client.last("patient").finish is FinishReason.LENGTH
    late = [error for i in range(30) if (error := client.last(str(i)).error) is not None]
    assert late
    assert {(error.status, error.code) for error in late} == {(408, "timeout")}
    assert server.loop.tally.outcomes["timeout"] == len(late)
    server.settle()


def test_deadlines_of_what_is_over_are_not_kept(server: Running, client: Client) -> None:
    for i in range(200):
        server.loop.submit([client.job(str(i), SHORT, deadline=time.perf_counter() + 1000)])
        client.last(str(i))
    assert len(server.loop._deadlines) < 80


def test_the_queue_is_bounded(start: Start, client: Client) -> None:
    server = start(engine={"batch_size": 1}, queue_size=3, retry_after=7)
    server.loop.submit([client.job("runs", LONG, stream=True)])
    client.wait(lambda: bool(client.heard["runs"]))
    server.loop.submit([client.job("a"), client.job("b")])
    with pytest.raises(ApiError, match="2 requests wait already") as caught:
        server.loop.submit([client.job("c"), client.job("d")])
    assert caught.value.status == 429
    assert caught.value.headers == {"Retry-After": "7"}
    with pytest.raises(ApiError, match="4 sequences in one request") as never:
        server.loop.submit([client.job(str(i)) for i in range(4)])
    assert never.value.status == 400
    server.loop.submit([client.job("e")])
    assert client.last("e").finish is FinishReason.LENGTH


def test_tenants_take_turns(start: Start, client: Client) -> None:
    server = start(engine={"batch_size": 1})
    ended: list[str] = []
    jobs = [client.job(f"greedy-{i}", tenant="greedy") for i in range(6)]
    jobs.append(client.job("modest", tenant="modest"))
    for job in jobs:
        deliver = job.deliver
        job.deliver = lambda job, update, deliver=deliver: (ended.append(job.request.id), deliver(job, update))
    server.loop.submit(jobs)
    for job in jobs:
        client.last(job.request.id)
    assert ended.index("modest") == 1


def test_a_failing_step_is_answered_and_the_next_goes_on(server: Running, client: Client) -> None:
    step, failures = server.engine.step, iter([False, False, True])

    def fails() -> Any:
        if next(failures, False):
            raise RuntimeError("secret of the house")
        return step()

    server.engine.step = fails  # type: ignore[method-assign]
    server.loop.submit([client.job("a", LONG), client.job("b", LONG, stream=True)])
    for name in "ab":
        error = client.last(name).error
        assert error is not None
        assert error.status == 500
        assert "secret" not in error.message
    assert server.loop.ready
    server.loop.submit([client.job("c")])
    assert client.last("c").finish is FinishReason.LENGTH
    assert server.loop.tally.failures == 1
    assert server.loop.tally.outcomes == {"error": 2, "length": 1}
    server.settle()


def test_steps_that_keep_failing_make_it_unready(server: Running, client: Client) -> None:
    def fails() -> Any:
        raise RuntimeError("again")

    server.engine.step = fails  # type: ignore[method-assign]
    for name in "abc":
        assert server.loop.ready
        server.loop.submit([client.job(name)])
        client.last(name)
    client.wait(lambda: not server.loop.alive)
    assert server.loop.trouble == "3 steps failed, one after the other"
    with pytest.raises(ApiError, match="the engine has failed") as caught:
        server.loop.submit([client.job("d")])
    assert caught.value.status == 503
    server.engine.check_integrity()


def test_lost_blocks_make_it_unready(start: Start, client: Client) -> None:
    server = start(engine={"batch_size": 1})

    def fails() -> Any:
        raise RuntimeError("once")

    def lost() -> None:
        raise InternalError("a block is held")

    server.engine.step = fails  # type: ignore[method-assign]
    server.engine.check_integrity = lost  # type: ignore[method-assign]
    server.loop.submit([client.job("a"), client.job("waits")])
    assert client.last("a").error is not None
    waits = client.last("waits").error
    assert waits is not None
    assert waits.status in (500, 503)
    client.wait(lambda: bool(server.loop.trouble))
    assert not server.loop.ready


def test_what_the_engine_refuses_is_answered(server: Running, client: Client) -> None:
    wrong = client.job("wrong")
    wrong.request.tokens[0] = 320
    server.loop.submit([wrong, client.job("right")])
    error = client.last("wrong").error
    assert error is not None
    assert error.status == 400
    assert "token ids outside 0..319" in error.message
    assert client.last("right").finish is FinishReason.LENGTH
    server.settle()


def test_draining_finishes_what_is_here_and_takes_nothing_new(start: Start, client: Client) -> None:
    server = start(engine={"batch_size": 1})
    server.loop.submit([client.job("a"), client.job("b")])
    server.loop.drain(30.0)
    with pytest.raises(ApiError, match="shutting down"):
        server.loop.submit([client.job("c")])
    server.loop.close(30.0)
    assert client.last("a").finish is FinishReason.LENGTH
    assert client.last("b").finish is FinishReason.LENGTH
    assert not server.loop.alive


def test_at_the_deadline_of_the_end_the_rest_is_answered(start: Start, client: Client) -> None:
    server = start(engine={"batch_size": 1})
    jobs = [client.job(str(i), LONG) for i in range(40)]
    server.loop.submit(jobs)
    server.loop.close(0.05)
    ends = [client.last(job.request.id) for job in jobs]
    cut = [end.error.status for end in ends if end.error is not None]
    assert cut
    assert set(cut) == {503}
    server.engine.check_integrity()


def test_an_idle_thread_sleeps(server: Running, client: Client) -> None:
    server.loop.submit([client.job("a")])
    client.last("a")
    turns: list[int] = []
    turn = server.loop._turn
    server.loop._turn = lambda: (turns.append(1), turn())[1]  # type: ignore[method-assign]
    server.loop.submit([client.job("b")])
    client.last("b")
    server.settle()
    before = len(turns)
    time.sleep(0.05)
    assert len(turns) <= before + 1


def test_a_request_may_draft_less(server: Running, client: Client) -> None:
    jobs = [client.job("all", LONG), client.job("one", LONG, nodes=1), client.job("none", LONG, nodes=0)]
    server.loop.submit(jobs)
    for job in jobs:
        client.last(job.request.id)
    deepest = [max(one.drafted for one in job.rounds) for job in jobs]
    assert deepest == [3, 1, 0]
    assert not server.loop._budget.caps
    outputs = [job.request.output.tolist() for job in jobs]
    assert outputs[0] == outputs[1] == outputs[2]


def test_rounds_say_how_tokens_came(server: Running, client: Client) -> None:
    job = client.job("a", LONG, stream=True, origins=True)
    server.loop.submit([job])
    client.last("a")
    assert sum(one.written for one in job.rounds) == 200
    assert sum(one.accepted for one in job.rounds) == job.request.stats.accepted > 0
    assert sum(one.drafted for one in job.rounds) == job.request.stats.drafted
    told = [origin for update in client.heard["a"] for origin in update.origins]
    assert len(told) == 200
    assert {"accepted", "recovered"} <= set(told)
    assert told[0] == "plain"


def test_origins_of_a_round() -> None:
    assert Round(1, 0, 0, 0).origins == ["plain"]
    assert Round(3, 2, 4, 4).origins == ["accepted", "accepted", "recovered"]
    assert Round(3, 2, 2, 2).origins == ["accepted", "accepted", "bonus"]
    assert Round(2, 2, 3, 3).origins == ["accepted", "accepted"]


def test_nobody_listens_any_more(server: Running) -> None:
    gone = Client()
    job = gone.job("a", LONG, stream=True)
    gone.close()
    server.loop.submit([job])
    server.settle()
    assert job.request.finish_reason is FinishReason.CANCELLED
