"""A tiny published Llama on disk, whole or damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from torch import Tensor


@pytest.fixture(scope="session")
def llama() -> transformers.PreTrainedModel:
    return tiny("Llama")


@pytest.fixture
def llama_folder(llama: transformers.PreTrainedModel, tmp_path: Path) -> Path:
    """A fresh folder with a tiny Llama."""
    folder = tmp_path / "llama"
    llama.save_pretrained(folder)
    return folder


@pytest.fixture
def edit_weights(llama_folder: Path) -> Callable[[Callable[[dict[str, Tensor]], None]], Path]:
    """Change the tensors of the tiny Llama's file with a function; returns the folder."""

    def edit(change: Callable[[dict[str, Tensor]], None]) -> Path:
        path = llama_folder / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})
        return llama_folder

    return edit
