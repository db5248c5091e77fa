"""A process that is killed in mid-batch: whatever was answered stays, the rest is answered once."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from batch_lab import answered, begin, ended, greedy, jsonl, lines, state, text, up, with_batches
from conftest import Start

from steeple import LLM, SamplingParams
from steeple.serve.batches.clerk import Clerk
from steeple.serve.batches.ledger import OPEN, Ledger, Result
from steeple.serve.batches.scan import Scan

COUNT = 12
PROMPTS = [f"def area{i}(" for i in range(COUNT)]
INPUT = [greedy(f"r{i}", prompt, 20) for i, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def expected(offline: LLM) -> list[str]:
    """What the plain offline API writes."""
    return [out.text for out in offline.generate(PROMPTS, SamplingParams(max_tokens=20, ignore_eos=True))]


def image(path: Path, to: Path) -> Path:
    """The files of a database as a kill would leave them at this moment."""
    to.mkdir()
    for name in (path.name, f"{path.name}-wal"):
        shutil.copy(path.with_name(name), to / name)
    return to / path.name


def kept(path: Path) -> dict[int, str]:
    """The answers in an image of a database, by line; opening it is what a restart would do."""
    probe = image(path, path.parent / "probe")
    db = sqlite3.connect(probe)
    found = dict(db.execute("SELECT line, answer FROM tasks WHERE answer IS NOT NULL"))
    db.close()
    return found


async def check(client: httpx.AsyncClient, id: str, expected: list[str]) -> list[str]:
    """The batch ends, every request is answered once and as it must be; the raw lines."""
    batch = await ended(client, id)
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": COUNT, "completed": COUNT, "failed": 0}
    assert batch["error_file_id"] is None
    found = await lines(client, batch["output_file_id"])
    assert [line["custom_id"] for line in found] == [line["custom_id"] for line in INPUT]
    assert [text(line) for line in found] == expected
    files = (await client.get("/v1/files")).json()["data"]
    assert sorted(file["purpose"] for file in files) == ["batch", "batch_output"]
    return (await client.get(f"/v1/files/{batch['output_file_id']}/content")).text.splitlines()


def test_a_kill_in_mid_batch(start: Start, tmp_path: Path, expected: list[str]) -> None:
    """The database as it was in mid-batch is given to a second server, which knows nothing of the first."""
    path, crashed = tmp_path / "db", tmp_path / "crashed"

    async def first() -> tuple[str, Path]:
        server = with_batches(start, path, batch_in_flight=2)
        async with up(server) as client:
            id = (await begin(client, jsonl(INPUT)))["id"]
            await answered(client, id, 4)
            return id, image(path, crashed)

    async def second() -> list[str]:
        server = with_batches(start, copy, {"drafter": "ngram"})
        async with up(server) as client:
            batch = await state(client, id)
            assert batch["status"] in OPEN
            found = await check(client, id, expected)
        assert server.loop.tally.outcomes == {"length": COUNT - len(before)}
        return found

    id, copy = asyncio.run(first())
    before = kept(copy)
    assert 4 <= len(before) < COUNT
    found = asyncio.run(second())
    # What was answered before was not answered again: even its random id is the same.
    assert all(found[line - 1] == answer for line, answer in before.items())


def test_an_orderly_end_keeps_and_continues(start: Start, tmp_path: Path, expected: list[str]) -> None:
    path = tmp_path / "db"

    async def first() -> str:
        async with up(with_batches(start, path, batch_in_flight=2)) as client:
            id = (await begin(client, jsonl(INPUT)))["id"]
            await answered(client, id, 2)
        return str(id)

    async def second() -> None:
        async with up(with_batches(start, path)) as client:
            await check(client, id, expected)

    id = asyncio.run(first())
    db = sqlite3.connect(path)
    assert 2 <= db.execute("SELECT COUNT(answer) FROM tasks").fetchone()[0] < COUNT
    db.close()
    asyncio.run(second())


class Killed(BaseException):
    """Stands for the kill: no handler of ours takes it."""


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (Scan, "end", 1),  # in the middle of validation: some requests are noted
        (Ledger, "begin", 1),
        (Ledger, "record", 3),
        (Ledger, "close", 1),
        (Clerk, "_copy", 1),  # in the middle of writing the output
        (Ledger, "finish", 1),
    ],
)
def test_a_kill_at_any_place(
    start: Start,
    tmp_path: Path,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
    call: int,
) -> None:
    """At the given call of a step the files are put aside as they are; a second server goes on from these."""
    path, crashed = tmp_path / "db", tmp_path / "crashed"
    whole: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def watched(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            image(path, crashed)
        return whole(self, *args)

    async def first() -> str:
        async with up(with_batches(start, path)) as client:
            monkeypatch.setattr(owner, name, watched)
            id = (await begin(client, jsonl(INPUT)))["id"]
            await ended(client, id)
            monkeypatch.undo()
            return str(id)

    async def second() -> None:
        async with up(with_batches(start, crashed / "db")) as client:
            assert (await state(client, id))["status"] in OPEN
            await check(client, id, expected)

    id = asyncio.run(first())
    assert calls >= call
    asyncio.run(second())
    db = sqlite3.connect(crashed / "db")
    assert {state for (state,) in db.execute("SELECT state FROM files")} == {"whole"}
    assert db.execute("SELECT COUNT(*) FROM pieces").fetchone() == (2,)
    db.close()


def test_an_answer_is_kept_once(tmp_path: Path, start: Start, expected: list[str]) -> None:
    """An answer that comes again, or too late, changes neither the output nor the counts."""
    path = tmp_path / "db"

    async def run() -> None:
        server = with_batches(start, path)
        record = Ledger.record

        def twice(self: Ledger, results: list[Result]) -> None:
            record(self, results)
            record(self, [Result(one.batch, one.line, not one.ok, "again") for one in results])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Ledger, "record", twice)
            async with up(server) as client:
                await check(client, (await begin(client, jsonl(INPUT)))["id"], expected)

    asyncio.run(run())


PROGRAM = """
    import sys
    from pathlib import Path

    import uvicorn

    from steeple.draft import drafter_config
    from steeple.engine import EngineConfig, build_engine, load_model
    from steeple.serve import EngineLoop, ServeConfig
    from steeple.serve.app import create_app
    from steeple.serve.batches.config import BatchStoreConfig
    from steeple.serve.batches.routes import add_batches

    model, path, port = sys.argv[1:]
    engine = EngineConfig(kv_tokens=2048, batch_size=4)
    loop = EngineLoop(build_engine(load_model(model, engine), engine, drafter_config("ngram")))
    app = create_app(loop, ServeConfig(served_name="tiny", report_every=0.0))
    add_batches(app, app.state.service, BatchStoreConfig(batch_db=Path(path), batch_in_flight=1))
    with loop:
        uvicorn.run(app, port=int(port), log_level="warning")
"""


class Process:
    """A server of its own process, which can be killed."""

    def __init__(self, model: Path, path: Path, port: int) -> None:
        program = path.with_name("program.py")
        program.write_text(textwrap.dedent(PROGRAM))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(program), str(model), str(path), str(port)]
        self.process = subprocess.Popen(command, env=environment)
        self.url = f"http://127.0.0.1:{port}"

    def wait(self) -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError(f"the server did not come up ({self.process.poll()})")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.slow
def test_kill_9_twice(target_folder: Path, tmp_path: Path, expected: list[str]) -> None:
    path, port = tmp_path / "db", free_port()
    seen: dict[str, Any] = {}

    async def first(url: str) -> str:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            id = str((await begin(client, jsonl(INPUT)))["id"])
            await answered(client, id, 2)
            return id

    async def second(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            before = (await state(client, seen["id"]))["request_counts"]["completed"]
            assert 2 <= before < COUNT
            await answered(client, seen["id"], before + 2)

    async def third(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            found = await check(client, seen["id"], expected)
            for answer in seen["answers"]:
                assert found[int(json.loads(answer)["custom_id"][1:])] == answer

    for act in (first, second, third):
        server = Process(target_folder, path, port)
        try:
            server.wait()
            told = asyncio.run(act(server.url))
            seen["id"] = told or seen["id"]
        finally:
            server.kill()
        if act is not third:
            shutil.rmtree(tmp_path / "probe", ignore_errors=True)
            seen["answers"] = kept(path).values()
