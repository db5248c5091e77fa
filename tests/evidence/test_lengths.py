"""Prompt lengths out of a published trace: the embedded quantiles are the trace's, and draws follow them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from steeple.evidence.lengths import SHARES, TRACES, draw_lengths

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces"
FILES = {"code": "AzureLLMInferenceTrace_code.csv", "conversation": "AzureLLMInferenceTrace_conv.csv"}


@pytest.mark.shared
@pytest.mark.skipif(not DATA.is_dir(), reason="shared/data/traces is not beside the repository")
@pytest.mark.parametrize("trace", list(TRACES))
def test_the_table_holds_the_quantiles_of_the_trace(trace: str) -> None:
    with (DATA / FILES[trace]).open(encoding="utf-8") as lines:
        lengths = [int(row["ContextTokens"]) for row in csv.DictReader(lines)]
    assert TRACES[trace] == pytest.approx(np.quantile(lengths, SHARES), abs=0.05)


def test_draws_follow_the_distribution_scaled_to_its_99th_percentile() -> None:
    lengths = draw_lengths("code", 1000, longest=2000, shortest=16, seed=0)
    assert np.median(lengths) == pytest.approx(1469 / 7436 * 2000, rel=0.01)
    assert np.quantile(lengths, 0.25) == pytest.approx(578 / 7436 * 2000, rel=0.02)
    assert max(lengths) == 2000
    assert min(lengths) == 16  # 3 of 7436 would be one token
    assert lengths != sorted(lengths)


def test_a_few_draws_already_cover_the_distribution() -> None:
    lengths = sorted(draw_lengths("code", 4, longest=7436, shortest=16, seed=3))
    assert lengths[0] <= 578 <= lengths[1] <= 1469 <= lengths[2] <= 2745 <= lengths[3]


def test_the_seed_decides() -> None:
    assert draw_lengths("code", 8, 100, 4, seed=1) == draw_lengths("code", 8, 100, 4, seed=1)
    assert draw_lengths("code", 8, 100, 4, seed=1) != draw_lengths("code", 8, 100, 4, seed=2)
