"""What the tests of batch files share: a server with a database, and a client's way through a batch."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import httpx
from conftest import Running, Start

from steeple.serve.batches.config import BatchStoreConfig
from steeple.serve.batches.routes import add_batches

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


def with_batches(start: Start, path: Path, settings: dict[str, Any] | None = None, **config: Any) -> Running:
    """A server that keeps batches in ``path``. Args: settings: of the server; config: of the batches."""
    server = start(**{"drafter": "none", **(settings or {})})
    add_batches(server.app, server.service, BatchStoreConfig(batch_db=path, **config))
    return server


@contextlib.asynccontextmanager
async def up(server: Running) -> AsyncIterator[httpx.AsyncClient]:
    """The application between its startup and its shutdown, and a client of it."""
    async with server.app.router.lifespan_context(server.app), server.client() as client:
        yield client


def greedy(name: str, prompt: str, tokens: int = 6, **more: Any) -> dict[str, Any]:
    """A line of a batch's input."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, **more}
    return {"custom_id": name, "method": "POST", "url": COMPLETIONS, "body": body}


def jsonl(lines: Iterable[Any]) -> bytes:
    """Lines of an input."""
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


async def upload(client: httpx.AsyncClient, data: bytes, **options: Any) -> dict[str, Any]:
    """A file that is taken."""
    files = {"file": ("lines.jsonl", data)}
    answer = await client.post("/v1/files", files=files, data={"purpose": "batch"}, **options)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def begin(client: httpx.AsyncClient, data: bytes, endpoint: str = COMPLETIONS, **more: Any) -> dict[str, Any]:
    """A batch over ``data``."""
    file = await upload(client, data)
    body = {"input_file_id": file["id"], "endpoint": endpoint, "completion_window": "24h", **more}
    answer = await client.post("/v1/batches", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "validating"
    return answer.json()


async def state(client: httpx.AsyncClient, id: str) -> dict[str, Any]:
    """The batch as it stands."""
    answer = await client.get(f"/v1/batches/{id}")
    assert answer.status_code == 200, answer.text
    return answer.json()


async def ended(client: httpx.AsyncClient, id: str) -> dict[str, Any]:
    """The batch once it has ended."""
    async with asyncio.timeout(60):
        while (batch := await state(client, id))["status"] not in ENDED:
            await asyncio.sleep(0.02)
    return batch


async def answered(client: httpx.AsyncClient, id: str, least: int) -> dict[str, Any]:
    """The batch once it has so many answers."""
    async with asyncio.timeout(60):
        while (batch := await state(client, id))["request_counts"]["completed"] < least:
            await asyncio.sleep(0.005)
    return batch


async def lines(client: httpx.AsyncClient, file: str | None) -> list[dict[str, Any]]:
    """The lines of an output, none if there is no file."""
    if file is None:
        return []
    answer = await client.get(f"/v1/files/{file}/content")
    assert answer.status_code == 200
    return [json.loads(line) for line in answer.content.splitlines()]


def text(line: dict[str, Any]) -> str:
    """The text of a completion's line."""
    assert line["error"] is None
    assert line["response"]["status_code"] == 200
    return line["response"]["body"]["choices"][0]["text"]
