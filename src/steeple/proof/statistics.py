"""How well counts fit a law: Pearson's chi-square, total variation, and the total variation that chance alone gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

SMALLEST_EXPECTED = 5.0  # bins with less are pooled, or the statistic would not follow chi-square's law
NOISE_DRAWS = 200

Outcome = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """The fit of ``samples`` draws.

    tv: total variation between the frequencies and the law. tv_noise: what an exact sampler has on average with so many
    draws. impossible: draws of outcomes that the law excludes.
    """

    samples: int
    tv: float
    tv_noise: float
    chi2: float
    dof: int
    impossible: int

    @property
    def p_value(self) -> float:
        """Probability that an exact sampler fits worse; 0 after an impossible draw."""
        if self.impossible:
            return 0.0
        return float(stats.chi2.sf(self.chi2, self.dof)) if self.dof else 1.0

    def passes(self, alpha: float) -> bool:
        """Whether the draws agree with the law; a false alarm has probability ``alpha``."""
        return self.p_value >= alpha

    def as_dict(self, alpha: float) -> dict[str, Any]:
        """For JSON."""
        return {
            "samples": self.samples,
            "tv": self.tv,
            "tv_noise": self.tv_noise,
            "chi2": self.chi2,
            "dof": self.dof,
            "p_value": self.p_value,
            "alpha": alpha,
            "impossible": self.impossible,
        }


def fit(counts: Mapping[Outcome, int], law: Mapping[Outcome, float], seed: int = 0) -> Fit:
    """The fit of ``counts`` (draws per outcome) to ``law`` (probabilities that sum to 1)."""
    outcomes = list(law)
    probs = np.array([law[o] for o in outcomes])
    probs = probs / probs.sum()
    seen = np.array([counts.get(o, 0) for o in outcomes], dtype=np.float64)
    samples = sum(counts.values())
    impossible = samples - int(seen.sum())
    tv = 0.5 * (float(np.abs(seen / samples - probs).sum()) + impossible / samples)
    draws = np.random.default_rng(seed).multinomial(samples, probs, size=NOISE_DRAWS) / samples
    noise = float(0.5 * np.abs(draws - probs).sum(axis=1).mean())
    observed, expected = _pooled(seen, probs * samples)
    chi2 = float(((observed - expected) ** 2 / expected).sum())
    return Fit(samples, tv, noise, chi2, len(expected) - 1, impossible)


def combine(fits: Sequence[Fit]) -> Fit:
    """Independent fits as one: the sum of chi-squares is a chi-square; total variations are averaged by samples."""
    samples = sum(f.samples for f in fits)
    return Fit(
        samples,
        sum(f.tv * f.samples for f in fits) / samples,
        sum(f.tv_noise * f.samples for f in fits) / samples,
        sum(f.chi2 for f in fits),
        sum(f.dof for f in fits),
        sum(f.impossible for f in fits),
    )


def _pooled(
    observed: NDArray[np.float64], expected: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bins of at least ``SMALLEST_EXPECTED``: the likely outcomes alone, the rare ones together."""
    order = np.argsort(-expected)
    observed, expected = observed[order], expected[order]
    alone = int((expected >= SMALLEST_EXPECTED).sum())
    rest = float(expected[alone:].sum())
    if alone == 0 or alone == len(expected):
        return observed[: max(alone, 1)], expected[: max(alone, 1)]
    if rest < SMALLEST_EXPECTED and alone > 1:  # too little even together: joins the smallest bin that stands alone
        alone -= 1
    return (
        np.append(observed[:alone], observed[alone:].sum()),
        np.append(expected[:alone], expected[alone:].sum()),
    )
