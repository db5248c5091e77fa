"""The proof on a published model: stories260K, converted, with a tokenizer that begins every text with a token."""

from __future__ import annotations

from pathlib import Path

import pytest

from steeple.convert import ConvertConfig, convert
from steeple.proof.config import ProofConfig
from steeple.proof.run import run_proof

STORIES = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "stories260K"
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not STORIES.is_dir(), reason="shared/data/stories260K is not beside the repository"),
]


def test_both_drafters_are_lossless_on_stories260k(tmp_path: Path) -> None:
    out = tmp_path / "stories"
    convert(
        ConvertConfig(source=str(STORIES / "stories260K.bin"), out=str(out), tokenizer=str(STORIES / "tok512.model"))
    )
    drafters = ("ngram", f"small_lm:{out}")
    result = run_proof(
        ProofConfig(model=str(out), drafter=drafters, requests=6, max_tokens=16, context=80, samples=400)
    )
    assert result["lossless"] is True
    assert result["greedy"] == {"requests": 12, "identical": 12, "oracle_identical": 12, "worst_gap": 0.0}
    ngram, itself = (result["drafters"][name] for name in drafters)
    assert ngram["sampling"]["drafted"] > 0.3
    assert max(case["acceptance"] for case in ngram["sampling"]["cases"]) > 0.1
    assert [case["acceptance"] for case in itself["sampling"]["cases"]] == [1.0, 1.0, 1.0]
    assert itself["greedy"]["tau"] > 2.0
