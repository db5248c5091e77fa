"""The target's exact law of the next tokens, by enumeration. It shares no code with the engine's sampling.

The processing of logits is written here a second time, in float64 and one row at a time, from the definitions in
``SamplingParams``: penalties, temperature, top_k, top_p, min_p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from steeple.engine import LoadedModel
from steeple.evidence.logits import last_logits
from steeple.types import SamplingParams

NUDGES = 4
REST = -1  # stands for all tokens that are too unlikely to be followed

Row = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ExactLaw:
    """``probabilities`` of every possible run of tokens, or of its likely beginning and ``REST``. stable: rounding
    cannot change what the filters keep.
    """

    probabilities: dict[tuple[int, ...], float]
    stable: bool

    def outcome(self, drawn: tuple[int, ...]) -> tuple[int, ...]:
        """Which of the outcomes these tokens are; themselves if they are none."""
        likely = (drawn, *((*drawn[:length], REST) for length in reversed(range(len(drawn)))))
        return next((found for found in likely if found in self.probabilities), drawn)


def processed_law(logits_V: Row, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> Row:
    """The law ``[V]`` that a token is drawn from after ``prompt`` and ``output``, given the raw logits there."""
    x = _penalised(np.asarray(logits_V, dtype=np.float64), params, prompt, output) / params.temperature
    if params.top_k:
        x = np.where(x < np.sort(x)[::-1][min(params.top_k, len(x)) - 1], -np.inf, x)
    p = _softmax(x)
    order = np.argsort(-p, kind="stable")
    kept, mass = 0, 0.0
    for token in order:
        # Without a filter by mass none is cut where the sum of all rounds to 1.
        if kept and (1.0 > params.top_p <= mass or p[token] < params.min_p * p[order[0]] or p[token] == 0.0):
            break
        mass += p[token]
        kept += 1
    return _softmax(np.where(x < x[order[kept - 1]], -np.inf, x))


def _penalised(x: Row, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> Row:
    x = x.copy()
    for token in {*prompt, *output}:
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in output:
        x[token] -= params.frequency_penalty
    for token in set(output):
        x[token] -= params.presence_penalty
    return x


def _softmax(x: Row) -> Row:
    e: Row = np.exp(x - x.max())
    return e / float(e.sum())


def exact_law(
    target: LoadedModel,
    prompt: Sequence[int],
    params: SamplingParams,
    tokens: int,
    *,
    rounding: float,
    least: float = 0.0,
) -> ExactLaw:
    """The joint law of the next ``tokens`` tokens after ``prompt``, every branch of it followed.

    Args:
        least: branches less likely than this are not followed; of each path they are one outcome together.
        rounding: how far logits may be off from one batch to another; decides ``stable``.
    """
    rng = np.random.default_rng(0)
    branches: dict[tuple[int, ...], float] = {(): 1.0}
    ended: dict[tuple[int, ...], float] = {}
    stable = True
    for _ in range(tokens):
        paths = list(branches)
        logits_BV = last_logits(target, [[*prompt, *path] for path in paths])[:, 0].double().cpu().numpy()
        grown: dict[tuple[int, ...], float] = {}
        for path, logits_V in zip(paths, logits_BV, strict=True):
            law = processed_law(logits_V, params, prompt, path)
            possible = branches[path] * law
            for token in np.flatnonzero((possible > 0) & (possible >= least)):
                grown[(*path, int(token))] = float(possible[token])
            if (possible < least).any():
                ended[(*path, REST)] = float(possible[possible < least].sum())
            for _ in range(NUDGES):
                nudged = logits_V + rounding * rng.standard_normal(len(logits_V))
                stable &= bool(((processed_law(nudged, params, prompt, path) > 0) == (law > 0)).all())
        branches = grown
    return ExactLaw(branches | ended, stable)
