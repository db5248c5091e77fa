"""The block pool: who holds what, what is found again, what is forgotten first."""

from __future__ import annotations

import numpy as np
import pytest

from steeple.cache.blocks import ROOT, BlockPool, block_name
from steeple.errors import InternalError


def names(*blocks: list[int]) -> list[bytes]:
    out: list[bytes] = []
    for tokens in blocks:
        out.append(block_name(out[-1] if out else ROOT, np.array(tokens, dtype=np.int64)))
    return out


def test_take_and_release() -> None:
    pool = BlockPool(3)
    one, two = pool.take(2), pool.take(1)
    assert sorted(one + two) == [0, 1, 2]
    assert (pool.available, pool.held) == (0, 3)
    pool.release(one)
    assert (pool.available, pool.held) == (2, 1)
    pool.check_integrity([two])


def test_taking_too_much_is_our_own_fault() -> None:
    with pytest.raises(InternalError, match="4 blocks asked, 3 available"):
        BlockPool(3).take(4)


def test_releasing_twice_is_our_own_fault() -> None:
    pool = BlockPool(3)
    taken = pool.take(1)
    pool.release(taken)
    with pytest.raises(InternalError, match="more often than taken"):
        pool.release(taken)


def test_a_name_says_all_tokens_before() -> None:
    one, other = names([1, 2], [3, 4]), names([9, 2], [3, 4])
    assert one[1] != other[1]
    assert one == names([1, 2], [3, 4])
    assert names([1, 2])[0] != names([2, 1])[0]


def test_shared_blocks_are_counted() -> None:
    pool = BlockPool(4)
    mine = pool.take(2)
    known = names([1, 2], [3, 4])
    for block, name in zip(mine, known, strict=True):
        pool.remember(block, name)
    assert pool.find(known) == mine
    pool.check_integrity([mine, mine])
    pool.release(mine)
    pool.check_integrity([mine])
    assert pool.held == 2
    pool.release(mine)
    assert pool.held == 0
    assert pool.find(known) == mine, "released blocks are still found"
    pool.check_integrity([mine])


def test_only_the_run_from_the_start_is_found() -> None:
    pool = BlockPool(4)
    mine = pool.take(3)
    known = names([1], [2], [3])
    pool.remember(mine[0], known[0])
    pool.remember(mine[2], known[2])
    assert pool.find(known) == mine[:1]


def test_the_oldest_is_forgotten_first_and_only_when_nothing_is_free() -> None:
    pool = BlockPool(3)
    for tokens in ([1], [2]):
        taken = pool.take(1)
        pool.remember(taken[0], names(tokens)[0])
        pool.release(taken)
    free = pool.take(1)
    assert pool._by_name.keys() == {names([1])[0], names([2])[0]}, "the free block goes first"
    used = pool.find(names([1]))
    pool.release(used)  # now [1] is the younger one
    pool.take(1)
    assert pool.find(names([2])) == []
    assert pool.find(names([1])) == used
    assert free not in used


def test_equal_content_keeps_one_name() -> None:
    pool = BlockPool(3)
    a, b = pool.take(2)
    pool.remember(a, names([1])[0])
    pool.remember(b, names([1])[0])
    assert pool.find(names([1])) == [a]
    pool.release([a, a, b])
    pool.check_integrity([])
    assert len(pool._free) == 2, "the copy without a name is simply free"


def test_integrity_sees_a_leak_and_a_stranger() -> None:
    pool = BlockPool(3)
    taken = pool.take(2)
    with pytest.raises(InternalError, match="leaked"):
        pool.check_integrity([])
    with pytest.raises(InternalError, match="wrong reference counts"):
        pool.check_integrity([taken, taken[:1]])
    pool._free.append(taken[0])
    with pytest.raises(InternalError, match="not those that nobody holds"):
        pool.check_integrity([taken])
