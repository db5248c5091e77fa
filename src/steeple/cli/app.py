"""``steeple``: the list of commands. A command's module is imported when the command is called, not before."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

COMMANDS = {
    "demo": ("steeple.cli.demo", "Generate real prompts twice, plainly and speculatively, and compare."),
    "generate": ("steeple.cli.generate", "Complete a file of prompts, faster and with the same tokens."),
    "bench": ("steeple.cli.bench", "Measure drafters against plain decoding, in one process."),
    "plan": ("steeple.cli.plan", "Say what pays for a model on a machine before anything is tried."),
    "serve": ("steeple.cli.serve", "Serve a model over HTTP, as OpenAI's API, with a live page."),
    "verify": ("steeple.cli.verify", "Prove on this machine that speculation changes nothing."),
    "convert": ("steeple.cli.convert", "Turn a GGUF or llama2.c checkpoint into a Hugging Face folder."),
}
TRAIN = {
    "lm": ("steeple.cli.train", "Train a language model from scratch; resumable."),
    "spire": ("steeple.cli.train_spire", "Train a draft that reads its target's cache; resumable."),
    "laws": ("steeple.cli.train_laws", "Train a grid of drafts, sizes by tokens, for scaling laws; resumable."),
}
BENCH = {
    "step": ("steeple.cli.bench_step", "Time one step, part by part, against the machine's floor."),
    "padded": ("steeple.cli.bench_padded", "Batched speculation for transformers' own models, by schedule and batch."),
    "select": ("steeple.cli.bench_select", "Choice among drafters per request, beside every single one and an oracle."),
    "serve": ("steeple.cli.bench_serve", "Load any OpenAI-compatible server; latencies, goodput, acceptance."),
}
PLAN = {
    "calibrate": ("steeple.cli.plan_calibrate", "Measure this machine and the engine's rounds; store a step model."),
    "fleet": ("steeple.cli.plan_fleet", "Simulate a serving fleet: GPUs, latencies, cost, with and without drafters."),
    "laws": ("steeple.cli.plan_laws", "Fit scaling laws of drafters to a table of runs; say what to train next."),
}
BELOW = {"bench": BENCH, "plan": PLAN}
"""Commands that are one by themselves and have others below them."""


class LazyCommand(TyperCommand):
    """Stands for a command in the list, and imports its module once it is called.

    Args:
        below: commands below this one, as in ``COMMANDS``.
    """

    def __init__(
        self, name: str, module: str, help: str, below: Mapping[str, tuple[str, str]] = MappingProxyType({})
    ) -> None:
        super().__init__(name, help=help)
        self._module, self._below = module, below

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the real command, which then runs instead of this one."""
        app: typer.Typer = importlib.import_module(self._module).app
        real = _group(_opened(app, self.help or ""), self._below) if self._below else typer.main.get_command(app)
        return real.make_context(info_name, args, parent, **extra)


def _opened(app: typer.Typer, help: str) -> typer.Typer:
    """A group that, without the name of a command below it, is the one command of ``app``."""
    own = app.registered_commands[0].callback
    assert own is not None  # ``command`` registered it

    @functools.wraps(own)
    def call(typer_context: typer.Context, **values: Any) -> None:
        below = typer_context.invoked_subcommand
        if below is None:
            own(typer_context, **values)
        given = [name for name in values if _explicit(typer_context, name)]
        if given:
            raise typer.BadParameter(f"--{given[0].replace('_', '-')} stands before {below}; put it behind.")

    group = typer.Typer(add_completion=False, pretty_exceptions_enable=False, subcommand_metavar="[COMMAND]")
    group.callback(invoke_without_command=True, help=help)(call)
    return group


def _explicit(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. Exit status 0, 1 (it ran and the answer is no), 2 (an error) or 130 (Ctrl-C)."""
    root().main(args=list(sys.argv[1:] if args is None else args), prog_name="steeple")


def root() -> TyperGroup:
    """The command line as typer has it."""
    app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
    app.callback(help="Lossless speculative decoding: the same tokens, faster.")(_root)
    group = _group(app, COMMANDS)
    train = typer.Typer(name="train", no_args_is_help=True, add_completion=False)
    train.callback(help="Train a model.")(_nothing)
    group.add_command(_group(train, TRAIN), "train")
    return group


def _group(app: typer.Typer, commands: Mapping[str, tuple[str, str]]) -> TyperGroup:
    group = typer.main.get_group(app)
    for name, (module, help_) in commands.items():
        group.add_command(LazyCommand(name, module, help_, BELOW.get(name, {})))
    return group


def _show_version(wanted: bool) -> None:
    if wanted:
        from steeple import __version__

        sys.stdout.write(f"steeple {__version__}\n")
        raise typer.Exit


def _root(
    version: bool = typer.Option(False, "--version", help="Show the version.", is_eager=True, callback=_show_version),
) -> None:
    pass


def _nothing() -> None:
    pass
