"""The whole proof on tiny models: it passes where the engine is right and fails for every planted defect."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import steeple.engine.engine as engine_module
import steeple.proof.run as proof_run
from steeple.draft.small_lm import SmallLM
from steeple.errors import ConfigError, TokenizerMismatch
from steeple.proof.config import ProofConfig
from steeple.proof.greedy import Conditions
from steeple.proof.run import run_proof
from steeple.types import Draft, Verdict
from steeple.verify import chains


@pytest.fixture(scope="module")
def config(target_folder: Path, near_folder: Path) -> ProofConfig:
    return ProofConfig(
        model=str(target_folder),
        drafter=(f"small_lm:{near_folder}",),
        k=3,
        requests=5,
        max_tokens=12,
        context=64,
        samples=1500,
        oracle=False,
    )


@pytest.fixture(scope="module")
def result(config: ProofConfig) -> dict[str, Any]:
    seen: list[str] = []
    both = replace(config, drafter=("ngram", *config.drafter), oracle=True)
    found = run_proof(both, lambda what, done, total: seen.append(what), argv=["steeple", "verify"])
    return {**found, "seen": seen}


def test_a_right_engine_is_lossless(result: dict[str, Any]) -> None:
    again = json.loads(json.dumps(result))
    assert again["lossless"] is True
    assert again["schema_version"] == 1
    assert again["command"] == ["steeple", "verify"]
    assert again["greedy"] == {"requests": 10, "identical": 10, "oracle_identical": 10, "worst_gap": 0.0}
    sampling = again["sampling"]
    assert sampling["samples"] == 3000
    assert sampling["p_value"] > sampling["alpha"] == 1e-5
    assert sampling["impossible"] == 0
    assert sampling["tv"] < 2 * sampling["tv_noise"]
    assert {"ngram: samples", "ngram: greedy", "plain decoding", "transformers"} <= set(again["seen"])


def test_the_greedy_batch_was_hard(result: dict[str, Any], config: ProofConfig) -> None:
    greedy = result["drafters"][config.drafter[0]]["greedy"]
    assert greedy["tau"] > 1.1
    assert greedy["rounds"] > greedy["k0_rounds"] > 0
    assert min(greedy["chunks"], greedy["joins"], greedy["preemptions"]) > 0


def test_drafts_had_a_say_in_the_samples(result: dict[str, Any], config: ProofConfig) -> None:
    for case in result["drafters"][config.drafter[0]]["sampling"]["cases"]:
        assert case["drafted"] == 1.0
        assert 0.1 < case["acceptance"] < 0.95
        assert case["stable"]
        assert case["outcomes"] > 20
    assert result["drafters"]["ngram"]["sampling"]["drafted"] > 0.05


def _accept_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(chains, "leading", lambda kept, cu: np.diff(cu))


def _accept_all_greedy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("steeple.engine.judge.chosen_nodes", lambda draft, choice: np.diff(draft.cu.numpy()))


def _swap_p_and_q(patch: pytest.MonkeyPatch) -> None:
    judge, entries, drawn_with = chains.reject_chains, chains._entries, chains._drawn_with

    def swapped(draft: Draft, probs_RV: torch.Tensor, *arguments: Any) -> Verdict:
        row = torch.from_numpy(chains._judging_rows(draft.cu.numpy()))
        with pytest.MonkeyPatch.context() as exchanged:
            p, q = entries(probs_RV, row, draft.tokens), drawn_with(draft)
            exchanged.setattr(chains, "_entries", lambda *_: q)
            exchanged.setattr(chains, "_drawn_with", lambda _: p)
            return judge(draft, probs_RV, *arguments)

    patch.setattr("steeple.verify.reject_chains", swapped)


def _forget_the_residual(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(chains, "residual", lambda p_MV, draft, refused: p_MV)


def _declare_another_law(patch: pytest.MonkeyPatch) -> None:
    propose = SmallLM.propose

    def flattened(self: SmallLM, *arguments: Any) -> Draft:
        draft = propose(self, *arguments)
        return draft if draft.probs is None else replace(draft, probs=(draft.probs.log() / 3).softmax(-1))

    patch.setattr(SmallLM, "propose", flattened)


def _ignore_penalties(patch: pytest.MonkeyPatch) -> None:
    """The nodes above a node are not counted: only tokens after the first are wrong, and only where penalties act."""
    patch.setattr("steeple.ops.law.Counts.add", lambda self, rows, tokens: None)


DEFECTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "accept everything": (_accept_all, "sampling"),
    "accept everything greedily": (_accept_all_greedy, "greedy"),
    "swap p and q": (_swap_p_and_q, "sampling"),
    "forget the residual": (_forget_the_residual, "sampling"),
    "declare another law than was drawn from": (_declare_another_law, "sampling"),
    "ignore the penalties of a path": (_ignore_penalties, "sampling"),
}


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as context:
        yield context


@pytest.mark.parametrize("name", DEFECTS)
def test_every_planted_defect_is_found(name: str, config: ProofConfig, patch: pytest.MonkeyPatch) -> None:
    plant, half = DEFECTS[name]
    plant(patch)
    found = run_proof(config)
    assert found["lossless"] is False
    if half == "sampling":
        assert found["sampling"]["p_value"] < config.alpha
    else:
        assert found["greedy"]["identical"] < found["greedy"]["requests"]
        difference = found["drafters"][config.drafter[0]]["greedy"]["differences"][0]
        assert difference["expected"] != difference["got"]
        assert difference["tie"] is False
        assert found["greedy"]["worst_gap"] >= difference["gap"] > 0


def test_a_wrong_target_is_found_by_the_oracle(config: ProofConfig, patch: pytest.MonkeyPatch) -> None:
    """Plain and speculative decoding agree with each other, but not with transformers."""
    load = proof_run.load_model

    def spoiled(*arguments: Any) -> Any:
        target = load(*arguments)
        with torch.no_grad():
            target.decoder.norm.weight[:8].mul_(-1.0)
        return target

    patch.setattr(proof_run, "load_model", spoiled)
    found = run_proof(replace(config, oracle=True, samples=200))
    assert found["greedy"]["identical"] == 5
    assert found["greedy"]["oracle_identical"] < 5
    assert found["lossless"] is False


def test_a_difference_within_rounding_is_reported_and_allowed(config: ProofConfig, patch: pytest.MonkeyPatch) -> None:
    """One output is changed where the target's two best logits are called a tie."""
    _accept_second_best(patch)
    strict = run_proof(replace(config, samples=200))
    generous = run_proof(replace(config, samples=200, tie_gap=10.0))
    assert strict["greedy"]["identical"] == generous["greedy"]["identical"] < 5
    assert not strict["lossless"]
    assert generous["greedy"]["worst_gap"] > 0
    assert all(d["tie"] for d in generous["drafters"][config.drafter[0]]["greedy"]["differences"])


def _accept_second_best(patch: pytest.MonkeyPatch) -> None:
    """The final token is the target's second choice whenever a request has written five tokens by speculation."""
    judge = engine_module.Judge.judge

    def second(self: Any, batch: Any, requests: Any, places: Any, draft: Any, hidden: Any) -> Any:
        judgement = judge(self, batch, requests, places, draft, hidden)
        for b, request in enumerate(requests):
            late = request.id.startswith("proof") and request.written == 5 and request.params.greedy
            if late and len(judgement.tokens[b]) == 1:
                row = batch.layout.node_row.tolist()[places[b]] - 1
                best = self._runner.logits(hidden.final_TD[row : row + 1])[0].topk(2).indices.tolist()
                judgement.tokens[b][0] = best[1]
        return judgement

    patch.setattr(engine_module.Judge, "judge", second)


def test_a_batch_that_was_not_hard_proves_nothing() -> None:
    with pytest.raises(ConfigError, match="saw no chunks, no preemptions; raise requests"):
        Conditions(joins=1, k0_rounds=3).require()


def test_wrong_drafters_are_told_before_the_work(config: ProofConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'ngram'"):
        run_proof(replace(config, drafter=("ngam",)))
    from tiny import tiny_model

    other = tiny_model(tmp_path / "other", vocab=300)
    with pytest.raises(TokenizerMismatch):
        run_proof(replace(config, drafter=(f"small_lm:{other}",)))
