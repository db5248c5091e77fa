"""``steeple plan`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steeple.cli import main
from steeple.cli import plan as plan_command
from steeple.plan.machines import find_machine

SWEEP = Path(__file__).resolve().parents[2] / "bench" / "results" / "sweep.json"
LARGE = ("--model", "llama-3-70b", "--hardware", "h200", "--devices", "4")


def steeple(*args: str) -> int:
    """The exit status of ``steeple plan``."""
    with pytest.raises(SystemExit) as ended:
        main(["plan", *args])
    return int(ended.value.code or 0)


def planned(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert steeple(*args, "--json", "-") == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("preset", "cells", "drafters"),
    [
        ("spire-figure4", 216, {"vanilla", "magicdec", "spire"}),
        ("spire-figure6", 216, {"vanilla", "magicdec", "spire"}),
        ("magicdec", 49, {"magicdec"}),
    ],
)
def test_presets_as_json(capsys: pytest.CaptureFixture[str], preset: str, cells: int, drafters: set[str]) -> None:
    result = planned(capsys, "--preset", preset)
    assert len(result["cells"]) == cells
    assert {cell["drafter"] for cell in result["cells"]} == drafters
    for cell in result["cells"]:
        assert list(cell) == ["drafter", "batch", "context", "tau", "dt", "throughput_multiplier"]
        assert cell["throughput_multiplier"] == pytest.approx(cell["tau"] / cell["dt"])


def test_a_preset_for_people_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert steeple("--preset", "spire-figure4", "--plots", str(tmp_path / "new")) == 0
    text = capsys.readouterr().err
    for part in ("vanilla", "magicdec, window 1/8 of the context", "1.36", "2.05", "2.78", "from 55 positions on"):
        assert part in text
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert files == ["spire-figure4-heatmap.png", "spire-figure4-heatmap.svg"]
    assert (tmp_path / "new" / files[0]).read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "new" / files[1]).read_text()


def test_a_preset_with_another_window(capsys: pytest.CaptureFixture[str]) -> None:
    result = planned(capsys, "--preset", "spire-figure4", "--window", "64")
    (cell,) = [c for c in result["cells"] if (c["drafter"], c["batch"], c["context"]) == ("magicdec", 16, 8192)]
    assert cell["throughput_multiplier"] == pytest.approx(3.38, abs=0.0055)
    assert result["windows"] == {"magicdec": "64", "spire": "64"}


def test_magicdec_shows_both_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    assert steeple("--preset", "magicdec") == 0
    assert "1.09 / 1.1" in capsys.readouterr().err


def test_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    args = (*LARGE, "--batch", "16,64", "--context", "8192", "--price", "3.5", "--tau", "spire=3.4,ngram=1.5")
    assert steeple(*args, "--json", str(file), "--plots", str(tmp_path)) == 0
    result = json.loads(file.read_text())
    text = capsys.readouterr().err
    for part in ("llama-3-70b on 4 x h200", "cost/Mtok", "given at k = 4", "SPIRe paper, small model", "upper bound"):
        assert part in text
    assert {cell["drafter"] for cell in result["cells"]} == {"none", "small_lm", "sparse_self", "spire", "ngram"}
    assert [sum(cell["best"] for cell in result["cells"] if cell["batch"] == b) for b in (16, 64)] == [1, 1]
    fastest = max(c["tokens_per_second"] for c in result["candidates"])
    assert result["best"]["tokens_per_second"] == fastest
    assert f"{fastest:,.0f} tokens/s" in text
    assert result["limits"]["memory_bytes"] == 4 * find_machine("h200").memory_bytes
    assert sorted(p.name for p in tmp_path.glob("plan-*")) == [
        "plan-heatmap.png",
        "plan-heatmap.svg",
        "plan-pareto.png",
        "plan-pareto.svg",
    ]


def test_measured_acceptance(capsys: pytest.CaptureFixture[str]) -> None:
    args = (
        "--hardware",
        "h100",
        "--acceptance",
        str(SWEEP),
        "--temperature",
        "1",
        "--context",
        "512,3968",
        "--ks",
        "4",
    )
    result = planned(capsys, *args)
    rows = json.loads(SWEEP.read_text())["rows"]
    for cell in result["cells"]:
        own = [
            r["tau"]
            for r in rows
            if (r["drafter"], r["context"], r["k"], r["temperature"]) == (cell["drafter"], cell["context"], 4, 1.0)
        ]
        if cell["k"]:
            assert cell["tau_source"] == "measured, T = 1"
            assert min(own) * 0.95 <= cell["tau"] <= max(own) * 1.05


def test_devices_are_the_fewest_that_hold_everything(capsys: pytest.CaptureFixture[str]) -> None:
    args = (*LARGE[:4], "--batch", "1,64", "--context", "8192", "--price", "2")
    result = planned(capsys, *args)
    plain = [c for c in result["cells"] if not c["k"]]
    assert result["devices"] == 4
    assert 2 * 141e9 < max(c["memory_bytes"] for c in plain) <= 4 * 141e9
    assert "4 devices are the fewest" in result["notes"][1]
    for cell in plain:
        assert cell["cost_per_million_tokens"] == pytest.approx(4 * 2 * 1e6 / 3600 / cell["tokens_per_second"])
    assert planned(capsys, *LARGE[:4], "--batch", "1", "--context", "8192")["devices"] == 2
    assert planned(capsys, "--hardware", "h200")["devices"] == 1
    assert planned(capsys, "--hardware", "m2-max")["devices"] == 1  # no links


def test_one_tau_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    result = planned(capsys, "--hardware", "h100", "--tau", "2.5", "--tau-k", "3", "--ks", "3")
    assert {round(c["tau"], 6) for c in result["cells"] if c["k"]} == {2.5}


def test_limits_mark_what_breaks_them(capsys: pytest.CaptureFixture[str]) -> None:
    result = planned(capsys, "--hardware", "h100", "--batch", "1,256", "--memory", "5")
    assert {(c["batch"], tuple(c["breaks"])) for c in result["cells"]} == {(1, ()), (256, ("memory_bytes",))}
    assert result["best"]["batch"] == 1


def test_a_calibration_takes_the_place_of_the_datasheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.json"
    model = {"bytes_per_second": 1e9, "flops_per_second": None, "fixed_seconds": 0.5}
    file.write_text(json.dumps({"model": model, "summary": {}}))
    result = planned(capsys, "--hardware", "h100", "--calibration", str(file), "--batch", "1")
    plain = next(c for c in result["cells"] if not c["k"])
    assert plain["seconds_per_token"] > 0.5
    assert not any("upper bound" in note for note in result["notes"])
    file.write_text("{}")
    assert steeple("--hardware", "h100", "--calibration", str(file)) == 2
    assert "holds no step model" in capsys.readouterr().err


def test_this_cpu_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def measured(dtype: str) -> Any:
        asked.append(dtype)
        return find_machine("m2-max")

    monkeypatch.setattr(plan_command, "this_cpu", measured)
    assert planned(capsys, "--dtype", "float16")["hardware"]["name"] == "m2-max"
    assert asked == ["float16"]


def test_this_cpu_becomes_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from steeple import hardware

    found = hardware.Hardware("Chip", 3, 5e9, {"float32": 1e12, "bfloat16": 2e12})
    monkeypatch.setattr(hardware, "measure", lambda device, *dtypes: found)
    machine = plan_command.this_cpu("bfloat16")
    assert (machine.name, machine.bytes_per_second, machine.flops("bfloat16")) == ("Chip", 5e9, 2e12)
    assert machine.memory_bytes > 0
    assert "3 threads" in machine.source


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--model", "lama-3-70b", "--hardware", "h200"), "Did you mean 'llama-3-70b'?"),
        (("--hardware", "h20"), "Did you mean 'h200'?"),
        (("--preset", "spire-figur4"), "Did you mean 'spire-figure4'?"),
        (("--preset", "magicdec", "--batch", "3"), "PlanConfig.batch = (3,) does not go with preset"),
        (("--preset", "magicdec", "--window", "x"), "give positions such as 64"),
        (("--hardware", "h100", "--window", "64"), "PlanConfig.window goes with preset"),
        (("--hardware", "h200", "--dtype", "bf16"), "Did you mean 'bfloat16'?"),
        (("--hardware", "a100", "--dtype", "float8"), "a100 has no arithmetic in 'float8'"),
        (("--hardware", "h100", "--latency", "0.00001"), "the limit on latency per token binds"),
        ((*LARGE[:4], "--devices", "1"), "the limit on memory binds: 141 GB were allowed"),
        (("--hardware", "h100", "--tau", "spire=7"), "a round brings from 1 to 5 tokens"),
        (("--hardware", "h100", "--tau", "spir=3"), "Did you mean 'spire'?"),
        (("--hardware", "h100", "--tau", "spire=x"), "give DRAFTER=TAU"),
        (("--hardware", "h100", "--drafters", "eagle"), "The planner knows no drafter 'eagle'"),
        (("--hardware", "h100", "--devices", "3"), "devices = 3 do not divide the 8 heads"),
        (("--hardware", "m2-max", "--devices", "2"), "link_bytes_per_second = 0"),
        (("--hardware", "h100", "--cost", "3"), "give the price of a device"),
        (("--hardware", "h100", "--acceptance", "nowhere.json"), "--acceptance nowhere.json cannot be read"),
        (("--hardware", "h100", "--acceptance", str(SWEEP), "--temperature", "0.5"), "nothing at temperature 0.5"),
        (("--hardware", "h100", "--ks", "0"), "PlanConfig.ks = 0 is out of range"),
        (("--hardware", "h100", "--batch", ""), "PlanConfig.batch is empty"),
    ],
)
def test_bad_input_ends_with_one_sentence(capsys: pytest.CaptureFixture[str], args: tuple[str, ...], says: str) -> None:
    assert steeple(*args) == 2
    text = capsys.readouterr().err
    assert says in text
    assert text.startswith("error ")


def test_a_config_without_a_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    assert steeple("--model", str(tmp_path), "--hardware", "h100") == 2
    assert "lacks 'num_hidden_layers'" in capsys.readouterr().err


def test_notes_on_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--model", "mistral-7b", "--hardware", "h200", "--batch", "1", "--context", "65536", "--windows", "32")
    notes = " ".join(planned(capsys, *args)["notes"])
    for part in ("small_lm is left out: no small model", "ngram is left out: its tau", "made for 32768", "tau is held"):
        assert part in notes
