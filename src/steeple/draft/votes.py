"""Weighted majority over chains: the heaviest path of a trie, the weights of its voters, and who is paused.

Source: Minions (Wang et al. 2024, arXiv 2402.15678). n voters, B requests, k depths; no loop over tokens or requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

LOW = 0.1  # of the heaviest voter's weight; who is below it may come to be paused
FLOOR = 0.05  # no weight falls below, so that a voter which becomes good again is heard again
BACK = 2 * LOW  # its weight after a pause: it has a little to lose before it is below again
PATIENCE = 8  # rounds below LOW, with no good one above it in between, until a voter is paused
TRIAL = 2  # the same after a pause
FIRST_REST, LONGEST_REST = 16, 256  # rounds of a pause; each pause in a row is twice as long as the one before


def heaviest_paths(table_nBk: Ints, weights_nB: Floats) -> Ints:
    """Walk every request's trie from the root to a leaf, always to the heaviest child.

    Args:
        table_nBk: chains of the voters; -1 behind the end of each.
        weights_nB: positive. A child weighs what those voters weigh together whose chains pass through it.

    Returns:
        Tokens ``[B, k]``, -1 behind the end: for each request the whole chain of some voter. Of equally heavy children
        the one wins whose first voter comes first.
    """
    voters, B, k = table_nBk.shape
    path_Bk = np.full((B, k), -1, dtype=np.int64)
    within_nB = np.ones((voters, B), dtype=np.bool_)
    everyone = np.arange(B)
    for depth in range(k):
        own_nB = table_nBk[:, :, depth]
        within_nB = within_nB & (own_nB >= 0)
        same_nnB = (own_nB[:, None] == own_nB[None, :]) & within_nB[None, :]
        weight_nB = np.where(within_nB, (same_nnB * weights_nB[None, :]).sum(axis=1), -1.0)
        token_B = own_nB[weight_nB.argmax(axis=0), everyone]
        path_Bk[:, depth] = np.where(within_nB.any(axis=0), token_B, -1)
        within_nB = within_nB & (own_nB == token_B)
    return path_Bk


class Votes:
    """Weights of the voters, per request or ``shared``, and the chains of the round that is not judged yet.

    Args: voters, depth: n and k; reward, penalty, threshold: see ``MinionsConfig``.
    """

    def __init__(
        self, voters: int, depth: int, reward: float, penalty: float, threshold: float, *, shared: bool = False
    ) -> None:
        self._n, self._k, self._shared = voters, depth, shared
        self._reward, self._penalty, self._threshold = reward, penalty, threshold
        self._row: dict[str, int] = {}
        self._spare: list[int] = []
        self._chains = np.zeros((0, voters, depth), dtype=np.int64)
        self._length: Ints = np.zeros(0, dtype=np.int64)
        # One row per request, or a single one.
        self._weight: Floats = np.ones((int(shared), voters))
        self._low, self._rest, self._pause = self._fresh(int(shared))

    def _fresh(self, rows: int) -> tuple[Ints, Ints, Ints]:
        """Rounds below ``LOW``, rounds that a pause still lasts, and how long the next one would."""
        none = np.zeros((rows, self._n), dtype=np.int64)
        return none, none.copy(), np.full((rows, self._n), FIRST_REST, dtype=np.int64)

    @property
    def remembered(self) -> frozenset[str]:
        """Ids of the requests that there are votes on."""
        return frozenset(self._row)

    def knows(self, id: str) -> bool:
        """Whether there are votes on the request."""
        return id in self._row

    def rows(self, ids: Sequence[str]) -> Ints:
        """Rows of the requests in all tables; new ones start with equal weights."""
        missing = [id for id in ids if id not in self._row]
        if missing:
            self._admit(missing)
        return np.fromiter((self._row[id] for id in ids), np.int64, len(ids))

    def _admit(self, ids: Sequence[str]) -> None:
        short = len(ids) - len(self._spare)
        if short > 0:
            have = self._length.shape[0]
            more = max(short, have)  # twice as many, so that growing costs little on the whole
            self._chains = np.concatenate((self._chains, np.zeros((more, self._n, self._k), dtype=np.int64)))
            self._length = np.concatenate((self._length, np.zeros(more, dtype=np.int64)))
            if not self._shared:
                self._weight = np.concatenate((self._weight, np.ones((more, self._n))))
                states = zip((self._low, self._rest, self._pause), self._fresh(more), strict=True)
                self._low, self._rest, self._pause = (np.concatenate(pair) for pair in states)
            self._spare.extend(range(have + more - 1, have - 1, -1))
        for id in ids:
            row = self._row[id] = self._spare.pop()
            self._length[row] = -1
            if not self._shared:
                self._weight[row] = 1.0
                self._low[row] = self._rest[row] = 0
                self._pause[row] = FIRST_REST

    def forget(self, id: str) -> None:
        """The request ended."""
        row = self._row.pop(id, None)
        if row is not None:
            self._spare.append(row)

    def _of(self, rows: Ints) -> Ints:
        """Rows of the weights."""
        return np.zeros_like(rows) if self._shared else rows

    def weights(self, rows: Ints) -> Floats:
        """``[n, B]``."""
        return self._weight[self._of(rows)].T

    def asked(self, rows: Ints) -> Bools:
        """Which voters are not paused, ``[n, B]``."""
        return (self._rest[self._of(rows)] == 0).T

    def note(self, rows: Ints, table_nBk: Ints, lengths: Ints) -> None:
        """These chains were proposed for texts of ``lengths [B]``."""
        self._chains[rows] = table_nBk.transpose(1, 0, 2)
        self._length[rows] = lengths

    def lengths(self, rows: Ints) -> Ints:
        """Length of each text when chains were last proposed for it; -1: those are judged already."""
        return self._length[rows]

    def learn(self, rows: Ints, text_Bk: Ints) -> None:
        """A round was judged: ``text_Bk`` was written after what the chains were proposed for, -1 where nothing was.

        A voter's token counts as tried if all before it in its chain were right and the text says what stands there.
        """
        chains_Bnk, text_B1k = self._chains[rows], text_Bk[:, None, :]
        self._length[rows] = -1
        right_Bnk = np.logical_and.accumulate((chains_Bnk == text_B1k) & (chains_Bnk >= 0), axis=2)
        before_Bnk = np.concatenate((np.ones_like(right_Bnk[..., :1]), right_Bnk[..., :-1]), axis=2)
        tried_Bn = (before_Bnk & (chains_Bnk >= 0) & (text_B1k >= 0)).sum(axis=2)
        right_Bn = right_Bnk.sum(axis=2)
        judged = (text_Bk[:, :1] >= 0).any(axis=1)
        if self._shared:
            rows, judged = np.zeros(1, dtype=np.int64), judged.any(keepdims=True)
            tried_Bn, right_Bn = tried_Bn.sum(axis=0, keepdims=True), right_Bn.sum(axis=0, keepdims=True)
        if judged.any():
            self._weigh(rows[judged], right_Bn[judged], tried_Bn[judged])

    def _weigh(self, rows: Ints, right_Gn: Ints, tried_Gn: Ints) -> None:
        """Multiply the weights of who tried; count rounds of the pauses."""
        good = right_Gn > self._threshold * tried_Gn
        factor = np.where(tried_Gn == 0, 1.0, np.where(good, 1.0 + self._reward, 1.0 - self._penalty))
        weight = self._weight[rows] * factor
        weight = np.maximum(weight / weight.max(axis=1, keepdims=True), FLOOR)
        rest, pause, low = self._rest[rows], self._pause[rows], self._low[rows]
        back = rest == 1  # its last round of rest
        rest = np.maximum(rest - 1, 0)
        proved = good & (weight > LOW)
        low = np.where(proved, 0, low + ((weight < LOW) & (rest == 0)))
        pause = np.where(proved, FIRST_REST, pause)
        weight, low = np.where(back, BACK, weight), np.where(back, PATIENCE - TRIAL, low)
        tired = (low >= PATIENCE) & (rest == 0)
        rest = np.where(tired, pause, rest)
        pause = np.where(tired, np.minimum(2 * pause, LONGEST_REST), pause)
        self._weight[rows], self._rest[rows], self._pause[rows], self._low[rows] = weight, rest, pause, low
