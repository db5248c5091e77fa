"""The sweep itself: load once, then cell by cell all drafters and k by turns, with plain decoding around them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from steeple.bench.floor import step_cost
from steeple.bench.step.turns import no_garbage_collection
from steeple.bench.sweep.config import SweepConfig
from steeple.bench.sweep.engines import Engines, Method, settings
from steeple.bench.sweep.identity import cell_identities, exact_identity
from steeple.bench.sweep.plots import write_sweep_plots
from steeple.bench.sweep.rows import CellRuns, Row, cell_of, cell_rows
from steeple.bench.sweep.store import PartialFile, settings_of
from steeple.bench.sweep.workload import Cell, Workload, cells
from steeple.draft import drafter_config
from steeple.engine import load_model
from steeple.evidence.environment import command_line, environment
from steeple.evidence.measure import Run, require_counted
from steeple.evidence.progress import Progress, silent
from steeple.evidence.prompts import PromptCutter, read_source
from steeple.hardware import Hardware, ReadProbe, measure

SCHEMA_VERSION = 1
PILOT_TOKENS = 8
MOST_REPEATS = 16


def run_sweep(
    config: SweepConfig,
    progress: Progress = silent,
    argv: Sequence[str] | None = None,
    file: Path | None = None,
) -> dict[str, Any]:
    """Run the sweep; the result is ready for JSON.

    Args:
        progress: told after every run. argv: the command to put on record; the process's own by default.
        file: where the result will be; beside it lies what is measured so far.

    Raises ``ConfigError``, ``ModelError``, ``CapacityError`` or ``StorageError`` before anything long begins.
    """
    for spec in config.speculative:
        drafter_config(spec, k=max(config.ks))
    store = PartialFile(file)
    earlier = store.earlier(config)
    started = time.perf_counter()
    progress("load", 0, 1)
    sweep = _Sweep(config)
    result = sweep.head(command_line() if argv is None else list(argv))
    plan, before = cells(config), 0.0
    if earlier is not None:
        before = earlier["seconds"]
        result["rows"] = earlier["rows"]
        result["sittings"] = [*earlier["sittings"], earlier["environment"]]
        result["identity"] = earlier["identity"]
    else:
        result["identity"] = exact_identity(config, sweep.workload, plan[0], progress)
    measured = {cell_of(row) for row in result["rows"]}
    for done, cell in enumerate(plan):
        if cell not in measured:
            result["rows"].extend(sweep.rows(cell, result["identity"], _Share(progress, done, len(plan))))
            result["seconds"] = before + time.perf_counter() - started
            store.write(result)
    result["complete"] = True
    store.finish(result)
    if config.plots:
        write_sweep_plots(result, Path(config.plots))
    return result


class _Share:
    """One cell's share of the progress, told in hundredths."""

    def __init__(self, progress: Progress, done: int, total: int) -> None:
        self._progress, self._done, self._total = progress, done, total

    def tell(self, what: str, share: float) -> None:
        self._progress(what, int(100 * (self._done + share)), 100 * self._total)


class _Sweep:
    """The target, its engines and the machine's figures."""

    def __init__(self, config: SweepConfig) -> None:
        self._config = config
        loading = settings(config, dtype=config.dtype, kv_tokens=0, batch_size=max(config.batch))
        self._target = load_model(config.model, loading)
        self._source = read_source(config.prompts)
        cutter = PromptCutter(self._source, self._target.tokenizer, config.seed)
        self.workload = Workload(config, cutter, self._target.decoder.config.max_context)
        positions = self.workload.kv_tokens(loading.block_size)
        chosen = settings(config, dtype=config.dtype, kv_tokens=positions, batch_size=max(config.batch))
        self._engines = Engines(config, self._target, chosen)
        self._all: list[Method] = [self._engines.plain, *self._engines.methods]
        self._hardware: Hardware = measure(self._target.device, getattr(torch, config.dtype))
        self._probe = ReadProbe(self._target.device)

    def head(self, command: list[str]) -> dict[str, Any]:
        """The result without rows."""
        surroundings = environment(self._target)
        surroundings["read_bytes_per_second"] = self._hardware.read_bytes_per_second
        surroundings["flops_per_second"] = self._hardware.flops_per_second[self._config.dtype]
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "sweep",
            "complete": False,
            "command": command,
            "config": settings_of(self._config),
            "environment": surroundings,
            "sittings": [],  # environments of what was resumed
            "model": {"name": self._config.model, "parameters": self._target.decoder.multiplied_parameters},
            "prompts": {"source": self._source.name, "sha256": self._source.digest},
            "identity": {},
            "seconds": 0.0,
            "rows": [],
        }

    def rows(self, cell: Cell, exact: dict[str, Any], share: _Share) -> list[Row]:
        """Measure one cell."""
        share.tell(f"{cell.label}: prompts", 0)
        self._fill(cell, 0)
        pilot = self._engines.plain.run(self.workload.requests(cell, 0), PILOT_TOKENS)
        require_counted(pilot, cell.label)
        tokens, repeats = self._plan(pilot.timing.step)
        runs = CellRuns(cell, tokens, methods=[[] for _ in self._engines.methods])
        total = repeats * len(self._all) + 1
        with no_garbage_collection():
            self._learn(cell, tokens)
            for repeat in range(repeats):
                self._fill(cell, repeat)
                runs.lengths += [len(prompt) for prompt in self.workload.prompts(cell, repeat)]
                for place in [0, *self._turn(repeat)]:
                    done = len(runs.plain) + sum(map(len, runs.methods))
                    run = self._run(runs, place, repeat, share, done / total)
                    (runs.methods[place - 1] if place else runs.plain).append(run)
            runs.plain.append(self._run(runs, 0, repeats - 1, share, 1.0))
        prompts = [self.workload.prompts(cell, repeat) for repeat in range(repeats)]
        identities = cell_identities(exact, self._all, runs, prompts, self._target)
        return cell_rows(self._config, runs, self._all, identities, self._floor(runs))

    def _turn(self, repeat: int) -> list[int]:
        """Places of the methods in this turn's order: one later each time."""
        count = len(self._engines.methods)
        return [1 + (repeat + place) % count for place in range(count)]

    def _fill(self, cell: Cell, repeat: int) -> None:
        """Compute the prompts, where they are not in the cache; who comes later finds them there."""
        self._engines.plain.run(self.workload.requests(cell, repeat, max_tokens=1))

    def _learn(self, cell: Cell, tokens: int) -> None:
        """What chooses its own k has a run to find out what a round of this cell costs."""
        for method in self._engines.methods:
            if method.adaptive:
                method.run(self.workload.requests(cell, 0), tokens)

    def _plan(self, step_seconds: float) -> tuple[int, int]:
        """Tokens of a run and number of turns, from the time of a plain step."""
        config = self._config
        fitting = int(config.seconds_per_run / step_seconds)
        tokens = min(max(fitting, config.least_tokens), config.max_tokens)
        repeats = min(fitting // tokens, MOST_REPEATS)
        return tokens, max(repeats, config.repeat)

    def _run(self, runs: CellRuns, place: int, repeat: int, share: _Share, done: float) -> Run:
        method = self._all[place]
        runs.readings.append(self._probe.now())
        run = method.run(self.workload.requests(runs.cell, repeat), runs.tokens)
        what = f"{runs.cell.label}: {method.label}"
        require_counted(run, what)
        tau = run.timing.committed / run.timing.request_rounds
        share.tell(f"{what}, {run.timing.tokens_per_second:.0f} tokens/s, tau {tau:.2f}", done)
        return run

    def _floor(self, runs: CellRuns) -> float:
        decoder = self._target.decoder
        middle = sum(runs.lengths) / len(runs.lengths) + runs.tokens / 2
        cost = step_cost(
            decoder.config,
            decoder.multiplied_parameters,
            decoder.dtype.itemsize,
            batch=runs.cell.batch,
            context=middle,
        )
        return cost.total.seconds(self._hardware, self._config.dtype)
