"""Every law, for every drafter, verification and cache."""

from __future__ import annotations

import pytest
from checks import (
    PROCESSORS,
    SMALL,
    check_cache_of,
    check_commits,
    check_greedy,
    check_law,
    check_seeds,
    exact_law,
    plain_outputs,
)
from lab import CACHES, DEPEND_ON_HISTORY, ROWS


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("row", ROWS)
def test_l1_greedy_equals_plain_decoding(row: str, cache: str) -> None:
    check_greedy(row, CACHES[cache])


def test_l1_has_something_to_lose() -> None:
    outputs = plain_outputs()
    assert len({tuple(o[:6]) for o in outputs}) > len(outputs) // 2, "the tiny target repeats itself whatever it reads"
    assert len(set(outputs[-1])) > 4


@pytest.mark.parametrize("row", ROWS)
def test_l2_sampled_output_follows_the_exact_law(row: str) -> None:
    check_law(row)


def test_l2_laws_differ() -> None:
    laws = [exact_law(name) for name in PROCESSORS]
    for i, law in enumerate(laws):
        assert abs(law.sum() - 1) < 1e-9
        assert law.shape == (SMALL.config.vocab_size,) * 4
        assert all(abs(law - other).sum() > 0.1 for other in laws[:i])


@pytest.mark.parametrize("row", [row for row in ROWS if row not in DEPEND_ON_HISTORY])
@pytest.mark.parametrize(
    ("cache", "arrival"),
    [
        ("paged", {}),
        ("private", {"backwards": True}),
        ("tiny_blocks", {"join_every": 2}),
        ("odd_blocks_tight", {"join_every": 1, "backwards": True}),
    ],
)
def test_l3_same_seed_same_tokens(row: str, cache: str, arrival: dict[str, object]) -> None:
    preemptions = check_seeds(row, CACHES[cache], **arrival)
    assert (preemptions > 0) == (cache == "odd_blocks_tight"), "the tight cache is there to preempt"


@pytest.mark.parametrize("decoys", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("cache", CACHES)
def test_l4_cache_equals_recomputation_with_refusals_at_each_depth(cache: str, decoys: bool) -> None:
    refused = check_commits(CACHES[cache], decoys=decoys)
    assert refused >= {0, 1, 2, 3}


@pytest.mark.parametrize("row", ROWS)
def test_l4_cache_equals_recomputation(row: str) -> None:
    check_cache_of(row, CACHES["odd_blocks_tight"])
