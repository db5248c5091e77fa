"""From acceptance to tau: survival by position, equal chances and their inverse, over context; goodput of a batch.

The chance that the first ``j`` drafted tokens all stay is the survival ``s_j``; a round of ``k`` brings
``tau = 1 + s_1 + ... + s_k`` tokens on average. Goodput: SmartSpec (Liu et al. 2024, arXiv 2406.14066).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from steeple.config import check_range
from steeple.errors import ConfigError
from steeple.plan.shapes import Floats

HALVINGS = 60  # of an interval of length 1: beyond the precision of a double


def tau_of_survival(survival: ArrayLike) -> Floats:
    """``1 + sum`` over the last axis of ``survival`` [..., k]: mean tokens per round, the target's own included."""
    return 1.0 + np.asarray(survival, dtype=np.float64).sum(-1)


def iid_survival(rate: float, k: int) -> Floats:
    """[k]: ``rate ** j``, if every token is accepted with the same chance whatever came before."""
    check_range("acceptance", "rate", float(rate), 0.0, 1.0)
    return np.power(float(rate), np.arange(1, k + 1))


def iid_tau(rate: ArrayLike, k: ArrayLike) -> Floats:
    """``(1 - a^(k+1)) / (1 - a)``, and ``k + 1`` at a = 1. Arrays broadcast."""
    a, depth = np.broadcast_arrays(np.asarray(rate, dtype=np.float64), np.asarray(k, dtype=np.float64))
    inside = (a > 0.0) & (a < 1.0)
    safe = np.where(inside, a, 0.5)
    # near 1 the difference 1 - a^(k+1) would lose its digits
    return np.where(inside, -np.expm1((depth + 1.0) * np.log(safe)) / (1.0 - safe), np.where(a < 1.0, 1.0, depth + 1.0))


def iid_rate(tau: ArrayLike, k: ArrayLike) -> Floats:
    """The rate whose ``iid_tau`` at ``k`` is ``tau``. Arrays broadcast.

    Raises:
        ConfigError: a tau is not from 1 to k + 1.
    """
    wanted, depth = np.broadcast_arrays(np.asarray(tau, dtype=np.float64), np.asarray(k, dtype=np.float64))
    wrong = ~((wanted >= 1.0) & (wanted <= depth + 1.0))
    if wrong.any():
        bad = np.argmax(wrong.ravel())
        raise ConfigError(
            f"tau = {wanted.ravel()[bad]:g} at k = {depth.ravel()[bad]:g}; a round brings from 1 to "
            f"{depth.ravel()[bad] + 1:g} tokens. Correct one of them."
        )
    low, high = np.zeros(wanted.shape), np.ones(wanted.shape)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        below = iid_tau(middle, depth) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Survival by position of one drafter at some contexts.

    Between two contexts survival is interpolated over log context; outside it stays as at the nearest one. Beyond the
    last position each further token survives as the last one did, given those before it.

    Args:
        contexts: rising, positions.
        survival: for each context the survival of positions 1, 2, ..., not rising.
        source: where it is from, for tables.
    """

    contexts: tuple[float, ...]
    survival: tuple[tuple[float, ...], ...]
    source: str = ""

    def __post_init__(self) -> None:
        if not self.contexts or len(self.contexts) != len(self.survival):
            raise ConfigError(
                f"Acceptance: {len(self.contexts)} contexts and {len(self.survival)} rows of survival; give as many."
            )
        if any(b <= a for a, b in zip(self.contexts, self.contexts[1:], strict=False)) or self.contexts[0] <= 0:
            raise ConfigError(f"Acceptance.contexts = {self.contexts}; give positive lengths in rising order.")
        for row in self.survival:
            steps = (1.0, *row)
            if not row or any(not 0.0 <= b <= a for a, b in zip(steps, row, strict=False)):
                raise ConfigError(f"Acceptance.survival {row}; give chances from 1 down to 0 that never rise.")

    @classmethod
    def iid(cls, rates: Mapping[float, float], source: str = "") -> Acceptance:
        """One rate of acceptance for every position; ``rates``: context -> rate."""
        contexts = tuple(sorted(rates))
        return cls(contexts=contexts, survival=tuple((float(rates[c]),) for c in contexts), source=source)

    @classmethod
    def of_tau(cls, taus: Mapping[float, float], k: int, source: str = "") -> Acceptance:
        """From mean tokens per round at ``k``, as if acceptance were the same at every position: context -> tau."""
        return cls.iid({context: float(iid_rate(tau, k)) for context, tau in taus.items()}, source)

    def at(self, context: ArrayLike, k: int) -> Floats:
        """Survival of positions 1 to ``k`` at ``context`` [...]: [..., k]."""
        check_range("acceptance", "k", k, 1, 1 << 16)
        place = np.log(np.maximum(np.asarray(context, dtype=np.float64), 1e-9))
        known = np.log(self.contexts)
        table = np.array([extended(row, k) for row in self.survival])
        return np.stack([np.interp(place, known, column) for column in table.T], axis=-1)

    def tau(self, context: ArrayLike, k: int) -> Floats:
        """Mean tokens per round of ``k`` at ``context`` [...]."""
        return tau_of_survival(self.at(context, k))

    def covers(self, context: float) -> bool:
        """Whether ``context`` lies between measured ones."""
        return self.contexts[0] <= context <= self.contexts[-1]


def extended(survival: Iterable[float], k: int) -> Floats:
    """``survival`` cut or continued to ``k`` positions: a further token stays as likely as the last known one did."""
    known = [float(value) for value in survival]
    ratio = known[-1] / (known[-2] if len(known) > 1 else 1.0) if known[-1] else 0.0
    further = known[-1] * np.power(ratio, np.arange(1, max(k - len(known), 0) + 1))
    return np.concatenate([known[:k], further])


def from_bench(result: Mapping[str, Any], temperature: float) -> dict[str, Acceptance]:
    """Drafter -> what a bench or a sweep measured at ``temperature``, by context, at the largest k of each.

    Rows of one drafter, k and context are averaged over batches, each weighted by its rounds. Drafters that choose
    their own k are left out: their late positions are those of the requests that went well.

    Raises:
        ConfigError: it is no result of a bench, or nothing was measured at this temperature.
    """
    rows = result.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise ConfigError("The acceptance file has no 'rows'; give the JSON of 'steeple bench' or 'bench --sweep'.")
    fixed = [row for row in rows if row.get("acceptance_by_position") and not row.get("adaptive")]
    own = [row for row in fixed if row.get("temperature") == temperature]
    if not own:
        there = sorted({row.get("temperature") for row in fixed})
        raise ConfigError(f"The acceptance file has nothing at temperature {temperature:g}; it has {there}.")
    found: dict[str, Acceptance] = {}
    for drafter in dict.fromkeys(str(row["drafter"]) for row in own):
        mine = [row for row in own if str(row["drafter"]) == drafter]
        means = {context: _mean_survival(mine, context) for context in sorted({_context(row) for row in mine})}
        source = f"measured, T = {temperature:g}"
        found[drafter] = Acceptance(contexts=tuple(means), survival=tuple(means.values()), source=source)
    return found


def goodput(tau: ArrayLike, round_seconds: ArrayLike) -> Floats:
    """Tokens committed per second by a batch: the sum of ``tau`` [..., requests] over the seconds of its round [...].

    A request that is not drafted for counts with tau = 1.
    """
    return np.asarray(tau, dtype=np.float64).sum(-1) / np.asarray(round_seconds, dtype=np.float64)


def _context(row: Mapping[str, Any]) -> float:
    return float(row["context"])


def _mean_survival(rows: list[Mapping[str, Any]], context: float) -> tuple[float, ...]:
    """At the largest k of ``context``; forced not to rise, since counts of late positions are small."""
    here = [row for row in rows if _context(row) == context]
    depth = max(len(row["acceptance_by_position"]) for row in here)
    deepest = [row for row in here if len(row["acceptance_by_position"]) == depth]
    weights = [float(row.get("rounds") or 1) * float(row.get("batch") or 1) for row in deepest]
    mean = np.average([row["acceptance_by_position"] for row in deepest], axis=0, weights=weights)
    return tuple(np.minimum.accumulate(np.clip(mean, 0.0, 1.0)).tolist())
