"""What is known of how far each drafter's drafts are accepted, for each request and for all: counts that fade, and
curves.

Shape letters: B requests, D drafters, K depths. A *survival* curve is the chance that the nodes of depths 1..K stay,
``[..., K]``; its sum is the expected number of accepted tokens of a whole draft.

Chances of going on from depth to depth are those of the drafter's population, with the odds of one request multiplied
by one factor of its own: so a few rounds of a request say something of every depth. Beside it a request keeps its own
counts per depth, which count the more the more there are. Counts fade, so that what changes is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

PRIOR = 0.7  # chance that a node stays, before anything is known
PRIOR_WEIGHT = 4.0  # nodes that this prior counts for
FADE_ALL = 0.98  # of what is known of a drafter, per round in which it drafted
FADE_OWN = 0.95  # of what is known of a drafter for one request, per round of that request with it
ODDS_WEIGHT = 4.0  # nodes that the population counts for in a request's own factor
DEPTH_WEIGHT = 12.0  # and in its own counts per depth
OFFER_PRIOR, OFFER_WEIGHT = 0.9, 2.0  # chance that a drafter that is asked proposes anything
LEAST, MOST = 1e-3, 1.0 - 1e-3


@dataclass(frozen=True, slots=True)
class Curves:
    """survival ``[B, D, K]``: chance that a request asks this drafter and the node of depth j + 1 stays, the chance
    of an empty proposal included. offers ``[B, D]``: chance that anything is proposed."""

    survival: Floats
    offers: Floats


class Acceptance:
    """Counts of drafts that came to each depth, and of those that went on.

    Args: drafters, most: D and K. foreseen: drafters whose offers are seen before they are asked (``note_offers``), so
    that being asked says nothing more of them.
    """

    def __init__(self, drafters: int, most: int, foreseen: Sequence[int] = ()) -> None:
        self._shape, self._foreseen = (drafters, most), frozenset(foreseen)
        self._reached, self._stayed = np.zeros(self._shape), np.zeros(self._shape)
        self._asked, self._offered = np.zeros(drafters), np.zeros(drafters)
        self.rounds = np.zeros(drafters, dtype=np.int64)
        """[D]: rounds in which each drafter was asked."""
        self._slot: dict[str, int] = {}
        self._free: list[int] = []
        self._own = np.zeros((0, 2, drafters, most))  # per slot: reached, stayed
        self._own_offers = np.zeros((0, 2, drafters))  # per slot: asked, offered

    def note(self, ids: Sequence[str], drafter: Ints, depth: Ints, accepted: Ints) -> None:
        """A round's end. All ``[B]``: which drafter was asked, depth of what it proposed (0: nothing), nodes kept.

        Only those that were asked; a request that was to get no draft is no evidence.
        """
        if not len(ids):
            return
        slots = np.array([self._place(id) for id in ids])
        level = np.arange(self._shape[1])
        kept = np.minimum(accepted, depth)[:, None]
        # the turn of a depth came if everything above it stayed
        came = (depth[:, None] > level) & (kept >= level)
        stayed = kept > level
        for d in np.unique(drafter).tolist():
            own = drafter == d
            for counts in (self._reached, self._stayed):
                counts[d] *= FADE_ALL
            self._reached[d] += came[own].sum(0)
            self._stayed[d] += stayed[own].sum(0)
            if d not in self._foreseen:
                self._note_offers(d, slots[own], depth[own] > 0)
            self.rounds[d] += 1
        self._own[slots, :, drafter] *= FADE_OWN
        self._own[slots, 0, drafter] += came
        self._own[slots, 1, drafter] += stayed

    def note_offers(self, ids: Sequence[str], drafter: int, offered: Bools) -> None:
        """Whether a foreseen ``drafter`` would propose anything for each of ``ids`` now, ``[B]``, asked or not."""
        self._note_offers(drafter, np.array([self._place(id) for id in ids], dtype=np.int64), offered)

    def _note_offers(self, d: int, slots: Ints, offered: Bools) -> None:
        self._asked[d] = FADE_ALL * self._asked[d] + offered.shape[0]
        self._offered[d] = FADE_ALL * self._offered[d] + offered.sum()
        self._own_offers[slots, :, d] *= FADE_OWN
        self._own_offers[slots, 0, d] += 1
        self._own_offers[slots, 1, d] += offered

    def curves(self, ids: Sequence[str], shift: Floats | None = None, shift_all: Floats | None = None) -> Curves:
        """Curves for ``ids``.

        Args:
            shift: ``[B, D]`` and shift_all ``[D]``: standard deviations by which a request's own log-odds, and a
                population's, are taken to be better than their mean; zeros (None) give the mean.
        """
        own, offers = self._of(ids)
        chance = self.population()
        if shift_all is not None:
            spread = 1.0 / np.sqrt((self._reached.sum(1) + 1.0) * chance[:, 0] * (1.0 - chance[:, 0]))
            chance = _moved(chance, (shift_all * spread)[:, None])
        reached, stayed = own[:, 0], own[:, 1]
        tried, kept = reached.sum(2), stayed.sum(2)
        first = chance[:, 0]
        expected = (reached * chance).sum(2)
        factor = _log_odds((kept + ODDS_WEIGHT * first) / (tried + ODDS_WEIGHT)) - _log_odds(
            (expected + ODDS_WEIGHT * first) / (tried + ODDS_WEIGHT)
        )
        if shift is not None:
            middle = (kept + ODDS_WEIGHT * first) / (tried + ODDS_WEIGHT)
            factor = factor + shift / np.sqrt((tried + ODDS_WEIGHT) * middle * (1.0 - middle))
        moved = _moved(chance[None], factor[:, :, None])
        chances = (stayed + DEPTH_WEIGHT * moved) / (reached + DEPTH_WEIGHT)
        if shift is not None:  # counts of its own say nothing more than the factor that was moved
            chances = np.where(shift[:, :, None] != 0.0, moved, chances)
        all_offers = (self._offered + OFFER_PRIOR * OFFER_WEIGHT) / (self._asked + OFFER_WEIGHT)
        offered = (offers[:, 1] + OFFER_WEIGHT * all_offers) / (offers[:, 0] + OFFER_WEIGHT)
        return Curves(offered[:, :, None] * np.cumprod(chances, axis=2), offered)

    def population(self) -> Floats:
        """Chance of going on from each depth to the next, over all requests, ``[D, K]``. A depth seldom reached is
        taken to be like the one before it."""
        share = np.empty(self._shape)
        before = np.full(self._shape[0], PRIOR)
        for j in range(self._shape[1]):
            share[:, j] = (self._stayed[:, j] + PRIOR_WEIGHT * before) / (self._reached[:, j] + PRIOR_WEIGHT)
            before = share[:, j]
        return np.clip(share, LEAST, MOST)

    def forget(self, id: str) -> None:
        """The request ended."""
        slot = self._slot.pop(id, None)
        if slot is not None:
            self._own[slot] = 0.0
            self._own_offers[slot] = 0.0
            self._free.append(slot)

    @property
    def remembered(self) -> frozenset[str]:
        """Requests of which something is known."""
        return frozenset(self._slot)

    def _place(self, id: str) -> int:
        slot = self._slot.get(id)
        if slot is None:
            if not self._free:
                held = self._own.shape[0]
                more = max(16, held)
                self._own = np.concatenate((self._own, np.zeros((more, *self._own.shape[1:]))))
                self._own_offers = np.concatenate((self._own_offers, np.zeros((more, *self._own_offers.shape[1:]))))
                self._free = list(range(held, held + more))[::-1]
            slot = self._slot[id] = self._free.pop()
        return slot

    def _of(self, ids: Sequence[str]) -> tuple[Floats, Floats]:
        """Own counts ``[B, 2, D, K]`` and offers ``[B, 2, D]``; zeros for requests that nothing is known of."""
        slots = np.array([self._slot.get(id, -1) for id in ids], dtype=np.int64)
        if self._own.shape[0] == 0:
            return np.zeros((len(ids), 2, *self._shape)), np.zeros((len(ids), 2, self._shape[0]))
        known = slots >= 0
        own, offers = self._own[slots], self._own_offers[slots]
        own[~known], offers[~known] = 0.0, 0.0
        return own, offers


def _log_odds(chance: Floats) -> Floats:
    inside = np.clip(chance, LEAST, MOST)
    return np.asarray(np.log(inside / (1.0 - inside)))


def _moved(chance: Floats, log_factor: Floats) -> Floats:
    """``chance`` with its odds multiplied."""
    return np.asarray(1.0 / (1.0 + np.exp(-(_log_odds(chance) + log_factor))))
