"""The step bench itself: measure the machine, then all cells of each model by turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from steeple.bench.step.config import StepConfig
from steeple.bench.step.plots import write_step_plots
from steeple.bench.step.rows import Model, cell_row, machine_facts
from steeple.bench.step.turns import (
    LEAST_ROUNDS,
    ROUNDS,
    TURN_SECONDS,
    Cell,
    Steady,
    Turn,
    cells,
    check_context,
    no_garbage_collection,
)
from steeple.engine import EngineConfig
from steeple.evidence.environment import command_line, environment
from steeple.evidence.progress import Progress, silent
from steeple.evidence.random_model import load_any, shape_of
from steeple.hardware import Hardware, ReadProbe, measure, pick_device

SCHEMA_VERSION = 1
ALWAYS = ("bfloat16", "float32")  # peaks that are measured whatever the dtype of the steps
SHOWN = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")


def run_step(config: StepConfig, progress: Progress = silent, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the bench; the result is ready for JSON.

    Args:
        progress: told after every turn. argv: the command to put on record; the process's own by default.

    Raises ``ConfigError`` or ``ModelError`` before anything long begins.
    """
    started = time.perf_counter()
    for model in config.model:
        check_context(config, model, shape_of(model))
    if config.threads:
        torch.set_num_threads(config.threads)
    progress("measure the machine", 0, 1)
    device = pick_device(config.device)
    hardware = measure(device, *(getattr(torch, name) for name in dict.fromkeys((*ALWAYS, config.dtype))))
    probe = ReadProbe(device)
    runs = [_run_model(config, model, probe, progress) for model in config.model]
    readings = [turn.read_bytes_per_second for run in runs for turns in run.turns.values() for turn in turns]
    result = {
        "schema_version": SCHEMA_VERSION,
        "kind": "step",
        "command": command_line() if argv is None else list(argv),
        "config": asdict(config),
        "environment": runs[0].environment,
        "machine": machine_facts(hardware, readings or [hardware.read_bytes_per_second]),
        "models": [run.facts() for run in runs],
        "rows": [row for run in runs for row in run.rows(config, hardware)],
        "seconds": time.perf_counter() - started,
    }
    if config.plots:
        write_step_plots(result, Path(config.plots))
    return result


@dataclass(frozen=True, slots=True)
class _Run:
    """What was measured of one model: turns by cell, and why other cells were skipped."""

    model: Model
    environment: dict[str, Any]
    turns: dict[Cell, list[Turn]]
    skipped: dict[Cell, str]

    def facts(self) -> dict[str, Any]:
        """Name and shape; ``parameters`` are those that a step multiplies, so without the embedding."""
        shape = {name: getattr(self.model.shape, name) for name in SHOWN}
        return {"name": self.model.name, "parameters": self.model.parameters, "shape": shape}

    def rows(self, config: StepConfig, hardware: Hardware) -> list[dict[str, Any]]:
        """A row for every cell, also for those that were skipped."""
        found = []
        for cell in cells(config):
            row = {"model": self.model.name, "dtype": config.dtype, **asdict(cell), "temperature": config.temperature}
            row["skipped"] = self.skipped.get(cell)
            if cell in self.turns:
                plain = self.turns.get(Cell(cell.batch, cell.context, 1))
                row |= cell_row(cell, self.turns[cell], plain, self.model, hardware, config.dtype)
            found.append(row)
        return found


def _run_model(config: StepConfig, name: str, probe: ReadProbe, progress: Progress) -> _Run:
    progress(f"load {name}", 0, 1)
    settings = EngineConfig(dtype=config.dtype, device=config.device, native=config.native)
    target = load_any(name, settings, config.seed)
    decoder = target.decoder
    model = Model(name, decoder.config, decoder.multiplied_parameters, decoder.dtype.itemsize)
    progress(f"fill the cache of {name}", 0, 1)
    steady = Steady(config, target, probe)
    for done, cell in enumerate(steady.cells):
        steady.turn(cell, LEAST_ROUNDS)
        progress(f"{name}, {cell.label}: warm-up", done + 1, len(steady.cells))
    with no_garbage_collection():
        turns = _by_turns(config, name, steady, progress)
    return _Run(model, environment(target), turns, steady.reason)


def _by_turns(config: StepConfig, name: str, steady: Steady, progress: Progress) -> dict[Cell, list[Turn]]:
    """Every cell has a turn, then every cell another, until each has had its seconds: so noise falls on all alike."""
    turns: dict[Cell, list[Turn]] = {cell: [] for cell in steady.cells}
    spent = dict.fromkeys(steady.cells, 0.0)
    left = list(steady.cells)
    while left:
        for cell in left:
            turn = steady.turn(cell, _next_rounds(turns[cell]))
            turns[cell].append(turn)
            spent[cell] += turn.spent
            progress(f"{name}, {cell.label}", len(spent) - len(left), len(spent))
        left = [cell for cell in left if spent[cell] < config.seconds]
    return turns


def _next_rounds(turns: Sequence[Turn]) -> int:
    """An even number that fills ``TURN_SECONDS``; the first turn finds out how long a round takes."""
    if not turns:
        return LEAST_ROUNDS
    fitting = TURN_SECONDS / (turns[-1].spent / turns[-1].rounds)
    return int(min(max(fitting // 2 * 2, LEAST_ROUNDS), ROUNDS))
