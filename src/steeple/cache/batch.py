"""Requests and their draft to one flat batch: positions, slots, block table and who sees whom, without a Python loop
over tokens.

``make_batch`` is the clear way. ``BatchMaker`` is its fast twin for a run of steps: between two steps of decoding
nearly nothing changes, so it keeps the block tables and the memory of the batch, and writes only what moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steeple.errors import InternalError
from steeple.types import MAX_NODES, Batch, Draft, KVLayout

Ints = NDArray[np.int64]
KEPT_SHAPES = 16


@dataclass(frozen=True, slots=True)
class Span:
    """The text rows of one request in a step: ``tokens`` stand at positions ``start``..``start + len(tokens) - 1``.

    ``blocks``: the request's block table, with room for the text and the nodes behind it.
    """

    request_id: str
    start: int
    tokens: Ints
    blocks: Sequence[int]


def tree_shape(parent: Ints, cu: Ints) -> tuple[Ints, Ints]:
    """Depth (0 = child of the root) and ancestor bits (itself included) of every node of a forest."""
    counts = np.diff(cu)
    depth = np.zeros(parent.shape[0], dtype=np.int64)
    bits = np.zeros(parent.shape[0], dtype=np.int64)
    for j in range(int(counts.max()) if counts.size else 0):
        node = cu[:-1][counts > j] + j
        above = parent[node]
        has = above >= 0
        safe = np.where(has, above, 0)
        depth[node] = np.where(has, depth[safe] + 1, 0)
        bits[node] = np.where(has, bits[safe], 0) | (1 << j)
    return depth, bits


def make_batch(spans: Sequence[Span], draft: Draft, block_size: int, device: torch.device | str) -> Batch:
    """The flat batch of ``spans`` with the nodes of ``draft`` behind each request's text rows."""
    B = len(spans)
    starts = np.fromiter((s.start for s in spans), np.int64, B)
    lengths = np.fromiter((s.tokens.shape[0] for s in spans), np.int64, B)
    node_cu = draft.cu.numpy()
    nodes = np.diff(node_cu)
    if nodes.size and nodes.max() > MAX_NODES:
        raise InternalError(f"a draft of {nodes.max()} nodes; at most {MAX_NODES} fit")
    rows = lengths + nodes
    cu_rows = np.concatenate(([0], np.cumsum(rows)))
    T = int(cu_rows[-1])
    owner = np.repeat(np.arange(B), rows)
    within = np.arange(T) - cu_rows[owner]
    text_len = starts + lengths
    is_node = within >= lengths[owner]
    node_rows = np.flatnonzero(is_node)
    storage = starts[owner] + within  # sequence position that the row's keys are staged at
    depth, bits = tree_shape(draft.parent.numpy(), node_cu)
    positions = storage.copy()
    positions[node_rows] = text_len[owner[node_rows]] + depth
    prefix = np.where(is_node, text_len[owner], storage + 1)
    ancestors = np.zeros(T, dtype=np.int64)
    ancestors[node_rows] = bits

    block_counts = np.fromiter((len(s.blocks) for s in spans), np.int64, B)
    cu_blocks = np.concatenate(([0], np.cumsum(block_counts)))
    blocks = np.fromiter((b for s in spans for b in s.blocks), np.int64, int(cu_blocks[-1]))
    slots = blocks[cu_blocks[owner] + storage // block_size] * block_size + storage % block_size

    tokens = np.zeros(T, dtype=np.int64)
    tokens[~is_node] = np.concatenate([s.tokens for s in spans]) if B else []
    tokens_T = torch.from_numpy(tokens).to(device)
    node_rows_N = torch.from_numpy(node_rows)
    if node_rows.size:
        tokens_T[node_rows_N.to(device)] = draft.tokens
    layout = KVLayout(
        cu_rows=_int32(cu_rows),
        blocks=_int32(blocks),
        cu_blocks=_int32(cu_blocks),
        block_size=block_size,
        prefix=_int32(prefix),
        ancestors=torch.from_numpy(ancestors),
        text_len=_int32(text_len),
        positions=_int32(positions),
        node_row=_int32(cu_rows[:-1] + lengths),
    )
    return Batch(
        tuple(s.request_id for s in spans),
        tokens_T,
        torch.from_numpy(positions).to(device),
        torch.from_numpy(slots).to(device),
        layout,
        node_rows_N,
    )


def _int32(values: Ints) -> Tensor:
    return torch.from_numpy(values.astype(np.int32))


class BlockTables:
    """The block tables of a set of requests as one array ``[B * width]``, copied as far as they are known.

    A table is known by the object that holds it and by its length: while its request runs it may only grow.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.ids: list[str] = []
        self.width = 0
        self.flat: NDArray[np.int32] = np.zeros(0, dtype=np.int32)
        # What to add to a position to get its slot, by blocks: (block - number of the block in its table) * block size.
        self.shift: Ints = np.zeros(0, dtype=np.int64)
        self._tables: list[Sequence[int]] = []
        self._known: list[int] = []

    def update(self, ids: list[str], tables: Sequence[Sequence[int]]) -> bool:
        """Copy what is new. True if the memory has moved."""
        if ids != self.ids:
            self._rebuild(ids, tables)
            return True
        for b, table in enumerate(tables):
            known, length = self._known[b], len(table)
            if table is not self._tables[b] or length < known or length > self.width:
                self._rebuild(ids, tables)
                return True
            if length > known:
                self._copy(b, table, known)
        return False

    def _copy(self, b: int, table: Sequence[int], known: int) -> None:
        at, length = b * self.width, len(table)
        self.flat[at + known : at + length] = table[known:]
        numbers = self.flat[at + known : at + length] - np.arange(known, length)
        self.shift[at + known : at + length] = numbers * self.block_size
        self._known[b] = length

    def _rebuild(self, ids: list[str], tables: Sequence[Sequence[int]]) -> None:
        before = {id: (b, self._tables[b], self._known[b]) for b, id in enumerate(self.ids)}
        flat, shift, width = self.flat, self.shift, self.width
        longest = max((len(t) for t in tables), default=0)
        self.width = longest + longest // 4 + 4
        self.flat = np.zeros(len(ids) * self.width, dtype=np.int32)
        self.shift = np.zeros(len(ids) * self.width, dtype=np.int64)
        self.ids, self._tables, self._known = ids, list(tables), [0] * len(ids)
        for b, (id, table) in enumerate(zip(ids, tables, strict=True)):
            row, old, known = before.get(id, (0, None, 0))
            if old is not table or len(table) < known:
                known = 0
            here = slice(b * self.width, b * self.width + known)
            there = slice(row * width, row * width + known)
            self.flat[here], self.shift[here] = flat[there], shift[there]
            self._copy(b, table, known)


class _Shape:
    """A batch whose requests have so many text rows and nodes: what these decide, and memory for what they do not."""

    def __init__(self, tables: BlockTables, lengths: Ints, counts: Ints) -> None:
        B = lengths.shape[0]
        rows = lengths + counts
        cu_rows = np.concatenate(([0], np.cumsum(rows)))
        T = int(cu_rows[-1])
        owner = np.repeat(np.arange(B), rows)
        self._within = np.arange(T) - cu_rows[owner]
        node = self._within - lengths[owner]  # number of the node, negative for a row of text
        self._node_rows, self._text_rows = np.flatnonzero(node >= 0), np.flatnonzero(node < 0)
        self._node = node[self._node_rows]
        # A row of text sees the text up to itself, a node all of the text.
        self._sees = np.where(node < 0, self._within + 1, lengths[owner])
        self._owner = None if T == B else owner
        self._first_block = owner * tables.width
        self._lengths, self._shift, self._block_size = lengths, tables.shift, tables.block_size
        self._tokens, self._positions, self._slots, self._ancestors = (np.zeros(T, dtype=np.int64) for _ in range(4))
        one = np.uint64(1)
        self._ancestors[self._node_rows] = ((one << (self._node + 1).astype(np.uint64)) - one).view(np.int64)
        self._positions_32 = np.zeros(T, dtype=np.int32)
        self._text_len = np.zeros(B, dtype=np.int32)
        # One row each sees exactly its request's text.
        self._prefix = self._text_len if T == B else np.zeros(T, dtype=np.int32)
        layout = KVLayout(
            cu_rows=_int32(cu_rows),
            blocks=torch.from_numpy(tables.flat),
            cu_blocks=_int32(np.arange(B + 1) * tables.width),
            block_size=tables.block_size,
            prefix=torch.from_numpy(self._prefix),
            ancestors=torch.from_numpy(self._ancestors),
            text_len=torch.from_numpy(self._text_len),
            positions=torch.from_numpy(self._positions_32),
            node_row=_int32(cu_rows[:-1] + lengths),
        )
        self.batch = Batch(
            tuple(tables.ids),
            torch.from_numpy(self._tokens),
            torch.from_numpy(self._positions),
            torch.from_numpy(self._slots),
            layout,
            torch.from_numpy(self._node_rows),
        )

    def fill(self, starts: Ints, tokens: Ints, draft: Draft) -> None:
        """Write this step's rows."""
        np.add(starts, self._lengths, out=self._text_len)
        if self._owner is None:
            storage = starts
        else:
            base = starts[self._owner]
            np.add(base, self._sees, out=self._prefix)
            storage = base + self._within
        block = storage // self._block_size
        block += self._first_block
        np.add(storage, self._shift[block], out=self._slots)
        self._positions[:] = storage
        if self._node_rows.shape[0]:
            self._tokens[self._text_rows] = tokens
            if draft.tokens.device.type == "cpu":
                self._tokens[self._node_rows] = draft.tokens.numpy()
            if not draft.chain:
                depth, self._ancestors[self._node_rows] = tree_shape(draft.parent.numpy(), draft.cu.numpy())
                self._positions[self._node_rows] += depth - self._node
        else:
            self._tokens[:] = tokens
        self._positions_32[:] = self._positions


class BatchMaker:
    """Makes the batches of one runner, step after step; see ``make_batch``, its slow twin.

    A batch is valid until the next one is made: its memory is written over. In the flat block table the requests have
    room behind their last block. Tables may only grow while their request runs.
    """

    def __init__(self, block_size: int, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._on_host = self._device.type == "cpu"
        self._tables = BlockTables(block_size)
        self._shapes: dict[bytes, _Shape] = {}

    def make(
        self,
        ids: list[str],
        tables: Sequence[Sequence[int]],
        starts: Ints,
        lengths: Ints,
        tokens: Ints,
        draft: Draft,
    ) -> Batch:
        """The flat batch of B requests and the nodes of ``draft`` behind each request's text rows.

        Args:
            ids, tables: the requests' names and block tables, with room for the text and the nodes behind it.
            starts, lengths: ``[B]`` request b has text rows at positions ``starts[b]`` and the next ``lengths[b]``.
            tokens: of the text rows, flat, on the host.
        """
        if self._tables.update(ids, tables):
            self._shapes.clear()
        key = lengths.tobytes()
        if draft.tokens.shape[0]:
            key += draft.cu.numpy().tobytes() + bytes((draft.chain,))
        shape = self._shapes.get(key)
        if shape is None:
            counts = draft.counts.numpy()
            if counts.size and counts.max() > MAX_NODES:
                raise InternalError(f"a draft of {counts.max()} nodes; at most {MAX_NODES} fit")
            if len(self._shapes) >= KEPT_SHAPES:
                self._shapes.clear()
            shape = self._shapes[key] = _Shape(self._tables, lengths.copy(), counts)
        shape.fill(starts, tokens, draft)
        return shape.batch if self._on_host else self._on_device(shape.batch, draft)

    def _on_device(self, batch: Batch, draft: Draft) -> Batch:
        tokens, positions, slots = (x.to(self._device) for x in (batch.tokens, batch.positions, batch.slots))
        if batch.node_rows.shape[0]:
            tokens[batch.node_rows.to(self._device)] = draft.tokens
        return replace(batch, tokens=tokens, positions=positions, slots=slots)
