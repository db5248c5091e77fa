"""The proof of padded generation: it passes where the schedules are right, and fails for planted defects."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import steeple.padded.round as round_module
import steeple.proof.sampling as sampling
from steeple.engine import EngineConfig, load_model
from steeple.padded.config import SCHEDULE_NAMES
from steeple.padded.holes import Holes
from steeple.padded.rows import LeftPadded
from steeple.proof.config import ProofConfig
from steeple.proof.padded import PaddedProof, prove_padded
from steeple.proof.prompts import prompt_pool, ragged
from steeple.proof.reference import transformers_greedy


@pytest.fixture(scope="module")
def parts(target_folder: Path, near_folder: Path) -> tuple[Any, ...]:
    """What ``prove_padded`` is given."""
    config = ProofConfig(model=str(target_folder), k=3, requests=4, max_tokens=12, context=48, samples=1200)
    target = load_model(config.model, EngineConfig(dtype="float32", device="cpu"))
    pool = prompt_pool(config, target)
    prompts = ragged(pool.prompts, config.seed)
    expected = transformers_greedy(target, prompts, config.max_tokens, lambda done: None)
    few = {"top_k": sampling.CASES["top_k"], "penalised": replace(sampling.CASES["top_k"], repetition_penalty=1.2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "CASES", few)
        cases = sampling.prepare_cases(config, target, pool)
    return config, target, str(near_folder), prompts, expected, cases


def test_all_schedules_are_lossless(parts: tuple[Any, ...]) -> None:
    proofs = prove_padded(*parts)
    assert tuple(proofs) == SCHEDULE_NAMES
    for proof in proofs.values():
        found = json.loads(json.dumps(proof.as_dict(1e-5)))
        assert found["lossless"] is True
        assert found["greedy"]["identical"] == found["greedy"]["requests"] == 12
        assert found["greedy"]["tau"] > 1.1
        assert [case["case"] for case in found["sampling"]["cases"]] == ["top_k"]
        assert found["sampling"]["samples"] == 400


def test_a_wrong_layout_is_seen(parts: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Holes that are not hidden, and rows that are moved one slot too far."""
    keep, move = Holes.keep, LeftPadded._move

    def shown(self: Holes, count_B: Any, staying: Any) -> None:
        keep(self, count_B, staying)
        self.valid_BS = torch.ones_like(self.valid_BS)

    monkeypatch.setattr(Holes, "keep", shown)
    monkeypatch.setattr(LeftPadded, "_move", lambda self, rows, shift, width: move(self, rows, shift + 1, width))
    config = replace(parts[0], samples=200)
    proofs = prove_padded(config, *parts[1:5], [])
    assert not proofs["align"].lossless(1e-5)
    assert proofs["holes"].refused, "the probe of the models is the first to see it"
    assert proofs["pool"].lossless(1e-5), "it moves nothing by these"


def test_a_wrong_law_is_seen(parts: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are kept whatever the target says."""
    judge = round_module.verdicts

    def blind(logits: Any, proposal: Any, budget: Any, *rest: Any) -> Any:
        found = judge(logits, proposal, budget, *rest)
        if proposal is None:
            return found
        drafted = proposal.tokens_Bk.tolist()
        return [[*own[:count], tokens[-1]] for own, count, tokens in zip(drafted, budget, found, strict=True)]

    monkeypatch.setattr(round_module, "verdicts", blind)
    for proof in prove_padded(*parts).values():
        assert not proof.lossless(1e-5)
        assert not all(found.passes(1e-5) for found in proof.fits.values())


def test_a_refusal_is_told() -> None:
    proof = PaddedProof(0, [], {}, 0.0, 1e-4, "because")
    assert proof.as_dict(1e-5) == {"refused": "because", "lossless": True}
