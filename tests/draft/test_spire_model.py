"""SPIRe's shape file, the pruned start, and keys out of a memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from steeple.draft.spire_model import FeedbackMemory, SpireShape, embedding, keys_values, prune
from steeple.errors import ConfigError, StorageError, WeightError
from steeple.model.decoder import Decoder
from steeple.model.layers import Attend
from steeple.model.load import load_decoder


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load_decoder(tiny_model(tmp_path_factory.mktemp("target"), layers=4), dtype=torch.float32)


def test_the_shape_survives_its_file(tmp_path: Path) -> None:
    shape = SpireShape(target_layers=(6, 7), sink=3, window=40, page=8, k=5, feedback=True)
    shape.save(tmp_path)
    assert SpireShape.load(tmp_path) == shape
    assert json.loads((tmp_path / "spire.json").read_text())["format"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windw": 3}, "Did you mean 'window'"),
        ({"k": 0}, r"spire\.json\.k = 0 is out of range"),
        ({"page": 0}, "page = 0"),
        ({"sink": -1}, "sink = -1"),
        ({"format": 2}, "format = 2"),
        ({"dense": 1}, "dense = 1 is not true or false"),
        ({"target_layers": []}, "name at least one"),
        ({"target_layers": [3, 2]}, "must rise"),
        ({"feedback": True, "target_activations": False}, "Switch feedback off"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "spire.json").write_text(json.dumps({"target_layers": [2, 3], **changes}))
    with pytest.raises(ConfigError, match=message):
        SpireShape.load(tmp_path)


def test_a_folder_without_a_shape_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"spire\.json cannot be read"):
        SpireShape.load(tmp_path)


@pytest.mark.parametrize(("sink", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_the_sink_is_rounded_up_to_pages(sink: int, pages: int) -> None:
    assert SpireShape(target_layers=(0,), sink=sink).sink_pages == pages


def test_the_window_begins_with_the_page_of_its_first_position() -> None:
    shape = SpireShape(target_layers=(0,), window=64)
    assert [shape.first_recent_page(base) for base in (0, 64, 79, 80, 100, 112)] == [0, 0, 0, 1, 2, 3]
    assert SpireShape(target_layers=(0,), dense=True).first_recent_page(1000) == 0


def test_a_shape_knows_its_target(target: Decoder) -> None:
    draft = prune(target, 2)
    SpireShape(target_layers=(2, 3)).check_target(target.config, draft.config)
    for layers, message in (((3,), "give one for each"), ((3, 4), "has 4 layers")):
        with pytest.raises(ConfigError, match=message):
            SpireShape(target_layers=layers).check_target(target.config, draft.config)


def test_a_pruned_draft_is_the_targets_end(target: Decoder) -> None:
    draft, ours = prune(target, 2), dict(prune(target, 2).named_parameters())
    theirs = dict(target.named_parameters())
    assert draft.config.num_layers == 2
    for name, value in ours.items():
        source = name.replace("layers.1.", "layers.3.").replace("layers.0.", "layers.2.")
        assert torch.equal(value, theirs[source]), name
    next(draft.parameters()).zero_()
    assert next(target.parameters()).abs().sum() > 0  # copies
    with pytest.raises(ConfigError, match="layers = 5"):
        prune(target, 5)


def test_a_memory_begins_as_the_mean_and_can_become_one_state() -> None:
    states = torch.randn(4, 7, 5).unbind(0)
    memory = FeedbackMemory(3)
    for found in memory(states):
        torch.testing.assert_close(found, torch.stack(states).mean(dim=0))
    with torch.no_grad():
        memory.mix[1, 2] = 100.0
    torch.testing.assert_close(memory(states)[1], states[2])


def test_a_memory_survives_its_file(tmp_path: Path) -> None:
    memory = FeedbackMemory(2)
    with torch.no_grad():
        memory.mix.normal_()
    memory.save(tmp_path)
    assert torch.equal(FeedbackMemory.load(tmp_path).mix, memory.mix)
    (tmp_path / "spire.safetensors").unlink()
    with pytest.raises(WeightError, match="train the draft again"):
        FeedbackMemory.load(tmp_path)


class Watch:
    """Attention that keeps what it was asked and attends to nothing."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        self.seen[layer] = (k_TKH, v_TKH)
        return torch.zeros_like(q_TNH)


@torch.no_grad()
def test_keys_of_a_layers_own_input_are_that_layers_keys(target: Decoder) -> None:
    watch = Watch()
    attend: Attend = watch
    tokens, positions = torch.randint(0, 300, (9,)), torch.arange(20, 29)
    hidden = target(tokens, positions, attend, keep=(0, 1))
    inputs = [embedding(target, tokens), hidden.kept[0], hidden.kept[1]]
    for layer, x_TD in enumerate(inputs):
        for ours, theirs in zip(keys_values(target, layer, x_TD, positions), watch.seen[layer], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
