"""A server on the tiny random model: in this process by ASGI, or behind a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from safetensors.torch import load_file, save_file

from steeple import LLM
from steeple.draft import drafter_config
from steeple.engine import EngineConfig, LoadedModel, build_engine, load_model
from steeple.serve import EngineLoop, ServeConfig
from steeple.serve.app import create_app

ENGINE = EngineConfig(kv_tokens=2048, batch_size=4)


@pytest.fixture(scope="session")
def loaded(target_folder: Path) -> LoadedModel:
    """The target, loaded once."""
    return load_model(str(target_folder), ENGINE)


@pytest.fixture(scope="session")
def offline(loaded: LoadedModel) -> LLM:
    """The offline API, plain: what the server must equal."""
    return LLM(loaded, config=ENGINE)


class Running:
    """A server in this process, reached without a socket.

    Args: engine: settings of the engine; others are the server's.
    """

    def __init__(self, loaded: LoadedModel, engine: dict[str, Any] | None = None, **settings: Any) -> None:
        self.config = ServeConfig(**{"served_name": "tiny", "report_every": 0.0, **settings})
        method = drafter_config(self.config.drafter, k=self.config.k)
        self.engine = build_engine(loaded, replace(ENGINE, **(engine or {})), method)
        self.loop = EngineLoop(self.engine, queue_size=self.config.queue_size, retry_after=self.config.retry_after)
        self.app = create_app(self.loop, self.config)
        self.service = self.app.state.service

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            yield client

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            async with self.client() as client:
                return await client.post(path, json=body, **options)

        return asyncio.run(send())

    def get(self, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            async with self.client() as client:
                return await client.get(path, **options)

        return asyncio.run(send())

    def settle(self) -> None:
        """Wait until nothing runs, then see that nothing is held."""
        until = time.monotonic() + 20
        while (self.loop.running or self.loop.waiting) and time.monotonic() < until:
            time.sleep(0.005)
        self.engine.check_integrity()


def events(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end as OpenAI's do."""
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


Start = Callable[..., Running]


@pytest.fixture
def start(loaded: LoadedModel) -> Iterator[Start]:
    """Start servers; they are closed at the end, and must hold nothing then."""
    open_: list[Running] = []

    def make(**settings: Any) -> Running:
        server = Running(loaded, **settings)
        server.loop.start()
        open_.append(server)
        return server

    yield make
    for server in open_:
        server.loop.close(0.0)
        if not server.loop.trouble:
            server.engine.check_integrity()


@pytest.fixture(scope="session")
def near_folder(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target with noise on its weights: a draft model that is right now and then."""
    folder = shutil.copytree(target_folder, tmp_path_factory.mktemp("near") / "model")
    weights = load_file(folder / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    for name, tensor in sorted(weights.items()):
        weights[name] = tensor + 0.15 * tensor.std() * torch.randn(tensor.shape, generator=noise)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def server(start: Start, near_folder: Path) -> Running:
    """A server whose drafts are accepted now and then."""
    return start(drafter=f"small_lm:{near_folder}", k=3)


@contextlib.contextmanager
def listening(running: Running) -> Iterator[str]:
    """A real uvicorn in a thread; yields its address."""
    config = uvicorn.Config(running.app, port=0, log_config=None, ws="none", timeout_graceful_shutdown=5)
    web = uvicorn.Server(config)
    thread = threading.Thread(target=web.run)
    thread.start()
    try:
        while not web.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{web.servers[0].sockets[0].getsockname()[1]}"
    finally:
        web.should_exit = True
        thread.join()
