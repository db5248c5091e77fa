"""``steeple demo``: the same prompts plainly and speculatively, side by side. Exit status 1 if the tokens differ."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from steeple.cli.app import COMMANDS
from steeple.cli.progress import steps
from steeple.cli.shell import Shell, command
from steeple.jobs.demo import DemoConfig, run_demo

SHOWN_LINES = 8


def run(config: DemoConfig, shell: Shell) -> dict[str, Any]:
    """Run the demonstration, then show one completion, the table and the verdict."""
    with steps(shell.console) as progress:
        result = run_demo(config, progress)
    _example(result["examples"][0], shell.console)
    shell.console.print(demo_table(config, result))
    verdict = "All outputs are identical to plain decoding." if result["identical"] else "OUTPUTS DIFFER."
    shell.console.print(verdict, style="bold")
    return result


def _example(example: dict[str, str], console: Console) -> None:
    """The end of a prompt and what the model wrote after it."""
    prompt = "\n".join(example["prompt"].splitlines()[-SHOWN_LINES:])
    console.print(prompt, style="dim", end="", markup=False, soft_wrap=True)
    console.print(example["text"], markup=False, soft_wrap=True)
    console.print()


def demo_table(config: DemoConfig, result: dict[str, Any]) -> Table:
    """A row per batch size and drafter."""
    table = Table(
        title=f"{config.model}: {config.requests} prompts of {config.context} tokens, {config.max_tokens} to write, "
        f"greedy, {result['dtype']}, k = {config.k}"
    )
    for name in ("batch", "drafter", "tokens/s", "speed-up", "tau", "accepted by position", "identical"):
        table.add_column(name, justify="left" if name in ("drafter", "identical") else "right")
    rows = result["rows"]
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(
            str(row["batch"]),
            row["drafter"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['speed_up']:.2f}",
            f"{row['tau']:.2f}",
            " ".join(f"{share:.2f}" for share in row["acceptance_by_position"]) or "-",
            "yes" if row["identical"] else "NO",
            end_section=after is None or after["batch"] != row["batch"],
        )
    return table


def differs(result: dict[str, Any]) -> bool:
    """Whether any output is not plain decoding's own."""
    return not result["identical"]


app = command(DemoConfig, run, help=COMMANDS["demo"][1], failed=differs)
