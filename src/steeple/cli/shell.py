"""What every command does around its work: logs, JSON, errors, exit status. People read stderr, programs stdout."""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.logging import RichHandler

from steeple.cli.bridge import Look, build, given, leaves, signature
from steeple.errors import SteepleError, StorageError

C = TypeVar("C")
FAILED, USAGE, INTERRUPTED = 1, 2, 130
STDOUT = "-"
FILE_WIDTH = 240
LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)
TALKERS = ("torchao", "torch.utils._pytree")


def speaker() -> Console:
    """The console on stderr. A terminal's width limits tables; a file or a pipe gets every column whole."""
    console = Console(stderr=True, highlight=False)
    return console if console.is_terminal else Console(stderr=True, highlight=False, width=FILE_WIDTH)


@dataclass(frozen=True, slots=True)
class Shell:
    """Where a command speaks. Args: console on stderr; verbose counts ``-v``; json is a file, ``-`` or nothing."""

    console: Console
    verbose: int
    json: str | None

    @staticmethod
    def open(verbose: int, json: str | None) -> Shell:
        """Set up the logs. ``StorageError`` if the JSON could not be written in the end."""
        shell = Shell(speaker(), verbose, json)
        logger = logging.getLogger("steeple")
        logger.setLevel(LEVELS[min(verbose, len(LEVELS) - 1)])
        logger.handlers = [RichHandler(console=shell.console, show_path=False, show_time=verbose > 0)]
        # What torchao says when it is imported concerns its own GPU kernels; transformers imports it wherever it lies.
        for talker in TALKERS:
            logging.getLogger(talker).setLevel(logging.WARNING if verbose else logging.ERROR)
        if json is not None and json != STDOUT and not os.access(Path(json).absolute().parent, os.W_OK):
            raise StorageError(f"--json {json}: its folder does not exist or cannot be written; make it first.")
        return shell

    def emit(self, result: dict[str, Any]) -> None:
        """Write the result where ``--json`` says."""
        if self.json is None:
            return
        text = json.dumps(result, indent=2, ensure_ascii=False, default=str) + "\n"
        if self.json == STDOUT:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        try:
            Path(self.json).write_text(text, encoding="utf-8")
        except OSError as error:
            sys.stdout.write(text)  # hours of work may be in it
            raise StorageError(
                f"--json {self.json} cannot be written ({error.strerror}); the result is on stdout instead."
            ) from error

    def complain(self, error: BaseException) -> None:
        """One clean message; with ``-v`` where it came from."""
        if self.verbose:
            self.console.print_exception()
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        self.console.print("[bold red]error[/]", end=" ")
        self.console.print(f"{error}{notes}", markup=False, soft_wrap=True)


Run = Callable[[C, Shell], dict[str, Any]]


def command(
    settings: type[C],
    run: Run[C],
    *,
    help: str,
    look: Look | None = None,
    failed: Callable[[dict[str, Any]], bool] | None = None,
) -> typer.Typer:
    """A command whose options are the fields of ``settings``.

    Args:
        run: the work, from settings to a result in JSON types; it speaks through the shell.
        failed: whether a result means exit status 1.
    """
    look = look or Look()
    found = leaves(settings)

    def call(typer_context: typer.Context, **values: Any) -> None:
        def explicit(name: str) -> bool:
            source = typer_context.get_parameter_source(name)
            return source is not None and source.name == "COMMANDLINE"

        def work(shell: Shell) -> dict[str, Any]:
            return run(build(settings, given(found, look, values, explicit)), shell)

        raise typer.Exit(_status(values["verbosity"], values["json_file"], work, failed))

    parameters = [
        inspect.Parameter("typer_context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        *signature(found, look),
        *_common(look),
    ]
    vars(call)["__signature__"] = inspect.Signature(parameters)
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=help)(call)
    return app


def _common(look: Look) -> list[inspect.Parameter]:
    json_file = typer.Option(None, "--json", metavar="FILE|-", help="write the result as JSON; - is stdout")
    verbose = typer.Option(0, "--verbose", "-v", count=True, help="say more; twice: everything", show_default=False)
    config = typer.Option(None, "--config", help="TOML or JSON file with settings; options win over it")
    keyword = inspect.Parameter.KEYWORD_ONLY
    file = [inspect.Parameter("config_file", keyword, default=config, annotation=Path | None)] if look.file else []
    return [
        *file,
        inspect.Parameter("json_file", keyword, default=json_file, annotation=str | None),
        inspect.Parameter("verbosity", keyword, default=verbose, annotation=int),
    ]


def _status(
    verbose: int,
    json_file: str | None,
    work: Callable[[Shell], dict[str, Any]],
    failed: Callable[[dict[str, Any]], bool] | None,
) -> int:
    """Do the work; the exit status says how it went."""
    shell = Shell(speaker(), verbose, None)
    try:
        shell = Shell.open(verbose, json_file)
        result = work(shell)
        shell.emit(result)
    except SteepleError as error:
        shell.complain(error)
        return USAGE
    except KeyboardInterrupt as error:
        shell.console.print(str(error) or "Interrupted.", markup=False, soft_wrap=True)
        return INTERRUPTED
    return FAILED if failed is not None and failed(result) else 0
