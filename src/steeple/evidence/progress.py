"""How long work tells where it stands. No terminal is known here."""

from __future__ import annotations

from collections.abc import Callable

# what is being done, steps done, steps in all
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """The progress of somebody who does not listen."""
