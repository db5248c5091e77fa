"""Sampling parameters and their errors; forests and how several become one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from steeple.errors import RequestError
from steeple.types import Draft, SamplingParams, concat_drafts


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": float("nan")}, r"temperature = nan is out of range; give a value from 0\.0 to 100\.0"),
        ({"temperature": float("inf")}, "temperature = inf is out of range"),
        ({"temperature": -0.1}, r"temperature = -0\.1 is out of range"),
        ({"temperature": "hot"}, "temperature = 'hot' is not a number"),
        ({"temperature": True}, "temperature = True is not a number"),
        ({"temperature": None}, "temperature = None is not a number"),
        ({"top_p": 0.0}, r"top_p = 0\.0 is out of range"),
        ({"top_p": 1.01}, r"top_p = 1\.01 is out of range"),
        ({"top_k": -1}, "top_k = -1 is out of range; give a value from 0"),
        ({"top_k": 2.0}, r"top_k = 2\.0 is not an integer"),
        ({"top_k": None}, "top_k = None is not an integer"),
        ({"min_p": 1.5}, r"min_p = 1\.5 is out of range"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty = 0\.0 is out of range"),
        ({"presence_penalty": float("nan")}, "presence_penalty = nan is out of range"),
        ({"frequency_penalty": 1e9}, r"frequency_penalty = 1000000000\.0 is out of range"),
        ({"seed": 2**63}, "seed = 9223372036854775808 is out of range"),
        ({"seed": 1.5}, r"seed = 1\.5 is not an integer"),
        ({"max_tokens": 0}, "max_tokens = 0 is out of range; give a value from 1"),
        ({"max_tokens": None}, "max_tokens = None is not an integer"),
        ({"n": 0}, "n = 0 is out of range"),
        ({"n": None}, "n = None is not an integer"),
        ({"logprobs": -1}, "logprobs = -1 is out of range"),
        ({"logprobs": 101}, "logprobs = 101 is out of range"),
        ({"stop": ("a", "")}, "stop = .* holds something that is not a non-empty string"),
        ({"stop": 3}, "stop = 3 is not a list"),
        ({"stop": [4]}, "not a non-empty string"),
        ({"stop_token_ids": "12"}, "stop_token_ids = '12' is not a list"),
        ({"stop_token_ids": [1.0]}, "stop_token_ids = .* not an integer"),
        ({"stop_token_ids": [True]}, "stop_token_ids = .* not an integer"),
        ({"ignore_eos": 1}, "ignore_eos = 1 is not true or false"),
    ],
)
def test_bad_values_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**values)


def test_good_values() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[3, 4], seed=-(2**63), temperature=1, logprobs=0)
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3, 4)
    assert not params.greedy
    assert SamplingParams().greedy
    assert not SamplingParams().penalised
    assert SamplingParams(presence_penalty=0.1).penalised
    assert hash(params) == hash(dataclasses.replace(params))


def test_unknown_parameters_get_a_suggestion() -> None:
    with pytest.raises(RequestError, match=r"'temprature' is no sampling parameter\. Did you mean 'temperature'\?"):
        SamplingParams.from_mapping({"temprature": 1.0})
    assert SamplingParams.from_mapping({"top_k": 3, "stop": ["x"]}) == SamplingParams(top_k=3, stop=("x",))


def a_forest(numbers: np.random.Generator, requests: int, *, laws: bool) -> Draft:
    counts = numbers.integers(4, size=requests)
    cu = torch.from_numpy(np.concatenate(([0], np.cumsum(counts))))
    n = int(cu[-1])
    parent = torch.arange(n) - 1
    parent[cu[:-1][cu.diff() > 0]] = -1
    row = torch.arange(n) if laws else torch.full((n,), -1)
    probs = torch.from_numpy(numbers.random((n, 7))).float() if laws else None
    return Draft(torch.from_numpy(numbers.integers(7, size=n)), parent, cu, row, probs)


def of_request(draft: Draft, b: int) -> list[tuple[int, int, list[float] | None]]:
    """The nodes of one request as plain data: token, parent within it, its law."""
    start, end = int(draft.cu[b]), int(draft.cu[b + 1])
    out = []
    for j in range(start, end):
        parent, row = int(draft.parent[j]), int(draft.row[j])
        law = draft.probs[row].tolist() if row >= 0 and draft.probs is not None else None
        out.append((int(draft.tokens[j]), parent - start if parent >= 0 else -1, law))
    return out


@pytest.mark.parametrize("seed", range(20))
def test_concatenated_forests_keep_every_request(seed: int) -> None:
    numbers = np.random.default_rng(seed)
    places = numbers.permutation(9)
    cuts = [places[:2], places[2:3], places[3:8]]  # nobody drafts for the last one
    parts = [(cut.tolist(), a_forest(numbers, len(cut), laws=bool(i != 1))) for i, cut in enumerate(cuts)]
    whole = concat_drafts(parts, 9)
    assert whole.cu.shape == (10,)
    assert whole.counts[int(places[8])] == 0
    for cut, part in parts:
        for b, place in enumerate(cut):
            assert of_request(whole, place) == of_request(part, b)


def test_concat_of_one_whole_part_is_that_part() -> None:
    part = a_forest(np.random.default_rng(0), 4, laws=True)
    assert concat_drafts([(range(4), part)], 4) is part


def test_concat_of_nothing_is_empty() -> None:
    for parts in ([], [([1], Draft.empty(1)), ([0], Draft.empty(1))]):
        draft = concat_drafts(parts, 2)
        assert draft.cu.tolist() == [0, 0, 0]
        assert draft.tokens.numel() == draft.parent.numel() == draft.row.numel() == 0
        assert draft.probs is None
