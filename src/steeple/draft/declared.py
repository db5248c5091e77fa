"""What a drafter takes in memory, known before it is built: so that it may be left out before its weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

from steeple import hf
from steeple.config import ModelConfig
from steeple.draft.base import Surroundings
from steeple.model.families import model_config
from steeple.plan.memory_parts import DraftMemory, Lay


@runtime_checkable
class DeclaresMemory(Protocol):
    """Settings of a method that can tell what its drafter will take. ``lay``: how the drafter's numbers lie."""

    def memory(self, around: Surroundings, lay: Lay) -> DraftMemory: ...


def stored_config(folder: Path, around: Surroundings) -> ModelConfig:
    """The shape of a drafter's model in ``folder``, from its configuration alone."""
    return model_config(hf.load_hf_config(folder), around.decoder.config.max_context)


def key_bytes_per_token(config: ModelConfig, lay: Lay) -> int:
    """Bytes of keys and values of one position."""
    return config.kv_elements_per_token * lay.element
