"""What the server tells of itself: Prometheus metrics, the state as JSON, the line in the log."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from conftest import Running, Start
from prometheus_client.parser import text_string_to_metric_families

from steeple.serve.reports import report
from steeple.serve.tally import Buckets, Tally

COMPLETIONS = "/v1/completions"
BODY = {"prompt": ["def area(", "class Box:"], "temperature": 0, "max_tokens": 40, "ignore_eos": True, "metrics": True}
LABELS = {"model_name": "tiny"}


def samples(server: Running) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = server.get("/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def one(found: dict[Any, float], name: str, **labels: str) -> float:
    return found[name, tuple(sorted({**LABELS, **labels}.items()))]


def test_metrics_count_what_was_done(server: Running) -> None:
    answer = server.post(COMPLETIONS, BODY).json()
    told, usage = answer["metrics"]["speculative_decoding"], answer["usage"]
    found = samples(server)
    assert one(found, "steeple_prompt_tokens_total") == usage["prompt_tokens"]
    assert one(found, "steeple_generation_tokens_total") == usage["completion_tokens"] == 80
    assert one(found, "steeple_request_success_total", finished_reason="length") == 2
    assert one(found, "steeple_spec_decode_num_drafts_total") == told["num_spec_steps"]
    assert one(found, "steeple_spec_decode_num_draft_tokens_total") == told["num_draft_tokens"]
    accepted = one(found, "steeple_spec_decode_num_accepted_tokens_total")
    assert accepted == told["num_accepted_draft_tokens"] > 0
    name = "steeple_spec_decode_num_accepted_tokens_per_pos_total"
    assert sum(one(found, name, position=str(j)) for j in range(3)) == accepted
    assert one(found, "steeple_num_requests_running") == 0
    assert one(found, "steeple_num_requests_waiting") == 0
    assert one(found, "steeple_kv_cache_usage_perc") == 0
    for histogram in ("time_to_first_token", "e2e_request_latency", "request_time_per_output_token"):
        assert one(found, f"steeple_{histogram}_seconds_count") == 2
        assert one(found, f"steeple_{histogram}_seconds_bucket", le="+Inf") == 2
    steps = one(found, "steeple_inter_token_latency_seconds_count")
    assert steps == told["num_spec_steps"] + sum(  # rounds without a draft, at the very end
        r["outcome"] == "length" and r["origins"].endswith("p") and len(r["origins"]) > 1
        for r in server.get("/stats").json()["recent"]
    )
    assert not any(name.startswith("vllm:") for name, _ in found)


def test_vllm_names_on_request(start: Start) -> None:
    server = start(vllm_metrics=True)
    server.post(COMPLETIONS, BODY)
    text = server.get("/metrics").text
    for name in (
        "spec_decode_num_drafts_total",
        "spec_decode_num_draft_tokens_total",
        "spec_decode_num_accepted_tokens_total",
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prompt_tokens_total",
        "generation_tokens_total",
        "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count",
        "request_time_per_output_token_seconds_count",
        "e2e_request_latency_seconds_count",
    ):
        assert f'\nvllm:{name}{{engine="0",model_name="tiny"}}' in text or f"\nvllm:{name}{{model_name" in text, name


def test_what_runs_and_waits_is_seen(start: Start) -> None:
    server = start(engine={"batch_size": 1}, drafter="none")
    step, held = server.engine.step, iter([True] * 3)
    server.engine.step = lambda: step() if next(held, False) else []  # type: ignore[method-assign]

    async def look() -> dict[str, Any]:
        async with server.client() as client:
            tasks = [asyncio.create_task(client.post(COMPLETIONS, json={"prompt": "a" * 40})) for _ in range(3)]
            while server.loop.tally.generation_tokens < 2 or server.loop.waiting < 2:
                await asyncio.sleep(0.01)
            state = (await client.get("/stats")).json()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return dict(state)

    state = asyncio.run(look())
    assert state["queue"]["running"] == 1
    assert state["queue"]["waiting"] == 2
    assert state["kv"]["held"] > 0


def test_the_state_for_pages(server: Running) -> None:
    server.post(COMPLETIONS, BODY)
    server.post(COMPLETIONS, {**BODY, "speculative": {"k": 0}})
    state = server.get("/stats").json()
    assert state["generation_tokens"] == 160
    assert set(state["by_drafter"]) == {"small_lm", "none"}
    assert state["by_drafter"]["none"]["accepted"] == 0
    drafted = state["by_drafter"]["small_lm"]
    assert drafted["accepted"] == state["speculation"]["accepted"] > 0
    assert drafted["tokens_per_round"] > 1
    assert state["speculation"]["acceptance_by_position"][0] > 0
    assert sum(second["tokens"] for second in state["seconds"]) == 160
    assert state["outcomes"] == {"length": 4}
    assert state["memory"]["predicted_bytes"] > 0
    recent = state["recent"]
    assert [len(request["origins"]) for request in recent] == [40] * 4
    assert all(set(request["origins"]) <= set("arbp") for request in recent)
    assert sum(request["origins"].count("a") for request in recent) == state["speculation"]["accepted"]
    assert {request["drafter"] for request in recent} == {"small_lm", "none"}
    assert "area" not in str(recent)


def test_rates_are_of_the_last_seconds() -> None:
    now = [100.5]
    tally = Tally(clock=lambda: now[0])
    tally._now(99.2).tokens += 30
    tally._now(100.1).tokens += 50
    assert tally.rate(10)["tokens_per_second"] == 3.0  # the second that still runs does not count
    now[0] = 111.0
    assert tally.rate(10)["tokens_per_second"] == 0.0


def test_buckets_are_cumulative() -> None:
    buckets = Buckets((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        buckets.add(value)
    assert buckets.cumulative() == [("1.0", 2), ("2.0", 3), ("+Inf", 4)]
    assert buckets.sum == 12.0


def test_the_log_has_a_line_now_and_then(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        task = asyncio.create_task(report(server.service, 0.2))
        await asyncio.sleep(0)
        async with server.client() as client:
            answer = (await client.post(COMPLETIONS, json=BODY)).json()["metrics"]["speculative_decoding"]
        while len(caplog.records) < 1:
            await asyncio.sleep(0.01)
        task.cancel()
        told = caplog.records[0].getMessage()
        assert f"Mean acceptance length: {answer['mean_acceptance_length']:.2f}" in told
        assert f"Avg Draft acceptance rate: {answer['draft_acceptance_rate']:.1%}" in told
        assert "Generation throughput: 400.0 tokens/s" in told

    with caplog.at_level(logging.INFO, "steeple.serve.reports"):
        asyncio.run(work())
