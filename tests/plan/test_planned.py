"""Predicted against measured: a sweep that a known machine made, and what is said of rows that another one made."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from steeple.bench.planned import Predictor, cause, noise, planned, planned_markdown
from steeple.bench.planned_plots import write_planned_plots
from steeple.errors import ConfigError, StorageError
from steeple.plan.calibration import Calibration
from steeple.plan.ours import DraftTerms, Precision, StepModel
from steeple.plan.rounds import Deployment, form_of, round_of
from steeple.plan.shapes import find_shape

STEP = StepModel(
    bytes_per_second=5e10,
    flops_per_second=6e11,
    fixed_seconds=4e-4,
    seconds_per_logit=2e-9,
    draft=DraftTerms(seconds_per_pass=2e-4, seconds_per_logit=5e-9),
)
READ = 5.5e10
CALIBRATION = Calibration(step=STEP, read_bytes_per_second=READ, models=("other",), path="file.json")
INNER = {"auto-k": "spire"}
PREDICTOR = Predictor(find_shape("demo"), STEP, Precision(), INNER)
TAUS = {"none": 1.0, "small_lm": 2.5, "spire": 3.0, "auto-k": 2.75}


def sweep(memory: float = 1.0, slower: float = 1.0) -> dict[str, Any]:
    """Rows of a machine of ``STEP``, its memory ``memory`` times as fast, all ``slower`` at the temperature 1."""
    rows: list[dict[str, Any]] = []
    for batch, context, temperature in ((1, 256, 0.0), (1, 256, 1.0), (32, 2048, 0.0), (32, 2048, 1.0)):
        plain = 0.0
        for drafter, tau in TAUS.items():
            row = {
                "drafter": drafter,
                "batch": batch,
                "context": context,
                "temperature": temperature,
                "k": 4 * (drafter != "none"),
                "adaptive": drafter == "auto-k",
                "drafted": 3.25 if drafter == "auto-k" else 4.0,
                "tau": tau,
                "max_tokens": 48,
                "rounds": 9,
                "read_bytes_per_second": READ * memory,
            }
            seconds = PREDICTOR.round_seconds(row, memory) * (slower if temperature else 1.0)
            plain = plain or seconds
            row |= {
                "step_ms": seconds * 1e3,
                "tokens_per_second": batch * tau / seconds,
                "throughput_multiplier": tau * plain / seconds,
                "plain_step_ms": [plain * 1e3, plain * 1.25e3],
            }
            rows.append(row)
    return {"kind": "sweep", "model": {"name": "demo"}, "config": {"dtype": "bfloat16"}, "rows": rows}


def test_what_is_predicted_is_the_planners_round() -> None:
    row = sweep()["rows"][2]
    demo = find_shape("demo")
    where = Deployment(target=demo, step=STEP, precision=Precision())
    form = form_of("spire", demo)
    assert form is not None
    assert PREDICTOR.round_seconds(row) == pytest.approx(float(round_of(where, form, 1, 256 + 24, 4).seconds))
    plain = sweep()["rows"][0]
    assert PREDICTOR.round_seconds(plain) == pytest.approx(float(round_of(where, form, 1, 256 + 24, 4).plain))


def test_a_mean_depth_lies_between_whole_ones() -> None:
    row = sweep()["rows"][3]
    fixed = {**row, "drafter": "spire", "adaptive": False}
    three, four = (PREDICTOR.round_seconds({**fixed, "k": k}) for k in (3, 4))
    assert PREDICTOR.round_seconds(row) == pytest.approx(0.75 * three + 0.25 * four)
    none = {**row, "drafted": 0.0}
    assert PREDICTOR.round_seconds(none) == pytest.approx(PREDICTOR.round_seconds(sweep()["rows"][0]))


def test_the_right_model_has_no_error() -> None:
    result = planned(sweep(), CALIBRATION, INNER)
    assert len(result["rows"]) == 16
    for name in ("error", "error_at_bandwidth", "error_of_multiplier"):
        assert result["summary"][name]["max"] == pytest.approx(0, abs=1e-12)
    assert result["summary"]["error_of_multiplier"]["measurements"] == 12
    assert result["noise"]["apart_p90"] == pytest.approx(0, abs=1e-12)
    assert not any(row["cause"] for row in result["rows"])


def test_a_slow_memory_is_told_from_a_wrong_model() -> None:
    result = planned(sweep(memory=0.6), CALIBRATION, INNER)
    assert result["summary"]["error"]["median"] > 0.2
    assert result["summary"]["error_at_bandwidth"]["max"] == pytest.approx(0, abs=1e-12)
    worst = result["worst"][0]
    assert worst["error"] == max(row["error"] for row in result["rows"])
    assert "memory at 60% of the calibration's speed" in worst["cause"]
    assert len({(row["batch"], row["context"], row["temperature"]) for row in result["worst"]}) == len(result["worst"])


def test_noise_bounds_what_any_model_can_do() -> None:
    result = planned(sweep(slower=1.3), CALIBRATION, INNER)
    found = result["noise"]
    assert found["pairs"] == 6  # rows of an adaptive drafter may have had other depths
    assert found["apart_median"] == pytest.approx(0.3)
    assert found["most_within_10_percent"] == 0.5  # 1.3 > 1.1 / 0.9
    assert found["most_within_20_percent"] == 1.0
    assert found["plain_spread_max"] == pytest.approx(0.25)
    one = [row for row in result["rows"] if not row["temperature"]]
    assert "pairs" not in noise(one)


def test_causes_are_only_named_where_something_was_read() -> None:
    row = {
        "error": 0.3,
        "error_at_bandwidth": 0.28,
        "memory": 1.05,
        "plain_spread": 0.05,
        "error_of_multiplier": 0.2,
    }
    assert "not explained" in cause(row)
    assert cause({**row, "error": 0.1}) == ""
    assert "varied by 40%" in cause({**row, "plain_spread": 0.4})
    assert "the whole cell" in cause({**row, "error_of_multiplier": -0.05})
    assert "memory" not in cause({**row, "memory": 1.5, "error_at_bandwidth": 0.5})


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ConfigError, match="no rows of a sweep"):
        planned({"kind": "bench", "rows": [1]}, CALIBRATION, INNER)
    own = Calibration(step=STEP, models=("demo",), path="file.json")
    with pytest.raises(ConfigError, match=r"measured demo itself, so it predicts nothing"):
        planned(sweep(), own, INNER)


def test_without_a_reading_the_memory_is_taken_as_it_is() -> None:
    result = planned(sweep(memory=0.5), Calibration(step=STEP), INNER)
    assert all(row["memory"] == 1.0 for row in result["rows"])
    assert result["summary"]["error"] == result["summary"]["error_at_bandwidth"]


def test_page_and_chart(tmp_path: Path) -> None:
    result = json.loads(json.dumps(planned(sweep(memory=0.8, slower=1.3), CALIBRATION, INNER)))
    text = planned_markdown(result)
    share = result["summary"]["error"]["within_10_percent"]
    assert f"| {share:.0%} |" in text
    assert "`small_lm`" in text
    assert "at least" not in text
    assert "no model that knows only the work can have more than 50%" in text
    assert not math.isnan(result["by"]["drafter"]["none"]["error_of_multiplier"]["mean"])
    assert {path.name for path in write_planned_plots(result, tmp_path / "new")} == {"planned.png", "planned.svg"}
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_planned_plots(result, tmp_path / "file")
