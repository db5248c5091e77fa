"""The load test itself: find the server, prepare requests, send them point by point, sum up."""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from steeple.bench.serve import rows
from steeple.bench.serve.client import Server, Serving, open_client, require_httpx
from steeple.bench.serve.config import ServeBenchConfig
from steeple.bench.serve.drive import drive
from steeple.bench.serve.load import Lengths, Point, lengths, points
from steeple.bench.serve.record import Record
from steeple.bench.serve.workload import Lines, Text, calls, is_whole
from steeple.errors import ConfigError
from steeple.evidence.environment import command_line, revision
from steeple.evidence.progress import Progress, silent
from steeple.evidence.prompts import Source, read_source
from steeple.hardware import cpu_name

if TYPE_CHECKING:
    import httpx

SCHEMA_VERSION = 1
LINES = ".jsonl"


def run_serve_bench(
    config: ServeBenchConfig,
    progress: Progress = silent,
    argv: Sequence[str] | None = None,
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> dict[str, Any]:
    """Run the bench; the result is ready for JSON.

    Args:
        progress: told after every request. argv: the command to put on record; the process's own by default.
        transport: how to reach the server; HTTP by default. loop_factory: the event loop, whose clock is the bench's.

    Raises ``ConfigError`` if the server cannot be used; what goes wrong later is counted in the rows.
    """
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        result = runner.run(_run(config, progress, command_line() if argv is None else list(argv), transport))
    if config.plots:
        from steeple.bench.serve.plots import write_serve_plots

        write_serve_plots(result, Path(config.plots))
    return result


@dataclass(frozen=True, slots=True)
class _Bench:
    """What all points have in common."""

    config: ServeBenchConfig
    server: Server
    serving: Serving
    wanted: Lengths
    prompts: Text | Lines


async def _run(
    config: ServeBenchConfig, progress: Progress, argv: list[str], transport: httpx.AsyncBaseTransport | None
) -> dict[str, Any]:
    started = time.perf_counter()
    todo = points(config)
    source = read_source(config.prompts)
    wanted = lengths(config, whole=config.prompts.endswith(LINES))
    async with open_client(config, transport) as client:
        server = Server(config, client)
        serving = await server.find()
        progress("prepare", 0, 1)
        prompts = await _prompts(config, server, serving, source, wanted)
        bench = _Bench(config, server, serving, wanted, prompts)
        await _warm_up(bench, progress)
        found = [await _point(bench, point, progress) for point in todo]
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "serve",
        "command": argv,
        "config": config.shown(),
        "environment": _environment(),
        "server": {"base_url": config.root, "version": serving.version, "model": dict(serving.card)},
        "model_id": serving.model,
        "workload": {
            "source": source.name,
            "sha256": source.digest,
            "prompts": "whole" if is_whole(wanted) else "cut",
            "unit": "characters" if isinstance(prompts, Text) and not prompts.counts_tokens else "tokens",
            "clipped": wanted.clipped,
            "repeated": prompts.rounds,
        },
        "rows": found,
        "seconds": time.perf_counter() - started,
    }


async def _prompts(
    config: ServeBenchConfig, server: Server, serving: Serving, source: Source, wanted: Lengths
) -> Text | Lines:
    """Whole lines, or text in the server's own tokens where it can count them and takes token ids."""
    if is_whole(wanted):
        return Lines(source)
    start = None if config.chat else await server.tokens(serving.model, "", special=True)
    if start is None:
        return Text(source, config.seed)

    async def encode(text: str) -> list[int]:
        tokens = await server.tokens(serving.model, text)
        if not tokens:
            raise ConfigError(f"{config.root}/tokenize does not answer, though it did; look at the server's log.")
        return tokens

    return Text(source, config.seed, encode, start)


async def _warm_up(bench: _Bench, progress: Progress) -> None:
    """Requests one by one. ``ConfigError`` with the server's own words if one fails: then all would."""
    config, clock = bench.config, asyncio.get_running_loop().time
    some = await calls(np.zeros(config.warmup), bench.wanted, bench.prompts, config.seed)
    for call in some:
        record = Record(call.index, clock(), dispatched=clock())
        await bench.server.complete(bench.serving, call, record)
        if record.error:
            raise ConfigError(
                f"A request to {config.root} fails before the test begins: {record.error}: {record.message}. "
                "Correct the settings, or give --warmup 0 to test with failing requests."
            )
        progress("warm up", call.index + 1, config.warmup)


async def _point(bench: _Bench, point: Point, progress: Progress) -> dict[str, Any]:
    todo = await calls(point.times, bench.wanted, bench.prompts, bench.config.seed)
    before = await bench.server.counters()

    def ended(over: int) -> None:
        progress(point.label, over, len(todo))

    driven = await drive(bench.server, bench.serving, todo, point.limit, ended)
    after = await bench.server.counters()
    counted = None if before is None or after is None else after.since(before)
    return rows.row(point, driven, bench.config.objectives, counted, detailed=bench.config.detailed)


def _environment() -> dict[str, Any]:
    """Where the requests come from; the server is described by itself."""
    from steeple import __version__  # the package's own name for itself; it is whole only after import

    return {
        "steeple": __version__,
        "revision": revision(Path(__file__).resolve().parents[2]),
        "python": platform.python_version(),
        "httpx": require_httpx().__version__,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "loadavg": [round(value, 2) for value in os.getloadavg()],
    }
