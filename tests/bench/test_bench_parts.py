"""The parts of a bench: settings, cells, turns, requests, the floor by hand, rows from known times."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from steeple.bench.config import BenchConfig
from steeple.bench.floor import Cost, step_cost
from steeple.bench.rows import Identity, cell_rows
from steeple.bench.workload import Cell, Workload, cells, turns
from steeple.config import ModelConfig
from steeple.errors import ConfigError
from steeple.evidence.measure import Run, Timing
from steeple.hardware import Hardware
from steeple.model.decoder import Decoder

SHAPE = ModelConfig(
    vocab_size=100,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=32,
    max_context=64,
    rope_inv_freq=(1.0, 0.1),
)


class Counting:
    """A cutter whose prompts are numbered."""

    def cut(self, length: int, count: int) -> list[list[int]]:
        return [[number] * length for number in range(count)]


CONFIG = BenchConfig(batch=(1, 3), context=(8, 20), temperature=(0.0, 1.0), max_tokens=12)


def work(config: BenchConfig = CONFIG) -> Workload:
    return Workload(config, Counting(), 64)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch": ()}, "batch is empty"),
        ({"batch": (0,)}, "BenchConfig.batch = 0 is out of range"),
        ({"context": (4, 4)}, "names a value twice"),
        ({"temperature": (float("nan"),)}, "temperature = nan is out of range"),
        ({"dtype": "float23"}, "Did you mean 'float32'"),
        ({"k": 8, "max_tokens": 16}, "max_tokens = 16 is out of range; give a value from 20"),
    ],
)
def test_wrong_settings_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchConfig(**values)


def test_plain_decoding_is_always_first() -> None:
    assert BenchConfig(drafters=("ngram",)).methods == ("none", "ngram")
    assert BenchConfig(drafters=("ngram", "none")).methods == ("none", "ngram")


def test_cells_cover_the_product() -> None:
    assert len(cells(CONFIG)) == 8
    assert cells(CONFIG)[:3] == [Cell(1, 8, 0.0), Cell(1, 8, 1.0), Cell(1, 20, 0.0)]


def test_methods_take_turns_within_each_repeat_and_none_is_always_first() -> None:
    order = list(turns(("a", "b", "c"), 3))
    assert order == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a"), (2, "c"), (2, "a"), (2, "b")]


def test_requests_of_a_cell_are_always_the_same_and_differ_from_each_other() -> None:
    first, again = work().requests(Cell(3, 8, 1.0)), work().requests(Cell(3, 8, 1.0))
    assert [r.tokens.tolist() for r in first] == [r.tokens.tolist() for r in again] == [[n] * 8 for n in range(3)]
    assert [r.seed for r in first] == [r.seed for r in again]
    assert len({r.seed for r in first}) == 3
    assert all(r.params.ignore_eos and r.params.temperature == 1.0 and r.params.max_tokens == 12 for r in first)
    assert work(replace(CONFIG, seed=1)).requests(Cell(3, 8, 1.0))[0].seed != first[0].seed


def test_a_part_of_a_cell_is_its_beginning() -> None:
    part = work().requests(Cell(3, 20, 0.0), count=2, max_tokens=5)
    assert [r.tokens.tolist() for r in part] == [[0] * 20, [1] * 20]
    assert part[0].params.max_tokens == 5


def test_the_cache_holds_every_request_of_the_largest_cell() -> None:
    assert work().kv_tokens(16) == 3 * (2 + 1) * 16  # 20 + 12 positions: two blocks and one to spare


def test_a_context_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"context 60 \+ max_tokens 12 exceed the model's context of 64"):
        work(replace(CONFIG, context=(8, 60)))


def test_multiplied_parameters_leave_the_embedding_out_unless_it_is_the_head() -> None:
    layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32 + 2 * 16  # q, k and v, o, feed-forward, two norms
    assert Decoder(SHAPE).multiplied_parameters == 2 * layer + 16 + 100 * 16
    assert Decoder(replace(SHAPE, tie_embeddings=True)).multiplied_parameters == 2 * layer + 16 + 100 * 16


def test_the_cost_of_a_plain_step_by_hand() -> None:
    cost = step_cost(SHAPE, 5000, 2, batch=3, context=10)
    kv = 2 * 2 * 4 * (10 + 10) * 3  # keys and values, 2 heads of 4, two layers, 10 positions, 3 requests
    assert cost.attention == Cost(kv * 2, 4 * 4 * 4 * (10 + 10) * 3)
    assert cost.logits == Cost(1600 * 2, 2 * 1600 * 3)
    assert cost.linear == Cost(3400 * 2, 2 * 3400 * 3)
    assert cost.embedding == Cost(3 * 16 * 2, 0)
    assert cost.total == Cost((5000 + kv + 3 * 16) * 2, 2 * 5000 * 3 + 4 * 4 * 4 * (10 + 10) * 3)


def test_verification_reads_weights_and_keys_once_and_computes_every_row() -> None:
    cost = step_cost(SHAPE, 5000, 2, batch=3, context=10, rows=4)
    kv = 2 * 2 * 4 * (13 + 13) * 3  # the 10 positions of the text and the 3 nodes
    seen = 2 * (10 + 11 + 12 + 13)  # the newest token sees 10, each node one more; two layers
    assert cost.total.bytes == (5000 + kv + 3 * 4 * 16) * 2
    assert cost.total.flops == 2 * 5000 * 3 * 4 + 4 * 4 * 4 * seen * 3
    assert cost.attention == Cost(kv * 2, 4 * 4 * 4 * seen * 3)


def test_a_window_bounds_what_a_layer_reads_and_sees() -> None:
    windowed = replace(SHAPE, windows=(0, 4))
    assert step_cost(windowed, 1600, 1, batch=1, context=10).attention.bytes == 2 * 2 * 4 * (10 + 4)
    cost = step_cost(windowed, 1600, 1, batch=1, context=3, rows=3).attention
    assert cost.bytes == 2 * 2 * 4 * (5 + 5)  # the third row sees 4 of 5 positions, the first the other one
    assert cost.flops == 4 * 4 * 4 * ((3 + 4 + 5) + (3 + 4 + 4))


def test_the_floor_is_the_larger_of_both_times() -> None:
    hardware = Hardware("h", 1, read_bytes_per_second=1e9, flops_per_second={"float32": 1e10})
    for flops, seconds, bound in ((1e7, 2e-3, "memory"), (5e7, 5e-3, "arithmetic")):
        cost = Cost(bytes=2e6, flops=flops)
        assert cost.seconds(hardware, "float32") == pytest.approx(seconds)
        assert cost.bound(hardware, "float32") == bound


def run_of(rounds: int, committed: int, verify: float, draft: float = 0.0, accepted: tuple[int, ...] = ()) -> Run:
    timing = Timing(rounds, rounds * 2, committed, 0, draft, verify, 0.0, list(accepted), 10.0, 100, 4.0)
    return Run(timing, [[1], [2]])


def test_rows_from_known_times() -> None:
    """Two requests. Plain: 20 tokens in 10 rounds of 0.1 s. Drafting: 36 tokens in 10 rounds of 0.12 s."""
    config = BenchConfig(drafters=("ngram",), batch=(2,), context=(8,), k=2, repeat=3)
    runs = {
        "none": [run_of(10, 20, 1.0), run_of(10, 20, 0.5), run_of(10, 20, 2.0)],
        "ngram": [run_of(10, 36, verify, draft, (12, 4)) for verify, draft in ((1.0, 0.2), (0.9, 0.1), (3.0, 1.0))],
    }
    identity = {"none": Identity(True, 2, 1.0), "ngram": Identity(False, 2, 0.5, 1e-6)}
    plain, ngram = cell_rows(config, Cell(2, 8, 0.0), runs, identity, 0.05)
    assert (plain["k"], ngram["k"]) == (0, 2)
    assert plain["tokens_per_second"] == pytest.approx(20.0)
    assert plain["tokens_per_second_range"] == pytest.approx([10.0, 40.0])
    assert plain["dt"] == plain["tau"] == plain["throughput_multiplier"] == 1.0
    assert plain["fraction_of_floor"] == pytest.approx(0.5)
    assert ngram["fraction_of_floor"] is None
    assert ngram["tau"] == pytest.approx(1.8)
    assert ngram["acceptance_by_position"] == pytest.approx([0.6, 0.2])
    assert (ngram["draft_ms"], ngram["verify_ms"], ngram["step_ms"]) == pytest.approx((20.0, 100.0, 120.0))
    assert ngram["dt"] == pytest.approx(1.2)
    assert ngram["throughput_multiplier"] == pytest.approx(1.5) == ngram["tau_over_dt"]
    assert ngram["tokens_per_second_total"] == pytest.approx(10.0)
    assert (ngram["identical"], ngram["identical_in_dtype"], ngram["smallest_gap"]) == (False, 0.5, 1e-6)
