"""What the Triton attention does in one step, as one int32 array: the items of work, and what every row sees.

On the host, in numpy, without a Python loop over requests; the array goes to the device in one copy. Its header says
where its parts begin, so that a captured graph can read plans of any size from one address.

Shape letters: B requests, T rows, W items of work.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from steeple.ops.attention import check_layout, require
from steeple.types import KVLayout

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
# int32: number of items; where items, prefix, positions, ancestors, slots, splits and blocks begin; head_stride
HEADER = 9
ITEM = 8  # int32: first row, rows, first block, text_len, first key, end of keys, first key of the tree, direct
NO_TREE = 1 << 30


@dataclass(frozen=True, slots=True)
class Tiling:
    """How work is cut. The first three fix the rounding of every row; ``programs`` and ``slots`` do not.

    rows      query rows of a request that one item holds
    keys      keys that are multiplied at once
    split     keys that are summed by themselves, a multiple of ``keys``
    programs  items x key heads that keep the device busy
    slots     partial sums there is room for, in rows x splits
    """

    rows: int
    keys: int
    split: int
    programs: int
    slots: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The array of a step on the host; number of items; whether any row is to be combined from partial sums."""

    array: Int32
    items: int
    combines: bool


def make_plan(layout: KVLayout, tiling: Tiling, kv_heads: int, blocks: int) -> Plan:
    """The plan of a step.

    Args:
        blocks: in the cache.

    Raises ``InternalError`` if the layout breaks the contract or a row would read outside the cache.
    """
    check_layout(layout)
    tiles = _Tiles.of(layout, tiling, kv_heads, blocks)
    splits = np.maximum(-(-tiles.end // tiling.split), 1)
    parted = _parted(tiles, splits, tiling, kv_heads)
    own_splits = np.where(parted, splits, 1)
    items = _items(tiles, own_splits, parted, tiling)
    row_splits = np.repeat(np.where(parted, splits, 0), tiles.rows)
    row_slot = np.cumsum(row_splits) - row_splits
    parts = (
        items.reshape(-1),
        layout.prefix.numpy(),
        layout.positions.numpy(),
        layout.ancestors.numpy().view(np.int32),  # little-endian: low word first
        row_slot,
        row_splits,
        _tables(layout, kv_heads),
    )
    sizes = [part.shape[0] for part in parts]
    starts = HEADER + np.concatenate(([0], np.cumsum(sizes)))
    array = np.empty(int(starts[-1]), dtype=np.int32)
    array[0] = items.shape[0]
    array[1 : HEADER - 1] = starts[:-1]
    array[HEADER - 1] = layout.head_stride
    for start, part in zip(starts, parts, strict=False):
        array[start : start + part.shape[0]] = part
    return Plan(array, items.shape[0], bool(parted.any()))


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Runs of rows of one request, at most ``Tiling.rows`` long; together all rows, in order."""

    first: Int64
    rows: Int64
    table: Int64
    text_len: Int64
    end: Int64
    tree_from: Int64

    @staticmethod
    def of(layout: KVLayout, tiling: Tiling, kv_heads: int, blocks: int) -> _Tiles:
        cu_rows = layout.cu_rows.numpy().astype(np.int64)
        cu_blocks = layout.cu_blocks.numpy().astype(np.int64)
        counts, held = np.diff(cu_rows), np.diff(cu_blocks)
        T, given = layout.prefix.shape[0], _tables(layout, kv_heads)
        entries = int(cu_blocks[-1]) + (kv_heads - 1) * layout.head_stride
        edges = bool(cu_rows[0] == cu_blocks[0] == 0 and cu_rows[-1] == T and entries == given.shape[0])
        require(edges and bool((counts >= 0).all() and (held >= 0).all()), "cu_rows or cu_blocks is wrong")
        each = -(-counts // tiling.rows)
        owner = np.repeat(np.arange(counts.shape[0]), each)
        within = (np.arange(owner.shape[0]) - (np.cumsum(each) - each)[owner]) * tiling.rows
        first = cu_rows[owner] + within
        text_len = layout.text_len.numpy().astype(np.int64)
        ancestors = layout.ancestors.numpy()
        row_owner = np.repeat(np.arange(counts.shape[0]), counts)
        row_end = np.where(ancestors != 0, text_len[row_owner] + bit_length(ancestors), 0)
        row_end = np.maximum(row_end, layout.prefix.numpy())
        inside = bool((row_end <= held[row_owner] * layout.block_size).all())
        require(inside and not (given.size and not 0 <= given.min() <= given.max() < blocks), OUTSIDE)
        if not T:
            return _Tiles(first, first, first, first, first, first)
        tree = np.logical_or.reduceat(ancestors != 0, first)
        return _Tiles(
            first,
            np.minimum(counts[owner] - within, tiling.rows),
            cu_blocks[owner],
            text_len[owner],
            np.maximum.reduceat(row_end, first),
            np.where(tree, text_len[owner] // tiling.keys * tiling.keys, NO_TREE),
        )


def _tables(layout: KVLayout, kv_heads: int) -> Int32:
    """The block tables of all heads; a layer's are followed by those of the layers behind it."""
    return layout.blocks.numpy()[: int(layout.cu_blocks[-1]) + (kv_heads - 1) * layout.head_stride]


OUTSIDE = "a row sees a position outside its request's blocks, or a block lies outside the cache"


def bit_length(x: Int64) -> Int64:
    """Number of the highest bit set, counted from 1; 0 for 0. ``x`` is not negative."""
    x, bits = x.copy(), np.zeros_like(x)
    for shift in (32, 16, 8, 4, 2, 1):
        high = x >> shift
        bits += np.where(high > 0, shift, 0)
        x = np.where(high > 0, high, x)
    return bits + (x > 0)


def _parted(tiles: _Tiles, splits: Int64, tiling: Tiling, kv_heads: int) -> NDArray[np.bool_]:
    """Tiles whose splits are shared out: those that would keep one program busy for more than its fair part."""
    fair = max(1, int(splits.sum()) * kv_heads // tiling.programs)
    parted = splits > fair
    while int((splits * tiles.rows)[parted].sum()) > tiling.slots:
        fair *= 2
        parted = splits > fair
    return parted


def _items(tiles: _Tiles, own_splits: Int64, parted: NDArray[np.bool_], tiling: Tiling) -> Int32:
    """``[W, ITEM]``, the longest first, because programs take them in turn."""
    tile = np.repeat(np.arange(own_splits.shape[0]), own_splits)
    number = np.arange(tile.shape[0]) - (np.cumsum(own_splits) - own_splits)[tile]
    first = number * tiling.split
    end = tiles.end[tile]
    stop = np.where(parted[tile], np.minimum(first + tiling.split, end), end)
    items = np.stack(
        (
            tiles.first[tile],
            tiles.rows[tile],
            tiles.table[tile],
            tiles.text_len[tile],
            first,
            stop,
            tiles.tree_from[tile],
            ~parted[tile],
        ),
        axis=1,
    )
    return items[np.argsort(first - stop, kind="stable")].astype(np.int32)
