"""What a training run tells: one JSON line per step, and a line on stderr against the machine's own ceiling."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

LOG = "log.jsonl"


def measured_peak(device: torch.device, seconds: float = 0.2) -> float:
    """Floating-point operations per second of a bfloat16 matrix product of 2048 x 2048, the best of the tries."""
    size, best = 2048, 0.0
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or best == 0.0:
        start = time.perf_counter()
        out = left @ right
        out[0, 0].item()  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


class Reporter:
    """Appends records to ``log.jsonl`` and shows them on stderr, on a terminal with a bar."""

    def __init__(self, folder: Path, first: int, total: int, console: Console | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.total = folder / LOG, total
        self.console = Console(stderr=True, highlight=False) if console is None else console
        self.bar = Progress(console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("training", total=total, completed=first)

    def __enter__(self) -> Reporter:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def record(self, **values: Any) -> None:
        """Append one record and show it."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        parts = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items() if k != "step")
        self.console.print(f"step {values['step']}/{self.total}  " + "  ".join(parts), soft_wrap=True)
        self.bar.update(self.task, completed=values["step"])


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of a run by step. Steps that a stopped run did again count once, the last time."""
    path = folder / LOG
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = {record["step"]: record for record in (json.loads(line) for line in lines if line.endswith("}"))}
    return [found[step] for step in sorted(found)]
