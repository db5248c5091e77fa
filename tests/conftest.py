"""Fixtures that several rooms share; this file also puts ``tests`` on the path, where ``tiny`` lies."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_model


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random target on disk."""
    return tiny_model(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="session")
def draft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tinier random model with the same tokenizer."""
    return tiny_model(tmp_path_factory.mktemp("models") / "draft", seed=1, layers=1)
