"""Several drafters at once: each request is drafted for by the one that brings the whole batch most, or by none.

Source: SPIN (Chen et al. 2025, arXiv 2503.15921), which gives each request one of several small models. Here the
drafters may be of any kind, the reward is the batch's tokens per second, and depth is chosen with the drafter
(``steeple.select``). Cost: the weights of all drafters and what each keeps; some rounds of trying. Loses to the best
single drafter where one is best for every request, by what trying costs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from steeple.config import ModelConfig, check_range
from steeple.draft.base import Drafter, DrafterConfig, Surroundings
from steeple.draft.declared import DeclaresMemory
from steeple.draft.parts import Parts, part_configs, parts_memory
from steeple.errors import ConfigError, did_you_mean
from steeple.plan.memory_parts import DraftMemory, Lay
from steeple.select.options import RULES, Options
from steeple.types import MAX_NODES

log = logging.getLogger(__name__)

OWNER = "spin"
LIKELY = ("ngram", "small_lm", "spire", "sparse_self")
UNKNOWN_SHARE = 0.5  # of the target's pass, for a drafter that does not say what it runs


@dataclass(frozen=True, kw_only=True)
class SpinConfig:
    """Settings: which drafters, how deep, and how what might be better is tried."""

    models: str = field(
        default="", metadata={"help": "drafters with commas between; empty: all that there are for the target"}
    )
    k: int = field(default=8, metadata={"help": "greatest depth of a draft"})
    rule: str = field(default="thompson", metadata={"help": "how drafters are tried: thompson, ucb or greedy"})
    explore: float = field(default=0.02, metadata={"help": "share of the time that trying may cost"})
    capacity: str = field(
        default="", metadata={"help": "most requests of each drafter in a round, like 8,0,4; 0 or empty: any number"}
    )
    seed: int = field(default=0, metadata={"help": "of the draws that decide what is tried"})

    def __post_init__(self) -> None:
        check_range(OWNER, "k", self.k, 1, MAX_NODES)
        check_range(OWNER, "explore", self.explore, 0.0, 0.5)
        check_range(OWNER, "seed", self.seed, 0, 2**63 - 1)
        if self.rule not in RULES:
            raise ConfigError(f"spin.rule = {self.rule!r}. {did_you_mean(self.rule, RULES)}")
        for number in filter(None, str(self.capacity).split(",")):
            if not number.strip().isdecimal():
                raise ConfigError(f"spin.capacity = {self.capacity!r}: give numbers with commas between.")

    def build(self, around: Surroundings) -> Drafter:
        """All drafters. ``ConfigError`` for one that was named and cannot be built, or if there is none."""
        from steeple.draft.spin_round import spin_drafter  # scipy's solvers take long to import

        built, configs = [], []
        for config in self._configs():
            try:
                built.append(config.build(around))
                configs.append(config)
            except ConfigError as error:
                if self.models:
                    raise
                log.info("spin goes on without %s: %s", type(config).__name__, error)
        for part in built:
            _check_part(part, self.k)
        if not built:
            raise ConfigError("spin: there is no drafter for this target; name some: spin:models=ngram,small_lm:DIR.")
        options = Options(
            most=self.k,
            rule=self.rule,
            explore=self.explore,
            capacity=self._capacity(len(built)),
            seed=self.seed,
        )
        return spin_drafter(Parts(OWNER, built), [_share(config, around) for config in configs], options, around)

    def memory(self, around: Surroundings, lay: Lay) -> DraftMemory:
        """That of all the drafters that it would build."""
        found = []
        for config in self._configs():
            try:
                if isinstance(config, DeclaresMemory):
                    config.memory(around, lay)
                found.append(config)
            except ConfigError:
                if self.models:
                    raise
        return parts_memory(found, around, lay)

    def _configs(self) -> list[DrafterConfig]:
        return part_configs(OWNER, self.models or LIKELY, self.k)

    def _capacity(self, drafters: int) -> tuple[int, ...]:
        given = [int(number) for number in filter(None, str(self.capacity).split(","))]
        if not any(given):
            return ()
        if len(given) == 1:
            given *= drafters
        if len(given) != drafters:
            raise ConfigError(
                f"spin.capacity = {self.capacity!r} has {len(given)} numbers for {drafters} drafters; give one each."
            )
        return tuple(room or 1 << 20 for room in given)


def _check_part(part: Drafter, k: int) -> None:
    """``ConfigError`` for a drafter whose depth is not spin's to choose."""
    if part.needs.adaptive or part.needs.nodes != k:
        what = "chooses its own depth" if part.needs.adaptive else "proposes trees"
        raise ConfigError(f"spin: {type(part).__name__} {what}; give drafters of plain chains (width = 1).")


def _share(config: DrafterConfig, around: Surroundings) -> float:
    """What a pass of a drafter takes of the target's, by the weights that it multiplies; until times are measured."""
    if not isinstance(config, DeclaresMemory):
        return UNKNOWN_SHARE
    runs = config.memory(around, Lay(element=around.dtype.itemsize)).runs
    return 0.0 if runs is None else min(1.0, _multiplied(runs) / _multiplied(around.decoder.config))


def _multiplied(config: ModelConfig) -> int:
    return config.body_parameters() + config.hidden_size * config.vocab_size
