"""Counts of parameters and keys, exactly; shapes from configs; machines."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from steeple.errors import ConfigError, ModelError, UnsupportedModel
from steeple.plan.machines import ALIASES, MACHINES, Machine, find_machine
from steeple.plan.shapes import EMBEDDED, HUB_NAMES, SHAPES, ModelShape, find_shape, from_config

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}

# name -> what the published checkpoints hold
PARAMETERS = {
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-2-7b": 6_738_415_616,
    "mistral-7b": 7_248_023_552,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}
# name -> body parameters and elements of keys per token, from the SPIRe paper's notebook
PAPER = {
    "spire-target": (67_117_056, 16_384),
    "spire-vanilla-draft": (8_390_656, 4_096),
    "spire-draft": (16_779_264, 4_096),
    "llama-3-70b": (68_452_352_000, 163_840),
    "llama-3-8b": (6_979_584_000, 65_536),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_public_models(name: str) -> None:
    assert SHAPES[name].parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_counts(name: str) -> None:
    assert (SHAPES[name].body_parameters, SHAPES[name].kv_elements_per_token) == PAPER[name]


def test_the_papers_pruned_drafts() -> None:
    pruned = SHAPES["llama-3-70b"].last_layers(20)
    assert (pruned.body_parameters, pruned.kv_elements_per_token) == (17_113_088_000, 40_960)
    assert SHAPES["spire-target"].last_layers(2).body_parameters == 16_779_264
    with pytest.raises(ConfigError, match="give from 1 to 80"):
        SHAPES["llama-3-70b"].last_layers(81)


@pytest.mark.parametrize(
    ("name", "parameters"), [("demo", 38_281_728), ("demo/small", None), ("demo/little", None), ("demo/spire", None)]
)
def test_embedded_models(name: str, parameters: int | None) -> None:
    """The shape's parameters are as many as the weights in the file."""
    shape = find_shape(name)
    assert shape.name == name
    file = Path(__file__).resolve().parents[2] / "models" / EMBEDDED[name] / "model.safetensors"
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    sizes = [value["shape"] for key, value in header.items() if key != "__metadata__"]
    stored = 0
    for size in sizes:
        count = 1
        for length in size:
            count *= length
        stored += count
    assert shape.parameters == stored
    assert parameters in (None, stored)


def test_embedded_names_are_those_of_the_engine() -> None:
    from steeple import hf

    assert {name: EMBEDDED[name] for name in hf.EMBEDDED} == hf.EMBEDDED


def test_from_config_by_hand() -> None:
    shape = from_config(LLAMA, "tiny")
    q, kv, mlp, norms = 64 * 64 * 2, 64 * 32 * 2, 3 * 64 * 96, 2 * 64
    assert shape.body_parameters == 2 * (q + kv + mlp + norms)
    assert shape.linear_parameters == 2 * (q + kv + mlp)
    assert shape.kv_elements_per_token == 2 * 2 * 2 * 16
    assert shape.parameters == shape.body_parameters + 2 * 100 * 64 + 64
    assert from_config({**LLAMA, "tie_word_embeddings": True}).parameters == shape.parameters - 100 * 64
    assert (shape.name, shape.max_context) == ("tiny", 512)


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"head_dim": 32}, "head_dim", 32),
        ({"num_key_value_heads": None}, "kv_heads", 4),
        ({"model_type": "qwen3"}, "qk_norm", True),
        ({"model_type": "qwen2"}, "qkv_bias", True),
        ({"model_type": "gemma"}, "tied", True),
        ({"model_type": "gemma2"}, "norms", 4),
        ({"model_type": "starcoder2"}, "gated", False),
        ({"attention_bias": True}, "o_bias", True),
        ({"sliding_window": 64}, "sliding_layers", 2),
        ({"sliding_window": 64, "use_sliding_window": False}, "sliding_layers", 0),
        ({"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}, "sliding_layers", 1),
        ({"sliding_window": 64, "layer_types": ["full_attention", "full_attention"]}, "window", 0),
        ({"sliding_window": 64, "num_hidden_layers": 12, "sliding_window_pattern": 6}, "sliding_layers", 10),
        ({"sliding_window": 64, "model_type": "gemma2"}, "sliding_layers", 1),
    ],
)
def test_from_config_of_the_families(changes: dict[str, Any], field: str, value: object) -> None:
    assert getattr(from_config({**LLAMA, **changes}), field) == value


def test_a_config_inside_a_config() -> None:
    assert from_config({"model_type": "gemma3", "text_config": {**LLAMA, "model_type": "gemma3_text"}}).norms == 4


def test_norms_and_biases_count() -> None:
    plain = from_config(LLAMA).parameters
    assert from_config({**LLAMA, "model_type": "qwen3"}).parameters == plain + 2 * 2 * 16
    assert from_config({**LLAMA, "attention_bias": True}).parameters == plain + 2 * (16 * 8 + 64)


def test_sliding_layers_read_less() -> None:
    shape = from_config({**LLAMA, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]})
    assert shape.kv_elements_read([10, 100]).tolist() == [2 * 10 * 64, (100 + 64) * 64]
    assert from_config(LLAMA).kv_elements_read(100) == 2 * 100 * 64


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"vocab_size": ...}, ModelError, "lacks 'vocab_size'; add"),
        ({"hidden_size": "64"}, ModelError, "hidden_size = '64' is no whole number"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, ModelError, "lacks 'head_dim'"),
        ({"num_local_experts": 8}, UnsupportedModel, "dense models only"),
        ({"num_key_value_heads": 3}, ConfigError, "no multiple of kv_heads = 3"),
    ],
)
def test_bad_configs(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    values = {key: value for key, value in {**LLAMA, **changes}.items() if value is not ...}
    with pytest.raises(error, match=says):
        from_config(values, "tiny")


def test_from_files(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    with pytest.raises(ModelError, match="cannot be read"):
        find_shape(folder)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    assert find_shape(folder) == find_shape(str(folder / "config.json")) == from_config(LLAMA, "mine")
    for text, says in (("{", "no valid JSON"), ("[]", "no JSON object")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ModelError, match=says):
            find_shape(folder)


def test_names() -> None:
    assert find_shape("meta-llama/Meta-Llama-3-70B") is SHAPES["llama-3-70b"]
    assert find_shape("Qwen/Qwen3-8B") is SHAPES["qwen3-8b"]
    assert set(HUB_NAMES.values()) <= set(SHAPES)
    with pytest.raises(ModelError, match=r"Did you mean 'llama-3-70b'\?"):
        find_shape("lama-3-70b")


@pytest.mark.parametrize("name", MACHINES)
def test_machines_are_plausible_and_say_where_from(name: str) -> None:
    machine = find_machine(name)
    assert machine.name == name
    assert machine.source
    assert 20 < machine.flops_per_byte("bfloat16") < 500
    assert machine.flops("float32") <= machine.flops("bfloat16") <= machine.flops_per_second.get("float8", 1e18)
    assert pickle.loads(pickle.dumps(machine)) == machine


def test_machines_by_name() -> None:
    assert find_machine("RTX 4090") is find_machine("4090") is MACHINES["rtx-4090"]
    assert set(ALIASES.values()) <= set(MACHINES)
    assert MACHINES["h100"].flops_per_byte("float8") == pytest.approx(591, abs=1)  # what the paper rounds to 600
    assert MACHINES["h200"].flops_per_byte("float8") == pytest.approx(412, abs=1)
    with pytest.raises(ConfigError, match=r"Did you mean 'h100'\?"):
        find_machine("h10")
    with pytest.raises(ConfigError, match="no arithmetic in 'float8'"):
        find_machine("a100").flops("float8")


@pytest.mark.parametrize(
    "values",
    [
        {"bytes_per_second": 0.0},
        {"memory_bytes": -1.0},
        {"flops_per_second": {}},
        {"flops_per_second": {"float32": 0.0}},
        {"link_bytes_per_second": -1.0},
    ],
)
def test_impossible_machines(values: dict[str, Any]) -> None:
    fine: dict[str, Any] = {
        "name": "mine",
        "flops_per_second": {"float32": 1.0},
        "bytes_per_second": 1.0,
        "memory_bytes": 1.0,
    }
    assert Machine(**fine).price_per_hour == 0.0
    with pytest.raises(ConfigError, match=next(iter(values))):
        Machine(**{**fine, **values})


def test_impossible_shapes() -> None:
    with pytest.raises(ConfigError, match=r"ModelShape\.layers = 0"):
        ModelShape(name="x", layers=0, hidden=1, heads=1, kv_heads=1, head_dim=1, intermediate=1)
    with pytest.raises(ConfigError, match="sliding_layers = 2"):
        ModelShape(name="x", layers=1, hidden=1, heads=1, kv_heads=1, head_dim=1, intermediate=1, sliding_layers=2)
