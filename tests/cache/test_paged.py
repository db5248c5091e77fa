"""The paged cache: attach, reserve, stage, commit, share, free."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steeple.cache.batch import Span, make_batch
from steeple.cache.paged import PagedCache
from steeple.config import ModelConfig
from steeple.errors import InternalError
from steeple.ops.attention import ReferenceAttention
from steeple.types import Batch, Draft

CONFIG = ModelConfig(
    vocab_size=10,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    intermediate_size=8,
    max_context=64,
    rope_inv_freq=(1.0, 0.1),
)
TEXT = np.arange(20, dtype=np.int64) % 10


def a_cache(blocks: int = 8, size: int = 4, *, share: bool = True) -> PagedCache:
    return PagedCache(
        CONFIG,
        blocks=blocks,
        block_size=size,
        dtype=torch.float32,
        share_prefixes=share,
        attention=ReferenceAttention(),
    )


def stage(cache: PagedCache, request: str, start: int, stop: int, draft: Draft | None = None) -> Batch:
    """Stage rows whose keys are their sequence position, in every layer."""
    draft = draft or Draft.empty(1)
    nodes = draft.tokens.shape[0]
    assert cache.reserve(request, stop + nodes)
    batch = make_batch([Span(request, start, TEXT[start:stop], cache.table(request))], draft, cache.block_size, "cpu")
    rows = torch.arange(start, stop + nodes, dtype=torch.float32).view(-1, 1, 1).expand(-1, 1, 4)
    for layer in range(2):
        cache.stage(layer, batch, rows + 100 * layer, -rows)
    return batch


def held(cache: PagedCache, request: str, length: int, layer: int = 0) -> list[int]:
    at, size = torch.arange(length), cache.block_size
    slots = torch.tensor(list(cache.table(request)))[at // size] * size + at % size
    keys, values = ReferenceAttention().read_kv(cache.keys[layer], cache.values[layer], slots)
    assert torch.equal(values, layer * 100 - keys)
    return keys[:, 0, 0].int().tolist()


def test_bytes_per_token_is_the_memory_really_used() -> None:
    cache = a_cache()
    assert cache.spec.exact
    used = cache.keys.nbytes + cache.values.nbytes
    assert used == cache.spec.bytes_per_token * cache.pool.count * cache.block_size


def test_text_lies_at_its_positions_in_every_layer() -> None:
    cache = a_cache()
    cache.attach("a", TEXT)
    batch = stage(cache, "a", 0, 6)
    cache.commit(batch, [()], [TEXT[:7]])
    assert held(cache, "a", 6) == list(range(6))
    assert held(cache, "a", 6, layer=1) == list(range(100, 106))


def test_commit_moves_the_accepted_path_and_nothing_else() -> None:
    cache = a_cache()
    cache.attach("a", TEXT)
    tree = Draft(torch.tensor([7, 8, 9, 5]), torch.tensor([-1, -1, 1, 1]), torch.tensor([0, 4]), torch.full((4,), -1))
    batch = stage(cache, "a", 0, 5, tree)
    cache.commit(batch, [(1, 3)], [TEXT[:8]])
    assert held(cache, "a", 7) == [0, 1, 2, 3, 4, 6, 8], "nodes 1 and 3 were staged at 6 and 8"
    assert held(cache, "a", 7, layer=1) == [100, 101, 102, 103, 104, 106, 108]


def test_reserve_changes_nothing_when_there_is_no_room() -> None:
    cache = a_cache(blocks=3)
    cache.attach("a", TEXT)
    cache.attach("b", TEXT)
    assert cache.reserve("a", 5)
    before = list(cache.table("a")), list(cache.table("b")), cache.pool.available
    assert cache.missing("b", 8) == 2
    assert not cache.reserve("b", 8)
    assert (list(cache.table("a")), list(cache.table("b")), cache.pool.available) == before
    assert cache.reserve("b", 4)


@pytest.mark.parametrize("length", [1, 4, 5, 8, 9, 11])
def test_full_blocks_are_shared_but_one_token_is_left_to_compute(length: int) -> None:
    cache = a_cache()
    cache.attach("a", TEXT)
    cache.commit(stage(cache, "a", 0, 10), [()], [TEXT[:11]])
    found = cache.attach("b", TEXT[:length])
    assert found == min((length - 1) // 4, 2) * 4
    assert list(cache.table("b")) == list(cache.table("a"))[: found // 4]
    cache.check_integrity()


def test_other_text_shares_nothing() -> None:
    cache = a_cache()
    cache.attach("a", TEXT)
    cache.commit(stage(cache, "a", 0, 10), [()], [TEXT[:11]])
    other = TEXT.copy()
    other[0] = 9
    assert cache.attach("b", other) == 0


def test_without_sharing_nothing_is_shared() -> None:
    cache = a_cache(share=False)
    cache.attach("a", TEXT)
    cache.commit(stage(cache, "a", 0, 10), [()], [TEXT[:11]])
    assert cache.attach("b", TEXT) == 0


def test_refused_nodes_are_never_shared() -> None:
    """Nodes fill a block, but only the text decides what the block is called."""
    cache = a_cache()
    cache.attach("a", TEXT)
    chain = Draft(torch.tensor([7, 7, 7, 7]), torch.arange(-1, 3), torch.tensor([0, 4]), torch.full((4,), -1))
    cache.commit(stage(cache, "a", 0, 2, chain), [(0,)], [TEXT[:4]])
    assert cache.attach("b", TEXT) == 0, "only three positions are committed"
    cache.free("b")
    cache.commit(stage(cache, "a", 3, 4), [()], [TEXT[:5]])
    assert cache.attach("b", TEXT) == 4


def test_a_text_that_ended_early_names_no_block_beyond_its_end() -> None:
    cache = a_cache()
    cache.attach("a", TEXT)
    chain = Draft(torch.tensor(TEXT[2:6].copy()), torch.arange(-1, 3), torch.tensor([0, 4]), torch.full((4,), -1))
    cache.commit(stage(cache, "a", 0, 2, chain), [(0, 1, 2, 3)], [TEXT[:3]])
    assert cache.attach("b", TEXT) == 0


def test_positions_beyond_the_text_get_their_names_when_the_text_has_come() -> None:
    """A drafter's cache holds nodes as rows of text that is not committed yet."""
    cache = a_cache()
    cache.attach("a", TEXT)
    cache.commit(stage(cache, "a", 0, 6), [()], [TEXT[:3]])
    cache.commit(stage(cache, "a", 3, 9), [()], [TEXT[:10]])
    assert cache.attach("b", TEXT) == 8


def test_freed_blocks_are_found_until_they_are_needed() -> None:
    cache = a_cache(blocks=3)
    cache.attach("a", TEXT)
    cache.commit(stage(cache, "a", 0, 9), [()], [TEXT[:10]])
    cache.free("a")
    cache.check_integrity(idle=True)
    assert cache.attach("b", TEXT) == 8
    cache.free("b")
    cache.attach("c", TEXT[::-1])
    assert cache.reserve("c", 8)
    assert cache.attach("d", TEXT) == 4, "the end of a prefix is forgotten before its start"


def test_shrink_gives_back_what_lies_behind() -> None:
    cache = a_cache()
    cache.attach("a", TEXT)
    assert cache.reserve("a", 12)
    cache.shrink("a", 5)
    assert len(cache.table("a")) == 2
    cache.check_integrity()


def test_errors_of_our_own() -> None:
    cache = a_cache()
    cache.attach("a", TEXT)
    with pytest.raises(InternalError, match="already in the cache"):
        cache.attach("a", TEXT)
    with pytest.raises(InternalError, match="still hold"):
        cache.check_integrity(idle=True)
    cache.free("a")
    cache.free("never seen")
    cache.check_integrity(idle=True)
