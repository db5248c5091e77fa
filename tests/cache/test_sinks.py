"""Copies of the sink, turned to stand right before the window."""

from __future__ import annotations

import numpy as np
import torch

from steeple.cache.paged import PagedCache
from steeple.cache.sinks import SinkCopies, Turn
from steeple.config import ModelConfig
from steeple.model.layers import rotate
from steeple.ops.attention import ReferenceAttention

PAGE, H, K = 4, 6, 2
ATTENTION = ReferenceAttention()


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary tables of four of six dims; the last two pass through."""
    angle = torch.outer(torch.arange(200, dtype=torch.float32), torch.tensor([1.0, 0.1]))
    return angle.cos(), angle.sin()


def a_cache(blocks: int = 80) -> PagedCache:
    config = ModelConfig(
        vocab_size=9,
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        num_kv_heads=K,
        head_dim=H,
        intermediate_size=8,
        max_context=200,
        rope_inv_freq=(1.0, 0.1),
    )
    return PagedCache(config, blocks=blocks, block_size=PAGE, dtype=torch.float32, attention=ATTENTION)


def fill(cache: PagedCache, id: str, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A request whose keys are random ones, rotated to their positions; the keys before, and the values."""
    cache.attach(id, np.arange(length))
    assert cache.reserve(id, length)
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(length, K, H, generator=generator)
    at = torch.arange(length)
    cos, sin = tables()
    slots = torch.tensor(list(cache.table(id)))[at // PAGE] * PAGE + at % PAGE
    values = torch.randn(length, K, H, generator=generator)
    for layer in range(2):
        keys, stored = cache.layer(layer)
        ATTENTION.write_kv(keys, stored, slots, rotate(raw, cos[at], sin[at]) + 0.0, values)
    return raw, values


def read(cache: PagedCache, blocks: list[int], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    slots = (torch.tensor(blocks)[:, None] * PAGE + torch.arange(PAGE)).flatten()
    return ATTENTION.read_kv(*cache.layer(layer), slots)


def test_a_copy_holds_the_keys_as_if_the_text_began_later() -> None:
    cache = a_cache()
    raws = {id: fill(cache, id, 40, seed) for seed, id in enumerate(("a", "b", "c"))}
    copies = SinkCopies(cache, cache, 2, 2, Turn(*tables()))
    ids = ["a", "b", "c"]
    cos, sin = tables()
    for skipped in ([8, 0, 20], [12, 4, 20]):  # then the windows of two of them move on
        found = copies.of(ids, [cache.table(id) for id in ids], np.array(skipped))
        for id, blocks, by in zip(ids, found, skipped, strict=True):
            assert (list(blocks) == list(cache.table(id)[:2])) == (by == 0), (
                "own pages are read only where none is left out"
            )
            at = torch.arange(2 * PAGE) + by
            for layer in range(2):
                keys, values = read(cache, list(blocks), layer)
                torch.testing.assert_close(keys, rotate(raws[id][0][: 2 * PAGE], cos[at], sin[at]), atol=1e-5, rtol=0)
                torch.testing.assert_close(values, raws[id][1][: 2 * PAGE])
        own = read(cache, list(cache.table("a")[:2]), 0)[0]
        at = torch.arange(2 * PAGE)
        torch.testing.assert_close(
            own, rotate(raws["a"][0][: 2 * PAGE], cos[at], sin[at]), msg="the text's own keys moved"
        )
    assert sorted(copies.remembered) == ids
    for id in ids:
        copies.forget(id)
        cache.free(id)
    cache.check_integrity(idle=True)


def test_texts_come_before_copies() -> None:
    cache = a_cache(blocks=20)
    fill(cache, "a", 64, 0)  # 16 of 20 blocks: fewer than a quarter are free
    copies = SinkCopies(cache, cache, 2, 1, Turn(*tables()))
    found = copies.of(["a"], [cache.table("a")], np.array([8]))
    assert list(found[0]) == list(cache.table("a")[:1])
    assert not copies.remembered
    copies.forget("a")
    cache.free("a")
    cache.check_integrity(idle=True)
