"""A bench of choices on tiny models: what it compares, what it counts, the oracle, table and charts."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import steeple.bench.select.run as select_run
from steeple.bench.select.config import SelectConfig
from steeple.bench.select.plots import shares_figure, throughput_figure, write_select_plots
from steeple.bench.select.run import run_select
from steeple.bench.select.runs import Counted, Fixed, Run, median_run
from steeple.bench.select.table import select_table
from steeple.draft.spin_round import Spin
from steeple.errors import ConfigError
from steeple.evidence.streams import Stream
from steeple.select.goodput import Plan
from steeple.select.matching import NOBODY
from steeple.select.selector import Outcome


def a_stream(*_: object) -> Stream:
    """Six prompts of two kinds: one repeats itself, one does not."""
    numbers = np.random.default_rng(0)
    again, new = numbers.integers(1, 99, (3, 4)), numbers.integers(1, 99, (3, 24))
    prompts = [tuple(text.tolist()) for pair in zip(new, np.tile(again, 6), strict=True) for text in pair]
    return Stream(
        name="two",
        source="a die",
        kinds=("new", "again"),
        prompts=tuple(prompts),
        kind_of_each=(0, 1) * 3,
        max_tokens=12,
        sha256="0",
    )


@pytest.fixture(scope="module")
def config(target_folder: Path) -> SelectConfig:
    return SelectConfig(
        model=str(target_folder),
        drafters=("ngram:min_match=1", "sparse_self:sink=4+window=8"),
        k=(1, 3),
        deepest=3,
        batch=3,
        max_tokens=12,
        longest=24,
        repeat=2,
        dtype="float32",
    )


@pytest.fixture(scope="module")
def result(config: SelectConfig) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select_run, "load_stream", a_stream)
        return run_select(config, argv=["steeple", "bench", "select"])


def test_everything_is_compared_and_writes_the_same(result: dict[str, Any], config: SelectConfig) -> None:
    json.dumps(result)
    rows = {row["method"]: row for row in result["rows"]}
    alone = [f"{spec}, k = {k}" for spec in config.drafters for k in config.k]
    assert list(rows) == ["none", *alone, *(f"auto-k:{spec}" for spec in config.drafters), "spin", "oracle"]
    assert all(row["identical"] == 1.0 for row in rows.values())
    best = [f"{spec}, k = {k}" for spec, k in result["best_depths"].items()]
    compared = [name for name, row in rows.items() if row["compared"]]
    assert sorted(compared) == sorted(["none", *best, *list(rows)[5:]])
    assert all(rows[name]["runs"] == 2 for name in compared if name not in (*best, "none"))
    assert rows["none"]["throughput_multiplier"] == 1.0
    assert rows["none"]["tau"] == 1.0
    assert rows["none"]["tau_by_kind"] == {"new": 1.0, "again": 1.0}
    assert rows["spin"]["first_tokens_per_second"] > 0


def test_shares_add_up_and_the_oracle_does_as_it_was_told(result: dict[str, Any], config: SelectConfig) -> None:
    rows = {row["method"]: row for row in result["rows"]}
    for name in ("spin", "oracle"):
        for shares in rows[name]["share_by_kind"].values():
            assert list(shares) == [*config.drafters, "none"]
            assert sum(shares.values()) == pytest.approx(1.0)
    assert rows["none"]["share_by_kind"] is None
    assert sum(sum(kind.values()) for kind in result["oracle"].values()) == 6
    for kind, told in result["oracle"].items():
        for spec in config.drafters:
            was = any(label.startswith(f"{spec}, ") for label in told)
            assert was == (rows["oracle"]["share_by_kind"][kind][spec] > 0)


def test_table_and_charts(result: dict[str, Any], tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(select_table(result))
    text = console.file.getvalue()
    assert all(row["method"] in text for row in result["rows"])
    bars = throughput_figure(result).axes[0].patches
    assert len(bars) == sum(row["compared"] for row in result["rows"]) - 1
    assert len(shares_figure(result).axes) == 2
    written = write_select_plots(result, tmp_path / "plots")
    assert sorted(path.name for path in written) == [
        "select_shares.png", "select_shares.svg", "select_throughput.png", "select_throughput.svg",
    ]  # fmt: skip


def test_the_median_is_of_speed() -> None:
    run = Run(10, 1.0, 0.8, 4, 5, 10, (2.0,), {}, ())
    middle = median_run([replace(run, seconds=3.0), run, replace(run, seconds=2.0, decode_steps=7)])
    assert (middle.tokens_per_second, middle.decode_steps) == (5.0, 7)
    assert middle.step_seconds == pytest.approx(0.8 / 7)


def test_rounds_are_counted_by_who_drafted() -> None:
    counted = Counted(Fixed({"a": (1, 2), "b": (NOBODY, 0)}))
    plan: Plan = counted.choose(["b", "a"], lambda: pytest.fail("nothing is to be looked up"))
    assert plan.drafter.tolist() == [NOBODY, 1]
    asked = np.array([0, 2])
    counted.learn(Outcome(["b", "a"], plan.drafter, asked, asked, asked, {}, 0.1, 10.0))
    # near its end a text may have no room for a draft
    counted.learn(Outcome(["b", "a"], plan.drafter, 0 * asked, 0 * asked, 0 * asked, {}, 0.1, 10.0))
    assert counted.shares == {("b", NOBODY): 2, ("a", 1): 1, ("a", NOBODY): 1}


def test_a_learner_gets_its_ears_back(config: SelectConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    whole = select_run.run_stream

    def watched(engine: Any, requests: Any) -> Run:
        if isinstance(engine.drafter, Spin):
            before = engine.drafter.lengths.selector
            run = whole(engine, requests)
            assert engine.drafter.lengths.selector is before
            seen.append(before)
            return run
        return whole(engine, requests)

    monkeypatch.setattr(select_run, "load_stream", a_stream)
    monkeypatch.setattr(select_run, "run_stream", watched)
    run_select(replace(config, repeat=1, adaptive=False, drafters=("ngram",), k=(2,)))
    assert len(seen) == 4


def test_settings_that_cannot_be(config: SelectConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"SelectConfig\.k = 64 is out of range"):
        SelectConfig(k=(64,))
    with pytest.raises(ConfigError, match=r"SelectConfig\.dtype = 'int8'"):
        SelectConfig(dtype="int8")
    with pytest.raises(ConfigError, match="names a value twice"):
        SelectConfig(drafters=("ngram", "ngram"))
    monkeypatch.setattr(select_run, "load_stream", lambda *_: replace(a_stream(), max_tokens=100_000))
    with pytest.raises(ConfigError, match="more than the model's context"):
        run_select(config)
