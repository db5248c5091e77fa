"""How long prompts are where language models serve people: quantiles of a published trace, and draws from them.

Source: Azure LLM inference trace 2023 (https://github.com/Azure/AzurePublicDataset, column ContextTokens of
AzureLLMInferenceTrace_code.csv, 8,819 requests, and AzureLLMInferenceTrace_conv.csv, 19,366), Microsoft, CC BY 4.0;
described in Patel et al. 2024 (Splitwise, arXiv 2311.18677). Only the quantiles are kept here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

SHARES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
TOP = 0.99  # this share of the requests fits below ``longest``

TRACES: Mapping[str, tuple[float, ...]] = {
    "code": (3.0, 17.0, 75.0, 147.0, 578.0, 1469.0, 2744.5, 5187.6, 7303.3, 7436.0, 7437.0),
    "conversation": (2.0, 29.0, 181.0, 207.0, 396.0, 1020.0, 1189.0, 2734.5, 4083.0, 4142.0, 14050.0),
}
"""Prompt lengths in tokens at ``SHARES``."""


def draw_lengths(trace: str, count: int, longest: int, shortest: int, seed: int) -> list[int]:
    """``count`` prompt lengths distributed as in ``trace``, scaled so that its 99th percentile is ``longest`` tokens.

    One draw from every ``count``-th of the distribution, in random order; what lies outside is set to ``shortest`` or
    ``longest``.
    """
    quantiles = TRACES[trace]
    scale = longest / quantiles[SHARES.index(TOP)]
    numbers = np.random.default_rng((seed, count))
    shares = (numbers.permutation(count) + numbers.random(count)) / count
    lengths = np.interp(shares, SHARES, quantiles) * scale
    return [int(length) for length in lengths.round().clip(shortest, longest)]
