"""What shapes a request's law besides its parameters: drafts under a constraint change nothing either."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from checks import GREEDY, PROCESSORS, PROMPT, SMALL, SMALL_BAD, prompts
from exact import Floats, check_sample, process
from lab import ROWS, CacheKind, dense, make_engine, make_requests, run
from torch import Tensor

from steeple.request import Request

LENGTH = 3


class Grammar:
    """No token twice in a row, none that is 1 above its predecessor; token 2 is liked the more the longer the text."""

    def rule(self, text: Sequence[int], row: Tensor) -> None:
        """Shape one row that follows ``text``."""
        row[text[-1]] = -torch.inf
        row[(text[-1] + 1) % len(row)] = -torch.inf
        if torch.isfinite(row[2]):
            row[2] += 0.3 * (len(text) % 5)

    def shape(self, request: Request, logits_RV: Tensor, paths: Sequence[Sequence[int]]) -> None:
        assert len(paths) == logits_RV.shape[0]
        assert list(paths[0]) == []
        for row, path in zip(logits_RV, paths, strict=True):
            self.rule([*request.tokens.tolist(), *path], row)


def constrained(requests: Sequence[Request], every: int = 1) -> list[Request]:
    """Every so many requests under the grammar."""
    for request in requests[::every]:
        request.constraint = Grammar()
    return list(requests)


def exact_law(name: str) -> Floats:
    """Probability of the first tokens, enumerated."""
    vocab = SMALL.config.vocab_size
    law = np.ones((vocab,) * LENGTH)
    for depth in range(LENGTH):
        for path in itertools.product(range(vocab), repeat=depth):
            if (law[path] > 0).any():
                row = dense(SMALL, [*PROMPT, *path])[0][-1].clone()
                Grammar().rule([*PROMPT, *path], row)
                own = process(row.tolist(), PROCESSORS[name], PROMPT, path)
                law[path] *= own.reshape(-1, *[1] * (LENGTH - depth - 1))
    return law


@pytest.mark.parametrize("row", ROWS)
def test_greedy_output_under_a_grammar_equals_plain_decoding_under_it(row: str) -> None:
    expected = [run(make_engine(), [own])[0] for own in _mixed()]
    assert run(make_engine(row, batch_size=5, step_tokens=12), _mixed(), join_every=1) == expected


def _mixed() -> list[Request]:
    return constrained(make_requests(prompts(), GREEDY), 2)


def test_the_grammar_matters() -> None:
    free = [run(make_engine(), [own])[0] for own in make_requests(prompts(), GREEDY)]
    bound = run(make_engine(), constrained(make_requests(prompts(), GREEDY)))
    assert all(a != b for a, b in itertools.pairwise(bound[-1]))
    assert sum(a != b for a, b in zip(free, bound, strict=True)) > len(free) // 2


@pytest.mark.parametrize("name", ["temperature", "everything"])
@pytest.mark.parametrize("row", ["none", "small_lm", "drawn_tree", "motley_tree", "spire", "two_drafters"])
def test_sampled_output_under_a_grammar_follows_its_exact_law(row: str, name: str) -> None:
    params = [replace(PROCESSORS[name], max_tokens=LENGTH + 3, seed=i) for i in range(800)]
    requests = constrained(make_requests([PROMPT] * len(params), params))
    engine = make_engine(row, CacheKind(blocks=20_000, block_size=4), target=SMALL, bad=SMALL_BAD, batch_size=3000)
    check_sample(run(engine, requests), exact_law(name), f"{row}, {name}")
