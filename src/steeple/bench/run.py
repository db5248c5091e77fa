"""The bench itself: load once, measure the machine, then all drafters by turns in every cell."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from steeple.bench.config import PLAIN, BenchConfig
from steeple.bench.floor import step_cost
from steeple.bench.plots import write_plots
from steeple.bench.rows import Identity, cell_rows
from steeple.bench.workload import Cell, Workload, cells, turns
from steeple.draft import drafter_config
from steeple.engine import Engine, EngineConfig, LoadedModel, build_engine, load_model
from steeple.errors import CapacityError
from steeple.evidence.environment import command_line, environment
from steeple.evidence.logits import first_difference, top_gap
from steeple.evidence.measure import Run, require_counted, run_requests
from steeple.evidence.progress import Progress, silent
from steeple.evidence.prompts import PromptCutter, read_source
from steeple.hardware import Hardware, available_memory, measure

SCHEMA_VERSION = 1
EXACT = "float32"


def run_bench(config: BenchConfig, progress: Progress = silent, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the bench; the result is ready for JSON.

    Args:
        progress: told after every run. argv: the command to put on record; the process's own by default.

    Raises ``ConfigError``, ``ModelError``, ``CapacityError`` or ``StorageError`` before anything long begins.
    """
    started = time.perf_counter()
    progress("load", 0, 1)
    target = load_model(config.model, _engine_config(config, 0))
    source = read_source(config.prompts)
    shape = target.decoder.config
    workload = Workload(config, PromptCutter(source, target.tokenizer, config.seed), shape.max_context)
    bench = _Bench(config, workload, target)
    surroundings = environment(target)
    progress("measure the machine", 0, 1)
    hardware = measure(target.device, getattr(torch, config.dtype))
    surroundings["read_bytes_per_second"] = hardware.read_bytes_per_second
    surroundings["flops_per_second"] = hardware.flops_per_second[config.dtype]
    rows = bench.rows(hardware, progress)
    result = {
        "schema_version": SCHEMA_VERSION,
        "kind": "bench",
        "command": command_line() if argv is None else list(argv),
        "config": asdict(config),
        "environment": surroundings,
        "model": {"name": config.model, "parameters": bench.parameters, "shape": _shape(target)},
        "prompts": {"source": source.name, "sha256": source.digest},
        "seconds": time.perf_counter() - started,
        "rows": rows,
    }
    if config.plots:
        write_plots(result, Path(config.plots))
    return result


def _shape(target: LoadedModel) -> dict[str, int]:
    shape = target.decoder.config
    names = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
    return {name: getattr(shape, name) for name in names}


def _engine_config(config: BenchConfig, kv_tokens: int) -> EngineConfig:
    """Prefixes are not shared: a repeat must compute its prompts anew."""
    return EngineConfig(
        dtype=config.dtype,
        device=config.device,
        threads=config.threads,
        native=config.native,
        share_prefixes=False,
        kv_tokens=kv_tokens,
        batch_size=max(config.batch),
        # The slack lets a prompt join beside requests that decode, which have a row each.
        step_tokens=config.step_tokens or max(config.batch) * (max(config.context) + 1),
    )


class _Bench:
    """The engines of a bench, one per method, and what runs on them."""

    def __init__(self, config: BenchConfig, workload: Workload, target: LoadedModel) -> None:
        self._config, self._workload, self._target = config, workload, target
        self.parameters = target.decoder.multiplied_parameters
        self._engines = _engines(config, workload, target)
        self._exact = _Exact(config, workload)

    def rows(self, hardware: Hardware, progress: Progress) -> list[dict[str, Any]]:
        """Measure every cell."""
        config = self._config
        plan = cells(config)
        done, total = 0, len(plan) * len(config.methods) * (config.repeat + 1)
        rows = []
        for cell in plan:
            for method in config.methods:
                self._run(cell, method, max_tokens=2 * config.k + 4)  # warm-up
                done += 1
                progress(_label(cell, method, "warm-up"), done, total)
            gc.collect()  # now, rather than in the middle of a round
            runs: dict[str, list[Run]] = {method: [] for method in config.methods}
            for repeat, method in turns(config.methods, config.repeat):
                run = self._run(cell, method)
                require_counted(run, _label(cell, method, "run"))
                runs[method].append(run)
                done += 1
                progress(_label(cell, method, f"repeat {repeat + 1}"), done, total)
            identities = {method: self._identity(cell, method, runs) for method in config.methods}
            rows.extend(cell_rows(config, cell, runs, identities, self._floor(cell, hardware)))
        return rows

    def _run(self, cell: Cell, method: str, max_tokens: int = 0) -> Run:
        return run_requests(self._engines[method], self._workload.requests(cell, max_tokens=max_tokens))

    def _floor(self, cell: Cell, hardware: Hardware) -> float:
        dtype = self._target.decoder.dtype
        middle = cell.context + self._config.max_tokens / 2
        cost = step_cost(self._target.decoder.config, self.parameters, dtype.itemsize, batch=cell.batch, context=middle)
        return cost.total.seconds(hardware, self._config.dtype)

    def _identity(self, cell: Cell, method: str, runs: dict[str, list[Run]]) -> Identity:
        if cell.temperature > 0:
            return Identity()
        prompts = self._workload.prompts[cell.context]
        pairs = [
            (index % cell.batch, plain, own)
            for a, b in zip(runs[PLAIN], runs[method], strict=True)
            for index, (plain, own) in enumerate(zip(a.outputs, b.outputs, strict=True))
        ]
        gaps = []
        for index, plain, own in pairs:
            place = first_difference(plain, own)
            if place is not None:
                gaps.append(top_gap(self._target, [*prompts[index], *plain[:place]]))
        share = 1 - len(gaps) / len(pairs)
        smallest = min(gaps) if gaps else None
        if self._config.dtype == EXACT:
            return Identity(not gaps, cell.batch, share, smallest)
        identical, requests = self._exact.identical(cell, method)
        return Identity(identical, requests, share, smallest)


class _Exact:
    """The float32 twin of a bench in another dtype, for the column ``identical``. Loaded when first asked."""

    def __init__(self, config: BenchConfig, workload: Workload) -> None:
        self._config, self._workload = replace(config, dtype=EXACT), workload
        self._engines: dict[str, Engine] | None = None
        self._outputs: dict[tuple[str, int, int], list[list[int]]] = {}

    def identical(self, cell: Cell, method: str) -> tuple[bool, int]:
        """Whether ``method`` writes plain decoding's tokens, and for how many requests that was checked."""
        count = min(cell.batch, self._config.identity_requests)
        return self._run(cell, method, count) == self._run(cell, PLAIN, count), count

    def _run(self, cell: Cell, method: str, count: int) -> list[list[int]]:
        key = (method, count, cell.context)  # greedy outputs of a prompt do not depend on the rest of the cell
        if key not in self._outputs:
            if self._engines is None:
                target = load_model(self._config.model, _engine_config(self._config, 0))
                self._engines = _engines(self._config, self._workload, target)
            self._outputs[key] = run_requests(self._engines[method], self._workload.requests(cell, count=count)).outputs
        return self._outputs[key]


def _engines(config: BenchConfig, workload: Workload, target: LoadedModel) -> dict[str, Engine]:
    """An engine per method over the same decoder. ``CapacityError`` if their caches do not fit together."""
    settings = _engine_config(config, 0)
    settings = replace(settings, kv_tokens=workload.kv_tokens(settings.block_size))
    shape = target.decoder.config
    needed = settings.kv_tokens * shape.kv_elements_per_token * target.decoder.dtype.itemsize * len(config.methods)
    available = available_memory(target.device)
    if needed > available:
        raise CapacityError(
            f"the caches of {len(config.methods)} engines for {max(config.batch)} requests of {max(config.context)} "
            f"tokens take {needed / 2**20:.0f} MiB, {(needed - available) / 2**20:.0f} MiB more than there is; "
            "lower batch or context, or compare fewer drafters at once."
        )
    return {method: build_engine(target, settings, drafter_config(method, k=config.k)) for method in config.methods}


def _label(cell: Cell, method: str, what: str) -> str:
    return f"batch {cell.batch}, context {cell.context}, T {cell.temperature:g}: {method}, {what}"
