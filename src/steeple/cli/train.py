"""``steeple train lm``: train a language model from scratch. It shows its own progress."""

from __future__ import annotations

from typing import Any

from steeple.cli.app import TRAIN
from steeple.cli.bridge import Look
from steeple.cli.shell import Shell, command
from steeple.train.lm import LMConfig, train


def run(config: LMConfig, shell: Shell) -> dict[str, Any]:
    """Train, or continue, and say where the model is."""
    result = train(config)
    shell.console.print(f"The model is in {config.out}.", markup=False, soft_wrap=True)
    return result


app = command(LMConfig, run, help=TRAIN["lm"][1], look=Look(short={"out": "-o"}, file=True))
