"""The file of a sweep while it runs: rewritten after every cell, so that a killed sweep keeps what it has."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steeple.bench.sweep.config import SweepConfig
from steeple.errors import ConfigError, StorageError

SUFFIX = ".partial"
FREE = ("resume", "plots")  # settings that decide no number


class PartialFile:
    """``FILE.partial`` beside the result; without a result file nothing is kept."""

    def __init__(self, result: Path | None) -> None:
        self.path = None if result is None else result.with_name(result.name + SUFFIX)

    def earlier(self, config: SweepConfig) -> dict[str, Any] | None:
        """What a killed sweep left, if ``config`` wants it and there is something.

        Raises:
            ConfigError: nothing could be kept, or the file is of a sweep with other settings. StorageError: unreadable.
        """
        if not config.resume:
            return None
        if self.path is None:
            raise ConfigError("--resume needs --json FILE: what a killed sweep has measured lies beside it.")
        if not self.path.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StorageError(f"{self.path} cannot be read ({error}); remove it to start anew.") from error
        now = settings_of(config)
        changed = sorted(name for name in now if found["config"].get(name) != now[name] and name not in FREE)
        if changed:
            raise ConfigError(f"{self.path} is of a sweep with other {', '.join(changed)}; remove it to start anew.")
        return found

    def write(self, result: dict[str, Any]) -> None:
        """Replace the file as a whole. ``StorageError`` if it cannot be written."""
        if self.path is None:
            return
        new = self.path.with_name(self.path.name + ".new")
        try:
            new.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            new.replace(self.path)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written: {error}") from error

    def finish(self, result: dict[str, Any]) -> None:
        """The sweep is complete: its file becomes the result."""
        self.write(result)
        if self.path is not None:
            self.path.replace(self.path.with_name(self.path.name.removesuffix(SUFFIX)))


def settings_of(config: SweepConfig) -> dict[str, Any]:
    """The settings as JSON gives them back."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return values
