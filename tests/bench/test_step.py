"""The step bench on tiny models: the state it sets up, the rounds it times, its rows, table, charts and messages."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import steeple.bench.step.run as step_run
import steeple.bench.step.steady as step_steady
import steeple.bench.step.turns as step_turns
from steeple.bench.step.config import StepConfig
from steeple.bench.step.parts import PARTS, WatchedEngine
from steeple.bench.step.plots import floor_figure, parts_figure, roofline_figure, write_step_plots
from steeple.bench.step.rows import Model, cell_row, machine_facts
from steeple.bench.step.run import run_step
from steeple.bench.step.steady import ScriptConfig, ScriptedDrafter
from steeple.bench.step.table import fill_page, step_markdown, step_table
from steeple.bench.step.turns import ROUNDS, Cell, Steady, Turn, begin, cells, limit
from steeple.config import ModelConfig
from steeple.engine import EngineConfig, LoadedModel, build_engine
from steeple.errors import ConfigError, ModelError
from steeple.evidence.random_model import llama_100m, load_any, random_decoder, shape_of
from steeple.hardware import Hardware
from steeple.model import Decoder
from steeple.request import Request
from steeple.types import Batch, SamplingParams

HARDWARE = Hardware("known", 1, 1e10, {"float32": 1e11, "bfloat16": 2e11})
SHAPE = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_context=256,
    rope_inv_freq=(1.0, 0.1, 0.01, 0.001),
)


class KnownProbe:
    """A machine that reads 5 GB/s. Measuring the real one takes time and is not what is tested here."""

    def __init__(self, device: torch.device) -> None:
        pass

    def now(self) -> float:
        return 5e9


@pytest.fixture(autouse=True, scope="module")
def known_hardware() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_run, "measure", lambda device, *dtypes: HARDWARE)
        patch.setattr(step_run, "ReadProbe", KnownProbe)
        yield


@pytest.fixture(scope="module")
def config(target_folder: Path) -> StepConfig:
    return StepConfig(
        model=(str(target_folder),), batch=(1, 3), context=(40, 100), rows=(1, 4), seconds=0.0, dtype="float32"
    )


@pytest.fixture(scope="module")
def result(config: StepConfig) -> dict[str, Any]:
    return json.loads(json.dumps(run_step(config, argv=["steeple", "bench", "step"])))


@pytest.fixture(scope="module")
def target(target_folder: Path) -> LoadedModel:
    return load_any(str(target_folder), EngineConfig())


@pytest.fixture(params=["native", "layer by layer"])
def either(request: pytest.FixtureRequest, config: StepConfig, target_folder: Path) -> Steady:
    """With the forward that counts its parts itself, where it builds, and with the one that is watched by hand."""
    settings = replace(config, native=request.param == "native")
    target = load_any(str(target_folder), EngineConfig(native=settings.native))
    return Steady(settings, target, KnownProbe(target.device))  # type: ignore[arg-type]


@pytest.fixture
def steady(config: StepConfig, target: LoadedModel) -> Steady:
    return Steady(config, target, KnownProbe(target.device))  # type: ignore[arg-type]


def watch_rows(engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], int]]:
    """Rows per request, and the fewest positions that a row sees, of the engine's forwards from now on."""
    seen: list[tuple[list[int], int]] = []
    forward = engine._runner.forward

    def watched(batch: Batch, **others: Any) -> Any:
        layout = batch.layout  # the next step may write into the same arrays
        seen.append((layout.cu_rows.diff().tolist(), int(layout.prefix.min())))  # type: ignore[no-untyped-call]
        return forward(batch, **others)

    monkeypatch.setattr(engine._runner, "forward", watched)
    return seen


# Settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": (65,)}, "StepConfig.rows = 65 is out of range; give a value from 1 to 64"),
        ({"rows": (0,)}, "StepConfig.rows = 0 is out of range"),
        ({"model": ()}, "StepConfig.model is empty"),
        ({"context": (8, 8)}, "StepConfig.context = .* names a value twice"),
        ({"dtype": "bfloat"}, "Did you mean 'bfloat16'"),
        ({"seconds": -1.0}, "StepConfig.seconds = -1.0 is out of range"),
    ],
)
def test_wrong_settings_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StepConfig(**values)


def test_impossible_benches_are_refused_before_they_run(config: StepConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"StepConfig\.context = 257 exceeds the 256 positions of"):
        run_step(replace(config, context=(40, 257)))
    with pytest.raises(ConfigError, match=r"no random model 'random-10m'\. Did you mean 'random-100m'"):
        run_step(replace(config, model=(*config.model, "random-10m")))
    with pytest.raises(ModelError, match="there is no such folder"):
        run_step(replace(config, model=(str(tmp_path / "nothing"),)))


def test_an_unknown_model_is_told_the_closest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(model: str) -> Path:
        raise ModelError(f"Model {model!r} cannot be reached")

    monkeypatch.setattr("steeple.evidence.random_model.hf.resolve", unreachable)
    with pytest.raises(ModelError) as raised:
        shape_of("demmo")
    assert raised.value.__notes__ == ["Did you mean 'demo'?"]


def test_the_most_rows_fit_or_are_refused(config: StepConfig) -> None:
    most = replace(config, context=(40,), rows=(64,))
    step_turns.check_context(most, "small", replace(SHAPE, max_context=82))
    with pytest.raises(ConfigError, match="rows = 64 needs a model of 82 positions, but small has 81; lower rows"):
        step_turns.check_context(most, "small", replace(SHAPE, max_context=81))


def test_cells_cover_the_product(config: StepConfig) -> None:
    assert cells(config)[:3] == [Cell(1, 40, 1), Cell(1, 40, 4), Cell(1, 100, 1)]
    assert len(cells(config)) == 8


# Random models


def test_the_random_100m_has_100_million_weights_beside_its_embedding() -> None:
    with torch.device("meta"):
        decoder = Decoder(llama_100m())
    assert decoder.multiplied_parameters == 75_516_672 + 24_576_000
    assert (shape_of("random-100m").num_heads, shape_of("random-100m").num_kv_heads) == (12, 4)


def test_random_weights_are_normal_and_decided_by_the_seed() -> None:
    first, again, other = (random_decoder(SHAPE, torch.bfloat16, "cpu", seed) for seed in (1, 1, 2))
    head, norm = first.head.weight.float(), first.layers[0].attention_norm.weight
    assert head.std().item() == pytest.approx(0.02, rel=0.1)
    assert abs(head.mean().item()) < 0.002
    assert norm.dtype == torch.bfloat16
    assert (norm == 1).all()
    assert torch.equal(first.embed.weight, again.embed.weight)
    assert not torch.equal(first.embed.weight, other.embed.weight)
    assert torch.allclose(first.cos[1, 0], torch.tensor(1.0).cos())


# The state and its rounds


@pytest.mark.parametrize("rows", [2, 5])
def test_scripted_rounds_have_their_rows_and_write_the_plain_tokens(
    target: LoadedModel, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: list[list[list[int]]] = []
    sizes: list[list[int]] = []
    for script in (None, ScriptConfig(rows - 1, 320, seed=3)):
        parts = build_engine(target, EngineConfig(kv_tokens=1024, share_prefixes=False), script).parts
        engine = WatchedEngine(parts)
        seen = watch_rows(engine, monkeypatch)
        prompts = ([5, 6, 7], [8] * 9, [1, 2])
        requests = [Request(str(i), p, SamplingParams(max_tokens=20, ignore_eos=True)) for i, p in enumerate(prompts)]
        for request in requests:
            engine.add(request)
        while not engine.idle:
            engine.step()
        engine.check_integrity()
        outputs.append([request.output.tolist() for request in requests])
        sizes.append([rows for rows, _ in seen])
    assert outputs[0] == outputs[1]
    assert sizes[0][1:4] == [[1, 1, 1]] * 3
    assert sizes[1][1:4] == [[rows, rows, rows]] * 3


def test_a_script_proposes_chosen_chains_within_vocabulary_and_budget() -> None:
    drafter = ScriptedDrafter(ScriptConfig(4, 50, seed=1), "cpu")
    requests = [Request(str(n), [0] * n, SamplingParams()) for n in (3, 4, 4)]
    draft = drafter.propose(requests, [4, 4, 2])
    assert draft.counts.tolist() == [4, 4, 2]
    assert draft.parent.tolist() == [-1, 0, 1, 2, -1, 4, 5, 6, -1, 8]
    assert draft.row.unique().tolist() == [-1]  # chosen, not drawn
    assert draft.probs is None
    tokens = draft.tokens.tolist()
    assert tokens[:4] != tokens[4:8]
    assert tokens[4:6] == tokens[8:10]
    assert all(0 <= token < 50 for token in tokens)


@pytest.mark.parametrize("cell", [Cell(3, 100, 1), Cell(3, 100, 4), Cell(1, 40, 4)])
def test_a_turn_times_rounds_in_the_middle_of_long_texts(
    steady: Steady, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = steady._engines[cell.rows]
    seen = watch_rows(engine, monkeypatch)
    turn = steady.turn(cell, ROUNDS)
    assert (len(turn.seconds), len(turn.parts)) == (ROUNDS // 2, ROUNDS // 2)
    assert np.mean(turn.lengths) == pytest.approx(cell.context, abs=2)  # a lucky guess makes a text longer
    assert turn.read_bytes_per_second == 5e9
    # Joining computes one token of each request, and no prompt.
    assert seen[0] == ([1] * cell.batch, begin(cell, 256))
    assert [rows for rows, _ in seen[1:]] == [[cell.rows] * cell.batch] * (ROUNDS + 1)
    engine.check_integrity()


def test_the_parts_of_a_round_are_the_round(either: Steady) -> None:
    turn = either.turn(Cell(3, 100, 4), 4)
    for parts in turn.parts:
        assert set(parts) == set(PARTS)
        assert all(parts[part] > 0 for part in ("attention", "linear", "logits", "sampling", "overhead"))
    assert turn.spent == pytest.approx(sum(turn.seconds) + sum(sum(parts.values()) for parts in turn.parts))


def test_watching_leaves_nothing_behind(either: Steady) -> None:
    """An operation replaced by a timed one must come back, or every round would be watched."""
    engine = either._engines[1]
    owners = [*engine.parts.decoder.modules(), engine._runner, engine.cache]
    before = [set(vars(owner)) for owner in owners]
    either.turn(Cell(1, 40, 1), 2)
    assert [set(vars(owner)) for owner in owners] == before
    watched = dict(engine._seconds)
    either.turn(Cell(1, 40, 1), 1)
    assert dict(engine._seconds) == watched


def test_plain_and_verifying_engines_read_the_same_full_cache(
    config: StepConfig, target: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_steady, "SLOTS", 48)  # so that the cache takes several pieces
    outputs = []
    for rows in (1, 4):
        steady = Steady(config, target, KnownProbe(target.device))  # type: ignore[arg-type]
        engine, requests = steady._engines[rows], steady._requests(Cell(3, 100, 1))
        assert engine.cache.keys.float().std().item() == pytest.approx(1.0, abs=0.05)
        for request in requests:
            engine.add(request)
        while not engine.idle:
            engine.step()
        outputs.append([request.output.tolist() for request in requests])
    assert outputs[0] == outputs[1]
    assert len({tuple(output) for output in outputs[0]}) == 3


def test_texts_stay_within_the_model() -> None:
    for rows in (1, 64):
        assert limit(Cell(1, 256, rows), 256) <= 256
    assert begin(Cell(1, 1, 1), 256) == 1


def test_cells_that_do_not_fit_are_left_out_with_the_reason(
    config: StepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, logits = 16 * 2 * 2 * 2 * 8 * 4, 3 * 4 * 320  # bytes; logits of one row, three times
    small = 3 * (4 + 1) * block + 3 * 4 * logits  # 40 - 9 + 1 + 16 + 4 positions: 4 blocks and one to spare
    large = 3 * (7 + 1) * block + 3 * logits  # 100 - 9 + 1 + 16 + 1 positions
    assert small < large
    monkeypatch.setattr(step_turns, "available_memory", lambda device: (small + 4) / step_turns.MEMORY_SHARE)
    rows = run_step(config)["rows"]
    skipped = {(row["batch"], row["context"], row["rows"]) for row in rows if row["skipped"] is not None}
    assert skipped == {(3, 100, 1), (3, 100, 4)}
    assert all("needs 0 MiB, 0 MiB are free" in row["skipped"] for row in rows if row["skipped"] is not None)
    assert all("step_ms" not in row for row in rows if row["skipped"] is not None)
    assert all(row["step_ms"] > 0 for row in rows if row["skipped"] is None)


def test_a_bench_without_a_cell_that_fits_still_answers(
    config: StepConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(step_turns, "available_memory", lambda device: 1000)
    result = run_step(replace(config, plots=str(tmp_path / "plots")))
    assert all(row["skipped"] for row in result["rows"])
    assert not (tmp_path / "plots").exists()
    assert "skipped: needs" in step_markdown([result])


# The result

NUMBERS = (
    "step_ms", "step_ms_least", "step_spread", "floor_ms", "fraction_of_floor", "bytes", "flops", "mean_context",
    "attention_ms", "attention_gbs", "attention_fraction_of_floor", "linear_ms", "linear_gbs", "logits_ms",
    "sampling_ms", "overhead_ms", "overhead_share", "elementwise_ms", "cache_ms", "rest_ms", "verify_over_plain",
)  # fmt: skip


def test_the_result_is_json_with_every_column(result: dict[str, Any], config: StepConfig) -> None:
    assert result["schema_version"] == 1
    assert result["command"] == ["steeple", "bench", "step"]
    assert set(result["machine"]) >= {"name", "threads", "read_gbs", "read_gbs_median", "bf16_gflops", "f32_gflops"}
    assert result["machine"]["read_gbs"] == 10.0
    assert result["machine"]["read_gbs_median"] == 5.0
    assert result["models"][0]["shape"]["num_layers"] == 2
    assert result["environment"]["threads"] >= 1
    found = [(row["batch"], row["context"], row["rows"]) for row in result["rows"]]
    assert found == [(cell.batch, cell.context, cell.rows) for cell in cells(config)]
    for row in result["rows"]:
        assert row["skipped"] is None
        assert (row["model"], row["dtype"]) == (config.model[0], "float32")
        assert row["bound"] in ("memory", "arithmetic")
        for name in NUMBERS:
            assert isinstance(row[name], float | int), name
        assert (row["verify_over_plain"] == 1.0) or row["rows"] == 4
        assert (row["tokens_per_second"] is None) == (row["rows"] == 4)


def test_without_plain_rows_there_is_nothing_to_compare_with(config: StepConfig) -> None:
    rows = run_step(replace(config, batch=(1,), context=(40,), rows=(2, 3)))["rows"]
    assert [row["verify_over_plain"] for row in rows] == [None, None]


def test_cells_take_turns_until_each_had_its_seconds(config: StepConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Cell, int]] = []

    def turn(self: Steady, cell: Cell, rounds: int) -> Turn:
        seen.append((cell, rounds))
        each = 0.1 if cell.rows == 4 else 0.02
        return Turn([each] * (rounds // 2), [dict.fromkeys(PARTS, each / len(PARTS))] * (rounds // 2), [40.0], 5e9)

    monkeypatch.setattr(Steady, "turn", turn)
    run_step(replace(config, batch=(1,), context=(40,), seconds=0.4))
    plain, four = Cell(1, 40, 1), Cell(1, 40, 4)
    # A warm-up; then 2 rounds to find out, then as many as fit into 0.2 s: ten of 0.02 s or two of 0.1 s.
    assert seen == [(plain, 2), (four, 2), (plain, 2), (four, 2), (plain, 10), (four, 2), (plain, 10)]


def turn_of(seconds: Sequence[float], attention: float, read: float = 1e9, overhead: float = 1.0) -> Turn:
    parts = dict.fromkeys(PARTS, 0.0) | {"attention": attention, "linear": 2.0, "logits": 1.0, "overhead": overhead}
    return Turn(list(seconds), [parts], [10.0], read)


def test_a_row_from_known_times() -> None:
    """A floor of 2 s at 1 GB/s and of 4 s at 0.5; three turns, the last of them on the slower machine."""
    model = Model("m", replace(SHAPE, vocab_size=1, hidden_size=1), 10**9 - 2 * 2 * 2 * 8 * 10 - 1, 2)
    hardware = Hardware("h", 1, 9e9, {"bfloat16": 1e15})
    turns = [turn_of([4.0, 4.0], 1.0), turn_of([5.0], 2.0), turn_of([9.0], 4.0, read=0.5e9, overhead=9.0)]
    plain = [turn_of([2.0], 1.0), turn_of([5.0], 1.0)]
    row = cell_row(Cell(1, 10, 1), turns, plain, model, hardware, "bfloat16")
    assert row["bytes"] == 2 * 10**9
    assert row["step_ms"] == 4500.0
    assert row["step_ms_least"] == 4000.0
    assert row["floor_ms"] == pytest.approx(2000.0)
    assert row["fraction_of_floor"] == pytest.approx(4 / 9)  # of 2 / 4, 2 / 5 and 4 / 9
    assert row["bound"] == "memory"
    assert (row["rounds"], row["turns"], row["mean_context"]) == (4, 3, 10.0)
    assert row["attention_ms"] == 2000.0
    assert row["attention_gbs"] == pytest.approx(2 * 2 * 2 * 2 * 8 * 10 / 2.0 / 1e9)
    assert row["linear_fraction_of_floor"] == pytest.approx(1.0, abs=1e-3)  # 2 s of floor in 2 s, twice
    assert row["overhead_share"] == pytest.approx(0.2)  # of 1 / 5, 1 / 6 and 9 / 16
    assert row["verify_over_plain"] == pytest.approx(1.5)  # of 4 / 2 and 5 / 5, turn by turn
    assert row["tokens_per_second"] == pytest.approx(1 / 4.5)


def test_the_machine_is_described_by_its_best_and_by_what_was_beside_the_steps() -> None:
    facts = machine_facts(HARDWARE, [1e9, 2e9, 4e9])
    assert (facts["read_gbs"], facts["read_gbs_median"]) == (10.0, 2.0)
    assert facts["read_gbs_range"] == pytest.approx([1.2, 3.6])
    assert (facts["bf16_gflops"], facts["f32_gflops"]) == (200.0, 100.0)


def test_table_and_page(result: dict[str, Any]) -> None:
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(step_table(result))
    assert f"{result['rows'][0]['step_ms']:.2f}" in console.export_text()
    page = fill_page("a\n<!-- numbers:step -->\nold\n<!-- /numbers:step -->\nb\n", "step", step_markdown([result]))
    assert page.startswith(
        "a\n<!-- numbers:step -->\nknown, threads: 1, reads 10.0 GB/s before the steps, 5.0 beside them"
    )
    assert page.endswith("<!-- /numbers:step -->\nb\n")
    assert "old" not in page
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(result["rows"])
    assert len({line.count("|") for line in lines}) == 1
    with pytest.raises(ConfigError, match="the page needs <!-- numbers:step -->"):
        fill_page("no marker", "step", "text")
    with pytest.raises(ConfigError, match="in this order"):
        fill_page("<!-- /numbers:step --><!-- numbers:step -->", "step", "text")


def test_charts_show_the_rows(result: dict[str, Any], tmp_path: Path) -> None:
    written = write_step_plots(result, tmp_path / "plots")
    names = {f"{name}.{kind}" for name in ("roofline", "floor", "parts") for kind in ("png", "svg")}
    assert {path.name for path in written} == names
    assert all(path.stat().st_size > 1000 for path in written)
    for panel, rows in zip(floor_figure(result).axes, (1, 4), strict=False):
        shares = {(r["batch"], r["context"]): r["fraction_of_floor"] for r in result["rows"] if r["rows"] == rows}
        expected = [f"{shares[b, c]:.1%}" for b in (1, 3) for c in (40, 100)]
        assert [f"{value:.1%}" for value in panel.images[0].get_array().flat] == expected
        assert len(panel.texts) == 4
    points = [line for line in roofline_figure(result).axes[0].lines if line.get_marker() == "o"]
    row = result["rows"][0]
    assert len(points) == 4
    assert points[0].get_xdata()[0] == row["flops"] / row["bytes"]
    assert points[0].get_ydata()[0] == pytest.approx(row["flops"] / row["step_ms"] / 1e6)
    bars = parts_figure(result).axes[0].patches
    assert sum(bar.get_width() for bar in bars) == pytest.approx(4.0)  # four plain rows, all of each
