"""What a drafter is to the fleet: rows to verify, a law of tokens per round, and a time. No drafting is one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from steeple.config import check_range
from steeple.errors import ConfigError
from steeple.plan.acceptance import iid_rate, iid_survival
from steeple.plan.fleet.load import Ints
from steeple.plan.fleet.steps import DraftTime, NoDraft

BLOCK = 1 << 14  # requests whose rounds are drawn together: they stay in the processor's cache
PLAIN = "plain"
ROUNDING = 1e-6  # rounds; tau is a sum of fractions


@dataclass(frozen=True)
class Drafting:
    """One way to decode.

    Attributes:
        name: for people; nothing depends on it.
        reached: chance that a round accepts at least 1, 2, .. k drafted tokens, so not rising; empty: no drafting.
        time: of drafting in a step.
    """

    name: str = PLAIN
    reached: tuple[float, ...] = ()
    time: DraftTime = field(default_factory=NoDraft)

    def __post_init__(self) -> None:
        for value in self.reached:
            check_range("Drafting", "reached", value, 0.0, 1.0)
        if any(later > earlier for earlier, later in zip(self.reached, self.reached[1:], strict=False)):
            raise ConfigError(f"Drafting.reached = {self.reached} rises; give the chance to accept at least 1, 2, ...")

    @property
    def k(self) -> int:
        """Drafted tokens of a round."""
        return len(self.reached)

    @property
    def rows(self) -> int:
        """Rows that a request has in a step: its newest token and the drafted ones."""
        return self.k + 1

    @property
    def tau(self) -> float:
        """Mean tokens of a round, the target's own included."""
        return 1.0 + sum(self.reached)

    def rounds(self, tokens: Ints, rng: np.random.Generator | None) -> Ints:
        """Rounds ``[N]`` until each request has its ``tokens``: drawn from the law, or the expected number.

        Rounds are drawn independently of each other, which makes requests a little more alike than they are.
        """
        if not self.reached:
            return tokens.copy()
        if rng is None:
            return np.ceil(tokens / self.tau - ROUNDING).astype(np.int64)
        edges = 1.0 - np.array(self.reached)
        found = np.empty_like(tokens)
        for begin in range(0, len(tokens), BLOCK):
            found[begin : begin + BLOCK] = _drawn(tokens[begin : begin + BLOCK], edges, rng)
        return found


def _drawn(tokens: Ints, edges: np.ndarray, rng: np.random.Generator) -> Ints:
    rounds = np.zeros_like(tokens)
    here = np.flatnonzero(tokens > 0)
    left = tokens[here]
    while len(here):
        rounds[here] += 1
        left = left - 1 - np.searchsorted(edges, rng.random(len(here)), side="right")
        going = left > 0
        here, left = here[going], left[going]
    return rounds


def from_tau(k: int, tau: float) -> tuple[float, ...]:
    """``reached`` of a drafter of which only k and tau are known: one chance of acceptance at every position.

    ``tau = (1 - a**(k + 1)) / (1 - a)`` (Leviathan et al. 2023, arXiv 2211.17192) solved for a.

    Raises:
        ConfigError: no chance of acceptance gives this tau.
    """
    check_range("Drafting", "k", k, 0, 63)
    check_range("Drafting", "tau", tau, 1.0, float(k + 1))
    return tuple(float(x) for x in iid_survival(float(iid_rate(tau, k)), k)) if k else ()


def from_conditional(rates: Sequence[float]) -> tuple[float, ...]:
    """``reached`` from the chance of acceptance at each position, given that all before it were accepted."""
    return tuple(float(x) for x in np.cumprod(np.array(rates, dtype=float)))
