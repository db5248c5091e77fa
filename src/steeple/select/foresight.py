"""Second thoughts, round by round: a drafter that can say beforehand whether it has anything to propose is asked then.

A choice of drafters holds for several rounds, and rests on how often a lookup finds something. Before each round that
is known. So a request whose lookup has found something takes it, if that promises more than what was chosen for it; and
one whose lookup was chosen and found nothing takes the best drafter that is at work anyway. Both rest on the committed
text, as a fall from drafter to drafter does in cascade speculative drafting (Chen et al. 2023, arXiv 2312.11462).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from steeple.select.goodput import Goodput, Plan
from steeple.select.matching import NOBODY

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Foresight:
    """What each request does beside what was chosen for it. Shape letters as in ``goodput``.

    Args: ids, goodput, plan: the choice that was made. foreseen: drafters that can say beforehand.
    """

    def __init__(self, ids: Sequence[str], goodput: Goodput, plan: Plan, foreseen: Sequence[int]) -> None:
        self._row = {id: b for b, id in enumerate(ids)}
        rate = plan.rate
        known = np.isin(plan.drafter, foreseen)
        self._drafter = np.where(known, NOBODY, plan.drafter)
        self._depth = np.where(known, 0, plan.depth)
        self._worth = goodput.worth(self._drafter, self._depth, rate)
        at_work = np.unique(self._drafter[self._drafter >= 0]).tolist()
        depths = {d: int(plan.depth[plan.drafter == d].max()) for d in at_work}
        for d, depth in depths.items():
            everyone = np.full(known.shape, d)
            worth = goodput.worth(everyone, np.full(known.shape, depth), rate)
            better = known & (worth > self._worth)
            self._drafter, self._depth = np.where(better, d, self._drafter), np.where(better, depth, self._depth)
            self._worth = np.where(better, worth, self._worth)
        self._sure = {d: goodput.sure(d, rate) for d in foreseen}

    def revise(self, ids: Sequence[str], plan: Plan, offered: Mapping[int, Bools]) -> Plan:
        """The round's choice for ``ids``, whose lookups have found something or not, ``[B]`` by drafter. Requests that
        the choice was not made for stay as they are."""
        rows = np.array([self._row.get(id, -1) for id in ids], dtype=np.int64)
        drafter, depth, worth = self._drafter[rows], self._depth[rows], self._worth[rows]
        for d, (deep, value) in self._sure.items():
            takes = offered[d] & (value[rows] > worth)
            drafter, depth = np.where(takes, d, drafter), np.where(takes, deep[rows], depth)
            worth = np.where(takes, value[rows], worth)
        old = rows < 0
        drafter, depth = np.where(old, plan.drafter, drafter), np.where(old, plan.depth, depth)
        return Plan(drafter, depth, plan.tokens, plan.seconds)
