"""Figures as files: PNG for people, SVG for pages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from steeple.errors import StorageError

FORMATS = ("png", "svg")


def write_figures(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write each figure as PNG and SVG into ``folder``; returns the files. ``StorageError`` if it cannot be written."""
    written = []
    for name, figure in figures.items():
        for kind in FORMATS:
            path = folder / f"{name}.{kind}"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, dpi=160)
            except OSError as error:
                raise StorageError(f"{path} cannot be written: {error}") from error
            written.append(path)
    return written
