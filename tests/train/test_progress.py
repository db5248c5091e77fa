"""The log of a run and what it shows."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from rich.console import Console

from steeple.train.card import curve
from steeple.train.progress import LOG, Reporter, measured_peak, read_log


def test_steps_done_again_count_once_the_last_time(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 3.0}', '{"step": 2, "loss": 2.0}', '{"step": 2, "loss": 2.5}', '{"step": 3, "lo']
    (tmp_path / LOG).write_text("\n".join(lines))
    assert read_log(tmp_path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]


def test_a_run_without_log_has_no_records(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []


def test_records_are_appended_and_shown_as_plain_lines(tmp_path: Path) -> None:
    shown = io.StringIO()
    for first in (0, 1):
        with Reporter(tmp_path, first, 2, Console(file=shown, width=200)) as reporter:
            reporter.record(step=first + 1, loss=1.23456)
    assert read_log(tmp_path) == [{"step": 1, "loss": 1.23456}, {"step": 2, "loss": 1.23456}]
    assert shown.getvalue().splitlines() == ["step 1/2  loss 1.235", "step 2/2  loss 1.235"]


def test_peak_is_a_rate() -> None:
    assert measured_peak(torch.device("cpu"), seconds=0.0) > 1e6


def test_curve_is_the_log_in_a_few_stretches() -> None:
    log = [{"step": i + 1, "tokens": 8 * (i + 1), "lr": 1.0, "loss": float(i)} for i in range(10)]
    log[3]["validation"] = 7.0
    points = curve(log, points=3)
    assert [p["step"] for p in points] == [4, 8, 10]
    assert [p["loss"] for p in points] == [1.5, 5.5, 8.5]
    assert [p.get("validation") for p in points] == [7.0, None, None]
