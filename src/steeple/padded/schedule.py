"""Who is in a round: what the schedules have in common, and the one that keeps a batch of rows together.

``Resident`` is EQSPEC with left-padded rows, and our variant with rows that have holes: which of the two is a matter of
the rows it is built with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from steeple.padded.net import Net
from steeple.padded.round import Group, Outcome
from steeple.padded.rows import LeftPadded, Rows
from steeple.padded.stats import PaddedStats
from steeple.request import Request


class Schedule(Protocol):
    """Holds the caches of all running requests and says which of them have the next round."""

    @property
    def free(self) -> int:
        """Requests that may join now."""
        ...

    @property
    def running(self) -> int:
        """Requests that have joined and not left."""
        ...

    def join(self, requests: list[Request], target: LeftPadded, draft: LeftPadded | None) -> None:
        """Take in requests whose prompts are read."""
        ...

    def next(self) -> Group:
        """The requests of the next round, at least one."""
        ...

    def settle(self, group: Group, outcome: Outcome, /) -> None:
        """Keep what the round accepted, and let finished requests go."""
        ...


class Resident:
    """One batch that stays: every round has all of it.

    Args: places: most rows; nets: target and assistant; make: rows without requests for one model.
    """

    def __init__(
        self, places: int, nets: tuple[Net, Net | None], stats: PaddedStats, make: Callable[[Net], Rows]
    ) -> None:
        self._places, self._stats = places, stats
        self._requests: list[Request] = []
        self._target = make(nets[0])
        self._draft = None if nets[1] is None else make(nets[1])

    @property
    def free(self) -> int:
        return self._places - len(self._requests)

    @property
    def running(self) -> int:
        return len(self._requests)

    def join(self, requests: list[Request], target: LeftPadded, draft: LeftPadded | None) -> None:
        with self._stats.timed("join", self._target.net.device):
            self._target.join(target)
            if self._draft is not None and draft is not None:
                self._draft.join(draft)
        self._requests = self._requests + requests

    def next(self) -> Group:
        lengths = self._target.lengths
        self._stats.grouped += int((lengths == lengths[0]).all())
        return Group(self._requests, self._target, self._draft)

    def settle(self, _group: Group, outcome: Outcome) -> None:
        before = self._target.moved
        with self._stats.timed("align", self._target.net.device):
            self._target.keep(outcome.kept_B, outcome.staying)
            if self._draft is not None:
                self._draft.keep(outcome.drafted_B, outcome.staying)
        self._stats.moved += self._target.moved - before
        self._requests = [self._requests[place] for place in outcome.staying.tolist()]
