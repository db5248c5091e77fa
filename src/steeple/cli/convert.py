"""``steeple convert``: a checkpoint of another program to a Hugging Face folder."""

from __future__ import annotations

from typing import Any

from steeple.cli.app import COMMANDS
from steeple.cli.bridge import Look
from steeple.cli.shell import Shell, command
from steeple.convert import ConvertConfig, convert


def run(config: ConvertConfig, shell: Shell) -> dict[str, Any]:
    """Convert and say what came out."""
    result = convert(config)
    shell.console.print(
        f"{result['out']}: {result['parameters']:,} parameters in {result['dtype']}, {result['layers']} layers, "
        f"vocabulary {result['vocab_size']}, context {result['context']} (from {result['format']})",
        markup=False,
        soft_wrap=True,
    )
    return result


app = command(ConvertConfig, run, help=COMMANDS["convert"][1], look=Look(positional=("source", "out")))
