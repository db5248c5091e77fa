"""Windows on a paged cache: the first pages of a text and its last ones, as batches of one row per request.

A page is a block of the cache. Keys are stored with the rotation of their absolute position, so a forward over a few of
a request's pages needs no copy: only a shorter block table, and who sees what counted in it. What such a forward
writes for the positions in flight goes to the request's own slots behind its text, where verification overwrites it.

Sources: StreamingLLM (Xiao et al. 2023, arXiv 2309.17453): sink and window; MagicDec (arXiv 2408.11049) and SPIRe,
which draft through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from steeple.cache.batch import BlockTables, Ints
from steeple.errors import InternalError
from steeple.types import Batch, KVLayout

EVERYTHING = 1 << 30  # a window that no text outgrows


@dataclass(frozen=True, slots=True)
class Window:
    """Which cached positions a draft sees before its root at position ``base``: those of the first
    ``ceil(sink / page)`` pages, and those from page ``(base - window) // page`` on. So ``window`` at least, and less
    than a page more.
    """

    sink: int
    window: int

    def pages(self, base: Ints, page: int) -> tuple[Ints, Ints]:
        """For roots at ``base``, ``[B]``: how many sink pages stand apart, and the first page of the window."""
        first = np.maximum(base - self.window, 0) // page
        return np.minimum(-(-self.sink // page), first), first


@dataclass(frozen=True, slots=True)
class Chosen:
    """More pages of B requests, for each layer and kv head: the first ``counts[b]`` of ``pages [L, K, B, most]``.

    They lie between sink and window.
    """

    pages: NDArray[np.int64]
    counts: Ints


class WindowBatches:
    """Makes the batches of the forwards of a round: row b is one token at position ``base[b] + depth``.

    A batch is valid until the next is made: its memory is written over.

    Args: block_size: positions of a page. strict: a row does not see its own position (feedback memory), so the
        newest keys it sees are those of the position before it.
    """

    def __init__(self, block_size: int, device: torch.device | str, window: Window, *, strict: bool = False) -> None:
        self._size, self._device, self._window, self._strict = block_size, torch.device(device), window, strict
        self._tables = BlockTables(block_size)
        self._rows: _Rows | None = None

    def open(
        self,
        ids: list[str],
        tables: Sequence[Sequence[int]],
        base: Ints,
        nodes: int,
        chosen: Chosen | None = None,
    ) -> None:
        """Begin a round of at most ``nodes`` rows each: requests, their block tables, and the positions of their roots.

        The tables must have room for positions up to ``base + nodes - 1``, as far as rows are made for them.
        """
        self._tables.update(ids, tables)
        apart, first = self._window.pages(base, self._size)
        last = (base + nodes - 1) // self._size
        more = np.zeros_like(base) if chosen is None else chosen.counts
        heads = (1, 1) if chosen is None else chosen.pages.shape[:2]
        count = apart + more + last - first + 1
        width = int(count.max())
        rows = self._rows
        if rows is None or rows.ids != ids or rows.width < width or rows.heads != heads:
            rows = self._rows = _Rows(ids, heads, width + 1, self._size, self._device, strict=self._strict)
        rows.open(self._tables, _Round(base, apart, first, more, count), nodes, chosen)

    @property
    def skipped(self) -> Ints:
        """Positions of the text before each window that are not visible, ``[B]``."""
        return self._opened.skipped

    def put_sinks(self, blocks: Sequence[Sequence[int]]) -> None:
        """Read these blocks in place of the requests' first ones, where a sink stands apart."""
        self._opened.put_sinks(blocks)

    @property
    def _opened(self) -> _Rows:
        if self._rows is None:
            raise InternalError("a round of windows that was not opened")
        return self._rows

    def at(self, depth: int, tokens: Ints) -> Batch:
        """The rows at ``base + depth``, with these tokens, host ``[B]``."""
        return self._opened.at(depth, tokens)

    def run(self, depth: int, passes: int, tokens: Ints) -> RoundRows:
        """The rows at ``base + depth`` and of the passes behind it, ``passes`` in all; ``tokens [B]`` are the first."""
        return self._opened.run(depth, passes, tokens)


@dataclass(frozen=True, slots=True)
class RoundRows:
    """The rows of forwards that follow each other, by depth, ``[k, B]`` each: ``positions`` and ``slots``, int64, and
    how many keys of their view the rows see, ``seen``, int32. ``first``: the batch of the first forward, on the host.
    """

    first: Batch
    positions: Ints
    slots: Ints
    seen: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _Round:
    """Per request ``[B]``: root, pages of the sink that stand apart, first page of the window, chosen ones, all."""

    base: Ints
    apart: Ints
    first: Ints
    chosen: Ints
    count: Ints

    @property
    def skipped(self) -> Ints:
        """Pages that the compact table leaves out before the window."""
        return self.first - self.apart - self.chosen


class _Rows:
    """The memory of the batches of one set of requests. ``heads``: layers and kv heads with tables of their own."""

    def __init__(
        self, ids: list[str], heads: tuple[int, int], width: int, size: int, device: torch.device, *, strict: bool
    ) -> None:
        B, (L, K) = len(ids), heads
        self.ids, self.heads, self.width, self._size, self._device = ids, heads, width, size, device
        self._own = 0 if strict else 1  # a row sees its own position
        self._order = np.arange(width)
        self._owner = np.arange(B)
        self._blocks = np.zeros((L, K, B, width), dtype=np.int32)
        self._tokens, self._positions, self._slots, none = (np.zeros(B, dtype=np.int64) for _ in range(4))
        self._positions_32, self._seen = (np.zeros(B, dtype=np.int32) for _ in range(2))
        seen = torch.from_numpy(self._seen)
        layout = KVLayout(
            cu_rows=torch.arange(B + 1, dtype=torch.int32),
            blocks=torch.from_numpy(self._blocks.reshape(-1)),
            cu_blocks=torch.arange(B + 1, dtype=torch.int32) * width,
            block_size=size,
            prefix=seen,
            ancestors=torch.from_numpy(none),
            text_len=seen,
            positions=torch.from_numpy(self._positions_32),
            node_row=torch.arange(1, B + 1, dtype=torch.int32),
            layer_stride=K * B * width if L * K > 1 else 0,
            head_stride=B * width if L * K > 1 else 0,
        )
        tokens, positions = torch.from_numpy(self._tokens), torch.from_numpy(self._positions)
        no_nodes = torch.zeros(0, dtype=torch.int64)
        self._batch = Batch(tuple(ids), tokens, positions, torch.from_numpy(self._slots), layout, no_nodes)

    def open(self, tables: BlockTables, round: _Round, nodes: int, chosen: Chosen | None) -> None:
        """Take the pages of a round out of the block tables."""
        order, apart, skipped = self._order, round.apart[:, None], round.skipped[:, None]
        page = np.where(order < apart, order, order + skipped)
        # Behind a request's last page the table is never read.
        np.minimum(page, np.minimum(skipped[:, 0] + round.count, tables.width)[:, None] - 1, out=page)
        table = tables.flat.reshape(-1, tables.width)
        self._blocks[:] = table[self._owner[:, None], page]
        if chosen is not None and chosen.pages.shape[3]:
            b, j = np.nonzero(np.arange(chosen.pages.shape[3]) < round.chosen[:, None])
            self._blocks[:, :, b, round.apart[b] + j] = table[b, chosen.pages[:, :, b, j]]
        self._apart, self.skipped = round.apart, round.skipped * self._size
        # What changes from one forward of the round to the next, for all of them at once, [nodes, B].
        self._at = round.base + np.arange(nodes)[:, None]
        self._sees = self._at + (self._own - self.skipped)
        page = np.minimum(self._at // self._size, tables.width - 1)
        self._writes = (table[self._owner, page] - page) * self._size + self._at

    def put_sinks(self, blocks: Sequence[Sequence[int]]) -> None:
        """See ``WindowBatches.put_sinks``."""
        for b, (own, apart) in enumerate(zip(blocks, self._apart.tolist(), strict=True)):
            self._blocks[:, :, b, :apart] = own[:apart]

    def run(self, depth: int, passes: int, tokens: Ints) -> RoundRows:
        """See ``WindowBatches.run``."""
        own = slice(depth, depth + passes)
        self.at(depth, tokens)
        return RoundRows(self._batch, self._at[own], self._writes[own], self._sees[own].astype(np.int32))

    def at(self, depth: int, tokens: Ints) -> Batch:
        """See ``WindowBatches.at``."""
        self._tokens[:] = tokens
        self._positions[:] = self._positions_32[:] = self._at[depth]
        self._seen[:] = self._sees[depth]
        self._slots[:] = self._writes[depth]
        if self._device.type == "cpu":
            return self._batch
        there, batch = self._device, self._batch
        on_device = (batch.tokens.to(there), batch.positions.to(there), batch.slots.to(there))
        return Batch(batch.request_ids, *on_device, batch.layout, batch.node_rows)
