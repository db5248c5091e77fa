"""Stored calibrations: the step model of a machine, with what it was fitted to, read back with clear errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steeple.errors import ConfigError, StorageError
from steeple.plan.ours import StepModel

KIND = "calibration"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A fitted step model.

    Args:
        step: the model; tokens are chosen unless it is asked for otherwise.
        read_bytes_per_second: the reading of the memory's speed at which it holds; 0 = not known.
        models: what was measured, so that nobody predicts a model from itself by mistake.
        path: where it is from.
    """

    step: StepModel
    read_bytes_per_second: float = 0.0
    models: tuple[str, ...] = ()
    path: str = ""


def read_calibration(path: str | Path, what: str = "--calibration") -> Calibration:
    """The calibration in the JSON file ``path``.

    Args:
        what: how messages call the option that named the file.

    Raises:
        StorageError: the file cannot be read. ConfigError: it holds no step model.
    """
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(
            f"{what} {path} cannot be read ({error.strerror}); make one with steeple plan calibrate --json FILE."
        ) from error
    except ValueError as error:
        raise ConfigError(f"{what} {path} is no valid JSON ({error}); make it again.") from error
    values: Any = stored.get("model", stored) if isinstance(stored, Mapping) else None
    if not isinstance(values, Mapping) or "bytes_per_second" not in values:
        raise ConfigError(
            f"{what} {path} holds no step model; give the JSON that steeple plan calibrate --json FILE wrote."
        )
    memory = stored.get("memory")
    return Calibration(
        step=StepModel.from_dict(values),
        read_bytes_per_second=float(memory.get("read_bytes_per_second", 0.0)) if isinstance(memory, Mapping) else 0.0,
        models=tuple(str(shape.get("name", "")) for shape in stored.get("shapes", ())),
        path=str(path),
    )
