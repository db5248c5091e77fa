"""Rounds in which each request has a drafter of its own: choices handed out, proposals timed, outcomes reported."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from steeple.cache.paged import PagedCache
from steeple.draft.base import Drafter, Needs, Surroundings
from steeple.draft.parts import Parts
from steeple.errors import InternalError
from steeple.model.decoder import Hidden
from steeple.request import Request
from steeple.select.costs import Drafted, Prior
from steeple.select.foresight import Bools
from steeple.select.goodput import Plan, Standing
from steeple.select.matching import NOBODY
from steeple.select.options import Options
from steeple.select.selector import Outcome, Selector
from steeple.types import Batch, Draft, concat_drafts

TOKENS_A_ROUND = 2.0  # by this it is guessed for how many rounds a request will be there
LONGEST = 256.0  # rounds; who knows when a text ends


@runtime_checkable
class FallsBehind(Protocol):
    """A drafter that must read what was written while it did not draft."""

    def behind(self, request: Request) -> int:
        """Rows of the text, without its newest token, that the request's next round reads first."""
        ...


@runtime_checkable
class Foresees(Protocol):
    """A drafter that can say at next to no cost whether it has anything to propose."""

    def offers(self, request: Request) -> bool:
        """Whether it would propose anything for the text as it stands."""
        ...


@runtime_checkable
class Revises(Protocol):
    """A chooser that thinks again before every round, knowing what foreseen drafters have to propose."""

    def revise(self, ids: Sequence[str], plan: Plan, offered: Mapping[int, Bools]) -> Plan: ...


class Chooser(Protocol):
    """Who drafts for whom; ``Selector`` is the one that learns."""

    def choose(self, ids: Sequence[str], standing: Callable[[], Standing]) -> Plan: ...

    def learn(self, outcome: Outcome) -> None: ...

    def forget(self, id: str) -> None: ...

    @property
    def remembered(self) -> frozenset[str]: ...


def spin_drafter(parts: Parts, shares: Sequence[float], options: Options, around: Surroundings) -> Spin:
    """The drafter over ``parts``, of which part i takes ``shares[i]`` of the target's time until that is measured."""
    foreseen = [d for d, part in enumerate(parts.parts) if isinstance(part, Foresees)]
    selector = Selector([Prior(share, share) for share in shares], options, foreseen=foreseen)
    return Spin(parts, Choices(selector, parts.parts), around.device)


class Choices:
    """Who drafts for whom and how deep, round by round: what the engine asks for lengths. See ``Lengths``."""

    def __init__(self, selector: Chooser, parts: Sequence[Drafter]) -> None:
        self.selector = selector
        self._readers = [(d, part) for d, part in enumerate(parts) if isinstance(part, FallsBehind)]
        self._seers = [(d, part) for d, part in enumerate(parts) if isinstance(part, Foresees)]
        self._drafters = len(parts)
        self._plan: dict[str, tuple[int, int]] = {}
        self._asked: dict[str, int] = {}
        self._draft: dict[int, tuple[Drafted, float]] = {}
        self._spent = 0.0

    def begin(self, running: Sequence[Request]) -> None:
        """Choose for those that are ready."""
        started = time.perf_counter()
        self._asked, self._draft, self._plan = {}, {}, {}
        ready = [r for r in running if r.ready]
        if ready:
            ids = [r.id for r in ready]
            plan = self.selector.choose(ids, lambda: self._standing(ready))
            if self._seers and isinstance(self.selector, Revises):
                offered = {d: np.array([part.offers(r) for r in ready]) for d, part in self._seers}
                plan = self.selector.revise(ids, plan, offered)
            pairs = zip(plan.drafter.tolist(), plan.depth.tolist(), strict=True)
            self._plan = dict(zip(ids, pairs, strict=True))
        self._spent = time.perf_counter() - started

    def __call__(self, request: Request) -> int:
        """The depth chosen; none for a request that came back in the middle of the step."""
        return self._plan.get(request.id, (NOBODY, 0))[1]

    def whose(self, request: Request) -> int:
        """The part that drafts for ``request`` in this round, or ``NOBODY``."""
        return self._plan.get(request.id, (NOBODY, 0))[0]

    def behind(self, drafter: int, requests: Sequence[Request]) -> int:
        """Rows that this part must read before it drafts for ``requests``."""
        return sum(part.behind(r) for d, part in self._readers if d == drafter for r in requests)

    def timed(
        self, drafter: int, requests: Sequence[Request], asked: Sequence[int], behind: int, seconds: float
    ) -> None:
        """What a part was asked for, and how long it took."""
        self._asked.update(zip([r.id for r in requests], asked, strict=True))
        positions = float(sum(depth * len(r) for r, depth in zip(requests, asked, strict=True)))
        done = Drafted(max(asked), min(asked) < max(asked), sum(asked), behind, positions)
        self._draft[drafter] = (done, seconds)

    def learn(
        self, requests: Sequence[Request], depths: Sequence[int], accepted: Sequence[int], seconds: float | None
    ) -> None:
        """See ``Lengths``."""
        if not requests:
            return
        ids = [r.id for r in requests]
        drafting = sum(took for _, took in self._draft.values())
        outcome = Outcome(
            ids,
            np.array([self.whose(r) for r in requests]),
            np.array([self._asked.get(id, 0) for id in ids]),
            np.array(depths),
            np.array(accepted),
            self._draft,
            None if seconds is None else max(seconds - drafting - self._spent, 0.0),
            float(sum(map(len, requests))),
        )
        self.selector.learn(outcome)
        for request in requests:
            if request.finished:  # the engine has forgotten it before the round was told of
                self.selector.forget(request.id)

    def _standing(self, ready: Sequence[Request]) -> Standing:
        behind = np.zeros((len(ready), self._drafters))
        for d, part in self._readers:
            behind[:, d] = [part.behind(r) for r in ready]
        left = np.array([(r.limit - len(r)) / TOKENS_A_ROUND for r in ready])
        lengths = np.fromiter(map(len, ready), np.float64, len(ready))
        return Standing(lengths, behind, np.clip(left, 1.0, LONGEST))


class Spin:
    """The drafter. All parts see all steps; each proposes for the requests that are its own in the round.

    A part that did not draft keeps nothing that could go wrong: ``small_lm`` compares its cache with the text and reads
    what it missed, which ``behind`` counts; the others read the target's cache or the text alone.
    """

    def __init__(self, parts: Parts, choices: Choices, device: torch.device) -> None:
        self._parts, self._choices, self._device = parts, choices, device

    @property
    def needs(self) -> Needs:
        return replace(self._parts.needs, adaptive=False)

    @property
    def lengths(self) -> Choices:
        """See ``DecidesLengths``."""
        return self._choices

    def prepare(self, cache: PagedCache) -> None:
        """See ``Drafter``."""
        self._parts.prepare(cache)

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> Draft:
        """The parts' forests side by side."""
        choices = self._choices
        whose = np.array([choices.whose(r) if nodes else NOBODY for r, nodes in zip(requests, budget, strict=True)])
        shares = []
        for d, part in enumerate(self._parts.parts):
            places = np.flatnonzero(whose == d).tolist()
            if not places:
                continue
            own, asked = [requests[b] for b in places], [budget[b] for b in places]
            behind = choices.behind(d, own)
            started = time.perf_counter()
            shares.append((places, part.propose(own, asked)))
            choices.timed(d, own, asked, behind, time.perf_counter() - started)
        return concat_drafts(shares, len(requests)) if shares else Draft.empty(len(requests), self._device)

    def observe(self, requests: Sequence[Request], batch: Batch, kept: Sequence[Sequence[int]], hidden: Hidden) -> None:
        """See ``Drafter``."""
        self._parts.observe(requests, batch, kept, hidden)

    def forget(self, request: Request) -> None:
        """See ``Drafter``; what was learnt of the request goes too."""
        self._parts.forget(request)
        self._choices.selector.forget(request.id)

    def check_integrity(self) -> None:
        """See ``Drafter``."""
        self._parts.check_integrity()
        left = self._choices.selector.remembered
        if left:
            raise InternalError(f"the choice of drafters remembers {sorted(left)[:4]}")
