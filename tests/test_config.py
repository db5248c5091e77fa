"""Settings: what they refuse, and how they say it."""

from __future__ import annotations

import dataclasses

import pytest

from steeple.config import ModelConfig, check_range, from_dict
from steeple.draft import drafter_config
from steeple.draft.ngram import NGramConfig
from steeple.draft.small_lm import SmallLMConfig
from steeple.engine.config import EngineConfig
from steeple.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batchsize": 3}, r"EngineConfig has no field 'batchsize'\. Did you mean 'batch_size'\?"),
        ({"dtype": "floaty32"}, r"EngineConfig\.dtype = 'floaty32'\. Did you mean 'float32'\?"),
        ({"dtype": "int8"}, r"EngineConfig\.dtype = 'int8'\..*float32"),
        ({"device": "tpu"}, r"EngineConfig\.device = 'tpu' is unknown; give cpu, cuda"),
        ({"dtype": "float16", "device": "cpu"}, "needs a GPU; on a CPU give float32 or bfloat16"),
        ({"block_size": 0}, r"EngineConfig\.block_size = 0 is out of range; give a value from 1 to 1024"),
        ({"step_tokens": 0}, r"EngineConfig\.step_tokens = 0 is out of range"),
        ({"kv_tokens": -1}, r"EngineConfig\.kv_tokens = -1 is out of range"),
        ({"threads": float("nan")}, r"EngineConfig\.threads = nan is not an integer"),
        ({"block_size": 2.5}, r"EngineConfig\.block_size = 2\.5 is not an integer"),
        ({"batch_size": "8"}, r"EngineConfig\.batch_size = '8' is not an integer"),
        ({"batch_size": True}, r"EngineConfig\.batch_size = True is not an integer"),
    ],
)
def test_engine_settings(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(EngineConfig, values)


def test_settings_cannot_be_changed_later() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().dtype = "bfloat16"


def test_range_of_real_numbers() -> None:
    check_range("Owner", "share", 1, 0.0, 1.0)
    for value in (float("nan"), -0.1, 1.1):
        with pytest.raises(ConfigError, match=r"Owner\.share = .* is out of range; give a value from 0\.0 to 1\.0"):
            check_range("Owner", "share", value, 0.0, 1.0)
    with pytest.raises(ConfigError, match=r"Owner\.share = 'x' is not a number"):
        check_range("Owner", "share", "x", 0.0, 1.0)


@pytest.mark.parametrize(
    ("spec", "k", "expected"),
    [
        ("none", None, None),
        ("none", 4, None),
        ("ngram", None, NGramConfig()),
        ("ngram", 7, NGramConfig(k=7)),
        ("small_lm", 2, SmallLMConfig(k=2)),
        ("small_lm:some/dir:with-colon", None, SmallLMConfig(model="some/dir:with-colon")),
    ],
)
def test_drafters_by_name(spec: str, k: int | None, expected: object) -> None:
    assert drafter_config(spec, k=k) == expected


@pytest.mark.parametrize(
    ("spec", "k", "message"),
    [
        ("ngarm", None, r"Unknown drafter 'ngarm'\. Did you mean 'ngram'\?"),
        ("zzz", None, r"Unknown drafter 'zzz'\. Known: auto, auto-k, minions, ngram, none, small_lm, sparse_self, sp"),
        ("ngram:dir", None, "'dir' is no setting of this drafter"),
        ("ngram", 0, r"ngram\.k = 0 is out of range; give a value from 1 to 63"),
        ("small_lm", 64, r"small_lm\.k = 64 is out of range"),
        ("ngram", 2.5, r"ngram\.k = 2\.5 is not an integer"),
    ],
)
def test_bad_drafters(spec: str, k: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        drafter_config(spec, k=k)


def test_ngram_matches_must_have_an_order() -> None:
    with pytest.raises(ConfigError, match=r"ngram\.max_match = 2 is below ngram\.min_match = 3"):
        NGramConfig(min_match=3, max_match=2)


def test_model_shape_counts_its_bytes() -> None:
    shape = ModelConfig(
        vocab_size=10,
        hidden_size=8,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=2,
        intermediate_size=16,
        max_context=8,
        rope_inv_freq=(1.0,),
        windows=(0, 4, 0),
    )
    assert shape.kv_elements_per_token == 2 * 3 * 2 * 2
    assert shape.body_parameters() == 3 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)
    assert [shape.window(layer) for layer in range(3)] == [0, 4, 0]
    assert shape.scale == 2**-0.5
