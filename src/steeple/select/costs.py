"""What rounds take, learnt while they run: seconds of each drafter's proposals, and of the rest of the step.

A drafter's proposals take ``a + b passes + c nodes + e caught-up rows + g positions read`` seconds, and ``f`` more a
pass where its requests are not equally deep; the rest of a step takes ``base + r rows + q positions``. The
coefficients are not negative and are found by least squares over recent rounds (scipy's nnls), with a weak pull
towards a prior. Batch, depth and context are features, so that a change of them does not look like a change of speed.
The prior of a drafter is a share of the target's own times, which the planner's arithmetic gives; so the first rounds
know something of every drafter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Floats = NDArray[np.float64]

REMEMBERED = 96  # rounds
FADE = 0.96  # weight of a round, per round that came after it
PULL = 0.1  # rounds that the prior counts for, per coefficient
CLIP = 2.0  # times what was expected, by the median's measure; more is taken for a busy machine
UNSETTLED = 0.15  # weight of a round of another shape than the one before it: cold caches, new buffers
REFIT = 4  # rounds between two fits
EAGER = 12  # rounds that are each followed by a fit
BASE_SHARE = 0.7  # of a plain step that no row adds to, before rounds with more rows were seen


class Fit:
    """Non-negative least squares over recent rounds.

    Args: prior: ``[F]`` seconds per unit of each feature.
    """

    def __init__(self, prior: Sequence[float]) -> None:
        self._anchor = np.array(prior, dtype=np.float64)
        self._coefficients = self._anchor
        self._seen: deque[tuple[Floats, float, float]] = deque(maxlen=REMEMBERED)
        self._since, self._stale = 0, False

    @property
    def rounds(self) -> int:
        """How many were seen and are remembered."""
        return len(self._seen)

    def note(self, features: Sequence[float], seconds: float, *, settled: bool = True) -> None:
        """A round. ``settled``: the one before had the same shape."""
        self._seen.append((np.array(features, dtype=np.float64), seconds, 1.0 if settled else UNSETTLED))
        self._since += 1
        self._stale |= self._since >= REFIT or len(self._seen) <= EAGER

    @property
    def coefficients(self) -> Floats:
        """``[F]``; those of the prior until something was seen."""
        if self._stale:
            self._coefficients = self._solve()
            self._since, self._stale = 0, False
            # While rounds are all alike they cannot tell the coefficients apart; what was known before then holds.
            if len(self._seen) > EAGER:
                self._anchor = self._coefficients
        return self._coefficients

    def _solve(self) -> Floats:
        x = np.stack([features for features, _, _ in self._seen])
        y = np.array([seconds for _, seconds, _ in self._seen])
        weight = np.array([w for _, _, w in self._seen]) * FADE ** np.arange(len(self._seen))[::-1]
        scale = np.maximum(x.max(axis=0), 1e-12)
        found = self._least(x / scale, y, weight, scale)
        expected = (x / scale) @ (found * scale)
        ratio = y / np.maximum(expected, 1e-12)
        most = CLIP * float(np.median(ratio))
        if (ratio > most).any():
            # twice, for the first fit has followed the rounds that it should not have
            y = np.minimum(y, most * np.maximum(expected, 1e-12))
            found = self._least(x / scale, y, weight, scale)
        return found

    def _least(self, x: Floats, y: Floats, weight: Floats, scale: Floats) -> Floats:
        """Errors of long rounds count less, as they vary more."""
        size = max(float(np.median(y)), 1e-12)
        root = np.sqrt(weight * size / np.maximum(y, size / 4.0))
        expected = self._anchor * scale
        # A prior that is far too high would outweigh any round if its error counted in seconds.
        pull = np.sqrt(PULL) * size / np.maximum(expected, size)
        left = np.concatenate((x * root[:, None], np.diag(pull)))
        right = np.concatenate((y * root, pull * expected))
        found, _ = nnls(left / size, right / size)
        return np.asarray(found / scale)


@dataclass(frozen=True, slots=True)
class Prior:
    """A drafter's times as shares of the target's: ``per_pass`` of what a plain step takes whatever its rows, and
    ``per_row`` of what a row adds to it."""

    per_pass: float = 0.5
    per_row: float = 0.5


@dataclass(frozen=True, slots=True)
class Rates:
    """The prices of a round, seconds.

    step: of the target with one row for every request; row: of one more row. Per drafter ``[D]``: start, per pass,
    ragged (a pass more, where requests are not equally deep), node, catch_up (a row) and read (a position of one
    request, per node).
    """

    step: float
    row: float
    start: Floats
    passes: Floats
    ragged: Floats
    node: Floats
    catch_up: Floats
    read: Floats


@dataclass(frozen=True, slots=True)
class Drafted:
    """What a drafter did in a round. ``positions``: summed over its nodes, those that they could read."""

    passes: int
    ragged: bool
    nodes: int
    caught_up: int
    positions: float

    def features(self) -> list[float]:
        """In the order of the coefficients."""
        ragged = self.passes if self.ragged else 0
        return [1.0, self.passes, ragged, self.nodes, self.caught_up, self.positions]


class Costs:
    """Args: priors: of each drafter."""

    def __init__(self, priors: Sequence[Prior]) -> None:
        self._priors = tuple(priors)
        self._step = Fit([0.0, 0.0, 0.0])
        self._drafts: list[Fit | None] = [None for _ in priors]
        self._shape: object = None

    @property
    def measured(self) -> NDArray[np.int64]:
        """[D]: rounds of each drafter that were timed."""
        return np.array([fit.rounds if fit is not None else 0 for fit in self._drafts], dtype=np.int64)

    @property
    def steps(self) -> int:
        """Steps of the target that were timed."""
        return self._step.rounds

    def note(
        self, rest: float, rows: int, batch: int, positions: float, draft: dict[int, tuple[Drafted, float]]
    ) -> None:
        """A step that read no prompt: the seconds of all but its proposals, its rows, requests and their positions;
        and of each drafter that was asked what it did and its seconds."""
        shape = (batch, tuple(sorted((d, done.passes, done.ragged) for d, (done, _) in draft.items())))
        settled, self._shape = shape == self._shape, shape
        if not self._step.rounds:
            self._step = Fit([BASE_SHARE * rest, (1.0 - BASE_SHARE) * rest / rows, 0.0])
        self._step.note([1.0, rows, positions], rest, settled=settled)
        for d, (done, seconds) in draft.items():
            self.note_draft(d, done, seconds, settled=settled)

    def note_draft(self, drafter: int, done: Drafted, seconds: float, *, settled: bool) -> None:
        """A drafter's proposals."""
        fit = self._drafts[drafter]
        if fit is None:
            fit = self._drafts[drafter] = Fit(self._prior(drafter))
        fit.note(done.features(), seconds, settled=settled and done.caught_up <= done.nodes)

    def rates(self, batch: int, positions: float) -> Rates:
        """The prices for ``batch`` requests that hold ``positions`` together."""
        base, row, read = self._step.coefficients
        each = [fit.coefficients if fit is not None else np.array(self._prior(d)) for d, fit in enumerate(self._drafts)]
        start, passes, ragged, node, catch_up, per_position = np.stack(each, axis=1)
        step = float(base + row * batch + read * positions)
        return Rates(max(step, 1e-9), float(row), start, passes, ragged, node, catch_up, per_position)

    def _prior(self, drafter: int) -> list[float]:
        base, row, _ = self._step.coefficients
        share = self._priors[drafter]
        return [0.0, share.per_pass * base, 0.0, share.per_row * row, share.per_row * row, 0.0]
