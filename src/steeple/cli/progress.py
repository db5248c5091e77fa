"""A bar for work that tells what it does, how far it is and how far it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def steps(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Yields the callback ``(what, done, total)``. Off a terminal nothing is shown."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # few refreshes: they take their time from the same cores that are measured
    with Progress(*columns, console=console, disable=not console.is_terminal, refresh_per_second=1) as bar:
        task = bar.add_task("", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield show
