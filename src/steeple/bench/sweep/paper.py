"""What the SPIRe paper reports, to stand beside measured rows. Source: Neelam et al. 2025, "SPIRe" (arXiv 2504.06419).

Its tau is measured (64 tokens from 65,536 texts, k = 4, temperature not stated); its throughput multipliers are
modelled: FLOPs and bytes of a 67 M target on hardware of 600 FLOP per byte, perfect overlap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

K = 4
BATCHES = (1, 8, 32, 64)
CONTEXTS = (256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class PaperDraft:
    """One of the paper's drafts and the drafter that is its like here.

    tau: by context (Table 1). multiplier: ``[BATCHES][CONTEXTS]`` at k = 4 (Figure 4).
    """

    name: str
    ours: str
    tau: Mapping[int, float]
    multiplier: tuple[tuple[float, ...], ...]


DRAFTS = (
    PaperDraft(
        "vanilla",
        "small_lm",
        {256: 2.637, 512: 2.647, 960: 2.644},
        (
            (1.73, 1.70, 1.65, 1.59, 1.51),
            (1.59, 1.51, 1.44, 1.39, 1.36),
            (1.44, 1.39, 1.36, 1.34, 1.33),
            (1.39, 1.36, 1.34, 1.33, 1.33),
        ),
    ),
    PaperDraft(
        "MagicDec",
        "sparse_self",
        {256: 4.005, 512: 3.891, 960: 3.793},
        (
            (0.81, 0.84, 0.90, 1.01, 1.20),
            (1.01, 1.20, 1.46, 1.77, 2.06),
            (1.45, 1.76, 2.06, 2.28, 2.42),
            (1.76, 2.05, 2.28, 2.42, 2.50),
        ),
    ),
    PaperDraft(
        "SPIRe",
        "spire",
        {256: 3.427, 512: 3.401, 960: 3.382},
        (
            (1.75, 1.79, 1.86, 1.99, 2.18),
            (1.99, 2.18, 2.40, 2.62, 2.78),
            (2.40, 2.61, 2.78, 2.89, 2.95),
            (2.61, 2.78, 2.89, 2.95, 2.99),
        ),
    ),
)
