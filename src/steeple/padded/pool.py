"""A pool of more requests than a round has rows: rounds prefer rows of equal length, which need no padding.

EXSPEC (Zhang et al. 2025, arXiv 2510.22876). Every request of the pool has a row of a store to itself, where its tokens
lie from slot 0 on, so that requests come and go without touching each other. A round copies its rows out of the store,
by one indexed copy for the keys of a layer and one for its values, and writes back the new slots only. The first length
that enough requests share decides the round; if there is none, the oldest requests are aligned for this round.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from steeple.padded.kv import KV, ROOM
from steeple.padded.net import Net
from steeple.padded.round import Group, Outcome
from steeple.padded.rows import Ints, LeftPadded, Rows
from steeple.padded.stats import PaddedStats
from steeple.request import Request


class Pool:
    """Args: places: most rows of a round; window: requests held; nets: target and assistant."""

    def __init__(self, places: int, window: int, nets: tuple[Net, Net | None], stats: PaddedStats) -> None:
        self._places, self._window, self._stats = places, max(window, places), stats
        self._stores = [_Store(net, self._window) for net in nets if net is not None]
        self._place: dict[Request, int] = {}  # in the order of their coming
        self._left = list(range(self._window))[::-1]
        self._part = "group"

    @property
    def free(self) -> int:
        return len(self._left)

    @property
    def running(self) -> int:
        return len(self._place)

    def join(self, requests: list[Request], target: LeftPadded, draft: LeftPadded | None) -> None:
        self._place |= {request: self._left.pop() for request in requests}
        with self._stats.timed("join", target.net.device):
            for store, rows in zip(self._stores, (target, draft), strict=False):
                if rows is not None:
                    store.add(self._rows_of(requests), rows)

    def next(self) -> Group:
        requests, alike = chosen(list(self._place), self._places)
        self._part = "group" if alike else "align"
        self._stats.grouped += alike
        self._stats.moved += not alike
        with self._stats.timed(self._part, self._stores[0].net.device):
            rows = [store.take(self._rows_of(requests)) for store in self._stores]
        return Group(requests, rows[0], rows[1] if len(rows) > 1 else None)

    def settle(self, group: Group, outcome: Outcome) -> None:
        place_B = self._rows_of(group.requests)
        with self._stats.timed(self._part, self._stores[0].net.device):
            counts = (outcome.kept_B, outcome.drafted_B)
            for store, rows, count_B in zip(self._stores, (group.target, group.draft), counts, strict=False):
                store.put(place_B, rows, count_B)
        for request in group.requests:
            if request.finished:
                self._left.append(self._place.pop(request))

    def _rows_of(self, requests: Sequence[Request]) -> list[int]:
        return [self._place[request] for request in requests]


def chosen(requests: Sequence[Request], most: int) -> tuple[list[Request], bool]:
    """The first ``most`` requests (or all there are) of one length, and True; or the oldest, and False."""
    enough = min(most, len(requests))
    alike: dict[int, list[Request]] = {}
    for request in requests:
        members = alike.setdefault(len(request), [])
        members.append(request)
        if len(members) == enough:
            return members, True
    return list(requests[:enough]), False


class _Store:
    """Keys and values of one model, one row per request of the pool; tokens lie from slot 0 on.

    Args: net: the model; window: rows.
    """

    def __init__(self, net: Net, window: int) -> None:
        self.net, self._window = net, window
        self._kv = KV()
        self._length_W: Ints = np.zeros(window, dtype=np.int64)

    def add(self, places: Sequence[int], rows: LeftPadded) -> None:
        """Rows that were prefilled. Their padding goes behind their tokens, where nothing counts."""
        self._reserve(rows.width, rows.kv)
        device = self.net.device
        slot = torch.arange(rows.width, device=device) - torch.from_numpy(rows.pad_B).to(device).unsqueeze(1)
        self._kv.put(torch.tensor(places, device=device), slot.remainder(max(rows.width, 1)), rows.kv)
        self._length_W[list(places)] = rows.lengths

    def take(self, places: Sequence[int]) -> LeftPadded:
        """A left-padded batch of some rows; nothing is padded where all are equally long."""
        device = self.net.device
        length_B: Ints = self._length_W[list(places)]
        width = int(length_B.max())
        pad_B = width - length_B
        slot = torch.arange(width + ROOM, device=device) - torch.from_numpy(pad_B).to(device).unsqueeze(1)
        slot = slot.clamp_(min=0, max=self._kv.width - 1)
        return LeftPadded(self.net, pad_B, self._kv.take(torch.tensor(places, device=device), slot, width))

    def put(self, places: Sequence[int], rows: Rows | None, kept_B: Ints) -> None:
        """Write back what a round has appended; the first ``kept_B`` slots of it count."""
        if not isinstance(rows, LeftPadded) or not rows.fed:
            return
        self._reserve(int(rows.lengths.max()) + rows.fed, rows.kv)
        device = self.net.device
        start = torch.from_numpy(rows.lengths).to(device).unsqueeze(1)
        slot = start + torch.arange(rows.fed, device=device)
        self._kv.put(torch.tensor(places, device=device), slot, rows.kv)
        self._length_W[list(places)] = rows.lengths + kept_B

    def _reserve(self, slots: int, like: KV) -> None:
        """Room for so many slots per row."""
        if not self._kv.layers:
            self._kv = like.like(self._window, slots + ROOM)
        elif slots > self._kv.width:
            self._kv = self._kv.like(self._window, slots + max(ROOM, slots // 4))
