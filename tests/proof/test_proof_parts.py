"""The parts of a proof: the statistics, the exact law, the prompts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import VOCAB

from steeple.engine import EngineConfig, LoadedModel, load_model
from steeple.errors import ConfigError, StorageError
from steeple.ops.law import Counts, Laws, count_text, penalise, probabilities
from steeple.proof import prompts as proof_prompts
from steeple.proof.config import ProofConfig
from steeple.proof.law import REST, ExactLaw, exact_law, processed_law
from steeple.proof.prompts import RANDOM, prompt_pool, ragged, sampling_prompts
from steeple.proof.statistics import Fit, combine, fit
from steeple.types import SamplingParams


@pytest.fixture(scope="module")
def target(target_folder: Path) -> LoadedModel:
    return load_model(str(target_folder), EngineConfig())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"drafter": ()}, "name each drafter once"),
        ({"drafter": ("ngram", "ngram")}, "name each drafter once"),
        ({"drafter": ("none",)}, "what the others are compared with"),
        ({"alpha": 0.5}, "alpha = 0.5 is out of range"),
        ({"samples": 10}, "samples = 10 is out of range; give a value from 200"),
        ({"dtype": "bfloat"}, "Did you mean 'bfloat16'"),
    ],
)
def test_wrong_settings_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ProofConfig(**values)


def test_chi_square_is_scipys() -> None:
    law = {(0,): 0.5, (1,): 0.3, (2,): 0.2}
    found = fit({(0,): 60, (1,): 25, (2,): 15}, law)
    theirs = stats.chisquare([60, 25, 15], [50, 30, 20])
    assert (found.chi2, found.dof, found.p_value) == pytest.approx((theirs.statistic, 2, theirs.pvalue))
    assert found.tv == pytest.approx(0.1)


def test_rare_outcomes_are_pooled() -> None:
    """1000 draws: the ten outcomes of 0.2 % expect two draws each and count as one bin of 20."""
    law = {(0,): 0.98, **{(n,): 0.002 for n in range(1, 11)}}
    found = fit({(0,): 960, (1,): 40}, law)
    assert found.dof == 1
    assert found.chi2 == pytest.approx(20**2 / 980 + 20**2 / 20)


def test_a_remainder_too_small_for_a_bin_joins_another() -> None:
    found = fit({(0,): 94, (1,): 6}, {(0,): 0.7, (1,): 0.28, (2,): 0.02})
    assert found.dof == 1
    assert found.chi2 == pytest.approx(24**2 / 70 + 24**2 / 30)


def test_the_noise_floor_is_what_chance_alone_gives() -> None:
    """Of one fair coin thrown n times: E |X/n - 1/2| = sqrt(1 / (2 pi n)), and total variation is that."""
    found = fit({(0,): 500, (1,): 500}, {(0,): 0.5, (1,): 0.5})
    assert found.tv_noise == pytest.approx(np.sqrt(1 / (2 * np.pi * 1000)), rel=0.2)
    assert found.tv == 0.0


def test_an_impossible_draw_fails_whatever_the_rest_says() -> None:
    found = fit({(0,): 500, (1,): 499, (2,): 1}, {(0,): 0.5, (1,): 0.5})
    assert found.impossible == 1
    assert found.p_value == 0.0
    assert not found.passes(1e-12)


def test_a_certain_outcome_passes() -> None:
    found = fit({(0,): 300}, {(0,): 1.0})
    assert (found.dof, found.p_value, found.tv) == (0, 1.0, 0.0)


def test_exact_samples_raise_false_alarms_as_often_as_stated() -> None:
    law = {(n,): p for n, p in enumerate(np.random.default_rng(0).dirichlet(np.ones(30)))}
    draws = np.random.default_rng(1).multinomial(2000, list(law.values()), size=400)
    alarms = sum(not fit({(n,): int(c) for n, c in enumerate(row)}, law).passes(0.05) for row in draws)
    assert 8 <= alarms <= 34  # 20 expected, three standard deviations on each side


def test_independent_fits_add_up() -> None:
    whole = combine([Fit(100, 0.1, 0.2, 5.0, 3, 0), Fit(300, 0.3, 0.2, 7.0, 9, 0)])
    assert whole == Fit(400, pytest.approx(0.25), pytest.approx(0.2), 12.0, 12, 0)
    assert combine([Fit(1, 0, 0, 0, 0, 1), Fit(1, 0, 0, 0, 0, 0)]).p_value == 0.0


PARAMS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=4),
    SamplingParams(temperature=1.3, top_p=0.6),
    SamplingParams(temperature=1.3, min_p=0.1, top_k=9),
    SamplingParams(temperature=0.9, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=-0.3),
    SamplingParams(temperature=1.5, top_k=9, top_p=0.9, min_p=0.05, repetition_penalty=0.8, presence_penalty=1.0),
]


@pytest.mark.parametrize("params", PARAMS)
def test_the_two_ways_to_process_logits_agree(params: SamplingParams) -> None:
    generator = torch.Generator().manual_seed(3)
    prompt, output = [1, 2, 2, 5], [5, 7, 7, 7]
    for _ in range(20):
        logits = torch.randn(1, 24, generator=generator) * 2
        laws, owner = Laws.of([params]), torch.zeros(1, dtype=torch.int64)
        table = count_text([np.array(prompt)], [np.array(output)], 24, "cpu")
        engine = probabilities(penalise(logits, laws, owner, Counts(table.prompt, table.output)), laws, owner)
        ours = processed_law(logits[0].double().numpy(), params, prompt, output)
        np.testing.assert_allclose(ours, engine[0].numpy(), atol=1e-6)
        assert ((ours > 0) == (engine[0].numpy() > 0)).all()


def test_the_joint_law_is_the_product_along_every_branch(target: LoadedModel) -> None:
    from transformers import AutoModelForCausalLM

    params = SamplingParams(temperature=1.0, top_k=2)
    law = exact_law(target, [5, 6, 7, 8], params, 2, rounding=0.0)
    model = AutoModelForCausalLM.from_pretrained(target.folder)
    assert len(law.probabilities) == 4
    assert sum(law.probabilities.values()) == pytest.approx(1.0)
    for (a, b), value in law.probabilities.items():
        rows = model(torch.tensor([[5, 6, 7, 8, a]])).logits[0].detach()
        expected = 1.0
        for row, token in ((rows[-2], a), (rows[-1], b)):
            best = row.topk(2)
            expected *= float(best.values.softmax(-1)[best.indices.tolist().index(token)])
        assert value == pytest.approx(expected, abs=1e-4)


def test_without_a_filter_no_token_is_cut_by_rounding() -> None:
    law = processed_law(-0.7 * np.arange(200.0), SamplingParams(temperature=1.0), [1], [])
    assert np.cumsum(law)[60] >= 1.0
    assert (law > 0).all()


def test_unlikely_branches_are_one_outcome_of_their_path(target: LoadedModel) -> None:
    params, least = SamplingParams(temperature=0.7), 0.02
    whole = exact_law(target, [5, 6, 7, 8], params, 2, rounding=0.0)
    assert len(whole.probabilities) == VOCAB**2
    assert whole.stable
    law = exact_law(target, [5, 6, 7, 8], params, 2, rounding=0.0, least=least)
    rest = [run for run in law.probabilities if run[-1] == REST]
    assert {len(run) for run in rest} == {1, 2}
    assert len(law.probabilities) > len(rest)
    added = dict.fromkeys(law.probabilities, 0.0)
    for run, value in whole.probabilities.items():
        added[law.outcome(run)] += value
    assert added == pytest.approx(law.probabilities, abs=1e-9)
    assert all(value >= least for run, value in law.probabilities.items() if run[-1] != REST)
    assert ExactLaw({(1, 2): 1.0}, True).outcome((1, 3)) == (1, 3)


def test_a_filter_that_cuts_within_rounding_is_not_stable(target: LoadedModel) -> None:
    params = SamplingParams(temperature=1.0, top_k=3)
    assert exact_law(target, [5, 6, 7], params, 1, rounding=0.0).stable
    assert not exact_law(target, [5, 6, 7], params, 1, rounding=10.0).stable


def test_ragged_prompts_have_every_length_and_a_shared_beginning() -> None:
    texts = [[n * 1000 + i for i in range(100)] for n in range(8)]
    cut = ragged(texts, 0)
    assert sorted(map(len, cut))[0] == 4
    assert sorted(map(len, cut))[-1] == 100
    longest = max(cut, key=len)
    assert any(p != longest and longest[: len(p)] == p for p in cut)
    assert ragged(texts, 0) == cut != ragged(texts, 1)


def test_prompts_fit_the_model(target: LoadedModel) -> None:
    pool = prompt_pool(ProofConfig(requests=4, max_tokens=200, context=192), target)
    assert {len(p) for p in pool.prompts} == {56}
    with pytest.raises(ConfigError, match="max_tokens = 254 leaves 2 positions"):
        prompt_pool(ProofConfig(max_tokens=254), target)


def test_random_ids_stand_in_only_where_the_user_gave_no_text(
    target: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(ConfigError, match="are needed"):
        prompt_pool(ProofConfig(requests=4, prompts=str(short)), target)

    def none(path: str) -> None:
        raise StorageError("no standard library")

    monkeypatch.setattr(proof_prompts, "read_source", none)
    pool = prompt_pool(ProofConfig(requests=4, context=32), target)
    assert pool.source == RANDOM
    assert [len(p) for p in pool.prompts] == [32] * 4
    assert 0 <= min(map(min, pool.prompts)) <= max(map(max, pool.prompts)) < VOCAB


def test_the_best_sampling_prompt_repeats_pairs_and_leaves_things_open(target: LoadedModel) -> None:
    params = SamplingParams(temperature=1.0, top_k=4)
    pool = prompt_pool(ProofConfig(requests=4, context=100), target)
    found = sampling_prompts(target, pool, params, 4)
    assert all(len(p) % 4 == 1 and 17 <= len(p) <= 97 for p in found)

    def score(prompt: list[int]) -> float:
        law = exact_law(target, prompt, params, 1, rounding=0.0).probabilities
        pairs = set(pairwise(prompt))
        return sum(p for (t,), p in law.items() if (prompt[-1], t) in pairs) * (1 - sum(p * p for p in law.values()))

    assert score(found[0]) == pytest.approx(max(map(score, found)), abs=1e-5)
    assert score(found[0]) > 0.02 > score(found[-1])
