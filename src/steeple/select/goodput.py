"""The best round: for every request a drafter and a depth, maybe none, with the most expected tokens per second.

The whole batch shares the target's pass, and all requests of a drafter share its passes; so what is maximised is one
ratio, expected tokens of the batch over seconds of the round. Dinkelbach's iteration (1967) turns it into sums: at a
price of ``rate`` tokens per second every request takes the draft that is worth most, and the price rises to what the
round then brings, until nothing changes. What the requests of a drafter share is its number of passes, so rounds are
compared by the depth of each drafter, every combination of them where these are few, else by improving one drafter's
at a time.

Sources: goodput as the objective, SmartSpec (Liu et al. 2024, arXiv 2406.14066); a price per row, TETRIS (Wu et al.
2025, arXiv 2502.15197), whose choice among drawn tokens is not made here; drafters as arms, SPIN (Chen et al. 2025,
2503.15921).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from steeple.select.acceptance import Curves
from steeple.select.costs import Rates
from steeple.select.matching import NOBODY, match

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ITERATIONS = 12
ENOUGH = 1e-4  # relative change of the rate that ends the iteration
MOST_COMBINATIONS = 729  # of depths, for 64 requests: as many are all compared
SWEEPS = 4


@dataclass(frozen=True, slots=True)
class Standing:
    """What a round is chosen for. B requests, D drafters.

    lengths ``[B]``: positions of each text. behind ``[B, D]``: rows that a drafter must read of it first. left ``[B]``:
    rounds over which reading them pays back.
    """

    lengths: Floats
    behind: Floats
    left: Floats


@dataclass(frozen=True, slots=True)
class Plan:
    """drafter ``[B]``: number, or ``NOBODY``. depth ``[B]``. tokens and seconds: of the round, as expected."""

    drafter: Ints
    depth: Ints
    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        """Expected tokens per second."""
        return self.tokens / self.seconds


class Goodput:
    """One round's problem.

    Args: curves, rates: see there. standing: of the requests. capacity: most requests of each drafter; none: no
    limit. foreseen: drafters that say before each round whether they have something, so that whoever else was chosen
    drafts only where they have nothing better (``steeple.select.foresight``).
    """

    def __init__(
        self,
        curves: Curves,
        rates: Rates,
        standing: Standing,
        capacity: Sequence[int] = (),
        foreseen: Sequence[int] = (),
    ) -> None:
        self._rates, self._standing, self._curves = rates, standing, curves
        B, D, K = curves.survival.shape
        self._B, self._K, self._capacity = B, K, tuple(capacity) or (B,) * D
        level = np.arange(1, K + 1)
        zero = np.zeros((B, D, 1))
        self._gain = np.concatenate((zero, np.cumsum(curves.survival, axis=2)), axis=2)
        # Rows are verified only where something is proposed; the drafter's own work may be done in vain.
        node = rates.row * curves.offers + rates.node + rates.read * standing.lengths[:, None]
        self._catch_up = rates.catch_up * standing.behind
        spread = self._catch_up / np.maximum(standing.left, 1.0)[:, None]
        self._spent = np.concatenate((zero, node[:, :, None] * level + spread[:, :, None]), axis=2)
        self._limits, self._foreseen = tuple(capacity), tuple(foreseen)
        self._own_gain, self._own_spent = self._gain, self._spent
        if foreseen and not capacity:
            self._gain, self._spent = self._with_foresight(tuple(foreseen))

    def best(self, start: float = 0.0) -> Plan:
        """The best round. ``start``: a rate that some round is known to reach, so that fewer iterations are
        needed."""
        rate = max(start, self._B / self._rates.step)
        plan = self.plain()
        for _ in range(ITERATIONS):
            value = self._value(rate)
            found = self._assign(value, self._depths(value, rate), rate)
            if found.rate > plan.rate:
                plan = found
            if plan.rate <= rate * (1.0 + ENOUGH):
                break
            rate = plan.rate
        return plan

    def plain(self) -> Plan:
        """The round without a draft."""
        return self.of(np.full(self._B, NOBODY), np.zeros(self._B, dtype=np.int64))

    def of(self, drafter: Ints, depth: Ints) -> Plan:
        """A given round, with what is expected of it."""
        tokens, seconds = float(drafter.shape[0]), self._rates.step
        drafts = np.flatnonzero(depth > 0)
        if drafts.size:
            who, deep = drafter[drafts], depth[drafts]
            tokens += float(self._gain[drafts, who, deep].sum())
            seconds += float(self._spent[drafts, who, deep].sum())
            for d in np.unique(who).tolist():
                own = deep[who == d]
                ragged = self._rates.ragged[d] if own.min() < own.max() else 0.0
                seconds += float(self._rates.start[d] + (self._rates.passes[d] + ragged) * own.max())
        return Plan(drafter, np.where(drafter >= 0, depth, 0), tokens, seconds)

    def _with_foresight(self, foreseen: tuple[int, ...]) -> tuple[Floats, Floats]:
        """Gains and prices of a draft that gives way to a foreseen drafter where that has something better.

        Which is better is judged at the rate of a plain round; the lowest there is, so lookups are valued a bit high.
        """
        gain, spent = self._own_gain.copy(), self._own_spent.copy()
        others = np.setdiff1d(np.arange(gain.shape[1]), foreseen)
        rate = self._B / self._rates.step
        everyone = np.arange(self._B)
        for d in foreseen:
            depth, worth = self.sure(d, rate)
            offers = self._curves.offers[:, d][:, None, None]
            found = self._own_gain[everyone, d, depth][:, None, None] / offers
            price = (self._sure_price(d) * depth)[:, None, None]
            gives_way = worth[:, None, None] > gain[:, others] - rate * spent[:, others]
            gives_way[:, :, 0] = False  # no draft at all is none with a lookup either
            share = np.where(gives_way, offers, 0.0)
            gain[:, others] = share * found + (1.0 - share) * gain[:, others]
            spent[:, others] = share * price + (1.0 - share) * spent[:, others]
        return gain, spent

    def _sure_price(self, d: int) -> Floats:
        """Seconds of a node of drafter ``d`` where it is known to propose it, ``[B]``."""
        return np.asarray(self._rates.row + self._rates.node[d] + self._rates.read[d] * self._standing.lengths)

    def worth(self, drafter: Ints, depth: Ints, rate: float) -> Floats:
        """Expected tokens of each request's own draft less what its own rows are worth at ``rate``, ``[B]``; 0 without
        a draft. Passes that are shared are not counted."""
        drafts = np.flatnonzero(depth > 0)
        found = np.zeros(self._B)
        place = (drafts, drafter[drafts], depth[drafts])
        found[drafts] = self._own_gain[place] - rate * self._own_spent[place]
        return found

    def sure(self, d: int, rate: float) -> tuple[Ints, Floats]:
        """Where drafter ``d`` is known to propose something: the depth that is worth most, and that worth, ``[B]``."""
        chances = self._curves.survival[:, d] / self._curves.offers[:, d, None]
        value = np.cumsum(chances, axis=1) - rate * self._sure_price(d)[:, None] * np.arange(1, self._K + 1)
        return value.argmax(axis=1) + 1, value.max(axis=1)

    def catch_up_seconds(self, plan: Plan) -> float:
        """What reading up takes in the very next round, which ``of`` spreads over those that it serves."""
        drafts = np.flatnonzero(plan.depth > 0)
        return float(self._catch_up[drafts, plan.drafter[drafts]].sum())

    def catch_up_price(self, drafter: int) -> float:
        """Seconds of a row that a drafter must read first."""
        return float(self._rates.catch_up[drafter])

    def with_curves(self, curves: Curves) -> Goodput:
        """The same problem under other hopes."""
        return Goodput(curves, self._rates, self._standing, self._limits, self._foreseen)

    def _value(self, rate: float) -> Floats:
        """Tokens less the price of seconds, of each request with each drafter at each depth, ``[B, D, K + 1]``.

        Where unequal depths cost nothing, a depth is worth what the best one up to it is.
        """
        value = self._gain - rate * self._spent
        value[:, :, 0] = 0.0
        free = self._rates.ragged <= 0.0
        value[:, free] = np.maximum.accumulate(value[:, free], axis=2)
        return value

    def _fixed(self, rate: float) -> Floats:
        """Price of each drafter's passes by depth, ``[D, K + 1]``."""
        level = np.arange(self._K + 1)
        price = self._rates.start[:, None] * (level > 0) + self._rates.passes[:, None] * level
        return np.asarray(rate * price)

    def _depths(self, value: Floats, rate: float) -> Ints:
        """The depth of each drafter, ``[D]``, whose round is worth most."""
        B, D, levels = value.shape
        fixed = self._fixed(rate)
        if levels**D * B <= MOST_COMBINATIONS * 64:
            return self._compare_all(value, fixed)
        return self._climb(value, fixed)

    def _compare_all(self, value: Floats, fixed: Floats) -> Ints:
        _, D, levels = value.shape
        best, cost = value[:, 0], fixed[0]  # [B, combinations]
        for d in range(1, D):
            best = np.maximum(best[:, :, None], value[:, d, None, :]).reshape(value.shape[0], -1)
            cost = (cost[:, None] + fixed[d]).reshape(-1)
        winner = int(np.argmax(np.maximum(best, 0.0).sum(axis=0) - cost))
        return np.array(np.unravel_index(winner, (levels,) * D), dtype=np.int64)

    def _climb(self, value: Floats, fixed: Floats) -> Ints:
        """From every set of drafters at once: give each in turn the depth that is best beside the others' present
        ones."""
        D = value.shape[1]
        allowed = ((np.arange(1 << min(D, 6))[:, None] >> np.arange(D)) & 1).astype(bool)
        alone = np.array([np.argmax(np.maximum(value[:, d], 0.0).sum(axis=0) - fixed[d]) for d in range(D)])
        depths = np.where(allowed, np.maximum(alone, 1), 0)  # [sets, D]
        now = np.stack([value[:, d, depths[:, d]] for d in range(D)])  # [D, B, sets]
        for _ in range(SWEEPS):
            before = depths.copy()
            for d in range(D):
                others = np.maximum(np.delete(now, d, axis=0).max(axis=0, initial=0.0), 0.0)
                worth = np.maximum(others[:, :, None], value[:, d, None, :]).sum(axis=0) - fixed[d]  # [sets, K + 1]
                worth[~allowed[:, d], 1:] = -np.inf
                depths[:, d] = worth.argmax(axis=1)
                now[d] = value[:, d, depths[:, d]]
            if (depths == before).all():
                break
        total = np.maximum(now.max(axis=0), 0.0).sum(axis=0) - fixed[np.arange(D), depths].sum(axis=1)
        return np.asarray(depths[int(total.argmax())])

    def _assign(self, value: Floats, depths: Ints, rate: float) -> Plan:
        """Every request to the drafter that is worth most at these depths, as far as their places go."""
        D = value.shape[1]
        at = value[:, np.arange(D), depths]
        at[:, depths == 0] = -np.inf
        drafter = match(at, self._capacity)
        depth = np.where(drafter >= 0, depths[drafter], 0)
        raw = self._gain - rate * self._spent
        drafts = np.flatnonzero(drafter >= 0)
        if drafts.size == 0:
            return self.plain()
        own = raw[drafts, drafter[drafts]]
        own = np.where(np.arange(self._K + 1) <= depth[drafts, None], own, -np.inf)
        cut = depth.copy()
        cut[drafts] = own.argmax(axis=1)
        return self._cut_where_it_pays(drafter, depth, cut, raw, rate)

    def _cut_where_it_pays(self, drafter: Ints, depth: Ints, cut: Ints, raw: Floats, rate: float) -> Plan:
        """Requests of a drafter are equally deep, unless the rows saved are worth more than its passes then cost."""
        final = depth.copy()
        for d in np.unique(drafter[drafter >= 0]).tolist():
            own = np.flatnonzero(drafter == d)
            shorter, whole = cut[own], depth[own]
            saved = float((raw[own, d, shorter] - raw[own, d, whole]).sum())
            if saved > rate * self._rates.ragged[d] * int(shorter.max(initial=0)):
                final[own] = shorter
        return self.of(np.where(final > 0, drafter, NOBODY), final)
