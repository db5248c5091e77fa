"""Which request goes to which drafter where drafters take only so many: a maximum-weight b-matching.

Source of the constraint and of the formulation: SPIN (Chen et al. 2025, arXiv 2503.15921). Solved as a linear
assignment of requests to places: each drafter is as many columns as it has places, and drafting nothing is a column
for each request.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
NOBODY = -1


def match(value: Floats, capacity: Sequence[int]) -> Ints:
    """The drafter of every request, ``[B]``, ``NOBODY`` for none, that has the largest sum of values.

    Args:
        value: ``[B, D]``, of drafting request i by drafter d over drafting nothing; -inf where it cannot.
        capacity: most requests of each drafter.
    """
    B, D = value.shape
    best = np.where(value.max(axis=1, initial=0.0) > 0.0, value.argmax(axis=1) if D else 0, NOBODY)
    if all(int((best == d).sum()) <= room for d, room in enumerate(capacity)):
        return best
    columns = np.repeat(np.arange(D), [min(room, B) for room in capacity])
    # Nobody is forced to a drafter that costs more than it brings, so a value below 0 is one of 0.
    weights = np.concatenate((np.maximum(value[:, columns], 0.0), np.zeros((B, B))), axis=1)
    rows, places = linear_sum_assignment(weights, maximize=True)
    found = np.full(B, NOBODY, dtype=np.int64)
    drafted = weights[rows, places] > 0.0
    found[rows[drafted]] = columns[places[drafted]]
    return found
