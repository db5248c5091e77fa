"""The demonstration: the same real prompts generated twice in one run, plainly and speculatively, on the embedded
models; the tokens compared one by one, the times side by side. Float32, greedy: so equality is exact."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from steeple.config import check_range
from steeple.draft import NO_DRAFTER, drafter_config
from steeple.engine import Engine, EngineConfig, LoadedModel, build_engine, load_model
from steeple.evidence.environment import command_line, environment
from steeple.evidence.measure import Run, run_requests
from steeple.evidence.progress import Progress, silent
from steeple.evidence.prompts import PromptCutter, read_source
from steeple.request import Request, SpeculationStats
from steeple.types import SamplingParams


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demonstration runs: every drafter at every batch size, against plain decoding of the same prompts."""

    model: str = field(default="demo", metadata={"help": "folder, hub name or demo"})
    drafters: tuple[str, ...] = field(
        default=("ngram", "small_lm", "spire"), metadata={"help": "compared with plain decoding"}
    )
    batch: tuple[int, ...] = field(default=(1, 8), metadata={"help": "requests at once"})
    requests: int = field(default=8, metadata={"help": "prompts"})
    context: int = field(default=128, metadata={"help": "tokens per prompt"})
    max_tokens: int = field(default=64, metadata={"help": "tokens to generate per prompt"})
    k: int = field(default=4, metadata={"help": "nodes per round"})
    threads: int = field(default=0, metadata={"help": "torch threads, 0 = leave as they are"})

    def __post_init__(self) -> None:
        check_range("DemoConfig", "requests", self.requests, 1, 1024)
        check_range("DemoConfig", "context", self.context, 1, 1 << 20)
        check_range("DemoConfig", "max_tokens", self.max_tokens, 1, 1 << 20)
        for batch in self.batch:
            check_range("DemoConfig", "batch", batch, 1, 1024)


def run_demo(config: DemoConfig, progress: Progress = silent) -> dict[str, Any]:
    """Run the demonstration.

    Returns a dict with ``rows`` (one per batch and drafter: tokens_per_second over whole requests, prompts included;
    tau, acceptance_by_position, speed_up over plain decoding at the same batch, identical), ``identical`` (all of
    them), ``examples`` (prompt end, text) and the ``environment``.
    """
    target = load_model(config.model, EngineConfig(threads=config.threads))
    prompts = PromptCutter(read_source(), target.tokenizer, seed=0).cut(config.context, config.requests)
    methods = (NO_DRAFTER, *config.drafters)
    rows: list[dict[str, Any]] = []
    plain: dict[int, Run] = {}
    done, total = 0, len(config.batch) * len(methods)
    for batch in config.batch:
        for method in methods:
            progress(f"batch {batch}, drafter {method}", done, total)
            run = _generate(target, config, method, batch, prompts)
            plain.setdefault(batch, run[0])
            rows.append(_row(batch, method, run, plain[batch]))
            done += 1
    progress("done", done, total)
    outputs = plain[config.batch[0]].outputs
    decode = target.tokenizer.decode
    return {
        "rows": rows,
        "identical": all(row["identical"] for row in rows),
        "examples": [{"prompt": decode(p), "text": decode(o)} for p, o in zip(prompts, outputs, strict=True)],
        "requests": config.requests,
        "context": config.context,
        "max_tokens": config.max_tokens,
        "k": config.k,
        "temperature": 0.0,
        "dtype": "float32",
        "command": command_line(),
        "environment": environment(target),
    }


def _generate(
    target: LoadedModel, config: DemoConfig, method: str, batch: int, prompts: list[list[int]]
) -> tuple[Run, SpeculationStats]:
    """All prompts, ``batch`` at a time, after a short warm-up that is not counted."""
    drafter = drafter_config(method, k=config.k) if method != NO_DRAFTER else None
    longest = config.context + config.max_tokens
    settings = EngineConfig(batch_size=batch, kv_tokens=max(batch, 2) * (longest + 64), share_prefixes=False)
    engine: Engine = build_engine(target, settings, drafter)
    warm = SamplingParams(max_tokens=2 * config.k, ignore_eos=True)
    run_requests(engine, [Request(f"warm-{i}", p, warm) for i, p in enumerate(prompts[:batch])])
    params = SamplingParams(max_tokens=config.max_tokens, ignore_eos=True)
    run = run_requests(engine, [Request(f"demo-{i}", p, params) for i, p in enumerate(prompts)])
    return run, engine.stats.speculation


def _row(batch: int, method: str, run: tuple[Run, SpeculationStats], plain: Run) -> dict[str, Any]:
    timing, stats = run[0].timing, run[1]
    return {
        "batch": batch,
        "drafter": method,
        "tokens_per_second": timing.total_tokens / timing.total_seconds,
        "seconds": timing.total_seconds,
        "tau": stats.tau,
        "acceptance_by_position": stats.acceptance_by_position,
        "speed_up": plain.timing.total_seconds / timing.total_seconds,
        "identical": run[0].outputs == plain.outputs,
    }
