"""A whole bench on tiny models: the schema of its result, turns, identity, table and charts."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import Tensor

import steeple.bench.run as bench_run
from steeple.bench.config import BenchConfig
from steeple.bench.plots import speedup_figure, write_plots
from steeple.bench.run import run_bench
from steeple.bench.table import bench_table
from steeple.engine import EngineConfig, LoadedModel
from steeple.errors import CapacityError, ConfigError
from steeple.hardware import Hardware
from steeple.model.run import Runner

COLUMNS = {
    "drafter": str, "batch": int, "context": int, "k": int, "temperature": float, "dtype": str, "max_tokens": int,
    "tokens_per_second": float, "tokens_per_second_total": float, "tokens_per_second_range": list, "tau": float,
    "acceptance_by_position": list, "draft_ms": float, "verify_ms": float, "other_ms": float, "step_ms": float,
    "dt": float, "throughput_multiplier": float, "floor_ms": float, "identical_requests": int,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def known_hardware() -> Iterator[None]:
    """Measuring the machine takes a second and is not what is tested here."""
    known = Hardware("known", 1, 1e10, {"float32": 1e11, "bfloat16": 2e11})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_run, "measure", lambda device, dtype: known)
        yield


@pytest.fixture(scope="module")
def config(target_folder: Path, draft_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BenchConfig:
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps({"text": f"def f{i}(x):\n    return x * {i}\n" * 9}) for i in range(4)]
    text.write_text("\n".join(lines))
    return BenchConfig(
        model=str(target_folder),
        drafters=("ngram", f"small_lm:{draft_folder}"),
        batch=(2,),
        context=(24,),
        k=2,
        max_tokens=12,
        repeat=2,
        prompts=str(text),
    )


@pytest.fixture(scope="module")
def result(config: BenchConfig) -> dict[str, Any]:
    return run_bench(config, argv=["steeple", "bench"])


def test_the_result_is_json_with_every_column(result: dict[str, Any], config: BenchConfig) -> None:
    again = json.loads(json.dumps(result))
    assert again["schema_version"] == 1
    assert again["command"] == ["steeple", "bench"]
    assert again["environment"]["read_bytes_per_second"] == 1e10
    assert [row["drafter"] for row in again["rows"]] == list(config.methods)
    for row in again["rows"]:
        for name, kind in COLUMNS.items():
            assert isinstance(row[name], kind), name
        assert row["identical"] is True
        assert row["identical_in_dtype"] == 1.0
        assert row["step_ms"] == pytest.approx(row["draft_ms"] + row["verify_ms"] + row["other_ms"], rel=0.5)
        assert 1.0 <= row["tau"] <= 3.0
    assert again["rows"][0]["throughput_multiplier"] == again["rows"][0]["dt"] == 1.0
    assert again["rows"][0]["floor_ms"] > 0


def test_drafters_take_turns_after_a_warm_up(config: BenchConfig) -> None:
    seen: list[str] = []
    run_bench(replace(config, drafters=("ngram",)), lambda what, done, total: seen.append(f"{what} {done}/{total}"))
    turns = [line.split(": ")[1] for line in seen if ": " in line]
    assert turns == [
        "none, warm-up 1/6",
        "ngram, warm-up 2/6",
        "none, repeat 1 3/6",
        "ngram, repeat 1 4/6",
        "ngram, repeat 2 5/6",
        "none, repeat 2 6/6",
    ]


def test_sampled_cells_have_no_identity(config: BenchConfig) -> None:
    rows = run_bench(replace(config, drafters=("ngram",), temperature=(1.0,)))["rows"]
    assert [row["identical"] for row in rows] == [None, None]


def test_another_dtype_is_checked_in_float32_as_well(config: BenchConfig) -> None:
    loaded: list[str] = []
    load = bench_run.load_model

    def watched(model: str, settings: EngineConfig) -> LoadedModel:
        loaded.append(settings.dtype)
        return load(model, settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_run, "load_model", watched)
        changed = replace(config, drafters=("ngram",), dtype="bfloat16", identity_requests=1)
        rows = run_bench(changed)["rows"]
    assert loaded == ["bfloat16", "float32"]
    assert [(row["identical"], row["identical_requests"]) for row in rows] == [(True, 1), (True, 1)]


def test_a_drafter_that_changes_tokens_is_called_not_identical(
    config: BenchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = Runner.best

    def worse(self: Runner, hidden_RD: Tensor) -> Tensor:
        """The next token of the vocabulary, where there are more rows than the two requests need."""
        return (best(self, hidden_RD) + (hidden_RD.shape[0] > 2)) % 320

    monkeypatch.setattr(Runner, "best", worse)
    rows = run_bench(config)["rows"]
    assert rows[0]["identical"] is True
    assert rows[2]["identical"] is False
    assert rows[2]["identical_in_dtype"] < 1.0
    assert rows[2]["smallest_gap"] > 0.0


def test_impossible_benches_are_refused_before_they_run(config: BenchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="exceed the model's context of 256"):
        run_bench(replace(config, context=(250,)))
    with pytest.raises(ConfigError, match="Did you mean 'ngram'"):
        run_bench(replace(config, drafters=("ngrm",)))
    with pytest.raises(ConfigError, match="99 different prompts of 24 tokens are needed"):
        run_bench(replace(config, batch=(99,)))
    monkeypatch.setattr(bench_run, "available_memory", lambda device: 1000)
    with pytest.raises(CapacityError, match=r"caches of 3 engines for 2 requests.*lower batch or context"):
        run_bench(config)


def test_table_and_charts(result: dict[str, Any], tmp_path: Path) -> None:
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(bench_table(result))
    text = console.export_text()
    assert "ngram" in text
    assert f"{result['rows'][0]['tokens_per_second']:.1f}" in text
    written = write_plots(result, tmp_path / "charts")
    assert sorted(p.name for p in written) == ["speedup.png", "speedup.svg", "throughput.png", "throughput.svg"]
    assert all(p.stat().st_size > 1000 for p in written)


def test_the_bars_are_the_multipliers(result: dict[str, Any]) -> None:
    axes = speedup_figure(result).axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == [row["throughput_multiplier"] for row in result["rows"][1:]]


def test_charts_are_written_where_the_settings_say(config: BenchConfig, tmp_path: Path) -> None:
    run_bench(replace(config, drafters=("ngram",), repeat=1, plots=str(tmp_path / "charts")))
    assert (tmp_path / "charts" / "speedup.svg").exists()
