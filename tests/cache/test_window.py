"""Windows on a paged cache: which positions a row sees, and where it writes."""

from __future__ import annotations

import numpy as np
import pytest

from steeple.cache.window import EVERYTHING, Window, WindowBatches
from steeple.errors import InternalError
from steeple.types import Batch

BASES = [0, 1, 2, 15, 16, 17, 40, 63, 64, 100]


def tables(bases: list[int], nodes: int, size: int) -> list[list[int]]:
    """Block tables that no two requests share, in no order."""
    counts = [-(-(base + nodes) // size) for base in bases]
    blocks = np.random.default_rng(0).permutation(sum(counts) + 3).tolist()
    return [[blocks.pop() for _ in range(count)] for count in counts]


def seen(batch: Batch, b: int, table: list[int]) -> list[int]:
    """The positions that row b sees, found back through the request's own table."""
    layout = batch.layout
    first, size = int(layout.cu_blocks[b]), layout.block_size
    compact = range(int(layout.prefix[b]))
    return [table.index(int(layout.blocks[first + p // size])) * size + p % size for p in compact]


def expected(base: int, depth: int, window: Window, size: int, strict: bool) -> list[int]:
    """The definition, position by position."""
    sinks = -(-window.sink // size) * size
    recent = max(0, base - window.window) // size * size
    return [p for p in range(base + depth + (not strict)) if p < sinks or p >= recent]


@pytest.mark.parametrize("strict", [False, True], ids=["own", "strict"])
@pytest.mark.parametrize("window", [Window(0, 0), Window(1, 1), Window(4, 20), Window(33, 16), Window(0, EVERYTHING)])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_rows_see_sink_window_and_what_is_in_flight(size: int, window: Window, strict: bool) -> None:
    nodes = 5
    own = tables(BASES, nodes, size)
    windows = WindowBatches(size, "cpu", window, strict=strict)
    windows.open([str(b) for b in BASES], own, np.array(BASES), nodes)
    for depth in range(nodes):
        tokens = np.arange(len(BASES)) + depth
        batch = windows.at(depth, tokens)
        assert batch.tokens.tolist() == tokens.tolist()
        assert batch.positions.tolist() == batch.layout.positions.tolist() == [base + depth for base in BASES]
        for b, base in enumerate(BASES):
            assert seen(batch, b, own[b]) == expected(base, depth, window, size, strict), (base, depth)
            page, offset = divmod(base + depth, size)
            assert int(batch.slots[b]) == own[b][page] * size + offset


def test_a_later_round_with_longer_texts_uses_the_same_memory() -> None:
    own, window = tables([40, 50], 40, 4), Window(4, 8)
    windows = WindowBatches(4, "cpu", window)
    windows.open(["a", "b"], own, np.array([20, 30]), 4)
    first = windows.at(0, np.array([1, 2]))
    for base in ([23, 30], [40, 50], [30, 33]):
        windows.open(["a", "b"], own, np.array(base), 4)
        batch = windows.at(1, np.array([3, 4]))
        assert batch is first
        for b in range(2):
            assert seen(batch, b, own[b]) == expected(base[b], 1, window, 4, False)


def test_other_requests_and_grown_tables_are_noticed() -> None:
    own, window = tables([40, 50, 60], 8, 4), Window(0, 4)
    windows = WindowBatches(4, "cpu", window)
    windows.open(["a", "b"], own[:2], np.array([40, 50]), 2)
    windows.open(["c", "a"], [own[2], own[0]], np.array([60, 40]), 2)
    batch = windows.at(1, np.array([0, 0]))
    assert seen(batch, 0, own[2]) == expected(60, 1, window, 4, False)
    assert seen(batch, 1, own[0]) == expected(40, 1, window, 4, False)
    own[0].append(99)
    windows.open(["c", "a"], [own[2], own[0]], np.array([60, 47]), 2)
    assert seen(windows.at(1, np.array([0, 0])), 1, own[0]) == expected(47, 1, window, 4, False)
    assert int(windows.at(1, np.array([0, 0])).slots[1]) == 99 * 4


def test_a_request_without_room_for_the_deepest_draft_does_no_harm() -> None:
    """Rows are made for others at depths that its table does not reach."""
    windows = WindowBatches(1, "cpu", Window(1, 2))
    short = list(range(10, 13))  # three positions
    windows.open(["a", "b"], [short, list(range(100, 170))], np.array([2, 5]), 63)
    batch = windows.at(0, np.array([0, 0]))
    assert seen(batch, 0, short) == expected(2, 0, Window(1, 2), 1, False)


def test_rows_without_a_round_are_refused() -> None:
    with pytest.raises(InternalError, match="not opened"):
        WindowBatches(4, "cpu", Window(0, 4)).at(0, np.array([1]))
