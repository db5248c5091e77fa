"""Which drafters ``spin`` takes, what it asks of the engine, and which settings it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model

from steeple import hf
from steeple.cache.paged import PagedCache
from steeple.draft import drafter_config
from steeple.draft.base import DecidesLengths, Surroundings
from steeple.draft.ngram import NGram
from steeple.draft.small_lm import SmallLM
from steeple.draft.spin import SpinConfig
from steeple.draft.spin_round import Choices, FallsBehind, Spin
from steeple.draft.windowed import WindowDrafter
from steeple.errors import ConfigError, InternalError
from steeple.model.load import load_decoder
from steeple.ops.attention import ReferenceAttention
from steeple.plan.memory_parts import Lay
from steeple.request import Request
from steeple.types import SamplingParams


def around(folder: Path) -> Surroundings:
    return Surroundings(
        decoder=load_decoder(folder, dtype=torch.float32, device="cpu"),
        tokenizer=hf.load_tokenizer(folder),
        attention=ReferenceAttention(),
        device=torch.device("cpu"),
        dtype=torch.float32,
        block_size=4,
        step_tokens=64,
        model_folder=folder,
    )


def build(folder: Path, spec: str, **fields: object) -> Spin:
    config = drafter_config(spec, **fields)
    assert config is not None
    drafter = config.build(around(folder))
    assert isinstance(drafter, Spin)
    return drafter


def test_all_that_there_are_or_those_that_are_named(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "target")
    kinds = [type(part) for part in build(folder, "spin")._parts.parts]
    assert kinds == [NGram, WindowDrafter], "a drafter that is not there is left out"
    tiny_model(tmp_path / "small", layers=1)
    assert SmallLM in [type(part) for part in build(folder, "spin")._parts.parts]
    named = build(folder, f"spin:models=small_lm:{tmp_path / 'small'},ngram:min_match=1+k=3+rule=ucb")
    first, second = named._parts.parts
    assert isinstance(first, SmallLM)
    assert isinstance(second, NGram)
    assert first.config.k == second.config.k == 3
    assert second.config.min_match == 1
    with pytest.raises(ConfigError, match="has no trained draft beside it"):
        build(folder, "spin:models=ngram,spire")


def test_its_needs_are_those_of_all_parts(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "target")
    tiny_model(tmp_path / "small", layers=1)
    drafter = build(folder, "spin:models=ngram,small_lm,sparse_self:choose=pillar", k=5)
    assert isinstance(drafter, DecidesLengths)
    assert drafter.needs.nodes == 5
    assert drafter.needs.shares_cache
    assert drafter.needs.scores
    assert drafter.needs.own_cache_bytes_per_token > 0
    assert not drafter.needs.adaptive
    assert [isinstance(part, FallsBehind) for part in drafter._parts.parts] == [False, True, False]


def test_what_it_takes_is_known_before_it_is_built(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "target")
    alone = SpinConfig().memory(around(folder), Lay())
    assert (alone.held, alone.keys) == (0, 0)
    tiny_model(tmp_path / "small", layers=1)
    own = drafter_config("small_lm")
    assert own is not None
    both = SpinConfig().memory(around(folder), Lay())
    assert both.held == own.memory(around(folder), Lay()).held > 0
    assert both.keys == own.memory(around(folder), Lay()).keys > 0
    assert both.position_state > 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("spin:rule=greedly", r"spin\.rule = 'greedly'\. Did you mean 'greedy'\?"),
        ("spin:explore=2", r"spin\.explore = 2.0 is out of range"),
        ("spin:k=0", r"spin\.k = 0 is out of range"),
        ("spin:capacity=2,x", r"spin\.capacity = '2,x': give numbers"),
        ("spin:models=ngram+capacity=2,3", r"has 2 numbers for 1 drafters"),
        ("spin:models=none", "drafts nothing; leave it out"),
        ("spin:models=ngram,ngarm", "Unknown drafter 'ngarm'"),
        ("spin:models=sparse_self:width=2", r"proposes trees; give drafters of plain chains"),
        ("spin:models=auto-k:ngram", r"chooses its own depth"),
        ("spin:models=spin", "cannot be one of several drafters"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, spec: str, message: str) -> None:
    folder = tiny_model(tmp_path / "target")
    with pytest.raises(ConfigError, match=message):
        build(folder, spec)


@pytest.mark.parametrize(
    ("text", "expected"), [("", ()), ("0", ()), ("4", (4, 4)), ("4,0", (4, 1 << 20)), ("1,2", (1, 2))]
)
def test_places(tmp_path: Path, text: str, expected: tuple[int, ...]) -> None:
    folder = tiny_model(tmp_path / "target")
    drafter = build(folder, "spin:models=ngram,sparse_self", capacity=text)
    assert drafter.lengths.selector._options.capacity == expected


def test_a_part_that_takes_more_of_the_target_is_expected_to_cost_more(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "target", layers=2)
    tiny_model(tmp_path / "small", layers=1)
    costs = build(folder, "spin:models=ngram,small_lm,sparse_self").lengths.selector.costs
    costs.note(10e-3, 8, 8, 0.0, {})
    ngram, small, whole = costs.rates(8, 0.0).passes
    assert ngram == 0.0
    assert 0.0 < small < whole
    assert whole == pytest.approx(7e-3)


def test_left_over_knowledge_is_noticed(tmp_path: Path) -> None:
    drafter = build(tiny_model(tmp_path / "target"), "spin:models=ngram")
    surroundings = around(tmp_path / "target")
    shape, attention = surroundings.decoder.config, surroundings.attention
    drafter.prepare(PagedCache(shape, blocks=8, block_size=4, dtype=torch.float32, attention=attention))
    drafter.check_integrity()
    choices = drafter.lengths
    assert isinstance(choices, Choices)
    request = Request("r", [1, 2, 3, 4], SamplingParams())
    request.cached = 3
    choices.selector.acceptance.note([request.id], np.array([0]), np.array([2]), np.array([1]))
    with pytest.raises(InternalError, match="remembers"):
        drafter.check_integrity()
    drafter.forget(request)
    drafter.check_integrity()
