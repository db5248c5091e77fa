"""``steeple bench padded``: batches of any ``transformers`` model, with and without drafts, schedule by schedule."""

from __future__ import annotations

from typing import Any

from steeple.bench.padded.config import PaddedBenchConfig
from steeple.bench.padded.run import run_padded_bench
from steeple.bench.padded.table import padded_table
from steeple.cli.app import BENCH
from steeple.cli.progress import steps
from steeple.cli.shell import Shell, command


def run(config: PaddedBenchConfig, shell: Shell) -> dict[str, Any]:
    """Measure and show the table."""
    with steps(shell.console) as progress:
        result = run_padded_bench(config, progress)
    shell.console.print(padded_table(result))
    return result


app = command(PaddedBenchConfig, run, help=BENCH["padded"][1])
