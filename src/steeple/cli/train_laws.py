"""``steeple train laws``: train a grid of drafts for scaling laws; resumable."""

from __future__ import annotations

from typing import Any

from steeple.cli.bridge import Look
from steeple.cli.shell import Shell, command
from steeple.train.laws import TABLE, train_laws
from steeple.train.laws_config import LawsConfig

HELP = "Train a grid of drafts, sizes by tokens, for scaling laws; resumable."


def run(config: LawsConfig, shell: Shell) -> dict[str, Any]:
    """Train what is missing, cell by cell, and say where the table is."""

    def told(what: str, done: int, total: int) -> None:
        shell.console.print(f"[{done}/{total}] {what}", markup=False, soft_wrap=True)

    table = train_laws(config, told)
    shell.console.print(f"The table is {config.out / TABLE}.", markup=False, soft_wrap=True)
    return table


app = command(LawsConfig, run, help=HELP, look=Look(short={"out": "-o"}, file=True))
