"""Settings of a selector. Light: importing this loads no scipy."""

from __future__ import annotations

from dataclasses import dataclass

RULES = ("thompson", "ucb", "greedy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """most: greatest depth. rule: how what might be better is tried, one of ``RULES``. explore: share of the time that
    trying may cost. capacity: most requests of each drafter in a round; empty: no limit. seed: of Thompson's draws."""

    most: int
    rule: str = "thompson"
    explore: float = 0.02
    capacity: tuple[int, ...] = ()
    seed: int = 0
