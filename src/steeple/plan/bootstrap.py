"""Least squares with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steeple.config import check_range
from steeple.errors import ConfigError

Floats = NDArray[np.float64]
SAMPLES = 2000
LEVEL = 0.95
FULL = 1.0 - 1e-9  # a leverage above this has no residual of its own


@dataclass(frozen=True)
class Interval:
    """A value and the bounds of its bootstrap interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """JSON types."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Fit:
    """A linear fit ``y = X @ coefficients`` with what its bootstrap drew.

    Attributes:
        names: of the coefficients ``[P]``.
        coefficients: ``[P]``, least squares.
        draws: coefficients of the bootstrap samples ``[S, P]``.
        covariances: of the coefficients, of the fit ``[P, P]`` and of each sample ``[S, P, P]``.
        r2: the share of the variance that is explained; 1 where there is none.
        residual: root mean square of what is left, with the degrees of freedom taken off.
    """

    names: tuple[str, ...]
    coefficients: Floats
    draws: Floats
    covariances: tuple[Floats, Floats]
    r2: float
    residual: float

    def interval(self, weights: Sequence[float], level: float = LEVEL) -> Interval:
        """``weights @ coefficients`` with its studentised bootstrap interval (Efron and Tibshirani 1993)."""
        check_range("laws", "level", level, 0.5, 0.999)
        w = np.asarray(weights, dtype=np.float64)
        value = float(w @ self.coefficients)
        error = float(w @ self.covariances[0] @ w) ** 0.5
        variances: Floats = self.covariances[1] @ w @ w
        errors = np.sqrt(np.maximum(variances, 0.0))
        off = self.draws @ w - value
        ratios = np.divide(off, errors, out=np.zeros_like(off), where=errors > 0)
        low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
        return Interval(value, value - float(high) * error, value - float(low) * error)

    def to_dict(self, level: float = LEVEL) -> dict[str, Any]:
        """JSON types: every coefficient with its interval, R2 and the residual."""
        rows = np.eye(len(self.names)).tolist()
        found = {name: self.interval(row, level).to_dict() for name, row in zip(self.names, rows, strict=True)}
        return {"coefficients": found, "r2": self.r2, "residual": self.residual}


def fit_linear(names: Sequence[str], X: Floats, y: Floats, *, samples: int = SAMPLES, seed: int = 0) -> Fit:
    """Least squares with a bootstrap of the residuals, each divided by its own share of freedom.

    Residuals and not runs are drawn, since the runs are a grid that somebody chose: samples of few runs would lack
    whole sizes.

    Args:
        X: regressors ``[N, P]``. y: ``[N]``.

    Raises:
        ConfigError: fewer than one run more than there are coefficients, or regressors that are not independent.
    """
    count, width = X.shape
    if count <= width:
        raise ConfigError(f"laws: {count} runs for {width} coefficients; give at least {width + 1}.")
    if np.linalg.matrix_rank(X) < width:
        raise ConfigError(f"laws: {', '.join(names)} cannot be told apart in these runs; vary them independently.")
    inverse = np.linalg.inv(X.T @ X)
    solve = inverse @ X.T
    hat = np.einsum("ni,in->n", X, solve)
    coefficients = solve @ y
    left = y - X @ coefficients
    freedom = count - width
    spread = left / np.sqrt(np.where(hat < FULL, 1.0 - hat, 1.0))
    spread = spread - spread.mean()
    rng = np.random.default_rng((seed, count))
    sampled = X @ coefficients + spread[rng.integers(0, count, (samples, count))]
    draws = sampled @ solve.T
    variance = float(left @ left) / freedom
    variances = ((sampled - draws @ X.T) ** 2).sum(axis=1) / freedom
    total = float(((y - y.mean()) ** 2).sum())
    return Fit(
        names=tuple(names),
        coefficients=coefficients,
        draws=draws,
        covariances=(variance * inverse, variances[:, None, None] * inverse),
        r2=1.0 - float(left @ left) / total if total > 0 else 1.0,
        residual=float(np.sqrt(variance)),
    )
