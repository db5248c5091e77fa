"""A short calibration of a tiny model from end to end, the places it visits, and its command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from steeple.bench.calibrate import run as calibrate
from steeple.bench.calibrate.config import CalibrateConfig
from steeple.bench.calibrate.measure import places
from steeple.cli import main
from steeple.errors import ConfigError
from steeple.evidence import random_model
from steeple.hardware import Hardware
from steeple.plan.calibration import read_calibration
from steeple.plan.memory_parts import config_of
from steeple.plan.shapes import ModelShape

LITTLE = ModelShape(
    name="little", layers=4, hidden=64, heads=2, kv_heads=1, head_dim=32, intermediate=128, vocab=320, max_context=512
)


class Probe:
    """Stands for the probe of the memory, which takes longer than the rounds of a little model."""

    def __init__(self, device: object) -> None:
        self.reading = 4e10

    def now(self) -> float:
        """Slower every time."""
        self.reading *= 0.99
        return self.reading


def status(arguments: list[str]) -> int:
    """Of the command line."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def test_places_are_all_there_in_a_fixed_order() -> None:
    config = CalibrateConfig(positions=40000)
    found = places(config, 2, 8192)
    assert found == places(config, 2, 8192)
    assert found != places(CalibrateConfig(positions=40000, seed=1), 2, 8192)
    assert len(set(found)) == len(found)
    assert max(place.batch * place.context for place in found) <= 40000
    steps = {(p.batch, p.context, p.k) for p in found if p.draft < 0 and p.temperature == 0}
    wanted = {(b, c, k) for b in config.batch for c in config.context for k in config.ks if b * c <= 40000}
    assert steps == wanted
    assert {place.draft for place in found} == {-1, 0, 1}
    assert all(
        place.batch * place.context * 4 <= 40000 for place in found if place.draft >= 0 and not place.temperature
    )
    assert {place.context for place in found if place.temperature} == {256}
    assert max(place.context for place in places(config, 2, 2000)) == 1024


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take seconds where others want the processor too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_calibration_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_model, "RANDOM", {"little": config_of(LITTLE)})
    monkeypatch.setattr(calibrate, "ReadProbe", Probe)
    monkeypatch.setattr(calibrate, "measure", lambda *_: Hardware("a machine", 1, 5e10, {"bfloat16": 1e11}))
    monkeypatch.setattr(calibrate, "COPY_BYTES", 1 << 20)
    path = tmp_path / "calibration.json"
    arguments = ["plan", "calibrate", "--model", "little", "--seconds", "0", "--batch", "1,3", "--context", "48"]
    arguments += ["--ks", "0,2", "--draft-ks", "2", "--json", str(path)]
    assert status(arguments) == 0
    result = json.loads(path.read_text())
    assert result["kind"] == "calibration"
    assert result["visits"] == len(result["cells"]) == 2 * (2 + 3 + 2 + 3)
    assert {cell["draft"] for cell in result["cells"]} == {"", "self", "layers", "small"}
    for cell in result["cells"]:
        assert cell["step_ms"] > 0
        assert ("draft_ms" in cell) == bool(cell["draft"])
    assert result["summary"]["steps"]["measurements"] == 20
    assert result["summary"]["drafts"]["measurements"] == 12
    assert result["memory"]["copy_bytes_per_second"] > 0
    stored = read_calibration(path)
    assert stored.models == ("little",)
    assert stored.read_bytes_per_second == result["memory"]["read_bytes_per_second"]
    assert stored.step.draft is not None
    answer = tmp_path / "plan.json"
    asked = ["plan", "--model", "demo", "--hardware", "h200", "--calibration", str(path), "--json", str(answer)]
    assert status(asked) == 0
    assert json.loads(answer.read_text())["step_model"] == result["model"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seconds": -1.0}, "seconds = -1"),
        ({"context": (4,)}, "context = 4 is out of range"),
        ({"ks": (64,)}, "ks = 64 is out of range"),
        ({"draft_ks": (0,)}, "draft_ks = 0 is out of range"),
        ({"batch": ()}, "batch is empty"),
        ({"positions": 100}, "positions = 100 is out of range"),
        ({"dtype": "bfloat"}, "bfloat16"),
    ],
)
def test_bad_settings(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CalibrateConfig(**values)  # type: ignore[arg-type]
