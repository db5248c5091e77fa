"""A cache of constant size per request: the pages of the sink, and a ring of pages for what came last.

For drafts whose keys are not the target's, and who see through a window: nothing older is ever read again. The ring has
room for the window and for the positions in flight at once (sink + window + k); so what is staged never lies on what
the next round needs. To whoever reads it, it looks like a paged cache: its block tables go round in circles.
"""

from __future__ import annotations

import numpy as np

from steeple.cache.batch import Ints
from steeple.cache.paged import PagedCache
from steeple.cache.window import Window


class PageRings:
    """Args: cache whose blocks are lent out; window; nodes: most positions in flight."""

    def __init__(self, cache: PagedCache, window: Window, nodes: int) -> None:
        self.cache, self._size = cache, cache.block_size
        self.sinks = -(-window.sink // self._size)
        self.ring = -(-(window.window + self._size - 1 + nodes) // self._size) + 1
        self._tables: dict[str, list[int]] = {}

    def admit(self, id: str) -> bool:
        """Pages for the request, if it has none yet; False if there are none left."""
        if id in self._tables:
            return True
        if (self.sinks + self.ring) > self.cache.pool.available:
            return False
        self.cache.attach(id, np.zeros(0, dtype=np.int64))
        self.cache.reserve(id, (self.sinks + self.ring) * self._size)
        self._tables[id] = list(self.cache.table(id)[: self.sinks])
        return True

    def has(self, id: str) -> bool:
        """Whether the request has pages."""
        return id in self._tables

    def table(self, id: str, length: int) -> list[int]:
        """Blocks of positions 0..length - 1. Only those of the sink and the last ``ring`` pages hold what was written
        there; the list grows, and only at its end."""
        table, blocks = self._tables[id], self.cache.table(id)
        for page in range(len(table), -(-length // self._size)):
            table.append(blocks[self.sinks + (page - self.sinks) % self.ring])
        return table

    def lasting(self, positions: Ints) -> Ints:
        """Which of these rising positions of a request will not be written over by the later ones."""
        if not positions.size:
            return positions
        page = positions // self._size
        return np.flatnonzero((page < self.sinks) | (page > page[-1] - self.ring))

    def slots(self, id: str, positions: Ints) -> Ints:
        """Where these positions are stored."""
        table = np.array(self.table(id, int(positions.max()) + 1 if positions.size else 0), dtype=np.int64)
        return table[positions // self._size] * self._size + positions % self._size

    def free(self, id: str) -> None:
        """Give the pages back."""
        if self._tables.pop(id, None) is not None:
            self.cache.free(id)
