"""Fits the step-time model to measured passes and keeps what it leaves unexplained.

Non-negative least squares on relative errors give a start (memory and arithmetic one after the other, which is linear);
from there a robust search over the logarithms of the terms settles the overlap and attention's efficiency by rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import least_squares, nnls

from steeple.errors import ConfigError
from steeple.plan.ours import StepModel, Work
from steeple.plan.shapes import Floats

OVERLAPS = (1.0, 0.75, 0.5, 0.25, 0.0)
LEAST = 1e-5  # share of a pass's time at which a term without a start begins, and below which it is dropped
CROSSINGS = (0.1, 0.4, 0.7)  # quantiles of intensity where memory and arithmetic may change places
MOST_STEPS = 60
OUTLIER = 0.1  # relative error from which a measurement counts less
FURTHEST = 16  # kinds of rows per request that get an efficiency of their own


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A step model, and the ``seconds`` [n] that it was fitted to with what it says of them."""

    model: StepModel
    seconds: Floats
    predicted: Floats

    @property
    def residuals(self) -> Floats:
        """[n]: predicted over measured, less 1."""
        return self.predicted / self.seconds - 1.0

    def summary(self) -> dict[str, float]:
        """Number of measurements, and the residuals' median, 90th percentile and maximum without their sign."""
        size = np.abs(self.residuals)
        return {
            "measurements": float(size.size),
            "median": float(np.median(size)),
            "p90": float(np.quantile(size, 0.9)),
            "max": float(size.max()),
            "within_10_percent": float((size <= 0.1).mean()),
            "within_20_percent": float((size <= 0.2).mean()),
        }

    def to_dict(self) -> dict[str, Any]:
        """Model, summary and residuals in JSON types."""
        return {"model": self.model.to_dict(), "summary": self.summary(), "residuals": self.residuals.tolist()}


def fit(
    work: Work,
    seconds: ArrayLike,
    *,
    overlaps: Sequence[float] = OVERLAPS,
    by_rows: bool = False,
    links: Mapping[str, float] | None = None,
) -> Fit:
    """The step model that fits best to passes of ``work`` which took ``seconds``; both broadcast to one shape.

    A term that the passes do not tell apart from others (all of one depth, say) stays 0.

    Args:
        overlaps: shares of overlap to try.
        by_rows: give attention an efficiency for each number of rows per request that occurs.
        links: fields of the model that are given, such as ``link_bytes_per_second``.

    Raises:
        ConfigError: too few measurements, times that are not positive, or too many kinds of rows.
    """
    measured = np.asarray(seconds, dtype=np.float64)
    shape = np.broadcast_shapes(measured.shape, work.shape)
    flat, times = replace(work, rows=np.broadcast_to(work.rows, shape)).flat(), np.broadcast_to(measured, shape).ravel()
    kinds = np.unique(flat.rows / flat.requests) if by_rows else np.ones(1)
    terms = _Terms(flat, dict(links or {}))
    needed = len(terms.names) + len(kinds)
    if times.size < needed or not np.all(np.isfinite(times) & (times > 0)):
        raise ConfigError(f"fit: {times.size} measurements; give at least {needed}, all with times above 0.")
    if len(kinds) > FURTHEST:
        raise ConfigError(f"fit: {len(kinds)} kinds of rows per request; give at most {FURTHEST}, or by_rows = False.")
    found = [terms.refine(start, times, overlap) for overlap in overlaps for start in terms.starts(times)]
    if by_rows:
        best = {trial.overlap: trial for trial in sorted(found, key=lambda trial: -trial.loss)}
        found = [terms.refine(trial.vector, times, trial.overlap, kinds) for trial in best.values()]
    model = terms.model(min(found, key=lambda trial: trial.loss))
    return Fit(model=model, seconds=times, predicted=model.predict(flat))


@dataclass(frozen=True, slots=True)
class _Trial:
    """Where a search ended: logarithms of the terms, then of attention's efficiency at ``kinds`` but the first."""

    loss: float
    vector: Floats
    overlap: float
    kinds: Floats


class _Terms:
    """The terms that ``work`` can tell apart, as a vector of seconds per unit, and the model that a vector means.

    ``names`` are fields of ``StepModel``; rates are held as seconds per byte or operation.
    """

    def __init__(self, work: Work, given: dict[str, float]) -> None:
        self._work, self._given = work, given
        constant = bool(np.ptp(work.layers) == 0)
        columns = {
            "bytes_per_second": work.linear_bytes + work.head_bytes,
            "flops_per_second": work.linear_flops + work.head_flops,
            "attention_bytes_per_second": work.attention_bytes,
            "attention_flops_per_second": work.attention_flops,
            "seconds_per_row": work.rows,
            "seconds_per_request": work.requests,
            "seconds_per_layer": np.zeros_like(work.layers) if constant else work.layers,
            "fixed_seconds": np.ones_like(work.rows),
        }
        self._columns = {name: column for name, column in columns.items() if np.any(column)}
        self.names = tuple(self._columns)

    def starts(self, times: Floats) -> list[Floats]:
        """Logarithms of seconds per unit: what fits if nothing overlaps, and the same with other arithmetic.

        Where the longer of two times counts, a search does not cross the point at which they change places. So it
        starts from several: where memory and arithmetic take equally long, for some of the intensities that occur.
        """
        table = np.stack(list(self._columns.values()), axis=1) / times[:, None]
        scale = table.mean(0)
        solution, _ = nnls(table / scale, np.ones_like(times), maxiter=50 * len(scale))
        first = dict(zip(self.names, np.maximum(solution, LEAST) / scale, strict=True))
        found = [first]
        for prefix in ("", "attention_"):
            memory, arithmetic = f"{prefix}bytes_per_second", f"{prefix}flops_per_second"
            if memory in first and arithmetic in first:
                balance = self._columns[memory] / np.maximum(self._columns[arithmetic], 1e-300)
                points = np.quantile(balance, CROSSINGS) * first[memory]
                found = [start | {arithmetic: value} for start in found for value in (start[arithmetic], *points)]
        return [np.log(list(start.values())) for start in found]

    def refine(self, start: Floats, times: Floats, overlap: float, kinds: Floats | None = None) -> _Trial:
        """The best vector of one overlap from ``start``; with ``kinds`` of rows, attention's efficiency at each too."""
        kinds = np.ones(1) if kinds is None else kinds
        first = np.concatenate([start, np.zeros(len(kinds) - 1)])

        def error(vector: Floats) -> Floats:
            model = self.model(_Trial(0.0, vector, overlap, kinds), drop=False)
            return np.log(model.predict(self._work) / times)

        result = least_squares(error, first, loss="soft_l1", f_scale=OUTLIER, max_nfev=MOST_STEPS)
        return _Trial(float(result.cost), result.x, overlap, kinds)

    def model(self, trial: _Trial, drop: bool = True) -> StepModel:
        """``drop``: leave out terms that take no noticeable share of any pass."""
        count = len(self.names)
        amounts = dict(zip(self.names, np.exp(np.clip(trial.vector[:count], -700.0, 700.0)).tolist(), strict=True))
        shares = np.exp(np.concatenate([[0.0], trial.vector[count:]]))
        pairs = tuple(zip(trial.kinds.tolist(), shares.tolist(), strict=True)) if len(shares) > 1 else ()
        values = {name: _value(name, amount) for name, amount in amounts.items()}
        rates: dict[str, Any] = {"bytes_per_second": math.inf, "flops_per_second": math.inf} | values | self._given
        model = StepModel(**rates, attention_efficiency=pairs, overlap=trial.overlap)
        if not drop:
            return model
        total = model.predict(self._work)
        silent = [n for n, amount in amounts.items() if np.all(amount * self._columns[n] < 10 * LEAST * total)]
        nothing: dict[str, Any] = {name: _value(name, 0.0) for name in silent}
        return replace(model, **nothing)


def _value(name: str, amount: float) -> float:
    """A field of ``StepModel`` from seconds per unit."""
    if not name.endswith("per_second"):
        return amount
    return 1.0 / amount if amount else math.inf
