"""Which drafter ``auto-k`` takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from steeple import hf
from steeple.draft import drafter_config
from steeple.draft.auto_k import AutoK
from steeple.draft.base import Surroundings
from steeple.draft.small_lm import SmallLM
from steeple.draft.windowed import WindowDrafter
from steeple.errors import ConfigError
from steeple.model.load import load_decoder
from steeple.ops.attention import ReferenceAttention


def build(folder: Path, spec: str) -> AutoK:
    around = Surroundings(
        decoder=load_decoder(folder, dtype=torch.float32, device="cpu"),
        tokenizer=hf.load_tokenizer(folder),
        attention=ReferenceAttention(),
        device=torch.device("cpu"),
        dtype=torch.float32,
        block_size=4,
        step_tokens=64,
        model_folder=folder,
    )
    config = drafter_config(spec)
    assert config is not None
    drafter = config.build(around)
    assert isinstance(drafter, AutoK)
    return drafter


def test_the_best_drafter_there_is(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "target")
    alone = build(folder, "auto-k")
    assert isinstance(alone._drafter, WindowDrafter)
    assert alone.needs.adaptive
    assert alone.needs.shares_cache
    assert alone.needs.nodes == 8
    tiny_model(tmp_path / "small", layers=1)
    assert isinstance(build(folder, "auto-k")._drafter, SmallLM)


def test_a_named_drafter_keeps_its_settings(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "target")
    drafter = build(folder, "auto-k:sparse_self:choose=pillar")
    assert drafter.needs.scores
    named = build(folder, "auto-k:ngram")
    assert named.needs.nodes == 8
    assert not named.needs.shares_cache


def test_a_drafter_that_is_not_there_is_told(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "target")
    with pytest.raises(ConfigError, match=r"drafter spire: .* has no trained draft beside it"):
        build(folder, "auto-k:spire")
    with pytest.raises(ConfigError, match="leaves nothing to choose"):
        build(folder, "auto-k:none")
    with pytest.raises(ConfigError, match="Unknown drafter 'sparse'"):
        build(folder, "auto-k:sparse")
