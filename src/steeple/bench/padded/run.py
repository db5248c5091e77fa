"""The bench of padded generation itself: all methods of a batch size by turns, in one process, on the same prompts."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from steeple.bench.padded.config import PaddedBenchConfig
from steeple.bench.padded.methods import METHODS, Method, Run, run_method
from steeple.bench.padded.pairs import Pair, pairs
from steeple.bench.padded.plots import write_padded_plots
from steeple.errors import ConfigError
from steeple.evidence.environment import command_line, revision
from steeple.evidence.progress import Progress, silent
from steeple.hardware import cpu_name, pick_device
from steeple.padded import generate

SCHEMA_VERSION = 1
FACTS = ("tau", "mean_rows", "grouping_rate", "waste", "rounds", "refills", "moved", "prefills")


def run_padded_bench(
    config: PaddedBenchConfig, progress: Progress = silent, argv: Sequence[str] | None = None
) -> dict[str, Any]:
    """Run the bench; the result is ready for JSON.

    Args:
        progress: told after every run. argv: the command to put on record; the process's own by default.
    """
    started = time.perf_counter()
    if config.threads:
        torch.set_num_threads(config.threads)
    rows: list[dict[str, Any]] = []
    gains: list[dict[str, Any]] = []
    for pair in pairs(config):
        able = {name: method for name, method in METHODS.items() if bears(pair, method)}
        for batch in config.batch:
            chosen = {name: method for name, method in able.items() if batch == 1 or not method.one_row}
            runs = _by_turns(config, pair, batch, chosen, progress)
            own = [_row(pair, batch, name, chosen[name], found, runs) for name, found in runs.items()]
            rows += own
            gains.append({"pair": pair.name, "batch": batch, **split(own)})
    result = {
        "schema_version": SCHEMA_VERSION,
        "kind": "padded",
        "command": command_line() if argv is None else list(argv),
        "config": asdict(config),
        "environment": _environment(config),
        "rows": rows,
        "gains": gains,
        "seconds": time.perf_counter() - started,
    }
    if config.plots:
        write_padded_plots(result, Path(config.plots))
    return result


def bears(pair: Pair, method: Method) -> bool:
    """Whether the models of a pair bear a method; asked once, so that no run spends time on it."""
    if not method.holes:
        return True
    with contextlib.suppress(ConfigError):
        generate(pair.target, pair.assistant, pair.prompts[:1], max_tokens=1, **(method.settings or {}))
        return True
    return False


def _by_turns(
    config: PaddedBenchConfig, pair: Pair, batch: int, methods: Mapping[str, Method], progress: Progress
) -> dict[str, list[Run]]:
    """Every method has a run, then every method another, so that noise falls on all alike."""
    runs: dict[str, list[Run]] = {name: [] for name in methods}
    for turn in range(config.repeat):
        for done, (name, method) in enumerate(methods.items()):
            runs[name].append(run_method(method, pair, batch, config))
            progress(
                f"{pair.name}, batch {batch}: {name}", turn * len(methods) + done + 1, config.repeat * len(methods)
            )
    return runs


def _row(
    pair: Pair, batch: int, name: str, method: Method, found: Sequence[Run], runs: Mapping[str, Sequence[Run]]
) -> dict[str, Any]:
    """What is reported of one method: medians of speed, counts and shares of time of its last run."""
    speeds = [run.tokens_per_second for run in found]
    reference = next(iter(runs.values()))[0].tokens
    same = [own == other for own, other in zip(found[-1].tokens, reference, strict=True)]
    row: dict[str, Any] = {
        "pair": pair.name,
        "batch": batch,
        "method": name,
        "drafts": method.drafts,
        "tokens_per_second": median(speeds),
        "tokens_per_second_range": [min(speeds), max(speeds)],
        "like_transformers": sum(same) / len(same),
    }
    stats = found[-1].stats
    if stats is None:
        return {**row, **dict.fromkeys(FACTS), "shares": None}
    whole = sum(stats["seconds"].values())
    shares = {part: seconds / whole for part, seconds in stats["seconds"].items() if part != "probe"}
    return {**row, **{fact: stats[fact] for fact in FACTS}, "shares": shares}


def split(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Where the speed comes from, as ratios of tokens per second of two methods that differ in one thing."""
    speed = {row["method"]: row["tokens_per_second"] for row in rows}

    def over(one: str, other: str) -> float | None:
        return speed[one] / speed[other] if one in speed and other in speed else None

    return {
        "refill_plain": over("plain", "plain, no refill"),
        "refill_drafted": over("align", "align, no refill"),
        "drafting": over("align", "plain"),
        "grouping": over("pool", "align"),
        "no_alignment": over("holes", "align"),
        "best_over_transformers": max(s for m, s in speed.items() if m in ("align", "pool", "holes"))
        / speed["transformers"],
    }


def _environment(config: PaddedBenchConfig) -> dict[str, Any]:
    from steeple import __version__  # the package's own name for itself; it is whole only after import

    device = pick_device(config.device)
    return {
        "steeple": __version__,
        "revision": revision(Path(__file__).resolve().parents[2]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "loadavg": [round(value, 2) for value in os.getloadavg()],
    }
