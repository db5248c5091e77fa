"""``steeple generate``: the main job with a bar on stderr and a table at its end."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from steeple.cli.app import COMMANDS
from steeple.cli.bridge import Look
from steeple.cli.shell import Shell, command
from steeple.jobs import GenerateConfig, Progress, run_generate
from steeple.plan.memory_units import show_bytes


class LiveColumn(ProgressColumn):
    """Tokens per second and tau, read from the engine at each refresh, so that they move within long requests."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """The job's last progress is a field of the task."""
        progress: Progress | None = task.fields.get("progress")
        if progress is None:
            return Text("loading")
        seconds = time.perf_counter() - progress.begun
        stats = progress.stats
        tau = f"  tau {stats.speculation.tau:.2f}" if stats.speculation.rounds else ""
        errors = f"  {progress.errors} errors" if progress.errors else ""
        return Text(f"{stats.committed / max(seconds, 1e-9):.0f} tokens/s{tau}{errors}")


def run(config: GenerateConfig, shell: Shell) -> dict[str, Any]:
    """Run the job and show it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), LiveColumn(), TimeRemainingColumn())
    # few refreshes: they take their time from the same cores that generate
    with Bar(*columns, console=shell.console, disable=not shell.console.is_terminal, refresh_per_second=2) as bar:
        task = bar.add_task("generating", total=None)

        def tell(progress: Progress) -> None:
            bar.update(task, completed=progress.done, total=progress.total, progress=progress)

        summary = run_generate(config, tell)
    report(summary, shell.console)
    return summary


def report(summary: dict[str, Any], console: Console) -> None:
    """The summary for people."""
    if summary["tokens_per_second"] is None:
        console.print(
            f"All {summary['requests']} requests are in {summary['output']} already; --overwrite runs them again.",
            soft_wrap=True,
        )
        return
    table = Table(show_header=False, title=f"{summary['model']}, drafter {summary['drafter']}, k = {summary['k']}")
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in _rows(summary):
        table.add_row(name, value)
    console.print(table)
    console.print(f"{summary['requests']} requests are in {summary['output']}", soft_wrap=True)


def _rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    acceptance = " ".join(f"{share:.2f}" for share in summary["acceptance_by_position"])
    rows = [
        ("tokens/s", f"{summary['tokens_per_second']:.1f}"),
        ("tau", f"{summary['tau']:.2f}"),
        ("acceptance by position", acceptance or "-"),
        ("tokens", f"{summary['completion_tokens']} after {summary['prompt_tokens']} of prompts"),
        ("seconds", f"{summary['seconds']:.2f} and {summary['load_seconds']:.2f} to load"),
        ("drafting, verifying", f"{summary['draft_seconds']:.2f} s, {summary['verify_seconds']:.2f} s"),
    ]
    memory = summary["memory"]
    if memory["budget_bytes"]:
        rows.append(("memory", f"{show_bytes(memory['most_bytes'])} of {show_bytes(memory['budget_bytes'])} at most"))
    rows += [("given up for memory", what) for what in memory["sacrificed"]]
    counts = (("from an earlier run", "resumed"), ("errors", "errors"), ("preemptions", "preemptions"))
    return rows + [(name, str(summary[key])) for name, key in counts if summary[key]]


app = command(
    GenerateConfig,
    run,
    help=COMMANDS["generate"][1],
    look=Look(positional=("prompts",), short={"output": "-o"}, repeated=("stop",)),
)
