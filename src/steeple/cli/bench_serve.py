"""``steeple bench serve``: load on an OpenAI-compatible server, and what its users would see of it."""

from __future__ import annotations

from typing import Any

from steeple.bench.serve.config import ServeBenchConfig
from steeple.bench.serve.run import run_serve_bench
from steeple.bench.serve.table import serve_table
from steeple.cli.app import BENCH
from steeple.cli.progress import steps
from steeple.cli.shell import Shell, command


def run(config: ServeBenchConfig, shell: Shell) -> dict[str, Any]:
    """Measure and show the table."""
    with steps(shell.console) as progress:
        result = run_serve_bench(config, progress)
    shell.console.print(serve_table(result))
    return result


def nothing_done(result: dict[str, Any]) -> bool:
    """Whether some point has no completed request, so that its latencies say nothing."""
    return any(not row["completed"] for row in result["rows"])


app = command(ServeBenchConfig, run, help=BENCH["serve"][1], failed=nothing_done)
