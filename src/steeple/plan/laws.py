"""Scaling laws of drafters: acceptance against training tokens and parameters, width against batch, and advice.

The form is Scylla's (arXiv 2505.07858): acceptance is linear in the logarithm of the training tokens and of the
draft's parameters, and the best width of a draft falls with the batch. Its coefficients were never published, so they
are fitted here from a table of runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from steeple.config import check_range
from steeple.errors import ConfigError
from steeple.plan.bootstrap import LEVEL, SAMPLES, Fit, Floats, Interval, fit_linear
from steeple.plan.laws_table import Table

LEAST_VALUES = 3  # of tokens and of parameters: two are a line through two points, which no residual can judge
LEAST_RUNS = 5
LEAST_BATCHES = 3


@dataclass(frozen=True)
class AcceptanceLaw:
    """``tau = a + b log10(tokens) + c log10(parameters)``, fitted to runs.

    Attributes:
        fit: of a, b, c around the centre of the runs.
        tokens, parameters: the smallest and the largest of the runs.
        k: drafted tokens behind tau; predictions stay within 1 and k + 1 where it is known.
    """

    fit: Fit
    tokens: tuple[float, float]
    parameters: tuple[float, float]
    k: int = 0

    @property
    def most(self) -> float:
        """The largest tau that there can be."""
        return float(self.k + 1) if self.k else float("inf")

    def tau(self, tokens: ArrayLike, parameters: ArrayLike) -> Floats:
        """Mean tau of drafts of so many parameters trained on so many tokens; arrays broadcast."""
        a, b, c = self.fit.coefficients
        return np.clip(a + b * np.log10(tokens) + c * np.log10(parameters), 1.0, self.most)

    def predict(self, tokens: float, parameters: float, level: float = LEVEL) -> Interval:
        """Mean tau with its interval.

        The bounds are those of the law at this point. A single run scatters around it by ``fit.residual``.
        """
        found = self.fit.interval([1.0, np.log10(tokens), np.log10(parameters)], level)
        return Interval(*(float(np.clip(v, 1.0, self.most)) for v in (found.value, found.low, found.high)))

    def inside(self, tokens: float, parameters: float) -> bool:
        """Whether both lie within the runs; outside, a prediction is an extrapolation."""
        return all(
            low <= value <= high for value, (low, high) in ((tokens, self.tokens), (parameters, self.parameters))
        )


NAMES = ("constant", "per decade of tokens", "per decade of parameters")


def fit_acceptance(table: Table, *, samples: int = SAMPLES, seed: int = 0) -> AcceptanceLaw:
    """Fit tau against log tokens and log parameters.

    Raises:
        ConfigError: too few runs, sizes or token counts; says which.
    """
    tokens, parameters, tau = (
        np.array([getattr(r, name) for r in table.runs]) for name in ("tokens", "parameters", "tau")
    )
    missing = [
        f"{name} with at least {LEAST_VALUES} different values, of which there are {len(np.unique(values))}"
        for name, values in (("tokens", tokens), ("parameters", parameters))
        if len(np.unique(values)) < LEAST_VALUES
    ]
    if len(table.runs) < LEAST_RUNS:
        missing.insert(0, f"at least {LEAST_RUNS} runs, of which there are {len(table.runs)}")
    if missing:
        raise ConfigError(f"A law of acceptance needs {', and '.join(missing)}; train the missing drafts.")
    X = np.stack([np.ones_like(tau), np.log10(tokens), np.log10(parameters)], axis=1)
    fit = fit_linear(NAMES, X, tau, samples=samples, seed=seed)
    return AcceptanceLaw(
        fit,
        (float(tokens.min()), float(tokens.max())),
        (float(parameters.min()), float(parameters.max())),
        k=table.k,
    )


@dataclass(frozen=True)
class WidthLaw:
    """``log2(best width) = a + b log2(batch)``, fitted to the best width of each batch.

    Attributes:
        best: batch -> the width with the highest throughput there.
        fit: of a and b.
    """

    best: Mapping[float, float]
    fit: Fit

    def predict(self, batch: float, level: float = LEVEL) -> Interval:
        """The best width at ``batch``."""
        found = self.fit.interval([1.0, float(np.log2(batch))], level)
        return Interval(*(float(2.0**v) for v in (found.value, found.low, found.high)))

    def falls_to(self, width: float = 1.0) -> float | None:
        """The batch at which the best width has fallen to ``width``; None where it does not fall."""
        a, b = self.fit.coefficients
        with np.errstate(over="ignore"):
            return float(2.0 ** ((np.log2(width) - a) / b)) if b < 0 else None


def fit_width(table: Table, *, samples: int = SAMPLES, seed: int = 0) -> WidthLaw:
    """Fit the best width against the batch. Of widths that are equally good the smallest counts.

    Raises:
        ConfigError: too few batches, or a batch with one width only, among which nothing is best.
    """
    batches = sorted({run.batch for run in table.widths})
    if len(batches) < LEAST_BATCHES:
        raise ConfigError(
            f"A law of width needs at least {LEAST_BATCHES} batches, of which there are {len(batches)}; measure more."
        )
    best: dict[float, float] = {}
    for batch in batches:
        here = sorted((run.width, run.throughput) for run in table.widths if run.batch == batch)
        if len({width for width, _ in here}) < 2:
            raise ConfigError(
                f"A law of width needs two widths at every batch; batch {batch:g} has {here[0][0]:g} only."
            )
        best[batch] = max(here, key=lambda pair: (pair[1], -pair[0]))[0]
    X = np.stack([np.ones(len(best)), np.log2(list(best))], axis=1)
    fit = fit_linear(
        ("constant", "per doubling of the batch"), X, np.log2(list(best.values())), samples=samples, seed=seed
    )
    return WidthLaw(best, fit)


Dt = Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class DraftCost:
    """The time of a round against a plain step, by the draft's parameters: verification, and k passes of the draft.

    Attributes:
        target: parameters of the target.
        k: drafted tokens of a round.
        verify: time of the verification, in plain steps.
        fixed: time of a draft's pass that does not depend on its size, in plain steps.
    """

    target: float
    k: int
    verify: float = 1.0
    fixed: float = 0.0

    def __post_init__(self) -> None:
        check_range("DraftCost", "target", self.target, 1.0, 1e16)
        check_range("DraftCost", "k", self.k, 1, 63)
        check_range("DraftCost", "verify", self.verify, 0.0, 1e6)
        check_range("DraftCost", "fixed", self.fixed, 0.0, 1e6)

    def __call__(self, parameters: float) -> float:
        """dt of a draft of so many parameters."""
        return self.verify + self.k * (self.fixed + parameters / self.target)


@dataclass(frozen=True)
class Advice:
    """The next draft to train.

    Attributes:
        parameters, tokens: its size and its training.
        tau: what the law predicts.
        multiplier: tau over dt: its throughput against plain decoding.
        dt: time of its round in plain steps.
        extrapolated: whether it lies outside the runs that the law was fitted to.
        bound: whether the best size is the smallest or largest that was looked at.
    """

    parameters: float
    tokens: float
    tau: Interval
    multiplier: Interval
    dt: float
    extrapolated: bool
    bound: bool


def advise(
    law: AcceptanceLaw,
    dt: Dt,
    *,
    tokens: float = 0.0,
    flops: float = 0.0,
    reach: float = 10.0,
    points: int = 400,
    level: float = LEVEL,
) -> Advice:
    """The size that maximises ``tau / dt`` within a budget.

    Args:
        dt: time of a round in plain steps, by parameters; ``DraftCost`` or a measured one.
        tokens: the training tokens that there are; 0 = the most of the runs.
        flops: the operations that training may take, 6 per parameter and token; 0 = no limit.
        reach: how far outside the sizes of the runs it may look.

    Raises:
        ConfigError: the budget does not train even the smallest draft on one token per parameter.
    """
    check_range("laws", "reach", reach, 1.0, 1e9)
    most = tokens or law.tokens[1]
    sizes = np.geomspace(law.parameters[0] / reach, law.parameters[1] * reach, points)
    allowed = np.minimum(most, flops / (6.0 * sizes)) if flops else np.full(points, most)
    if flops and not np.any(allowed >= sizes):
        raise ConfigError(
            f"laws: {flops:g} operations do not train even {sizes[0]:.3g} parameters on as many tokens; raise the "
            "budget or lower reach."
        )
    taus = np.where(allowed >= 1.0, law.tau(np.maximum(allowed, 1.0), sizes), 0.0)
    values = taus / np.array([dt(float(n)) for n in sizes])
    at = int(np.argmax(values))
    size, seen = float(sizes[at]), float(allowed[at])
    tau, cost = law.predict(seen, size, level), dt(size)
    return Advice(
        parameters=size,
        tokens=seen,
        tau=tau,
        multiplier=Interval(tau.value / cost, tau.low / cost, tau.high / cost),
        dt=cost,
        extrapolated=not law.inside(seen, size),
        bound=at in (0, points - 1),
    )
