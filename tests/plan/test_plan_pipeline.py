"""The worth of micro-batches as arithmetic: hand-made step models whose times are known."""

from __future__ import annotations

import pytest

from steeple.errors import ConfigError
from steeple.plan.ours import Precision, StepModel
from steeple.plan.pipeline import PipelinedRound, advice, best_separate, pipelined_round
from steeple.plan.rounds import Deployment, DraftForm, round_of
from steeple.plan.shapes import find_shape

TARGET, SMALL = find_shape("llama-3.1-8b"), find_shape("llama-3.2-1b")
OWN = DraftForm(name="small_lm", shape=SMALL, own_weights=True, own_keys=True)
SHARES = DraftForm(name="sparse_self", shape=TARGET, window=256)
READS = {"bytes_per_second": 2e12, "flops_per_second": 1e30}
COMPUTES = {"bytes_per_second": 1e30, "flops_per_second": 4e14}


def a_place(**terms: float) -> Deployment:
    return Deployment(target=TARGET, step=StepModel(**terms), precision=Precision.of("bfloat16"))


def test_weights_are_read_once_a_micro_batch_where_memory_decides() -> None:
    where = a_place(**READS)
    one, four = (pipelined_round(where, OWN, 4, 1, 4, m) for m in (1, 4))
    whole = round_of(where, OWN, 4, 1, 4)
    assert one.shared == pytest.approx(float(whole.seconds))
    assert one.separate == one.shared, "with one micro-batch nothing overlaps on any device"
    assert four.shared == pytest.approx(4 * one.shared, rel=0.01), "keys of a position are next to nothing"
    assert four.separate == pytest.approx(4 * max(four.draft, four.verify))


def test_where_arithmetic_decides_micro_batches_cost_nothing() -> None:
    where = a_place(**COMPUTES)
    one, four = (pipelined_round(where, OWN, 64, 1024, 4, m) for m in (1, 4))
    assert four.shared == pytest.approx(one.shared, rel=1e-6)
    assert four.separate == pytest.approx(max(one.draft, one.verify), rel=1e-6)
    assert best_separate(where, OWN, 64, 1024, 4).separate < 0.95 * one.shared


def test_two_are_as_good_as_many_where_only_the_slower_side_counts() -> None:
    assert best_separate(a_place(**COMPUTES), OWN, 64, 1024, 4).micro_batches == 2
    assert best_separate(a_place(**READS), OWN, 4, 1, 1).micro_batches == 1, "weights twice cost more than is hidden"


def test_the_slower_side_decides() -> None:
    assert PipelinedRound(3, 2.0, 5.0).separate == 15.0
    assert PipelinedRound(3, 6.0, 5.0).separate == 18.0
    assert PipelinedRound(3, 6.0, 5.0).shared == 33.0
    assert PipelinedRound(1, 2.0, 5.0).separate == 7.0


@pytest.mark.parametrize("micro_batches", [0, 5])
def test_no_more_micro_batches_than_requests(micro_batches: int) -> None:
    with pytest.raises(ConfigError, match=f"micro_batches = {micro_batches} of a batch of 4; give 1 to 4"):
        pipelined_round(a_place(**READS), OWN, 4, 1, 4, micro_batches)


def test_the_advice_says_what_follows() -> None:
    fast = a_place(**COMPUTES)
    assert "there is no drafting to hide" in advice(fast, DraftForm(name="ngram"), 8, 1024, 4)
    assert "there is no drafting to hide" in advice(fast, OWN, 1, 1024, 4)
    assert "it cannot have another device: micro_batches = 1." in advice(fast, SHARES, 8, 1024, 4)
    assert "micro_batches = 1 here, more there." in advice(fast, OWN, 64, 1024, 4)
    assert "would not pay either: micro_batches = 1." in advice(a_place(**READS), OWN, 4, 1, 1)
    whole, halves = (pipelined_round(a_place(**READS), OWN, 8, 64, 4, m).shared for m in (1, 2))
    assert f"take {100 * halves / whole:.0f} % of the time of one" in advice(a_place(**READS), OWN, 8, 64, 4)
