"""With ``deterministic`` bfloat16 is as lossless as float32: the same tokens whatever the batch, the drafter and k."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from steeple.draft import drafter_config
from steeple.engine import EngineConfig
from steeple.engine.build import LoadedModel, build_engine, load_model
from steeple.errors import ConfigError
from steeple.ops.native import library_path
from steeple.request import Request
from steeple.types import SamplingParams

SETTINGS = EngineConfig(dtype="bfloat16", kv_tokens=6000, deterministic=True)
REQUESTS, TOKENS = 12, 40


@pytest.fixture(scope="module")
def target() -> LoadedModel:
    if library_path() is None:
        pytest.skip("no compiler: there are no native kernels")
    return load_model("demo", SETTINGS)


def requests(temperature: float) -> list[Request]:
    made = np.random.default_rng(0)
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=temperature, seed=5)
    return [Request(f"r{i}", made.integers(0, 4000, 3 + 17 * i), params) for i in range(REQUESTS)]


def outputs(
    target: LoadedModel, method: str, *, temperature: float = 0.0, batch: int = REQUESTS, k: int = 4, **changes: int
) -> list[list[int]]:
    settings = replace(SETTINGS, batch_size=batch, **changes)
    engine = build_engine(target, settings, drafter_config(method, k=k) if method else None)
    todo = requests(temperature)
    for request in todo:
        engine.add(request)
    while not engine.idle:
        engine.step()
    return [request.output.tolist() for request in todo]


def test_bfloat16_writes_plain_decodings_tokens(target: LoadedModel) -> None:
    alone = outputs(target, "", batch=1)
    assert outputs(target, "") == alone
    assert outputs(target, "small_lm") == alone
    assert outputs(target, "small_lm", k=7, batch=5, step_tokens=50) == alone
    assert outputs(target, "ngram", batch=7) == alone


def test_sampling_in_bfloat16_does_not_depend_on_the_batch(target: LoadedModel) -> None:
    assert outputs(target, "", temperature=1.0, batch=1) == outputs(target, "", temperature=1.0, step_tokens=33)


def test_it_is_refused_where_it_cannot_be_kept(tmp_path: Path) -> None:
    settings = EngineConfig(kv_tokens=256, native=False, deterministic=True)
    with pytest.raises(ConfigError, match=r"EngineConfig.deterministic = True, but .* native = True"):
        build_engine(load_model("demo", settings), settings)
