"""A world without a model: requests of kinds that drafters suit more or less, rounds that take what formulas say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from steeple.select.acceptance import Curves
from steeple.select.costs import Drafted, Rates
from steeple.select.goodput import Goodput, Plan, Standing
from steeple.select.selector import Outcome, Selector


@dataclass
class World:
    """chance ``[kind][drafter]`` of a node to stay. Seconds: of a step and of a row; per drafter start, pass, node, and
    a row that is caught up; ``own``: those drafters keep a cache, which falls behind while they do not draft."""

    chance: Sequence[Sequence[float]]
    kinds: Sequence[int]
    k: int = 6
    step: float = 20e-3
    row: float = 0.15e-3
    start: Sequence[float] = (0.1e-3, 1e-3)
    passes: Sequence[float] = (0.0, 4e-3)
    node: Sequence[float] = (0.0, 0.05e-3)
    catch_up: float = 0.1e-3
    own: Sequence[int] = ()
    noise: float = 0.03
    spikes: float = 0.01
    length: int = 256
    seed: int = 1
    tokens: int = 0
    seconds: float = 0.0
    used: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.B, self.D = len(self.kinds), len(self.chance[0])
        self.ids = [f"r{i}" for i in range(self.B)]
        self.lengths = np.full(self.B, float(self.length))
        self.behind = np.zeros((self.B, self.D))
        self.behind[:, list(self.own)] = self.length

    def standing(self) -> Standing:
        return Standing(self.lengths.copy(), self.behind.copy(), np.full(self.B, 100.0))

    def best(self) -> Plan:
        """The oracle: the best round of all, for one who knows everything."""
        level = np.arange(1, self.k + 1)
        chance = np.array(self.chance)[list(self.kinds)]
        survival = chance[:, :, None] ** level
        zero = np.zeros(self.D)
        rates = Rates(
            self.step + self.row * self.B, self.row, np.array(self.start), np.array(self.passes), zero,
            np.array(self.node), zero, zero,
        )  # fmt: skip
        curves = Curves(survival, np.ones((self.B, self.D)))
        return Goodput(curves, rates, self.standing()).best()

    def single(self, d: int) -> float:
        """Tokens per second of the best depth of one drafter for all."""
        level = np.arange(self.k + 1)
        chance = np.array(self.chance)[list(self.kinds), d]
        tokens = np.cumsum(chance[:, None] ** level, axis=1).sum(axis=0)
        fixed = self.start[d] * (level > 0) + self.passes[d] * level + self.node[d] * level * self.B
        return float((tokens / (self.step + self.row * self.B * (level + 1) + fixed)).max())

    @property
    def plain(self) -> float:
        return self.B / (self.step + self.row * self.B)

    def play(self, plan: Plan) -> Outcome:
        """A round: what is kept, and what it took."""
        drafter, depth = plan.drafter, plan.depth
        chance = np.array(self.chance)[self.kinds, np.maximum(drafter, 0)]
        draws = self.rng.random((self.B, self.k)) < chance[:, None]
        accepted = np.where(drafter >= 0, np.minimum(np.cumprod(draws, axis=1).sum(1), depth), 0)
        draft: dict[int, tuple[Drafted, float]] = {}
        for d in np.unique(drafter[drafter >= 0]).tolist():
            own = np.flatnonzero(drafter == d)
            passes, nodes = int(depth[own].max()), int(depth[own].sum())
            caught = int(self.behind[own, d].sum())
            ragged = bool(depth[own].min() < passes)
            done = Drafted(passes, ragged, nodes, caught, float((depth[own] * self.lengths[own]).sum()))
            took = self.start[d] + self.passes[d] * passes + self.node[d] * nodes + self.catch_up * caught
            draft[d] = (done, took * self._noise())
            self.behind[own, d] = 0.0
        rest = (self.step + self.row * (self.B + int(depth.sum()))) * self._noise()
        written = accepted + 1
        for d in self.own:
            self.behind[drafter != d, d] += written[drafter != d]
        self.lengths += written
        self.tokens += int(written.sum())
        self.seconds += rest + sum(seconds for _, seconds in draft.values())
        self.used.append(drafter.copy())
        return Outcome(self.ids, drafter, depth, depth, accepted, draft, rest, float(self.lengths.sum()))

    def _noise(self) -> float:
        slow = 4.0 if self.rng.random() < self.spikes else 1.0
        return float(np.exp(self.noise * self.rng.standard_normal())) * slow

    def run(self, selector: Selector, rounds: int) -> float:
        """Tokens per second over ``rounds`` rounds, each under the selector's choice."""
        tokens, seconds = self.tokens, self.seconds
        for _ in range(rounds):
            selector.learn(self.play(selector.choose(self.ids, self.standing)))
        return (self.tokens - tokens) / (self.seconds - seconds)

    def fixed(self, plan: Plan, rounds: int) -> float:
        """Tokens per second of one plan, over and over."""
        tokens, seconds = self.tokens, self.seconds
        for _ in range(rounds):
            self.play(plan)
        return (self.tokens - tokens) / (self.seconds - seconds)
