"""The block pool of paged caches: free blocks, reference counts, and full blocks found again by their content.

Intervals of a block's life: *free* (nobody's, content void) -> *held* (count > 0) -> *remembered* (count 0, content
known by its hash, taken last) -> free. A full block's name is the hash of its tokens and of the block before it, so
equal names mean equal prefixes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from steeple.errors import InternalError

ROOT = b""


def block_name(before: bytes, tokens: NDArray[np.int64]) -> bytes:
    """Name of a full block that follows the block named ``before``."""
    return blake2b(before + tokens.tobytes(), digest_size=16).digest()


class BlockPool:
    """``count`` blocks with reference counts. Blocks are plain integers."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._references = [0] * count
        self._name: list[bytes | None] = [None] * count
        self._by_name: dict[bytes, int] = {}
        self._remembered: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that ``take`` can give."""
        return len(self._free) + len(self._remembered)

    @property
    def held(self) -> int:
        """Blocks that somebody holds."""
        return self.count - self.available

    def take(self, count: int) -> list[int]:
        """``count`` blocks with void content; the caller checks ``available`` first."""
        if count > self.available:
            raise InternalError(f"{count} blocks asked, {self.available} available")
        taken = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._forget_oldest()
            self._references[block] = 1
            taken.append(block)
        return taken

    def _forget_oldest(self) -> int:
        block, _ = self._remembered.popitem(last=False)
        name = self._name[block]
        if name is not None:
            del self._by_name[name]
            self._name[block] = None
        return block

    def release(self, blocks: Iterable[int]) -> None:
        """Give up one reference each; named blocks stay findable until their place is needed."""
        for block in blocks:
            self._references[block] -= 1
            if self._references[block] < 0:
                raise InternalError(f"block {block} released more often than taken")
            if self._references[block] == 0:
                if self._name[block] is None:
                    self._free.append(block)
                else:
                    self._remembered[block] = None

    def remember(self, block: int, name: bytes) -> None:
        """Give a full, committed block its name; if the name is taken the block stays private."""
        if self._name[block] is None and name not in self._by_name:
            self._name[block] = name
            self._by_name[name] = block

    def find(self, names: Sequence[bytes]) -> list[int]:
        """Take a reference on the longest known run of ``names`` from the start."""
        found: list[int] = []
        for name in names:
            block = self._by_name.get(name)
            if block is None:
                break
            self._remembered.pop(block, None)
            self._references[block] += 1
            found.append(block)
        return found

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Raise ``InternalError`` unless the counts equal what ``holders`` hold and every block is in one state."""
        expected = [0] * self.count
        for blocks in holders:
            for block in blocks:
                expected[block] += 1
        if expected != self._references:
            wrong = [b for b in range(self.count) if expected[b] != self._references[b]]
            raise InternalError(f"blocks {wrong[:8]} have wrong reference counts: leaked or freed twice")
        free, remembered = set(self._free), set(self._remembered)
        if len(free) != len(self._free) or free & remembered:
            raise InternalError("a block is free twice")
        unheld = {b for b in range(self.count) if expected[b] == 0}
        if free | remembered != unheld:
            raise InternalError("the free blocks are not those that nobody holds")
        if any(self._name[b] is not None for b in free):
            raise InternalError("a free block still has a name")
