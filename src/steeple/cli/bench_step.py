"""``steeple bench step``: one decoding step, part by part, against the floor of the machine."""

from __future__ import annotations

from typing import Any

from steeple.bench.step.config import StepConfig
from steeple.bench.step.run import run_step
from steeple.bench.step.table import step_table
from steeple.cli.app import BENCH
from steeple.cli.progress import steps
from steeple.cli.shell import Shell, command


def run(config: StepConfig, shell: Shell) -> dict[str, Any]:
    """Measure and show the table."""
    with steps(shell.console) as progress:
        result = run_step(config, progress)
    shell.console.print(step_table(result))
    return result


app = command(StepConfig, run, help=BENCH["step"][1])
