"""The processed law against rows computed one by one, against transformers' processors, and at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from steeple.ops.law import Counts, Laws, _inverse, argmax, count_text, draw, inverse, penalise, probabilities
from steeple.types import SamplingParams

V = 50
PARAMS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=2.0, top_k=7),
    SamplingParams(temperature=1.0, top_k=500),
    SamplingParams(temperature=1.0, top_p=0.5),
    SamplingParams(temperature=0.7, top_p=0.999),
    SamplingParams(temperature=1.0, top_p=1e-6),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(temperature=1.0, min_p=1.0),
    SamplingParams(temperature=1.5, top_k=20, top_p=0.8, min_p=0.02),
]


def logits(rows: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * spread


def published(row: Tensor, params: SamplingParams) -> Tensor:
    """What transformers' ``generate`` samples from."""
    ids = torch.zeros(1, 1, dtype=torch.int64)
    scores = TemperatureLogitsWarper(float(params.temperature))(ids, row[None])
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p > 0:
        scores = MinPLogitsWarper(params.min_p)(ids, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("seed", range(4))
def test_equals_transformers_row_by_row_in_a_mixed_batch(seed: int) -> None:
    rows = logits(2 * len(PARAMS), seed)
    owner = torch.arange(2 * len(PARAMS)) % len(PARAMS)
    found = probabilities(rows, Laws.of(PARAMS), owner)
    for row, own, law in zip(rows, owner.tolist(), found, strict=True):
        assert torch.allclose(law, published(row, PARAMS[own]), atol=1e-6), PARAMS[own]


def test_repetition_equals_transformers() -> None:
    text = [1, 4, 4, 9]
    params = SamplingParams(repetition_penalty=1.7)
    rows = logits(1)
    counts = count_text([np.array(text[:2])], [np.array(text[2:])], V, "cpu")
    found = penalise(rows, Laws.of([params]), torch.tensor([0]), counts)
    assert torch.equal(found, RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([text]), rows.clone()))


def test_presence_and_frequency_count_the_output_only() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    rows = logits(1)
    counts = count_text([np.array([1, 2, 2])], [np.array([2, 3, 3, 3])], V, "cpu")
    expected = rows.clone()
    expected[0, 2] -= 0.5 + 0.25
    expected[0, 3] -= 0.5 + 0.75
    assert torch.allclose(penalise(rows, Laws.of([params]), torch.tensor([0]), counts), expected)


def test_counts_of_a_path_add_up() -> None:
    counts = Counts(torch.zeros(2, V), torch.zeros(2, V))
    counts.add(torch.tensor([0, 0, 1]), torch.tensor([5, 5, 6]))
    assert counts.output.nonzero().tolist() == [[0, 5], [1, 6]]
    assert counts.output[0, 5] == 2


@pytest.mark.parametrize("neighbour", PARAMS[1:])
def test_a_row_does_not_depend_on_its_neighbours(neighbour: SamplingParams) -> None:
    rows = logits(2, spread=6.0)
    alone = probabilities(rows[:1], Laws.of(PARAMS[:1]), torch.tensor([0]))
    beside = probabilities(rows, Laws.of([PARAMS[0], neighbour]), torch.tensor([0, 1]))
    assert torch.equal(alone[0], beside[0])


def test_top_p_1_keeps_the_whole_tail_beside_a_truncated_row() -> None:
    # Three thirds, each rounded up, sum to 1 in float32 before the tail comes.
    row = torch.tensor([0.0, 0.0, 0.0, -20.0, -21.0, -40.0])
    laws = Laws.of([SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.5)])
    law = probabilities(torch.stack((row, row)), laws, torch.tensor([0, 1]))
    assert (law[0] > 0).all()
    assert (law[1] > 0).tolist() == [True, True, True, False, False, False]


def test_greedy_rows_are_one_hot_whatever_truncates() -> None:
    params = [SamplingParams(top_k=3, top_p=0.2), SamplingParams(temperature=1.0, min_p=0.3)]
    rows = logits(2)
    law = probabilities(rows, Laws.of(params), torch.tensor([0, 1]))
    assert law[0].tolist() == torch.nn.functional.one_hot(rows[0].argmax(), V).tolist()
    assert torch.allclose(law[1], published(rows[1], params[1]), atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-44, 1e-300])
def test_the_lowest_temperatures_are_greedy(temperature: float) -> None:
    rows = logits(3, spread=50.0)
    law = probabilities(rows, Laws.of([SamplingParams(temperature=temperature)]), torch.zeros(3, dtype=torch.int64))
    assert torch.equal(law.argmax(-1), rows.argmax(-1))
    assert torch.allclose(law.max(-1).values, torch.ones(3))


def test_equal_logits_at_an_edge_all_stay() -> None:
    law = probabilities(
        torch.tensor([[3.0, 1.0, 1.0, 0.0]]), Laws.of([SamplingParams(temperature=1.0, top_k=2)]), torch.tensor([0])
    )
    assert (law[0] > 0).tolist() == [True, True, True, False]


def test_impossible_tokens_stay_impossible() -> None:
    row = torch.tensor([[1.0, -torch.inf, 0.0, -torch.inf]])
    for params in (*PARAMS, SamplingParams(temperature=1.0, repetition_penalty=2.0, presence_penalty=-1.0)):
        counts = count_text([np.array([1, 3])], [np.array([0])], 4, "cpu")
        out = penalise(row, Laws.of([params]), torch.tensor([0]), counts)
        law = probabilities(out, Laws.of([params]), torch.tensor([0]))
        assert law[0, 1] == law[0, 3] == 0
        assert law.sum().item() == pytest.approx(1.0)


def test_draw_inverts_the_cumulative_law() -> None:
    law = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    u = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(law.expand(6, -1), u).tolist() == [1, 1, 3, 3, 4, 4]


def test_draw_never_takes_a_token_of_probability_0() -> None:
    generator = torch.Generator().manual_seed(0)
    law = torch.rand(2000, 40, generator=generator) * (torch.rand(2000, 40, generator=generator) < 0.2)
    law[:, 3] += 1e-3  # unnormalised on purpose: rounding is not what decides
    for u in (0.0, 1 - 2**-53, 0.5):
        drawn = draw(law, torch.full((2000,), u, dtype=torch.float64))
        assert (law.gather(1, drawn[:, None]) > 0).all()


def test_draw_sees_tiny_probabilities_in_a_large_vocabulary() -> None:
    V = 150_000
    law = torch.full((1, V), 1 / V)
    assert draw(law, torch.tensor([0.999999999], dtype=torch.float64)).item() == V - 1
    assert draw(law, torch.tensor([1e-9], dtype=torch.float64)).item() == 0


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 1000, 4096])
@pytest.mark.parametrize("right", [True, False])
def test_inverse_equals_the_sum_over_the_whole_row(vocab: int, right: bool) -> None:
    generator = torch.Generator().manual_seed(vocab)
    law = torch.randn(60, vocab, generator=generator).mul_(3).softmax(-1)
    law *= torch.rand(60, vocab, generator=generator) < 0.3
    law[:, vocab // 2] += 1e-3
    share = torch.rand(60, 1, generator=generator, dtype=torch.float64)
    share[:3, 0] = torch.tensor([0.0, 1 - 2**-53, 0.5], dtype=torch.float64)
    whole = law.double().cumsum(-1)
    expected = torch.searchsorted(whole, share * whole[:, -1:], right=right).squeeze(1)
    assert inverse(law, share, right=right).tolist() == expected.tolist()
    runs = torch.nn.functional.pad(law, (0, -vocab % 64)).view(60, -1, 64)
    assert _inverse(runs, runs.sum(-1, dtype=torch.float64), share, right).tolist() == expected.tolist()
    alone = [int(inverse(law[i : i + 1], share[i : i + 1], right=right)) for i in range(60)]
    assert alone == expected.tolist(), "a draw depends on its neighbours"


def test_inverse_at_the_edge_of_a_run_finds_an_entry_of_weight() -> None:
    """A run added up in two ways has two sums; a share between them must not lead out of the run."""
    law = torch.randn(2000, 192, generator=torch.Generator().manual_seed(5)).mul_(8).exp_()
    law[:, ::64] = 0.0
    whole = law.view(2000, 3, 64).sum(-1, dtype=torch.float64).cumsum(-1)
    share = torch.nextafter(whole[:, 1:2] / whole[:, 2:], torch.zeros(1, dtype=torch.float64))
    runs = law.view(2000, 3, 64)
    for found in (inverse(law, share, right=True), _inverse(runs, runs.sum(-1, dtype=torch.float64), share, True)):
        assert (law.gather(1, found[:, None]) > 0).all()


def test_the_first_of_equals_is_the_best() -> None:
    rows = logits(40).round()
    first = [(row == row.max()).nonzero()[0].item() for row in rows]
    assert argmax(rows).tolist() == first


@pytest.mark.parametrize("params", [PARAMS[0], PARAMS[1], PARAMS[6], PARAMS[-1]])
def test_a_batch_of_one_kind_has_the_laws_of_a_mixed_one_to_the_last_bit(params: SamplingParams) -> None:
    rows = logits(6, spread=5.0)
    alike = probabilities(rows[:5], Laws.of([params] * 5), torch.arange(5))
    mixed = probabilities(rows, Laws.of([params] * 5 + [SamplingParams(temperature=0.9, top_k=9)]), torch.arange(6))
    assert torch.equal(alike, mixed[:5])
    out = torch.empty(5, V)
    assert probabilities(rows[:5], Laws.of([params] * 5), torch.arange(5), out=out) is out
    assert torch.equal(out, alike)
