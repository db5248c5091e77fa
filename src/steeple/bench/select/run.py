"""The bench itself: each drafter alone at each depth, then its best, ``auto-k``, ``spin`` and an oracle by turns."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from steeple.bench.config import PLAIN
from steeple.bench.select.config import SelectConfig
from steeple.bench.select.plots import write_select_plots
from steeple.bench.select.runs import FixedConfig, Run, median_run, run_stream
from steeple.bench.workload import turns
from steeple.draft import drafter_config
from steeple.draft.base import DrafterConfig
from steeple.draft.spin import SpinConfig
from steeple.engine import Engine, EngineConfig, LoadedModel, build_engine, load_model
from steeple.errors import ConfigError
from steeple.evidence.environment import command_line, environment
from steeple.evidence.progress import Progress, silent
from steeple.evidence.streams import Stream, StreamConfig, load_stream
from steeple.select.matching import NOBODY

SCHEMA_VERSION = 1
CHOSEN, ORACLE = "spin", "oracle"
WARM_TOKENS = 8


def run_select(config: SelectConfig, progress: Progress = silent, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the bench; the result is ready for JSON.

    Args:
        progress: told after every run. argv: the command to put on record; the process's own by default.

    Raises ``ConfigError`` or ``ModelError`` before anything long begins.
    """
    started = time.perf_counter()
    progress("load", 0, 1)
    settings = EngineConfig(
        dtype=config.dtype,
        device=config.device,
        threads=config.threads,
        share_prefixes=False,
        batch_size=config.batch,
        step_tokens=config.batch * (config.longest + 1),
    )
    target = load_model(config.model, settings)
    wanted = StreamConfig(
        count=config.count,
        max_tokens=config.max_tokens,
        longest=config.longest,
        seed=config.seed,
        data=config.data,
    )
    stream = load_stream(config.stream, wanted, target.tokenizer)
    if stream.longest > target.decoder.config.max_context:
        raise ConfigError(
            f"SelectConfig: prompts and output take up to {stream.longest} tokens, more than the model's context of "
            f"{target.decoder.config.max_context}; lower longest or max_tokens."
        )
    bench = _Bench(config, target, stream, settings)
    surroundings = environment(target)
    result = {
        "schema_version": SCHEMA_VERSION,
        "kind": "select",
        "command": command_line() if argv is None else list(argv),
        "config": asdict(config),
        "environment": surroundings,
        "stream": stream.as_dict(),
        **bench.measure(progress),
        "seconds": time.perf_counter() - started,
    }
    if config.plots:
        write_select_plots(result, Path(config.plots))
    return result


class _Bench:
    """Engines by name over one cache, and what was measured of them."""

    def __init__(self, config: SelectConfig, target: LoadedModel, stream: Stream, settings: EngineConfig) -> None:
        self._config, self._target, self._stream = config, target, stream
        blocks = -(-stream.longest // settings.block_size) + 1
        self._settings = replace(settings, kv_tokens=config.batch * blocks * settings.block_size)
        self._engines: dict[str, Engine] = {}
        self._runs: dict[str, list[Run]] = {}
        self._first: dict[str, float] = {}
        self._add(PLAIN, None)

    def measure(self, progress: Progress) -> dict[str, Any]:
        """Rows and the oracle's assignment."""
        alone = {
            f"{spec}, k = {k}": (spec, k, drafter_config(spec, k=k))
            for spec in self._config.drafters
            for k in self._config.k
        }
        for name, (_, _, settings) in alone.items():
            self._add(name, settings)
        for place, name in enumerate([PLAIN, *alone]):
            self._warm_up(name)
            self._run(name)
            progress(name, place + 1, len(alone) + 1)
        best = {
            spec: self._best(name for name, (own, _, _) in alone.items() if own == spec)
            for spec in self._config.drafters
        }
        told = self._told({name: (spec, k) for name, (spec, k, _) in alone.items()})
        compared = [PLAIN, *best.values(), *self._add_chosen(told)]
        total = self._config.repeat * len(compared)
        for name in compared:
            if name not in self._runs:
                self._run(name, first=True)
        for done, (_, name) in enumerate(turns(compared, self._config.repeat)):
            self._run(name)
            progress(name, done + 1, total)
        return {
            "rows": [self._row(name, name in compared) for name in self._engines],
            "best_depths": {spec: alone[name][1] for spec, name in best.items()},
            "oracle": self._told_by_kind(told),
        }

    def _add(self, name: str, drafter: DrafterConfig | None) -> str:
        """All engines share one cache: no two of them run at once, and prefixes are not shared."""
        cache = self._engines[PLAIN].cache if self._engines else None
        self._engines[name] = build_engine(self._target, self._settings, drafter, cache)
        return name

    def _add_chosen(self, told: Mapping[str, tuple[int, int]]) -> list[str]:
        config = self._config
        names = []
        if config.adaptive:
            for spec in config.drafters:
                names.append(self._add(f"auto-k:{spec}", drafter_config(f"auto-k:{spec}", k=config.deepest)))
        models = ",".join(config.drafters)
        spin = SpinConfig(models=models, k=config.deepest, rule=config.rule, seed=config.seed)
        names.append(self._add(CHOSEN, spin))
        deepest = max(config.k)
        parts = tuple(drafter_config(spec, k=deepest) for spec in config.drafters)
        oracle = FixedConfig(tuple(part for part in parts if part is not None), told, deepest)
        names.append(self._add(ORACLE, oracle))
        return names

    def _warm_up(self, name: str) -> None:
        requests = self._stream.requests(self._config.temperature)[: self._config.batch]
        for request in requests:
            request.params = replace(request.params, max_tokens=WARM_TOKENS)
        run_stream(self._engines[name], requests)

    def _run(self, name: str, *, first: bool = False) -> None:
        run = run_stream(self._engines[name], self._stream.requests(self._config.temperature))
        if first:
            self._first[name] = run.tokens_per_second
        else:
            self._runs.setdefault(name, []).append(run)

    def _best(self, names: Any) -> str:
        return max(names, key=lambda name: median_run(self._runs[name]).tokens_per_second)

    def _told(self, alone: Mapping[str, tuple[str, int]]) -> dict[str, tuple[int, int]]:
        """For each request the drafter and depth whose own run gave it the most tokens per second of a step."""
        names = [PLAIN, *alone]
        rates = np.stack([np.array(self._runs[n][0].tau) / self._runs[n][0].step_seconds for n in names])
        numbers = [(NOBODY, 0), *((self._config.drafters.index(spec), k) for spec, k in alone.values())]
        ids = [request.id for request in self._stream.requests()]
        return {id: numbers[int(best)] for id, best in zip(ids, rates.argmax(axis=0), strict=True)}

    def _told_by_kind(self, told: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
        counts: dict[str, dict[str, int]] = {kind: {} for kind in self._stream.kinds}
        for kind, (drafter, k) in zip(self._stream.kind_of_each, told.values(), strict=True):
            own = counts[self._stream.kinds[kind]]
            label = f"{self._name(drafter)}, k = {k}" if k else PLAIN
            own[label] = own.get(label, 0) + 1
        return counts

    def _name(self, drafter: int) -> str:
        return PLAIN if drafter == NOBODY else self._config.drafters[drafter]

    def _row(self, name: str, compared: bool) -> dict[str, Any]:
        config, runs = self._config, self._runs[name]
        run, plain = median_run(runs), median_run(self._runs[PLAIN])
        speeds = [own.tokens_per_second for own in runs]
        return {
            "method": name,
            "compared": compared,
            "batch": config.batch,
            "longest": config.longest,
            "temperature": config.temperature,
            "dtype": config.dtype,
            "tokens_per_second": run.tokens_per_second,
            "slowest": min(speeds),
            "fastest": max(speeds),
            "runs": len(runs),
            "first_tokens_per_second": self._first.get(name),
            "throughput_multiplier": run.tokens_per_second / plain.tokens_per_second,
            "tau": run.committed / max(run.rounds, 1),
            "step_ms": 1e3 * run.step_seconds,
            "tau_by_kind": self._by_kind(run.tau),
            "share_by_kind": self._shares(run),
            "identical": self._identical(run) if config.temperature == 0 else None,
        }

    def _by_kind(self, tau: Sequence[float]) -> dict[str, float]:
        kinds = np.array(self._stream.kind_of_each)
        return {
            name: float(np.array(tau)[kinds == place].mean())
            for place, name in enumerate(self._stream.kinds)
            if (kinds == place).any()
        }

    def _shares(self, run: Run) -> dict[str, dict[str, float]] | None:
        """Of each kind's rounds, the share that each drafter had."""
        if not run.shares:
            return None
        ids = {
            request.id: kind for request, kind in zip(self._stream.requests(), self._stream.kind_of_each, strict=True)
        }
        counts = np.zeros((len(self._stream.kinds), len(self._config.drafters) + 1))
        for (id, drafter), rounds in run.shares.items():
            counts[ids[id], drafter] += rounds  # NOBODY is the last column
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
        names = [*self._config.drafters, PLAIN]
        return {
            kind: dict(zip(names, own, strict=True))
            for kind, own in zip(self._stream.kinds, shares.tolist(), strict=True)
        }

    def _identical(self, run: Run) -> float:
        """Share of the requests whose output is that of plain decoding."""
        pairs = zip(run.outputs, self._runs[PLAIN][0].outputs, strict=True)
        return float(np.mean([own == plain for own, plain in pairs]))
