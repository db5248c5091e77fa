"""``steeple bench select``: drafters chosen per request, against each of them alone and against an oracle."""

from __future__ import annotations

from typing import Any

from steeple.bench.select.config import SelectConfig
from steeple.bench.select.run import run_select
from steeple.bench.select.table import select_table
from steeple.cli.app import BENCH
from steeple.cli.progress import steps
from steeple.cli.shell import Shell, command

HELP = "Time drafters chosen per request against each of them alone, and an oracle."


def run(config: SelectConfig, shell: Shell) -> dict[str, Any]:
    """Measure and show the table."""
    with steps(shell.console) as progress:
        result = run_select(config, progress)
    shell.console.print(select_table(result))
    return result


app = command(SelectConfig, run, help=BENCH["select"][1] if "select" in BENCH else HELP)
