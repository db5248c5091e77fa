"""Rings of pages: what the next round reads is never written over, and tables grow at their end only."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steeple.cache.paged import PagedCache
from steeple.cache.ring import PageRings
from steeple.cache.window import Window
from steeple.config import ModelConfig
from steeple.ops.attention import ReferenceAttention

CONFIG = ModelConfig(
    vocab_size=5,
    hidden_size=4,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=4,
    intermediate_size=4,
    max_context=500,
    rope_inv_freq=(1.0, 0.1),
)


def rings(window: Window, nodes: int, page: int, blocks: int = 60) -> PageRings:
    cache = PagedCache(CONFIG, blocks=blocks, block_size=page, dtype=torch.float32, attention=ReferenceAttention())
    return PageRings(cache, window, nodes)


@pytest.mark.parametrize("page", [1, 3, 4])
@pytest.mark.parametrize(
    ("window", "nodes"), [(Window(4, 8), 5), (Window(0, 1), 1), (Window(5, 0), 3), (Window(1, 20), 7)]
)
def test_window_and_what_is_in_flight_never_share_a_slot(window: Window, nodes: int, page: int) -> None:
    ring = rings(window, nodes, page)
    assert ring.admit("a")
    written: dict[int, int] = {}
    rng = np.random.default_rng(page)
    length = 1
    while length < 200:
        grown = int(rng.integers(1, nodes + 2))
        new = np.arange(length - 1, length - 1 + grown)
        for position, slot in zip(new.tolist(), ring.slots("a", new).tolist(), strict=True):
            written[slot] = position
        length += grown
        base = length - 1
        in_flight = np.arange(base, base + nodes)
        for position, slot in zip(in_flight.tolist(), ring.slots("a", in_flight).tolist(), strict=True):
            written[slot] = position
        sinks, first = -(-window.sink // page) * page, max(0, base - window.window) // page * page
        visible = np.array([p for p in range(base + nodes) if p < sinks or p >= first])
        assert [written[slot] for slot in ring.slots("a", visible).tolist()] == visible.tolist()


def test_only_what_lasts_is_written_of_a_long_prompt() -> None:
    ring = rings(Window(4, 8), 4, 4)
    ring.admit("a")
    positions = np.arange(150)
    kept = positions[ring.lasting(positions)]
    slots = ring.slots("a", kept)
    assert len(set(slots.tolist())) == len(kept)
    assert set(range(4)) <= set(kept.tolist())
    assert set(range(136, 150)) <= set(kept.tolist())
    assert ring.lasting(np.zeros(0, dtype=np.int64)).size == 0


def test_tables_grow_at_their_end() -> None:
    ring = rings(Window(4, 8), 4, 4)
    ring.admit("a")
    before = list(ring.table("a", 40))
    table = ring.table("a", 90)
    assert table[: len(before)] == before
    assert table is ring.table("a", 60)
    assert len(table) == 23


def test_pages_end_and_come_back() -> None:
    ring = rings(Window(4, 8), 4, 4, blocks=13)
    assert ring.admit("a")
    assert ring.admit("b")
    assert not ring.admit("c")
    assert not ring.has("c")
    assert ring.admit("a")
    ring.free("a")
    ring.free("nobody")
    assert ring.admit("c")
    for id in ("b", "c"):
        ring.free(id)
    ring.cache.check_integrity(idle=True)
