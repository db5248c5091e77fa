"""``bench serve`` over real sockets: uvicorn, chunked streams, a connection that breaks, Prometheus' own writer."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from prometheus_client import CollectorRegistry, Counter, generate_latest
from scripted_server import DONE, text, usage
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from steeple.bench.serve.config import ServeBenchConfig
from steeple.bench.serve.run import run_serve_bench

TOKENS = 3


class Fake:
    """Answers ``TOKENS`` tokens, two in the last chunk; refuses every fourth prompt, breaks off every fourth after."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
        self.registry = registry
        self.counters = {name: Counter(f"vllm:spec_decode_{name}", name, registry=registry) for name in names}
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/metrics", self.metrics),
            ]
        )

    async def models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "fake", "object": "model", "owned_by": "vllm"}]})

    async def metrics(self, _request: Request) -> Response:
        return Response(generate_latest(self.registry), media_type="text/plain; version=0.0.4")

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        number = int(body["prompt"].split()[1])
        if number % 4 == 1:
            return JSONResponse({"error": {"message": "full"}}, 429, {"Retry-After": "1"})
        return StreamingResponse(self.stream(breaks=number % 4 == 2), media_type="text/event-stream")

    async def stream(self, *, breaks: bool) -> AsyncIterator[bytes]:
        first = text("\u2028", count=1)
        yield first[:9]  # events do not respect packets
        yield first[9:]
        if breaks:
            raise ConnectionError("this server breaks off")
        yield text("bc", "length", count=TOKENS) + usage(TOKENS) + DONE
        for name, step in (("num_drafts", 1), ("num_draft_tokens", 2), ("num_accepted_tokens", 1)):
            self.counters[name].inc(step)


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of a server in a thread of its own."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    started = threading.Event()
    startup = server.startup

    async def tell(*args: Any, **kwargs: Any) -> None:
        await startup(*args, **kwargs)
        started.set()

    server.startup = tell  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert started.wait(30)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"prompt {i}"}) + "\n" for i in range(24)))
    return str(file)


def test_over_real_connections(prompts: str) -> None:
    with served(Fake().app) as address:
        config = ServeBenchConfig(
            base_url=address, prompts=prompts, requests=8, rate=(200.0,), concurrency=(3, 0), warmup=1, timeout=60.0
        )
        result = run_serve_bench(config, argv=["x"])
    # the warm-up took prompt 0, so that prompts 1 to 8 and 9 to 16 follow
    for row in result["rows"]:
        assert row["errors"] == {"http 429": 2, "broken stream": 2}
        assert (row["completed"], row["failed"]) == (4, 4)
        assert (row["total_output_tokens"], row["total_input_tokens"]) == (4 * TOKENS, 4 * 5)
        assert row["itl_per_token_requests"] == 4
        assert 0 < row["p50_ttft_from_send_ms"] <= row["p50_ttft_ms"] <= row["p50_e2el_ms"]
        assert (row["acceptance_from"], row["tau"], row["spec_decode_num_drafts"]) == ("metrics", 2.0, 4)
    assert result["rows"][0]["max_concurrent_requests"] <= 3
    assert result["server"]["model"]["owned_by"] == "vllm"
    assert result["server"]["version"] is None
