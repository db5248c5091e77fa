"""``steeple serve``: the server, with its address on stderr, until Ctrl-C."""

from __future__ import annotations

import logging
from typing import Any

from steeple.cli.app import COMMANDS
from steeple.cli.bridge import Look
from steeple.cli.shell import Shell, command
from steeple.llm import LLM
from steeple.serve.config import ServeConfig
from steeple.serve.reports import JsonLines
from steeple.serve.server import serve


def run(config: ServeConfig, shell: Shell) -> dict[str, Any]:
    """Serve, and say where."""
    _log(config)

    def tell(address: str, llm: LLM) -> None:
        drafter = llm.engine.drafter
        k = f", k = {drafter.needs.nodes}" if drafter is not None else ""
        shell.console.print(
            f"Serving {config.name} (drafter {config.drafter}{k}, {config.engine.dtype}) at {address}\n"
            f"Try: curl {address}/v1/completions -H 'Content-Type: application/json' "
            f'-d \'{{"prompt": "def area(", "max_tokens": 32}}\'\n'
            "Ctrl-C ends it.",
            markup=False,
            soft_wrap=True,
        )

    return serve(config, tell)


def _log(config: ServeConfig) -> None:
    """The server's own lines are for reading, so they show without ``-v`` too."""
    logger = logging.getLogger("steeple")
    quiet = logger.level > logging.INFO
    logging.getLogger("steeple.serve").setLevel(logging.INFO if quiet else logger.level)
    if quiet:  # a line for every request only on demand
        logging.getLogger("steeple.serve.middleware").setLevel(logging.WARNING)
    if config.log_format == "json":
        handler = logging.StreamHandler()
        handler.setFormatter(JsonLines())
        logger.handlers = [handler]
        logging.getLogger("steeple.serve.middleware").setLevel(logging.INFO)


app = command(
    ServeConfig,
    run,
    help=COMMANDS["serve"][1],
    look=Look(repeated=("cors_origins",), file=True),
)
