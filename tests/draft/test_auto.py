"""Which drafter ``auto`` takes: what the planner says of a made-up machine, of what there is for the target."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from steeple import hf
from steeple.draft import drafter_config
from steeple.draft.auto import AutoConfig
from steeple.draft.auto_k import AutoK
from steeple.draft.base import Surroundings
from steeple.draft.ngram import NGram
from steeple.draft.small_lm import SmallLM
from steeple.draft.windowed import WindowDrafter
from steeple.engine import EngineConfig, build_engine, load_model
from steeple.errors import ConfigError, StorageError
from steeple.evidence.measure import run_requests
from steeple.model.load import load_decoder
from steeple.ops.attention import ReferenceAttention
from steeple.plan.ours import StepModel
from steeple.request import Request
from steeple.types import SamplingParams

FREE = StepModel(bytes_per_second=1e30, flops_per_second=1e30, fixed_seconds=1e-3)
"""Every pass takes the same, so the fewest passes for a token win."""
LAYERED = replace(FREE, fixed_seconds=1e-9, seconds_per_layer=1.0)
"""A pass takes as long as it has layers, so a draft of few layers wins."""
VERIFYING = replace(FREE, seconds_per_row=1.0, fixed_seconds=0.0)
"""A row takes as long as a step, so nothing pays."""


def stored(folder: Path, model: StepModel) -> str:
    path = folder / "calibration.json"
    path.write_text(json.dumps({"kind": "calibration", "model": model.to_dict()}))
    return str(path)


def around_of(folder: Path, **others: Any) -> Surroundings:
    values: dict[str, Any] = {
        "decoder": load_decoder(folder, dtype=torch.float32, device="cpu"),
        "tokenizer": hf.load_tokenizer(folder),
        "attention": ReferenceAttention(),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "block_size": 4,
        "step_tokens": 64,
        "model_folder": folder,
    }
    return Surroundings(**values | others)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target of four layers with a sibling of one."""
    folder = tmp_path_factory.mktemp("pair")
    tiny_model(folder / "small", layers=1)
    return tiny_model(folder / "target", layers=4)


def test_the_machine_decides(pair: Path, tmp_path: Path) -> None:
    around = around_of(pair)
    free = AutoConfig(calibration=stored(tmp_path, FREE)).build(around)
    assert isinstance(free, AutoK)
    assert isinstance(free._drafter, WindowDrafter)  # the paper's tau of its like is the highest
    layered = AutoConfig(calibration=stored(tmp_path, LAYERED), k=5).build(around)
    assert isinstance(layered, AutoK)
    assert isinstance(layered._drafter, SmallLM)
    assert layered.needs.adaptive
    assert layered.needs.nodes == 5


def test_what_is_chosen_is_told_with_its_reasons(pair: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="steeple"):
        AutoConfig(calibration=stored(tmp_path, LAYERED), batch=7, context=100).build(around_of(pair))
        AutoConfig(calibration=stored(tmp_path, VERIFYING)).build(around_of(pair))
    told = [record.getMessage() for record in caplog.records]
    assert any("auto leaves out spire" in text for text in told)
    assert any("auto chose small_lm: expected 1." in text and "batch 7, context 100 with k = " in text for text in told)
    assert "not expected to pay" in told[-1]


def test_measured_acceptance_decides(pair: Path, tmp_path: Path) -> None:
    rows = [
        {"drafter": name, "context": 64, "batch": 1, "rounds": 9, "temperature": 0.0, "acceptance_by_position": rates}
        for name, rates in (("ngram", [0.9, 0.9]), ("small_lm", [0.1, 0.0]), ("sparse_self", [0.2, 0.1]))
    ]
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"rows": rows}))
    config = AutoConfig(calibration=stored(tmp_path, FREE), acceptance=str(path))
    drafter = config.build(around_of(pair))
    assert isinstance(drafter, AutoK)
    assert isinstance(drafter._drafter, NGram)
    assert [choice.drafter for choice in config.order(around_of(pair))] == ["ngram", "sparse_self", "small_lm"]
    with pytest.raises(ConfigError, match="nothing at temperature 1"):
        replace(config, temperature=1.0).build(around_of(pair))


def test_what_is_expected(pair: Path, tmp_path: Path) -> None:
    config = AutoConfig(calibration=stored(tmp_path, FREE))
    first = config.order(around_of(pair))[0]
    assert (first.batch, first.context) == (32, 128)  # half of the 256 positions of the model
    assert config.order(around_of(pair, batch_size=5))[0].batch == 5
    assert replace(config, batch=3).order(around_of(pair, batch_size=5))[0].batch == 3


def test_one_that_cannot_be_built_gives_way(pair: Path, tmp_path: Path) -> None:
    """A sibling with another tokenizer says what it takes, but is refused when it is built."""
    shutil.copytree(pair, tmp_path / "target")
    tiny_model(tmp_path / "small", layers=1, vocab=280)
    config = AutoConfig(calibration=stored(tmp_path, LAYERED))
    around = around_of(tmp_path / "target")
    assert config.order(around)[0].drafter == "small_lm"
    drafter = config.build(around)
    assert isinstance(drafter, AutoK)
    assert isinstance(drafter._drafter, WindowDrafter)


def test_greedy_outputs_are_plain_decodings(pair: Path, tmp_path: Path) -> None:
    settings = EngineConfig(kv_tokens=1024, batch_size=4)
    target = load_model(str(pair), settings)
    tokens = target.tokenizer("def area(width):\n    return", add_special_tokens=False)["input_ids"]
    outputs = []
    for config in (None, AutoConfig(calibration=stored(tmp_path, LAYERED), k=3)):
        params = SamplingParams(max_tokens=40, ignore_eos=True)
        requests = [Request(f"r{n}", tokens[: 3 + n], params) for n in range(4)]
        engine = build_engine(target, settings, config)
        outputs.append(run_requests(engine, requests).outputs)
    assert outputs[0] == outputs[1]
    assert engine.stats.speculation.drafted > 0


def test_memory_is_that_of_what_is_chosen(pair: Path, tmp_path: Path) -> None:
    from steeple.plan.memory_parts import Lay

    around, lay = around_of(pair), Lay()
    assert AutoConfig(calibration=stored(tmp_path, FREE)).memory(around, lay).held == 0
    assert AutoConfig(calibration=stored(tmp_path, LAYERED)).memory(around, lay).held > 0


def test_bad_input(pair: Path, tmp_path: Path) -> None:
    around = around_of(pair)
    with pytest.raises(ConfigError, match=r"'batsh=3' is no setting of this drafter.*batch"):
        drafter_config("auto:batsh=3")
    with pytest.raises(ConfigError, match=r"auto.batch = -1 is out of range"):
        drafter_config("auto:batch=-1")
    with pytest.raises(StorageError, match=r"calibration = nowhere.json cannot be read"):
        AutoConfig(calibration="nowhere.json").build(around)
    foreign = tmp_path / "foreign.json"
    foreign.write_text('{"rows": []}')
    with pytest.raises(ConfigError, match="holds no step model; give the JSON that steeple plan calibrate"):
        AutoConfig(calibration=str(foreign)).build(around)
    foreign.write_text("[")
    with pytest.raises(ConfigError, match="is no valid JSON"):
        AutoConfig(calibration=str(foreign)).build(around)
    with pytest.raises(ConfigError, match="is no valid JSON"):
        AutoConfig(calibration=stored(tmp_path, FREE), acceptance=str(foreign)).build(around)
    with pytest.raises(StorageError, match=r"acceptance = nowhere.json cannot be read"):
        AutoConfig(calibration=stored(tmp_path, FREE), acceptance="nowhere.json").build(around)
