"""A drafter that is nearly the target: it agrees often and errs often, so that both branches of a rule matter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model


@pytest.fixture(scope="session")
def near_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target of ``target_folder`` with noise on its weights."""
    folder = tiny_model(tmp_path_factory.mktemp("models") / "near")
    path = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(7)
    weights = {
        name: value + 0.01 * torch.randn(value.shape, generator=generator) for name, value in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    return folder
