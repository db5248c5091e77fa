"""Fits a step model with caches and drafting to measured steps and drafts at once, each at its own memory speed.

Least squares over the logarithms of all terms, robust against the passes that met a busy machine; a faint pull towards
where the search began settles what the measurements cannot tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from steeple.errors import ConfigError
from steeple.plan.ours import DraftTerms, StepModel, Work
from steeple.plan.shapes import Floats

OVERLAPS = (0.0, 0.25, 0.5, 0.75, 1.0)
OUTLIER = 0.1  # relative error from which a measurement counts less
PULL = 0.01  # of a term towards its start: as a relative error of so much for a factor of e
MOST_STEPS = 80
WIDEST = 25.0  # logarithm of the factor that a term may be away from its start

STEP_TERMS: Mapping[str, float] = MappingProxyType(
    {
        "seconds_per_row": 3e-6,
        "seconds_per_request": 5e-6,
        "seconds_per_layer": 1e-5,
        "fixed_seconds": 3e-4,
        "verify_seconds": 1e-4,
        "seconds_per_logit": 1e-9,
    }
)
"""Fields of ``StepModel`` in seconds -> where the search begins."""

DRAFT_TERMS: Mapping[str, float] = MappingProxyType(
    {
        "seconds_per_pass": 1e-4,
        "seconds_per_row": 3e-6,
        "seconds_per_round": 1e-4,
        "seconds_per_request": 5e-6,
        "seconds_per_logit": 3e-9,
    }
)
"""Fields of ``DraftTerms`` -> where the search begins."""

CACHE_BYTES = 24e6
CACHE_SPEED = 3.0  # of the memory's
ATTENTION_SHARE = 0.7  # of the speeds of products with weights


def _ones() -> Floats:
    return np.ones(1)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Measured passes of a target.

    Args:
        work: of [n] passes; ``logits`` is 0 where tokens were chosen.
        seconds: [n].
        memory: speed of the memory beside each, over that of the model to be fitted; broadcasts.
    """

    work: Work
    seconds: Floats
    memory: Floats = field(default_factory=_ones)


@dataclass(frozen=True, kw_only=True)
class Drafts:
    """Measured drafts: ``k`` passes of ``work`` took ``seconds``; the target reads ``between`` bytes in between."""

    work: Work
    k: Floats
    between: Floats
    seconds: Floats
    memory: Floats = field(default_factory=_ones)


@dataclass(frozen=True, kw_only=True)
class RoundFit:
    """A step model, and what it says of the measured steps [n] and drafts [m]."""

    model: StepModel
    steps: Floats
    drafts: Floats
    step_residuals: Floats
    draft_residuals: Floats


def summary(residuals: Floats) -> dict[str, float]:
    """Percentiles of residuals (predicted over measured, less 1) without their sign, and shares within bounds."""
    size = np.abs(residuals)
    if not size.size:
        return {"measurements": 0.0}
    return {
        "measurements": float(size.size),
        "median": float(np.median(size)),
        "p75": float(np.quantile(size, 0.75)),
        "p90": float(np.quantile(size, 0.9)),
        "max": float(size.max()),
        "within_10_percent": float((size <= 0.1).mean()),
        "within_20_percent": float((size <= 0.2).mean()),
    }


def fit_rounds(
    steps: Steps,
    drafts: Drafts | None,
    *,
    bytes_per_second: float,
    flops_per_second: float,
    overlaps: Sequence[float] = OVERLAPS,
) -> RoundFit:
    """The step model that fits best to ``steps`` and ``drafts``.

    Args:
        bytes_per_second, flops_per_second: the machine's rates, from which the search begins.
        overlaps: shares of overlap of memory and arithmetic to try.

    Raises:
        ConfigError: too few measurements, or times that are not positive.
    """
    terms = _Terms(steps, drafts, bytes_per_second, flops_per_second)
    times = np.concatenate([steps.seconds, drafts.seconds if drafts else ()])
    if times.size < len(terms.start) or not np.all(np.isfinite(times) & (times > 0)):
        raise ConfigError(
            f"fit_rounds: {times.size} measurements; give at least {len(terms.start)}, all with times above 0."
        )

    def search(overlap: float) -> tuple[float, Floats, float]:
        def error(moved: Floats) -> Floats:
            found = np.concatenate(terms.predict(terms.model(moved, overlap)))
            return np.concatenate([np.log(found / times), PULL * moved])

        start = np.zeros(len(terms.start))
        bounds = (start - WIDEST, start + WIDEST)
        result = least_squares(error, start, loss="soft_l1", f_scale=OUTLIER, max_nfev=MOST_STEPS, bounds=bounds)
        return float(result.cost), result.x, overlap

    _, moved, overlap = min((search(overlap) for overlap in overlaps), key=lambda found: found[0])
    model = terms.model(moved, overlap)
    own, drafted = terms.predict(model)
    return RoundFit(
        model=replace(model, drawn=False),
        steps=own,
        drafts=drafted,
        step_residuals=own / steps.seconds - 1.0,
        draft_residuals=drafted / drafts.seconds - 1.0 if drafts else drafted,
    )


class _Terms:
    """Terms as a vector of logarithms, relative to ``start``, and the model that a vector means.

    A term that nothing measured depends on is left out and stays 0.
    """

    def __init__(self, steps: Steps, drafts: Drafts | None, bytes_per_second: float, flops_per_second: float) -> None:
        self._steps, self._drafts = steps, drafts
        layers = [steps.work.layers, *([drafts.work.layers] if drafts else [])]
        silent = {
            "seconds_per_logit": not np.any(steps.work.logits),
            "seconds_per_layer": np.ptp(np.concatenate(layers)) == 0,
            "verify_seconds": not np.any(steps.work.rows > steps.work.requests),
        }
        start = {
            "bytes_per_second": bytes_per_second,
            "flops_per_second": flops_per_second,
            "attention_bytes_per_second": bytes_per_second * ATTENTION_SHARE,
            "attention_flops_per_second": flops_per_second * ATTENTION_SHARE,
            "cache_bytes": CACHE_BYTES,
            "cache_bytes_per_second": bytes_per_second * CACHE_SPEED,
        }
        start |= {name: value for name, value in STEP_TERMS.items() if not silent.get(name)}
        own = {}
        if drafts:
            drawn = bool(np.any(drafts.work.logits))
            own = {name: value for name, value in DRAFT_TERMS.items() if drawn or name != "seconds_per_logit"}
        self._names, self._drafting = list(start), list(own)
        self.start = np.array([*start.values(), *own.values()])

    def model(self, moved: Floats, overlap: float) -> StepModel:
        values = (self.start * np.exp(moved)).tolist()
        count = len(self._names)
        terms: dict[str, Any] = dict(zip(self._names, values[:count], strict=True))
        draft = DraftTerms(**dict(zip(self._drafting, values[count:], strict=True))) if self._drafting else None
        return StepModel(**terms, draft=draft, overlap=overlap, drawn=True)

    def predict(self, model: StepModel) -> tuple[Floats, Floats]:
        """Seconds of the steps and of the drafts."""
        steps, drafts = self._steps, self._drafts
        own = model.predict(steps.work, steps.memory)
        if drafts is None:
            return own, np.zeros(0)
        return own, model.drafting(drafts.work, drafts.k, drafts.between, drafts.memory)
