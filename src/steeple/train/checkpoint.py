"""Checkpoints of a training run: written whole or not at all, and enough to continue with the same loss curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from steeple.errors import StorageError
from steeple.train.optim import Optimizers

NAME = "checkpoint.pt"


def save_checkpoint(folder: Path, model: nn.Module, optimizers: Optimizers, progress: dict[str, Any]) -> None:
    """Write model, optimiser states, ``progress`` (plain values) and the random state to ``folder``, atomically.

    Where the data goes on needs no state of its own: a batch is a function of the seed and the step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{NAME}.partial"
    state = {
        "model": model.state_dict(),
        "optimizers": optimizers.state_dict(),
        "progress": progress,
        "rng": torch.get_rng_state(),
    }
    torch.save(state, partial)
    partial.replace(folder / NAME)


def load_checkpoint(folder: Path, model: nn.Module, optimizers: Optimizers) -> dict[str, Any] | None:
    """Restore the run in ``folder`` into ``model`` and ``optimizers``; returns its progress, None if there is none.

    Raises:
        StorageError: the checkpoint is of another shape or cannot be read.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizers.load_state_dict(state["optimizers"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise StorageError(
            f"The checkpoint {str(path)!r} does not fit this run ({error}); give another run folder or remove it."
        ) from error
    torch.set_rng_state(state["rng"])
    return state["progress"]
