"""The parts of a sweep: settings, cells, requests, rows of known runs, tables, heatmaps, the file of a killed one."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from steeple.bench.rows import Identity
from steeple.bench.sweep import select
from steeple.bench.sweep.config import SweepConfig
from steeple.bench.sweep.engines import Method
from steeple.bench.sweep.plots import multiplier_figure, parts_figure, write_sweep_plots
from steeple.bench.sweep.rows import CellRuns, cell_of, cell_rows
from steeple.bench.sweep.store import PartialFile, settings_of
from steeple.bench.sweep.table import sweep_markdown, sweep_table
from steeple.bench.sweep.workload import MIXED, Cell, Workload, cells, spread_of
from steeple.errors import ConfigError, StorageError
from steeple.evidence.measure import Run, Timing

CONFIG = SweepConfig(batch=(4, 1), context=(40, 20), max_tokens=16)


class Counting:
    """A cutter whose prompts say whose they are and where."""

    def cut(self, length: int, count: int) -> list[list[int]]:
        return [[1000 * number + place for place in range(length)] for number in range(count)]


def work(config: SweepConfig = CONFIG) -> Workload:
    return Workload(config, Counting(), 64)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ks": ()}, "ks is empty"),
        ({"ks": (4, 64)}, "SweepConfig.ks = 64 is out of range"),
        ({"batch": (0,)}, "SweepConfig.batch = 0 is out of range"),
        ({"ks": (8,), "max_tokens": 16}, "max_tokens = 16 is out of range; give a value from 20"),
        ({"dtype": "float23"}, "Did you mean 'float32'"),
        ({"trace": "cod"}, "Did you mean 'code'"),
        ({"seconds_per_run": float("nan")}, "seconds_per_run = nan is out of range"),
    ],
)
def test_wrong_settings_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SweepConfig(**values)


def test_batches_unless_they_are_given() -> None:
    assert SweepConfig().batch == (1, 8, 32, 64)
    assert SweepConfig(mixed=True).batch == (8, 32, 64)
    assert SweepConfig(mixed=True, batch=(2,)).batch == (2,)


def test_plain_decoding_is_no_drafter_of_the_sweep() -> None:
    assert SweepConfig(drafters=("ngram", "none")).speculative == ("ngram",)


def test_a_run_is_long_enough_for_a_counted_round_at_every_k() -> None:
    assert SweepConfig(max_tokens=48).least_tokens == 24
    assert SweepConfig(max_tokens=48, ks=(1, 20)).least_tokens == 44
    assert SweepConfig(max_tokens=16).least_tokens == 16


def test_cells_come_in_the_order_that_shares_prompts() -> None:
    order = cells(replace(CONFIG, temperature=(1.0, 0.0)))
    assert [(c.batch, c.context) for c in order[::2]] == [(1, 20), (1, 40), (4, 20), (4, 40)]
    assert [c.temperature for c in order[:2]] == [1.0, 0.0]
    assert cells(replace(CONFIG, mixed=True)) == [Cell(b, MIXED, t) for b in (1, 4) for t in (0.0, 1.0)]


def test_prompts_are_beginnings_of_the_same_texts() -> None:
    workload = work()
    short, long = workload.prompts(Cell(1, 20, 0.0), 0), workload.prompts(Cell(4, 40, 0.0), 0)
    assert [len(p) for p in short] == [20]
    assert long[0][:20] == short[0]
    assert [p[0] for p in long] == [0, 1000, 2000, 3000]


def test_repeats_of_a_small_batch_take_the_next_texts() -> None:
    workload = work()
    assert [workload.prompts(Cell(1, 20, 0.0), repeat)[0][0] for repeat in range(5)] == [0, 1000, 2000, 3000, 0]
    assert [p[0] for p in workload.prompts(Cell(4, 20, 0.0), 1)] == [0, 1000, 2000, 3000]


def test_requests_are_the_same_again_and_draw_anew_in_each_repeat() -> None:
    workload, cell = work(), Cell(4, 20, 1.0)
    first, again, other = (workload.requests(cell, repeat) for repeat in (0, 0, 1))
    assert [r.seed for r in first] == [r.seed for r in again]
    assert not {r.seed for r in first} & {r.seed for r in other}
    assert all(r.params.ignore_eos and r.params.temperature == 1.0 and r.limit == 64 for r in first)
    assert workload.requests(cell, 0, max_tokens=3)[0].limit == 23


def test_mixed_requests_differ_in_length_and_fit() -> None:
    workload = work(replace(CONFIG, mixed=True, batch=(8,)))
    lengths = [len(p) for p in workload.prompts(Cell(8, MIXED, 0.0), 0)]
    assert len(set(lengths)) >= 3
    assert 16 == min(lengths) < max(lengths) <= 64 - 16


def test_the_cache_holds_all_prompts_and_twice_what_a_run_writes() -> None:
    # 4 prompts of 3 blocks; 16 tokens, 6 nodes and a root take 2 blocks, one more for where they begin
    assert work().kv_tokens(16) == 4 * (3 + 2 * 3) * 16
    assert work(replace(CONFIG, batch=(1,), context=(8,), max_tokens=6, ks=(1,))).kv_tokens(8) == 9 * 8  # 64 positions


@pytest.mark.parametrize("values", [{"context": (20, 60)}, {"mixed": True, "max_tokens": 48}])
def test_a_context_that_does_not_fit_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"do not fit into the model's context of 64"):
        work(replace(CONFIG, **values))


def test_the_spread_of_contexts() -> None:
    assert spread_of([10, 20, 90]) == {"min": 10, "median": 20.0, "mean": 40.0, "max": 90}


def run_of(rounds: int, committed: int, seconds: float, drafted: int = 0, accepted: tuple[int, ...] = ()) -> Run:
    timing = Timing(rounds, rounds * 2, committed, drafted, seconds / 4, seconds / 2, seconds / 4, list(accepted))
    timing.total_seconds, timing.total_tokens = 1.0, 1
    return Run(timing, [[1], [2]])


METHODS = [
    Method("none", 0, 0, False, None),  # type: ignore[arg-type]
    Method("small_lm", 4, 4, False, None),  # type: ignore[arg-type]
    Method("small_lm", 2, 2, False, None),  # type: ignore[arg-type]
    Method("clever", 6, 6, True, None),  # type: ignore[arg-type]
]


def rows_of(cell: Cell, faster: float = 1.0) -> list[dict[str, Any]]:
    """Plain: 20 tokens in 10 rounds of 0.1 s, then of 0.12 s. k = 4: 60 in 0.2 s; k = 2: 40 in 0.11 s."""
    config = SweepConfig(ks=(2, 4), batch=(2,), context=(8, 16))
    runs = CellRuns(cell, 24, lengths=[8, 12] if cell.context == MIXED else [cell.context] * 2)
    runs.plain = [run_of(10, 20, 1.0), run_of(10, 20, 1.2)]
    runs.methods = [
        [run_of(10, 60, 2.0 / faster, 80, (20, 10, 7, 3))],
        [run_of(10, 40, 1.1, 40, (14, 6))],
        [run_of(10, 44, 1.1, 50, (14, 6, 4, 0, 0, 0))],
    ]
    runs.readings = [2e10, 3e10, 1e10]
    identities = {} if cell.temperature else {"none": Identity(True, 2, 1.0), "small_lm k=4": Identity(False, 2, 0.5)}
    return cell_rows(config, runs, METHODS, identities, 0.05)


def result_of(*cells_: Cell) -> dict[str, Any]:
    config = SweepConfig(ks=(2, 4), batch=(2,), context=(8, 16))
    return {
        "config": settings_of(config),
        "environment": {"device": "cpu", "cpu": "a processor", "threads": 2},
        "identity": {"requests": 3, "same": {"none": True, "small_lm k=4": False}},
        "rows": [row for place, cell in enumerate(cells_) for row in rows_of(cell, 1.0 + place)],
    }


def test_rows_from_known_times() -> None:
    plain, four, two, clever = rows_of(Cell(2, 8, 0.0))
    assert (plain["drafter"], plain["k"], plain["dt"], plain["drafted"]) == ("none", 0, 1.0, 0.0)
    assert plain["step_ms"] == pytest.approx(110.0)
    assert plain["plain_step_ms"] == four["plain_step_ms"] == pytest.approx([100.0, 120.0])
    assert plain["fraction_of_floor"] == pytest.approx(0.05 / 0.11)
    assert four["fraction_of_floor"] is None
    assert (four["k"], four["batch"], four["context"], four["contexts"], four["max_tokens"]) == (4, 2, 8, None, 24)
    assert four["tau"] == pytest.approx(3.0)
    assert four["drafted"] == pytest.approx(4.0)
    assert four["dt"] == pytest.approx(200 / 110)
    assert four["acceptance_by_position"] == pytest.approx([1.0, 0.5, 0.35, 0.15])
    rates = 20 / 1.0, 20 / 1.2
    assert four["throughput_multiplier"] == pytest.approx(30 / (sum(rates) / 2))
    assert (four["draft_ms"], four["verify_ms"], four["other_ms"]) == pytest.approx((50, 100, 50))
    assert (four["read_bytes_per_second"], four["read_bytes_per_second_range"]) == (2e10, [1e10, 3e10])
    assert (four["identical"], four["identical_requests"], four["identical_in_dtype"]) == (False, 2, 0.5)
    assert (two["identical"], two["identical_requests"]) == (None, 0)
    assert clever["adaptive"]
    assert clever["drafted"] == pytest.approx(2.5)
    assert {four[name] for name in ("tokens_per_second_total", "throughput_multiplier_total", "prompt_ms")} == {None}


def test_a_row_knows_its_cell() -> None:
    for cell in (Cell(2, 8, 0.0), Cell(2, 16, 1.0), Cell(2, MIXED, 1.0)):
        rows = json.loads(json.dumps(rows_of(cell)))
        assert {cell_of(row) for row in rows} == {cell}
    assert rows[0]["context"] == 10
    assert rows[0]["contexts"] == {"min": 8, "median": 10.0, "mean": 10.0, "max": 12}


def test_choosing_rows() -> None:
    rows = result_of(Cell(2, 8, 1.0), Cell(2, 16, 1.0))["rows"]
    assert [(r["drafter"], r["k"]) for r in select.at_k(rows, 2)[:2]] == [("small_lm", 2), ("clever", 6)]
    best = {(r["drafter"], r["context"]): r["k"] for r in select.best_k(rows)}
    assert best == {("small_lm", 8): 2, ("small_lm", 16): 4, ("clever", 8): 6, ("clever", 16): 6}
    assert (select.common_k(rows, 4), select.common_k(rows, 3), select.common_k([], 4)) == (4, 4, 4)
    assert select.contexts([*rows, *rows_of(Cell(2, MIXED, 1.0))]) == [8, 16, "mixed"]
    assert select.drafters(rows) == ["small_lm", "clever"]


def test_tiles_of_the_heatmaps_are_the_rows() -> None:
    result = result_of(Cell(2, 8, 1.0), Cell(2, 16, 1.0), Cell(2, 8, 0.0))
    four = [select.find(result["rows"], drafter="small_lm", k=4, context=c, temperature=1.0) for c in (8, 16)]
    figure = multiplier_figure(result, 1.0)
    assert [text.get_text() for text in figure.axes[0].texts] == [f"{r['throughput_multiplier']:.2f}" for r in four]
    best = [text.get_text().split("\n")[1] for text in figure.axes[2].texts]
    assert best == ["k = 2", "k = 4"]
    assert figure.axes[3].texts[0].get_text().endswith("2.5 nodes")
    assert figure.axes[0].images[0].get_clim() == (-1.0, 1.0) or figure.axes[0].images[0].get_clim()[1] > 1.0
    assert sum(figure.axes[0].images[0].get_clim()) == 0.0  # the middle of the colours is a multiplier of 1
    parts = parts_figure(result, 1.0)
    shown = [[text.get_text() for text in parts.axes[line * 2].texts] for line in range(4)]
    plain_ms = 110.0
    names = [("tau", 1.0), ("dt", 1.0), ("draft_ms", plain_ms), ("verify_ms", plain_ms)]
    assert shown == [[f"{row[name] / unit:.2f}" for row in four] for name, unit in names]


def test_heatmaps_are_written_for_every_temperature(tmp_path: Path) -> None:
    written = write_sweep_plots(result_of(Cell(2, 8, 1.0), Cell(2, 8, 0.0)), tmp_path / "new")
    names = [f"{name}-t{t}.{kind}" for t in (0, 1) for name in ("multiplier", "parts") for kind in ("png", "svg")]
    assert [path.name for path in written] == names
    assert all(path.stat().st_size > 1000 for path in written)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_sweep_plots(result_of(Cell(2, 8, 1.0)), tmp_path / "file")


def test_the_table_shows_both_k() -> None:
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(sweep_table(result_of(Cell(2, 8, 1.0), Cell(2, MIXED, 1.0))))
    lines = [line.split("│")[1:-1] for line in console.export_text().splitlines() if "small_lm" in line]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["2", "8", "1", "small_lm", "1.64", "3.00", "1.82", "2", "1.98", "2.00", "1.00"],
        ["2", "10", "1", "small_lm", "3.27", "3.00", "0.91", "4", "3.27", "3.00", "0.91"],
    ]


def test_the_page_sets_the_papers_figures_beside_ours() -> None:
    result = result_of(Cell(8, 512, 1.0), Cell(8, 3968, 1.0), Cell(8, 512, 0.0))
    page = sweep_markdown(result)
    ours = select.find(result["rows"], drafter="small_lm", k=4, context=3968, temperature=1.0)
    assert ours is not None
    assert "| 512 | 2.65 / 3.00 |" in page
    assert "| 960 | 2.64 / - |" in page
    assert f"| 8 | 3968 | 1.36 / {ours['throughput_multiplier']:.2f} |" in page
    assert "| 8 | 512 | 110.0 | **1.64** (3.00 / 1.82) | " in page
    assert "**1.98** (2)" in page
    assert "In float32 1 of 2 wrote plain decoding's tokens (3 requests, T = 0)." in page
    assert "20.0% apart in the median cell" in page
    assert "Bandwidth beside the runs: 10.0 to 30.0 GB/s" in page


def test_the_page_of_mixed_contexts_has_nothing_of_the_papers_beside_it() -> None:
    mixed = sweep_markdown(result_of(Cell(8, MIXED, 1.0)))
    assert "best k of each drafter and cell" in mixed
    assert "Paper" not in mixed
    both = sweep_markdown(result_of(Cell(8, 512, 1.0), Cell(8, MIXED, 1.0)))
    assert "Figure 4" in both
    assert "| 8 | mixed |" not in both


def test_a_killed_sweep_leaves_a_file_that_only_the_same_settings_take_up(tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    left = {"config": settings_of(CONFIG), "rows": [1]}
    PartialFile(file).write(left)
    assert not file.exists()
    assert PartialFile(file).earlier(CONFIG) is None
    again = replace(CONFIG, resume=True, plots="charts")
    assert PartialFile(file).earlier(again) == left
    with pytest.raises(ConfigError, match=r"sweep\.json\.partial is of a sweep with other ks, seed; remove it"):
        PartialFile(file).earlier(replace(again, seed=1, ks=(2,)))
    PartialFile(file).finish({"rows": [1, 2]})
    assert json.loads(file.read_text()) == {"rows": [1, 2]}
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]
    assert PartialFile(file).earlier(again) is None


def test_a_file_that_cannot_serve_is_named(tmp_path: Path) -> None:
    resumed = replace(CONFIG, resume=True)
    with pytest.raises(ConfigError, match="--resume needs --json FILE"):
        PartialFile(None).earlier(resumed)
    PartialFile(None).finish({})
    (tmp_path / "a.json.partial").write_text("{")
    with pytest.raises(StorageError, match=r"a\.json\.partial cannot be read"):
        PartialFile(tmp_path / "a.json").earlier(resumed)
    with pytest.raises(StorageError, match="cannot be written"):
        PartialFile(tmp_path / "absent" / "a.json").write({})
