"""Batches through their whole life: equal to HTTP, bad lines, cancelling, expiry, priorities, failures."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from batch_lab import CHAT, COMPLETIONS, answered, begin, ended, greedy, jsonl, lines, state, text, up, with_batches
from conftest import Start

from steeple import LLM, SamplingParams
from steeple.serve.batches import recorder, runner
from steeple.serve.batches.ledger import Ledger

PROMPTS = ["def area(", "class Box:", "for index in range(10):\n", "import os", "return x"]
COMPLETION_BODIES = [
    {"prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0},
    {"prompt": PROMPTS[:2], "n": 2, "max_tokens": 5, "temperature": 0.7, "seed": 3, "logprobs": 2},
    {"prompt": [5, 9, 200], "max_tokens": 8, "temperature": 0, "stop_token_ids": [66]},
    {"prompt": PROMPTS[0], "temperature": 0, "metrics": True},
    {"prompt": PROMPTS[0], "model": "other"},
    {"prompt": PROMPTS[0], "max_tokens": 10**6},
    {"prompt": PROMPTS[0], "temperature": "hot"},
    {"prompt": PROMPTS[0], "best_of": 2},
    {"prompt": "half a pair \ud800"},
    {},
]
JSON = {"Content-Type": "application/json"}
TALK = [{"role": "user", "content": "print the index"}]
CHAT_BODIES = [
    {"messages": TALK, "max_tokens": 6, "temperature": 0},
    {"messages": TALK, "max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 2},
    {"messages": TALK, "tools": [{"type": "function"}]},
    {"messages": []},
]


def same(answer: Any) -> Any:
    """An answer without what differs between two that are equal."""
    return {key: value for key, value in answer.items() if key not in ("id", "created")}


@pytest.mark.parametrize(("endpoint", "bodies"), [(COMPLETIONS, COMPLETION_BODIES), (CHAT, CHAT_BODIES)])
def test_a_batch_says_what_http_says(start: Start, tmp_path: Path, endpoint: str, bodies: list[Any]) -> None:
    server = with_batches(start, tmp_path / "db")
    inputs = [{"custom_id": f"c{i}", "method": "POST", "url": endpoint, "body": body} for i, body in enumerate(bodies)]

    async def run() -> None:
        async with up(server) as client:
            batch = await ended(client, (await begin(client, jsonl(inputs), endpoint))["id"])
            found = await lines(client, batch["output_file_id"]) + await lines(client, batch["error_file_id"])
            assert sorted(line["custom_id"] for line in found) == sorted(line["custom_id"] for line in inputs)
            for line in found:
                body = jsonl([bodies[int(line["custom_id"][1:])]])
                direct = await client.post(endpoint, content=body, headers=JSON)
                assert line["response"]["status_code"] == direct.status_code
                assert same(line["response"]["body"]) == same(direct.json())
            good = sum(line["response"]["status_code"] == 200 for line in found)
            assert 0 < good < len(found)
            assert batch["request_counts"] == {"total": len(found), "completed": good, "failed": len(found) - good}
            assert len(await lines(client, batch["output_file_id"])) == good

    asyncio.run(run())
    server.settle()


def test_a_batch_has_openais_fields(start: Start, tmp_path: Path, offline: LLM) -> None:
    server = with_batches(start, tmp_path / "db")
    expected = [out.text for out in offline.generate(PROMPTS, SamplingParams(max_tokens=6, ignore_eos=True))]
    inputs = [greedy(f"r{i}", prompt) for i, prompt in enumerate(PROMPTS)]
    inputs[2]["body"]["stream"] = True

    async def run() -> None:
        async with up(server) as client:
            metadata = {"who": "me"}
            more = {"metadata": metadata, "output_expires_after": {"anchor": "created_at", "seconds": 7200}}
            batch = await ended(client, (await begin(client, jsonl(inputs), **more))["id"])
            assert batch["status"] == "completed"
            assert batch["object"] == "batch"
            assert batch["metadata"] == metadata
            assert batch["completion_window"] == "24h"
            assert batch["endpoint"] == COMPLETIONS
            assert batch["expires_at"] == batch["created_at"] + 86400
            order = [batch[f"{name}_at"] for name in ("created", "in_progress", "finalizing", "completed")]
            assert order == sorted(order)
            assert all(batch[f"{name}_at"] is None for name in ("failed", "expired", "cancelling", "cancelled"))
            assert batch["errors"] is None
            assert batch["request_counts"] == {"total": 5, "completed": 4, "failed": 1}
            # in the order of the input, whoever was first
            output = await lines(client, batch["output_file_id"])
            assert [line["custom_id"] for line in output] == ["r0", "r1", "r3", "r4"]
            assert [text(line) for line in output] == [*expected[:2], *expected[3:]]
            (bad,) = await lines(client, batch["error_file_id"])
            assert bad["custom_id"] == "r2"
            assert bad["response"]["body"]["error"]["param"] == "stream"
            file = (await client.get(f"/v1/files/{batch['output_file_id']}")).json()
            assert file["purpose"] == "batch_output"
            assert file["expires_at"] == file["created_at"] + 7200

    asyncio.run(run())


def test_validation_fails_before_anything_runs(start: Start, tmp_path: Path) -> None:
    server = with_batches(start, tmp_path / "db")
    data = jsonl([greedy("a", "x"), greedy("b", "x")]) + b"no json\n\n" + jsonl([greedy("a", "y")])

    async def run() -> None:
        async with up(server) as client:
            batch = await ended(client, (await begin(client, data))["id"])
            assert batch["status"] == "failed"
            assert batch["failed_at"] is not None
            assert batch["output_file_id"] is batch["error_file_id"] is None
            errors = batch["errors"]
            assert errors["object"] == "list"
            assert [(e["code"], e["line"]) for e in errors["data"]] == [
                ("invalid_json_line", 3),
                ("duplicate_custom_id", 5),
            ]
            assert "line 1" in errors["data"][1]["message"]

    asyncio.run(run())
    assert not server.loop.tally.outcomes


def test_cancelling_keeps_what_is_done(start: Start, tmp_path: Path) -> None:
    server = with_batches(start, tmp_path / "db", batch_in_flight=1)
    inputs = [greedy(f"r{i}", PROMPTS[0], 4) for i in range(2)] + [greedy(f"long{i}", "x", 200) for i in range(6)]

    async def run() -> None:
        async with up(server) as client:
            id = (await begin(client, jsonl(inputs)))["id"]
            await answered(client, id, 2)
            first = (await client.post(f"/v1/batches/{id}/cancel")).json()
            assert first["status"] == "cancelling"
            batch = await ended(client, id)
            assert batch["status"] == "cancelled"
            assert batch["cancelling_at"] <= batch["cancelled_at"]
            output, errors = [await lines(client, batch[f"{kind}_file_id"]) for kind in ("output", "error")]
            assert len(output) == batch["request_counts"]["completed"] < len(inputs)
            assert [line["custom_id"] for line in output + errors] == [line["custom_id"] for line in inputs]
            assert all(line["response"] is None for line in errors)
            assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}
            assert batch["request_counts"]["failed"] == len(errors)
            again = await client.post(f"/v1/batches/{id}/cancel")
            assert again.json() == batch
            done = await ended(client, (await begin(client, jsonl(inputs[:1])))["id"])
            refused = await client.post(f"/v1/batches/{done['id']}/cancel")
            assert refused.status_code == 409

    asyncio.run(run())
    server.settle()
    assert server.loop.tally.outcomes["cancelled"] == 1


def test_a_batch_that_is_late_expires(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "db"
    inputs = [greedy("quick", PROMPTS[0], 4)] + [greedy(f"long{i}", "x", 200) for i in range(6)]

    async def first() -> str:
        async with up(with_batches(start, path, batch_in_flight=1)) as client:
            id = (await begin(client, jsonl(inputs)))["id"]
            await answered(client, id, 1)
        return str(id)

    id = asyncio.run(first())
    with sqlite3.connect(path) as db:
        db.execute("UPDATE batches SET expires_at = created_at")
    db.close()

    async def second() -> None:
        async with up(with_batches(start, path)) as client:
            batch = await ended(client, id)
            assert batch["status"] == "expired"
            assert batch["expired_at"] >= batch["expires_at"]
            assert (await lines(client, batch["output_file_id"]))[0]["custom_id"] == "quick"
            errors = await lines(client, batch["error_file_id"])
            assert {line["error"]["code"] for line in errors} == {"batch_expired"}
            counts = batch["request_counts"]
            assert counts["failed"] == len(errors)
            assert counts["completed"] + counts["failed"] == counts["total"] == len(inputs)

    asyncio.run(second())


def test_live_requests_find_rows(start: Start, tmp_path: Path) -> None:
    server = with_batches(start, tmp_path / "db")  # 4 rows, of which batches take 2
    most = 0

    async def run() -> None:
        nonlocal most
        async with up(server) as client:
            id = (await begin(client, jsonl(greedy(f"r{i}", "x", 120) for i in range(8))))["id"]
            await answered(client, id, 1)
            for _ in range(5):
                most = max(most, server.loop.running)
                live = await client.post(COMPLETIONS, json=greedy("", "y", 2)["body"])
                assert live.status_code == 200
            assert (await state(client, id))["status"] == "in_progress"
            assert (await ended(client, id))["request_counts"]["completed"] == 8

    asyncio.run(run())
    assert 1 <= most <= 2


def test_a_step_that_fails_costs_nothing(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = with_batches(start, tmp_path / "db")
    step, calls = server.engine.step, 0

    def failing() -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise ValueError("a fault")
        return step()

    monkeypatch.setattr(server.engine, "step", failing)

    async def run() -> None:
        async with up(server) as client:
            batch = await ended(client, (await begin(client, jsonl(greedy(f"r{i}", "x", 10) for i in range(4))))["id"])
            assert batch["request_counts"] == {"total": 4, "completed": 4, "failed": 0}

    asyncio.run(run())
    assert server.loop.tally.failures == 1


def test_a_request_that_always_fails_is_given_up(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = with_batches(start, tmp_path / "db", batch_in_flight=1)
    step = server.engine.step

    def failing() -> Any:
        if any(request.prompt_len == 3 for request in server.engine.scheduler.waiting):
            raise ValueError("a fault")
        return step()

    monkeypatch.setattr(server.engine, "step", failing)
    inputs = [greedy("good", "x", 4), greedy("bad", [1, 2, 3], 4), greedy("better", "x", 4)]

    async def run() -> None:
        async with up(server) as client:
            batch = await ended(client, (await begin(client, jsonl(inputs)))["id"])
            (bad,) = await lines(client, batch["error_file_id"])
            assert (bad["custom_id"], bad["response"]["status_code"]) == ("bad", 500)
            assert batch["request_counts"] == {"total": 3, "completed": 2, "failed": 1}

    asyncio.run(run())
    assert server.loop.tally.failures == runner.TRIES


def test_a_full_disk_is_waited_out(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = with_batches(start, tmp_path / "db")
    record, calls = Ledger.record, 0

    def failing(self: Ledger, results: Any) -> None:
        nonlocal calls
        calls += 1
        if calls <= 2:
            raise sqlite3.OperationalError("database or disk is full")
        record(self, results)

    monkeypatch.setattr(Ledger, "record", failing)
    monkeypatch.setattr(recorder, "AGAIN", 0.01)

    async def run() -> None:
        async with up(server) as client:
            batch = await ended(client, (await begin(client, jsonl(greedy(f"r{i}", "x") for i in range(4))))["id"])
            assert [line["custom_id"] for line in await lines(client, batch["output_file_id"])] == [
                f"r{i}" for i in range(4)
            ]

    asyncio.run(run())
    assert calls > 2


def test_time_limits_are_a_requests_own(start: Start, tmp_path: Path) -> None:
    server = with_batches(start, tmp_path / "db", settings={"timeout": 0.001})
    inputs = [greedy("a", "x", 50), greedy("b", "x", 200, timeout=0.001)]

    async def run() -> None:
        async with up(server) as client:
            batch = await ended(client, (await begin(client, jsonl(inputs)))["id"])
            assert [line["custom_id"] for line in await lines(client, batch["output_file_id"])] == ["a"]
            (late,) = await lines(client, batch["error_file_id"])
            assert (late["custom_id"], late["response"]["status_code"]) == ("b", 408)

    asyncio.run(run())
