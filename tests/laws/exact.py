"""The exact law of the first tokens of a request: enumerated, one row at a time, in float64, without Steeple's own law.

And the chi-square test against it. False alarms: every check fails an exact engine with probability below ``ALPHA``;
seeds are fixed, so a check that passed once goes on passing until something that matters changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from lab import dense
from numpy.typing import NDArray
from scipy import stats

from steeple.model.decoder import Decoder
from steeple.types import SamplingParams

ALPHA = 1e-6
Floats = NDArray[np.float64]


def process(logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> Floats:
    """The processed law of one row, spelled out token by token."""
    row = np.array(logits, dtype=np.float64)
    for token in set(prompt) | set(output):
        row[token] = (
            row[token] / params.repetition_penalty if row[token] > 0 else row[token] * params.repetition_penalty
        )
    for token in set(output):
        row[token] -= params.presence_penalty + params.frequency_penalty * list(output).count(token)
    if params.temperature == 0:
        return np.eye(len(row))[row.argmax()]
    row /= params.temperature
    weight = np.exp(row - row.max())
    ranked = sorted(range(len(row)), key=lambda token: -weight[token])
    if params.top_k:
        ranked = ranked[: params.top_k]
    total, mass, kept = weight[ranked].sum(), 0.0, []
    for token in ranked:
        if mass < params.top_p * total and weight[token] >= params.min_p * weight[ranked[0]]:
            kept.append(token)
        mass += weight[token]
    law = np.zeros(len(row))
    law[kept] = weight[kept] / weight[kept].sum()
    return law


def joint_law(decoder: Decoder, prompt: Sequence[int], params: SamplingParams, length: int) -> Floats:
    """Probability of every sequence of ``length`` tokens after ``prompt``, ``[V] * length``."""
    vocab = decoder.config.vocab_size
    law = np.zeros((vocab,) * length)
    law[...] = 1.0
    for depth in range(length):
        for path in itertools.product(range(vocab), repeat=depth):
            if (law[path] > 0).any():
                logits = dense(decoder, [*prompt, *path])[0][-1].tolist()
                own = process(logits, params, prompt, path)
                law[path] *= own.reshape(-1, *[1] * (length - depth - 1))
    return law


def p_value(counts: Floats, law: Floats) -> float:
    """Chi-square of counted sequences against their law; cells with fewer than 5 expected are counted together."""
    counts, expected = counts.ravel(), law.ravel() * counts.sum()
    assert not counts[expected == 0].any(), "a sequence of probability 0 was written"
    order = np.argsort(expected)
    counts, expected = counts[order], expected[order]
    small = int(np.searchsorted(expected, 5.0))
    # At least five expected together, else they join the next cell.
    while 0 < small < len(expected) and expected[:small].sum() < 5.0:
        small += 1
    if small:
        counts = np.append(counts[small:], counts[:small].sum())
        expected = np.append(expected[small:], expected[:small].sum())
    if len(expected) == 1:
        return 1.0
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return float(stats.chi2.sf(statistic, len(expected) - 1))


def check_sample(outputs: Sequence[Sequence[int]], law: Floats, what: str) -> None:
    """The first tokens of ``outputs`` follow ``law``: jointly, one by one and in neighbouring pairs."""
    length, vocab = law.ndim, law.shape[0]
    counts = np.zeros(law.shape)
    np.add.at(counts, tuple(np.array([o[:length] for o in outputs]).T), 1)
    views = [tuple(range(length)), *((i,) for i in range(length)), *itertools.pairwise(range(length))]
    for view in views:
        rest = tuple(i for i in range(length) if i not in view)
        p = p_value(counts.sum(rest), law.sum(rest))
        assert p > ALPHA / len(views), f"{what}: tokens {view} do not follow the law over {vocab}: p = {p:.1e}"


def uniform_draws(n: int, seed: int = 0) -> torch.Tensor:
    """Ordinary random numbers, for tests of what must hold for any."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
