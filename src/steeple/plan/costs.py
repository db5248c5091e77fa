"""Money: cost per million tokens, and what a trained draft saves over its life against what it cost to train.

The second is the cost analysis of the SPIRe paper (MatX 2025), in units of training the target once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from steeple.errors import ConfigError
from steeple.plan.shapes import Floats

DECODING_BUDGET = 10.0
"""What decoding without a drafter costs over a model's life, in trainings of that model: the paper's assumption."""

SPIRE_TRAINING = 0.25
"""What training a SPIRe draft costs, in trainings of its target: its share of the body parameters."""


def savings(multiplier: ArrayLike, *, training: float = 0.0, budget: float = DECODING_BUDGET) -> Floats:
    """What is saved of ``budget`` by decoding ``multiplier`` times as fast, less ``training`` of the draft."""
    speed = np.asarray(multiplier, dtype=np.float64)
    if np.any(speed <= 0) or training < 0 or budget < 0:
        raise ConfigError(
            f"savings: multiplier {speed}, training {training:g}, budget {budget:g}; give a multiplier above 0 "
            "and nothing negative."
        )
    return budget * (1.0 - 1.0 / speed) - training


def advantage(
    multiplier: float, rival: float, *, training: float = SPIRE_TRAINING, budget: float = DECODING_BUDGET
) -> float:
    """How much more a draft trained at the cost ``training`` saves than an untrained ``rival``: 0.2 is a fifth more.

    Both are throughput multipliers. ``ConfigError`` if the rival saves nothing.
    """
    against = float(savings(rival, budget=budget))
    if against <= 0:
        raise ConfigError(f"advantage: the rival's multiplier {rival:g} saves nothing; give one above 1.")
    return float(savings(multiplier, training=training, budget=budget)) / against - 1.0


def break_even_budget(multiplier: float, training: float) -> float:
    """The decoding budget, in the units of ``training``, from which training a draft pays; infinite if never."""
    return training / (1.0 - 1.0 / multiplier) if multiplier > 1 else float("inf")


def cost_per_million_tokens(tokens_per_second: ArrayLike, price_per_hour: ArrayLike) -> Floats:
    """Price of a million generated tokens, in the currency of ``price_per_hour`` (of all devices together)."""
    return np.asarray(price_per_hour, dtype=np.float64) * 1e6 / (3600.0 * np.asarray(tokens_per_second))
