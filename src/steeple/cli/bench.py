"""``steeple bench``: drafters against plain decoding."""

from __future__ import annotations

from typing import Any

from steeple.bench.config import BenchConfig
from steeple.bench.run import run_bench
from steeple.bench.table import bench_table
from steeple.cli.app import COMMANDS
from steeple.cli.progress import steps
from steeple.cli.shell import Shell, command


def run(config: BenchConfig, shell: Shell) -> dict[str, Any]:
    """Measure and show the table."""
    with steps(shell.console) as progress:
        result = run_bench(config, progress)
    shell.console.print(bench_table(result))
    return result


app = command(BenchConfig, run, help=COMMANDS["bench"][1])
