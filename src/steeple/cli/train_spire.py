"""``steeple train spire``: train a draft that reads its target's cache. It shows its own progress."""

from __future__ import annotations

from typing import Any

from steeple.cli.bridge import Look
from steeple.cli.shell import Shell, command
from steeple.train.spire import train_spire
from steeple.train.spire_config import SpireConfig


def run(config: SpireConfig, shell: Shell) -> dict[str, Any]:
    """Train, or continue, and say where the draft is."""
    result = train_spire(config)
    shell.console.print(f"The draft is in {config.out}.", markup=False, soft_wrap=True)
    return result


app = command(
    SpireConfig,
    run,
    help="Train a draft that reads its target's cache; resumable.",
    look=Look(short={"out": "-o"}, file=True),
)
