"""``steeple bench`` is a command and has one below it; ``bench/step_page.py`` writes a page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steeple.bench.config import BenchConfig
from steeple.bench.step.config import StepConfig
from steeple.bench.sweep.config import SweepConfig
from steeple.cli import bench as bench_command
from steeple.cli import bench_step as step_command
from steeple.cli import main
from steeple.cli.app import BENCH, COMMANDS

ROOT = Path(__file__).resolve().parents[2]
ROW = {
    "model": "m", "dtype": "float32", "batch": 1, "context": 8, "rows": 1, "temperature": 0.0, "skipped": "too large",
}  # fmt: skip
RESULT = {
    "machine": {"name": "h", "threads": 2, "read_gbs": 3.0, "read_gbs_median": 2.0, "bf16_gflops": 5, "f32_gflops": 4},
    "config": {"dtype": "float32", "temperature": 0.0},
    "rows": [ROW],
}


def steeple(*args: str) -> int:
    """The exit status."""
    with pytest.raises(SystemExit) as ended:
        main(args)
    return int(ended.value.code or 0)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The settings that either bench was called with; nothing is measured."""
    seen: list[Any] = []

    def run(config: Any, progress: Any) -> dict[str, Any]:
        seen.append(config)
        return RESULT

    monkeypatch.setattr(bench_command, "run_bench", run)
    monkeypatch.setattr(bench_command, "bench_table", lambda result: "the table of drafters")
    monkeypatch.setattr(bench_command, "run_sweep", lambda config, progress, file: run((config, file), progress))
    monkeypatch.setattr(bench_command, "sweep_table", lambda result: "the table of the sweep")
    monkeypatch.setattr(step_command, "run_step", run)
    return seen


def test_bench_alone_compares_drafters(called: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert steeple("bench", "--batch", "2,4", "--k", "3", "--json", "-") == 0
    assert called == [BenchConfig(batch=(2, 4), k=3)]
    captured = capsys.readouterr()
    assert json.loads(captured.out) == RESULT
    assert captured.err == "the table of drafters\n"


def test_a_sweep_has_settings_and_defaults_of_its_own(
    called: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert steeple("bench", "--sweep") == 0
    file = tmp_path / "sweep.json"
    assert steeple("bench", "--sweep", "--ks", "2,4", "--drafters", "ngram", "--mixed", "--json", str(file)) == 0
    assert called == [
        (SweepConfig(), None),
        (SweepConfig(ks=(2, 4), drafters=("ngram",), mixed=True), file),
    ]
    assert json.loads(file.read_text()) == RESULT
    assert capsys.readouterr().err == "the table of the sweep\n" * 2


def test_bench_step_times_steps(called: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", "demo,random-100m", "--rows", "1,5", "--seconds", "0.5", "--json", "-")
    assert steeple("bench", "step", *arguments) == 0
    assert called == [StepConfig(model=("demo", "random-100m"), rows=(1, 5), seconds=0.5)]
    captured = capsys.readouterr()
    assert json.loads(captured.out) == RESULT
    assert "skipped: too large" in captured.err


def test_help_of_both(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert steeple("bench", "--help") == 0
    text = capsys.readouterr().out
    assert COMMANDS["bench"][1] in text
    assert BENCH["step"][1] in text
    assert "--drafters" in text
    assert "--json" in text
    assert "bench: 64; sweep: 48" in " ".join(text.split())
    assert "--sweep only: draft nodes per round" in " ".join(text.split())
    assert steeple("bench", "step", "--help") == 0
    text = capsys.readouterr().out
    assert "steeple bench step [OPTIONS]" in text
    assert "--rows" in text
    assert "--drafters" not in text


def test_wrong_calls_are_one_message(called: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, says in (
        (("stp",), "Did you mean 'step'?"),
        (("--batch", "2", "step"), "--batch stands before step; put it behind."),
        (("step", "--rows", "65"), "StepConfig.rows = 65 is out of range; give a value from 1 to 64."),
        (("step", "--rws", "5"), "--rows"),
        (("--max-tokens", "2"), "BenchConfig.max_tokens = 2 is out of range"),
        (("--ks", "2"), "--ks is not for this kind of bench; add --sweep."),
        (("--sweep", "--step-tokens", "9"), "--step-tokens is not for this kind of bench; leave it out"),
    ):
        assert steeple("bench", *arguments) == 2
        assert says in capsys.readouterr().err
    assert not called


def test_the_script_fills_the_page(tmp_path: Path) -> None:
    page, result = tmp_path / "page.md", tmp_path / "step.json"
    page.write_text("# Title\n<!-- numbers:step -->\n<!-- /numbers:step -->\n")
    result.write_text(json.dumps(RESULT))
    script = ROOT / "bench" / "step_page.py"
    subprocess.run([sys.executable, str(script), str(result), "--page", str(page)], check=True)
    assert "| m | 1 | 8 | 1 | - | - | - | skipped: too large |" in page.read_text()
