"""Throughput by number of micro-batches: on the real engine, and where drafter and target have a device each.

    python bench/pipeline.py --json bench/results/pipeline.json
    python bench/pipeline.py --quick --json quick.json

Real: the same prompts for every number; numbers take turns, the median of the repetitions counts. Simulated: the same
engine, but its drafter sleeps instead of computing, and its target's forward is stretched by sleeping, to given seconds
a call and a request; ``predicted`` is what ``steeple.plan.pipeline`` makes of the same seconds. Tokens per second are
counted from the moment when all requests decode until the first one ends.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steeple.cache.paged import PagedCache
from steeple.draft import drafter_config
from steeple.draft.base import Drafter, DrafterConfig, Needs, Surroundings, chains
from steeple.engine import Engine, EngineConfig, LoadedModel, build_engine, load_model
from steeple.evidence.environment import command_line, environment
from steeple.evidence.prompts import PromptCutter, read_source
from steeple.model.decoder import Hidden
from steeple.plan.pipeline import PipelinedRound
from steeple.request import Request
from steeple.types import Batch, Draft, SamplingParams

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Device:
    """A simulated device: seconds of every call, and of every request in it."""

    call: float
    request: float

    def seconds(self, requests: int) -> float:
        return self.call + self.request * requests


@dataclass(frozen=True, kw_only=True)
class SleepConfig:
    """Settings of a drafter that sleeps and proposes the newest token again."""

    k: int
    device: Device

    def build(self, _around: Surroundings) -> Drafter:
        return Sleeper(self)


class Sleeper:
    """The drafter. It gives its thread away while it sleeps, as one that waits for a device would."""

    def __init__(self, config: SleepConfig) -> None:
        self._config, self.needs = config, Needs(nodes=config.k)

    def prepare(self, cache: PagedCache) -> None: ...

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> Draft:
        time.sleep(self._config.device.seconds(len(requests)))
        return chains([r.tokens[-1:].repeat(n) for r, n in zip(requests, budget, strict=True)], "cpu")

    def observe(
        self, requests: Sequence[Request], batch: Batch, kept: Sequence[Sequence[int]], hidden: Hidden
    ) -> None: ...

    def forget(self, request: Request) -> None: ...

    def check_integrity(self) -> None: ...


def slowed(engine: Engine, device: Device) -> Engine:
    """The engine with a target whose forward takes the seconds of ``device``, if that is more than its own."""
    forward = engine._runner.forward

    def slow(batch: Batch, **options: Any) -> Hidden:
        start = time.perf_counter()
        hidden = forward(batch, **options)
        time.sleep(max(0.0, start + device.seconds(len(batch.request_ids)) - time.perf_counter()))
        return hidden

    engine._runner.forward = slow  # type: ignore[method-assign]
    return engine


def rate(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> float:
    """Tokens per second while all requests decode."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    requests = [Request(f"r{i}", list(prompt), params) for i, prompt in enumerate(prompts)]
    for request in requests:
        engine.add(request)
    while not all(r.ready for r in requests):
        engine.step()
    written, start = 0, time.perf_counter()
    while not any(r.finished for r in requests):
        written += sum(len(own.tokens) for own in engine.step())
    seconds = time.perf_counter() - start
    while not engine.idle:
        engine.step()
    engine.check_integrity()
    return written / seconds


def engines(
    target: LoadedModel, settings: EngineConfig, drafter: DrafterConfig, counts: Sequence[int]
) -> dict[int, Engine]:
    """An engine for each number of micro-batches."""
    values = asdict(settings)
    return {m: build_engine(target, EngineConfig(**{**values, "micro_batches": m}), drafter) for m in counts}


def measured(
    made: dict[int, Engine], prompts: Sequence[Sequence[int]], tokens: int, repeat: int
) -> list[dict[str, Any]]:
    """A row for each number; the first turn of all does not count."""
    rates: dict[int, list[float]] = {m: [] for m in made}
    for turn in range(repeat + 1):
        for m, engine in made.items():
            found = rate(engine, prompts, tokens)
            if turn:
                rates[m].append(found)
    return [
        {
            "micro_batches": m,
            "tokens_per_second": round(statistics.median(found), 2),
            "spread": [round(min(found), 2), round(max(found), 2)],
        }
        for m, found in rates.items()
    ]


def real(target: LoadedModel, settings: EngineConfig, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every drafter, batch and number on this machine."""
    cutter = PromptCutter(read_source(), target.tokenizer, args.seed)
    out = []
    for name in args.drafters:
        drafter = drafter_config(name, k=args.k)
        if drafter is None:
            raise SystemExit("there is nothing to pipeline without a drafter")
        made = engines(target, settings, drafter, args.counts)
        for batch in args.batches:
            rows = measured(made, cutter.cut(args.context, batch), args.tokens, args.repeat)
            out.append({"drafter": name, "k": args.k, "batch": batch, "context": args.context, "rows": rows})
            sys.stdout.write(f"{out[-1]}\n")
    return out


def simulated(target: LoadedModel, settings: EngineConfig, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Two devices that sleep: the draft's as fast as the target's, half, and a quarter of its time."""
    cutter = PromptCutter(read_source(), target.tokenizer, args.seed)
    verify = Device(call=args.call, request=args.request)
    out = []
    for share in args.shares:
        draft = Device(call=share * verify.call, request=share * verify.request)
        made = {
            m: slowed(engine, verify)
            for m, engine in engines(target, settings, SleepConfig(k=args.k, device=draft), args.counts).items()
        }
        for batch in args.batches:
            rows = measured(made, cutter.cut(args.context, batch), args.tokens, args.repeat)
            rounds = {
                m: PipelinedRound(m, draft.seconds(batch // m), verify.seconds(batch // m))
                for m in args.counts
                if 0 < m <= batch
            }
            for row in rows:
                if row["micro_batches"] in rounds and 1 in rounds:
                    row["predicted"] = round(rounds[1].separate / rounds[row["micro_batches"]].separate, 3)
            one = next((row["tokens_per_second"] for row in rows if row["micro_batches"] == 1), None)
            for row in rows:
                row["speed_up"] = round(row["tokens_per_second"] / one, 3) if one else None
            out.append({"draft": asdict(draft), "verify": asdict(verify), "batch": batch, "rows": rows})
            sys.stdout.write(f"{out[-1]}\n")
    return out


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--drafters", nargs="+", default=["small_lm", "spire", "ngram"])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 3, 4, 0], help="0 = as many as pay")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.5, 0.25], help="draft over verification")
    parser.add_argument("--call", type=float, default=0.02, help="seconds of a simulated verification")
    parser.add_argument("--request", type=float, default=0.002, help="and of each request in it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one repetition of next to nothing: does it run?")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    if args.quick:
        args.batches, args.context, args.tokens, args.repeat = [4], 64, 12, 1
        args.drafters, args.counts, args.shares = args.drafters[:1], [1, 2, 0], [1.0]
    settings = EngineConfig(dtype=args.dtype, batch_size=max(args.batches), kv_tokens=2 * max(args.batches) * 1024)
    target = load_model(args.model, settings)
    result = {
        "schema_version": SCHEMA,
        "kind": "pipeline",
        "command": command_line(),
        "environment": environment(target),
        "real": real(target, settings, args),
        "simulated": simulated(target, settings, args),
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
