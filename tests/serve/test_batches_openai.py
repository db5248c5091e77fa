"""The ``openai`` client's own calls for files and batches, over a socket."""

from __future__ import annotations

import asyncio
import io
import json
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from batch_lab import CHAT, COMPLETIONS, ENDED, greedy, jsonl, with_batches
from conftest import Start, listening

from steeple import LLM, SamplingParams

PROMPTS = ["def area(", "class Box:", "import os"]


def wait(client: openai.OpenAI, id: str) -> Any:
    until = time.monotonic() + 60
    while (batch := client.batches.retrieve(id)).status not in ENDED:
        assert time.monotonic() < until
        time.sleep(0.02)
    return batch


def test_the_clients_calls_work(start: Start, tmp_path: Path, offline: LLM) -> None:
    expected = [out.text for out in offline.generate(PROMPTS, SamplingParams(max_tokens=6, ignore_eos=True))]
    server = with_batches(start, tmp_path / "db")
    with listening(server) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        data = io.BytesIO(jsonl(greedy(f"r{i}", prompt) for i, prompt in enumerate(PROMPTS)))
        file = client.files.create(
            file=("lines.jsonl", data), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert file.expires_at == file.created_at + 3600
        made = client.batches.create(
            input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h", metadata={"a": "b"}
        )
        batch = wait(client, made.id)
        assert batch.status == "completed"
        assert batch.request_counts.model_dump() == {"total": 3, "completed": 3, "failed": 0}
        assert batch.metadata == {"a": "b"}
        content = client.files.content(batch.output_file_id).text.splitlines()
        found = [json.loads(line) for line in content]
        assert [line["response"]["body"]["choices"][0]["text"] for line in found] == expected
        assert [line["custom_id"] for line in found] == ["r0", "r1", "r2"]
        assert [one.id for one in client.batches.list(limit=1)] == [batch.id]
        assert {one.id for one in client.files.list(limit=1)} == {file.id, batch.output_file_id}
        assert client.files.retrieve(file.id) == file
        assert client.files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)
        with pytest.raises(openai.ConflictError):
            client.batches.cancel(batch.id)
        with pytest.raises(openai.BadRequestError):
            client.files.create(file=("a", b"x"), purpose="assistants")


def test_a_batch_is_cancelled(start: Start, tmp_path: Path) -> None:
    server = with_batches(start, tmp_path / "db")
    with listening(server) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 150, "ignore_eos": True}
        data = jsonl({"custom_id": f"{i}", "url": CHAT, "method": "POST", "body": body} for i in range(12))
        file = client.files.create(file=data, purpose="batch")
        id = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h").id
        assert client.batches.cancel(id).status in ("cancelling", "cancelled")
        assert wait(client, id).status == "cancelled"


def test_the_asynchronous_client(start: Start, tmp_path: Path) -> None:
    async def run(url: str) -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            file = await client.files.create(file=jsonl([greedy("a", "x")]), purpose="batch")
            made = await client.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h")
            async with asyncio.timeout(60):
                while (batch := await client.batches.retrieve(made.id)).status != "completed":
                    await asyncio.sleep(0.02)
            assert batch.output_file_id is not None
            assert b'"custom_id":"a"' in (await client.files.content(batch.output_file_id)).content

    with listening(with_batches(start, tmp_path / "db")) as url:
        asyncio.run(run(url))
