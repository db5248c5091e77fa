"""The fleet simulation: equal to its slow twin, true to queueing theory, and nobody is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steeple.errors import ConfigError
from steeple.plan.fleet.drafting import Drafting, from_tau
from steeple.plan.fleet.load import Load, fixed, lognormal, poisson
from steeple.plan.fleet.replica import Limits, Replica
from steeple.plan.fleet.simulate import ROUND_ROBIN, ROUTES, Fleet, Outcome, simulate
from steeple.plan.fleet.steps import LinearStep, ShareOfStep, StepTable
from steeple.plan.fleet.twin import SlowReplica

STEP = LinearStep(fixed=7e-3, per_token=2e-5, per_request=1e-5, per_context=5e-8)
PLAIN = Drafting()


def some_load(count: int, rate: float, seed: int = 0, prompt: float = 300.0, output: float = 40.0) -> Load:
    rng = np.random.default_rng(seed)
    arrival = poisson(rate, count, rng)
    return Load(arrival, lognormal(prompt, 1.0, count, rng), lognormal(output, 0.8, count, rng))


def drafting(k: int, tau: float, share: float = 0.2) -> Drafting:
    return Drafting("some", from_tau(k, tau), ShareOfStep(STEP, share))


def both(load: Load, fleet: Fleet, way: Drafting) -> tuple[Outcome, Outcome]:
    return simulate(load, fleet, STEP, way), simulate(load, fleet, STEP, way, kind=SlowReplica)


def assert_equal(fast: Outcome, slow: Outcome) -> None:
    np.testing.assert_allclose(fast.first, slow.first, rtol=1e-9)
    np.testing.assert_allclose(fast.done, slow.done, rtol=1e-9)
    np.testing.assert_allclose(fast.busy, slow.busy, rtol=1e-9)
    assert (fast.steps, fast.preempted, fast.token_steps) == (slow.steps, slow.preempted, slow.token_steps)
    assert fast.decode_seconds == pytest.approx(slow.decode_seconds, rel=1e-9)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("way", [PLAIN, drafting(4, 2.8)], ids=["plain", "drafted"])
@pytest.mark.parametrize(
    "limits",
    [
        Limits(max_batch=32, kv_tokens=50_000, chunk=512),
        Limits(max_batch=4, kv_tokens=50_000, chunk=100),
        Limits(max_batch=32, kv_tokens=4_000, chunk=512, watermark=0.0),
    ],
    ids=["roomy", "few-places", "short-cache"],
)
def test_the_same_as_step_by_step(route: str, way: Drafting, limits: Limits) -> None:
    fleet = Fleet(replicas=3, route=route, limits=limits)
    for rate in (5.0, 60.0):
        assert_equal(*both(some_load(120, rate), fleet, way))


def test_a_short_cache_preempts() -> None:
    fleet = Fleet(limits=Limits(max_batch=32, kv_tokens=3_000, chunk=512, watermark=0.0))
    fast, slow = both(some_load(80, 100.0, output=150.0), fleet, PLAIN)
    assert fast.preempted > 5
    assert_equal(fast, slow)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rate=st.floats(0.5, 300.0),
    kv=st.integers(600, 20_000),
    chunk=st.integers(16, 1024),
    batch=st.integers(1, 24),
    replicas=st.integers(1, 4),
    route=st.sampled_from(sorted(ROUTES)),
    k=st.integers(0, 5),
    drawn=st.booleans(),
)
def test_everybody_is_answered_or_refused_once_and_as_slowly(
    seed: int, rate: float, kv: int, chunk: int, batch: int, replicas: int, route: str, k: int, drawn: bool
) -> None:
    load = some_load(40, rate, seed)
    limits = Limits(max_batch=batch, kv_tokens=kv, chunk=chunk)
    fleet = Fleet(replicas=replicas, route=route, limits=limits, drawn=drawn)
    way = drafting(k, 1 + 0.5 * k) if k else PLAIN
    fast, slow = both(load, fleet, way)
    assert_equal(fast, slow)
    served = ~fast.refused
    assert not np.isnan(fast.done[served]).any()
    assert np.isnan(fast.done[fast.refused]).all()
    assert (fast.first[served] > load.arrival[served]).all()
    assert (fast.done[served] >= fast.first[served]).all()
    assert (fast.refused == (load.prompt + load.output + k > kv)).all()


class Counting(Replica):
    """Counts what comes out."""

    answered: list[int]

    def commit(self) -> list[int]:
        found = super().commit()
        type(self).answered.extend(found)
        return found


def test_each_request_is_answered_once_and_tokens_add_up() -> None:
    Counting.answered = []
    load = some_load(400, 80.0)
    fleet = Fleet(replicas=2, limits=Limits(max_batch=16, kv_tokens=6_000, chunk=256, watermark=0.0))
    out = simulate(load, fleet, STEP, PLAIN, kind=Counting)
    assert sorted(Counting.answered) == np.flatnonzero(~out.refused).tolist()
    # without drafts a decoding request has one token per step, and its first comes from its prompt
    assert out.token_steps == (load.output - 1)[~out.refused].sum()
    assert out.gaps.sum() == out.token_steps
    # decoding requests per step, integrated over time, are the requests' own times (no preemption in this one)
    roomy = replace(fleet, limits=Limits(max_batch=16, kv_tokens=10**6))
    out = simulate(load, roomy, STEP, PLAIN)
    assert out.preempted == 0
    assert out.decode_seconds == pytest.approx((out.done - out.first).sum(), rel=1e-9)


def service(seconds: float) -> LinearStep:
    """A step that takes this long per prompt token, and next to nothing else."""
    return LinearStep(fixed=1e-9, per_token=seconds)


ONE = Fleet(route=ROUND_ROBIN, limits=Limits(max_batch=1, kv_tokens=10**6, chunk=10**5))


@pytest.mark.parametrize("rho", [0.3, 0.7])
def test_mean_wait_of_m_d_1(rho: float) -> None:
    """Pollaczek and Khinchine: with equal service times D, a request waits rho D / (2 (1 - rho))."""
    count = 100_000
    load = Load(poisson(rho, count, np.random.default_rng(1)), fixed(100, count), fixed(1, count))
    out = simulate(load, ONE, service(1 / 100), PLAIN)
    wait = (out.done - load.arrival).mean() - 1.0
    assert wait == pytest.approx(rho / (2 * (1 - rho)), rel=0.04)
    assert out.busy[0] / out.makespan == pytest.approx(rho, rel=0.02)


def test_mean_time_and_its_law_in_m_m_1() -> None:
    """With exponential service of rate 1, the time in the system is exponential of rate 1 - rho."""
    count, rho, rng = 100_000, 0.6, np.random.default_rng(2)
    load = Load(poisson(rho, count, rng), rng.geometric(1 / 2000, count), fixed(1, count))
    out = simulate(load, ONE, service(1 / 2000), PLAIN)
    time = out.done - load.arrival
    assert time.mean() == pytest.approx(1 / (1 - rho), rel=0.05)
    assert np.quantile(time, 0.9) == pytest.approx(np.log(10) / (1 - rho), rel=0.06)


def test_littles_law() -> None:
    """Requests found in flight by a Poisson arrival are, in the mean, rate times mean time (PASTA)."""
    load = some_load(20_000, 40.0)
    out = simulate(load, Fleet(replicas=2), STEP, PLAIN)
    order = np.sort(out.done)
    found = np.arange(len(load)) - np.searchsorted(order, load.arrival, side="right")
    assert found.mean() == pytest.approx(load.rate * (out.done - load.arrival).mean(), rel=0.05)


def test_more_replicas_answer_no_fewer_tokens_a_second_and_wait_no_longer() -> None:
    load = some_load(2_000, 200.0)
    outs = [simulate(load, Fleet(replicas=n), STEP, PLAIN) for n in (1, 2, 4, 8, 16)]
    spans = [out.makespan for out in outs]
    waits = [float((out.first - load.arrival).mean()) for out in outs]
    assert spans == sorted(spans, reverse=True)
    assert waits == sorted(waits, reverse=True)
    assert spans[0] > 1.5 * spans[2]


def test_a_cheaper_drafter_with_the_same_tau_is_faster() -> None:
    load = some_load(2_000, 200.0)
    spans = [simulate(load, Fleet(), STEP, drafting(4, 2.8, share)).makespan for share in (0.0, 0.3, 2.5)]
    assert spans == sorted(spans)
    assert spans[0] < simulate(load, Fleet(), STEP, PLAIN).makespan < spans[2]


def test_a_seed_decides_what_is_drawn() -> None:
    load, way = some_load(500, 50.0), drafting(4, 2.8)
    first, again, other = (simulate(load, Fleet(seed=seed), STEP, way) for seed in (3, 3, 4))
    assert (first.done == again.done).all()
    assert (first.done != other.done).any()


def waits_by_route(load: Load, limits: Limits) -> dict[str, float]:
    outs = {route: simulate(load, Fleet(replicas=8, route=route, limits=limits), STEP, PLAIN) for route in ROUTES}
    return {route: float(np.quantile(out.first - load.arrival, 0.99)) for route, out in outs.items()}


def test_shorter_queues_serve_better_than_turns() -> None:
    """Somebody's turn comes while he is busy, by requests where places are short and by tokens where prompts differ."""
    waits = waits_by_route(some_load(4_000, 45.0, output=120.0), Limits(max_batch=8, kv_tokens=100_000))
    assert waits["least_loaded"] < 0.9 * waits[ROUND_ROBIN]
    waits = waits_by_route(some_load(4_000, 60.0, prompt=3000.0, output=1.0), Limits(kv_tokens=200_000))
    assert waits["shortest_queue"] < 0.9 * waits[ROUND_ROBIN]


def test_turns_go_round() -> None:
    """Request i is served by replica i modulo 3: each has prompts of one length only, one at a time."""
    lengths = np.tile([100, 200, 400], 5)
    load = Load(np.arange(15) * 10.0, lengths, fixed(1, 15))
    out = simulate(load, Fleet(replicas=3, route=ROUND_ROBIN), service(1e-3), PLAIN)
    assert out.busy == pytest.approx([0.5, 1.0, 2.0], rel=1e-4)


def test_a_request_larger_than_the_cache_is_refused_and_counted() -> None:
    load = Load(np.array([0.0, 1.0, 2.0]), np.array([100, 989, 100]), np.array([10, 10, 10]))
    fleet = Fleet(limits=Limits(kv_tokens=999, chunk=64))
    out = simulate(load, fleet, STEP, PLAIN)
    assert out.refused.tolist() == [False, False, False]
    out = simulate(load, fleet, STEP, drafting(1, 1.5))
    assert out.refused.tolist() == [False, True, False]
    assert np.isnan(out.done).tolist() == [False, True, False]
    nobody = simulate(load, Fleet(limits=Limits(kv_tokens=10)), STEP, PLAIN)
    assert nobody.refused.all()
    assert nobody.makespan == 0.0


class Roofline:
    """The time of whichever takes longer: the arithmetic of the rows, or reading weights and keys."""

    def seconds(self, prompt_tokens: float, decode_requests: int, context_tokens: Any, rows_per_request: int) -> Any:
        rows = prompt_tokens + decode_requests * rows_per_request
        return np.maximum(3e-5 * rows, 5e-3 + 4e-8 * context_tokens)


def test_the_table_of_a_model_with_a_kink_is_close() -> None:
    table = StepTable(Roofline(), PLAIN.time, rows=1, most_context=500_000, chunk=2048)
    rng = np.random.default_rng(0)
    for _ in range(300):
        prompt, requests, context = rng.integers(1, 2048), int(rng.integers(0, 300)), float(rng.integers(0, 500_000))
        true = Roofline().seconds(prompt, requests, context, 1)
        assert table.mixed(prompt, requests, context) == pytest.approx(true, rel=0.08)
    load = some_load(300, 100.0)
    fast, slow = (simulate(load, Fleet(), Roofline(), PLAIN, kind=kind) for kind in (Replica, SlowReplica))
    assert fast.makespan == pytest.approx(slow.makespan, rel=0.01)
    assert (fast.done - load.arrival).mean() == pytest.approx((slow.done - load.arrival).mean(), rel=0.01)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Fleet(route="least_load"), "Did you mean 'least_loaded'"),
        (lambda: Fleet(replicas=0), "Fleet.replicas = 0"),
        (lambda: Limits(chunk=0), "Limits.chunk = 0"),
        (lambda: Limits(watermark=float("nan")), "Limits.watermark"),
        (lambda: simulate(some_load(3, 1.0), Fleet(), LinearStep(fixed=0.0), PLAIN), "a step takes a time above 0"),
    ],
)
def test_bad_settings_say_what_to_do(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()
