"""Prompt lookup against a search through the whole text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steeple.draft.ngram import NGram, NGramConfig
from steeple.errors import InternalError
from steeple.request import Request
from steeple.types import SamplingParams


def a_request(tokens: list[int], name: str = "r") -> Request:
    return Request(name, tokens, SamplingParams())


def searched(text: list[int], nodes: int, shortest: int, longest: int) -> list[int]:
    """What the text would go on with, found by looking at every position."""
    for length in range(min(longest, len(text) - 1), shortest - 1, -1):
        ends = [e for e in range(length, len(text)) if text[e - length : e] == text[-length:]]
        if ends:
            out: list[int] = []
            for _ in range(nodes):
                out.append((text + out)[ends[-1] + len(out)])
            return out
    return []


@pytest.mark.parametrize("seed", range(10))
def test_equals_the_search_while_the_text_grows(seed: int) -> None:
    numbers = np.random.default_rng(seed)
    config = NGramConfig(k=5, min_match=1 + seed % 3, max_match=1 + seed % 3 + seed % 4)
    drafter = NGram(config, torch.device("cpu"))
    requests = [a_request(numbers.integers(3, size=n).tolist(), f"r{n}") for n in (1, 2, 7)]
    for _ in range(25):
        budget = numbers.integers(6, size=3).tolist()
        draft = drafter.propose(requests, budget)
        for b, request in enumerate(requests):
            expected = searched(request.tokens.tolist(), budget[b], config.min_match, config.max_match)
            assert draft.tokens[draft.cu[b] : draft.cu[b + 1]].tolist() == expected
            request.append(numbers.integers(3, size=int(numbers.integers(1, 4))).tolist())


def test_tokens_are_chosen_chains() -> None:
    drafter = NGram(NGramConfig(k=3), torch.device("cpu"))
    draft = drafter.propose(
        [a_request([1, 2, 1, 2], "a"), a_request([5], "b"), a_request([3, 4, 3, 4], "c")], [3, 3, 3]
    )
    assert draft.cu.tolist() == [0, 3, 3, 6]
    assert draft.parent.tolist() == [-1, 0, 1, -1, 3, 4]
    assert draft.row.tolist() == [-1] * 6
    assert draft.probs is None


def test_a_loop_goes_on_past_the_end_of_the_text() -> None:
    drafter = NGram(NGramConfig(k=6, min_match=1), torch.device("cpu"))
    assert drafter.propose([a_request([1, 2, 3, 1, 2, 3])], [6]).tokens.tolist() == [1, 2, 3, 1, 2, 3]


def test_requests_are_forgotten() -> None:
    drafter = NGram(NGramConfig(), torch.device("cpu"))
    one = a_request([1, 2, 1, 2])
    drafter.propose([one], [4])
    with pytest.raises(InternalError, match=r"n-gram indices of \['r'\] are left over"):
        drafter.check_integrity()
    drafter.forget(one)
    drafter.check_integrity()
    drafter.forget(one)
    # The same name with another text starts anew.
    assert drafter.propose([a_request([7, 8, 9, 7, 8])], [1]).tokens.tolist() == [9]
