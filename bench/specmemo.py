"""Generation memory against throughput: plain decoding, speculation as a naive engine does it, and Steeple in budgets.

    python bench/specmemo.py --json bench/results/specmemo.json --plots bench/results/plots-specmemo

*Generation memory* is every byte beyond the target's weights: caches, draft weights, rooms, laws, block tables. What
each contestant is given:

- *plain*: no drafter; a cache as long as the requests need.
- *naive*: a drafter and k nodes, and a static cache of ``batch x max_context`` positions for the target and as much for
  the drafter, reserved before the first request, prompts of the whole batch in one forward. So do engines with static
  caches: gpt-fast (``setup_caches(max_batch_size, max_seq_length)``) and MagicDec, which is built on it, for both
  models; transformers' ``StaticCache(max_batch_size, max_cache_len)``.
- *exact*: the same with caches as long as the requests need. What lies between it and naive is what is saved by knowing
  how long requests are, what lies between it and Steeple is the rest.
- *steeple*: ``memory_budget`` = the target's weights and a share of naive's generation memory. The planner decides what
  is given up (docs/memory.md).

Every turn is a process of its own; contestants take turns. Two memories are reported: what the engine allocates and
plans for its costliest step, and the growth of the process' peak (torch's allocator on a GPU) from after the target was
loaded, with every page of every cache written once, as a static cache's are. Tokens per second are those of the whole
run, prompts included. ``--tiny`` runs everything once, small, to see that it works.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from steeple.bench.step.table import fill_page
from steeple.draft import drafter_config
from steeple.engine import Engine, EngineConfig, build_engine, load_model
from steeple.evidence.environment import command_line, environment
from steeple.evidence.measure import run_requests
from steeple.evidence.prompts import PromptCutter, read_source
from steeple.request import Request
from steeple.types import SamplingParams

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One run of one contestant. ``kv_tokens``: positions of the cache; ``budget``: bytes, 0 = none."""

    name: str
    kind: str
    drafter: str
    k: int
    model: str
    dtype: str
    device: str
    batch: int
    context: int
    max_tokens: int
    max_context: int
    temperature: float
    kv_tokens: int
    step_tokens: int
    threads: int
    budget: int = 0
    share: float = 0.0

    @property
    def config(self) -> EngineConfig:
        return EngineConfig(
            dtype=self.dtype,
            device=self.device,
            batch_size=self.batch,
            max_context=self.max_context,
            kv_tokens=self.kv_tokens,
            step_tokens=self.step_tokens,
            share_prefixes=False,
            threads=self.threads,
            memory_budget=str(self.budget) if self.budget else "",
        )


def requests_of(turn: Turn, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Request]:
    params = SamplingParams(temperature=turn.temperature, max_tokens=max_tokens, ignore_eos=True, seed=7)
    return [Request(f"{max_tokens}-{place}", prompt, params) for place, prompt in enumerate(prompts)]


def reset_peak(device: torch.device) -> int:
    """Give back what is free, begin to watch; bytes of the process (or of tensors on the GPU) now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")  # VmHWM begins anew
    return _status("VmRSS")


def peak(device: torch.device) -> int:
    """The most bytes since ``reset_peak``."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
    return int(fields[field].split()[0]) * 1024


def touch(engine: Engine) -> None:
    """Write every page of the caches: what is reserved is then in memory."""
    for cache in (engine.cache, getattr(engine.drafter, "cache", None)):
        if cache is not None:
            for tensor in (cache.keys, cache.values):
                tensor.view(torch.uint8).fill_(0)


def run_turn(turn: Turn) -> dict[str, Any]:
    """Load, build, warm up, run. Called in a process of its own."""
    config = turn.config
    target = load_model(turn.model, config)
    prompts = PromptCutter(read_source(), target.tokenizer, 0).cut(turn.context, turn.batch)
    before = reset_peak(target.device)
    drafter = drafter_config(turn.drafter, k=turn.k) if turn.k else None
    engine = build_engine(target, config, drafter)
    touch(engine)
    run_requests(engine, requests_of(turn, prompts[:1], min(turn.max_tokens, 8)))
    run = run_requests(engine, requests_of(turn, prompts, turn.max_tokens))
    most = peak(target.device) - before
    report = engine.memory
    if report is None or engine.parts.plan is None:
        raise SystemExit("the engine has no plan of its memory")
    load = engine.parts.plan.load
    timing, rounds = run.timing, engine.stats.speculation
    return {
        "tokens_per_second": timing.total_tokens / timing.total_seconds,
        "steady_tokens_per_second": timing.tokens_per_second if timing.rounds else None,
        "tokens_per_pass": rounds.tau,
        "peak_bytes": most,
        "planned_bytes": report.most - report.predicted["target weights"],
        "held_bytes": sum(report.allocated.values()) - report.allocated["target weights"],
        "weight_bytes": report.allocated["target weights"],
        "parts": engine.parts.plan.parts,
        "chosen": asdict(load),
        "sacrificed": list(report.sacrificed),
        "warning": report.warning,
        "outputs": [output[:8] for output in run.outputs],
        "environment": environment(target),
    }


def child(turn: Turn) -> dict[str, Any]:
    """``run_turn`` in a new process; what it found."""
    command = [sys.executable, __file__, "--turn", json.dumps(asdict(turn))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{turn.name} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def contestants(given: argparse.Namespace) -> list[Turn]:
    """All but those in budgets. The first naive one is what all others are compared with."""
    size = 16  # of a block; drafts stand behind the text, and each request rounds up
    longest = given.context + given.max_tokens
    if longest > given.max_context:
        raise SystemExit(f"context + max_tokens = {longest} exceeds --max-context {given.max_context}; raise it.")
    most = max(given.naive_k + given.k)
    exact = given.batch * (-(-(longest + most) // size) + 1) * size
    base = Turn(
        name="plain",
        kind="plain",
        drafter="none",
        k=0,
        model=given.model,
        dtype=given.dtype,
        device=given.device,
        batch=given.batch,
        context=given.context,
        max_tokens=given.max_tokens,
        max_context=given.max_context,
        temperature=given.temperature,
        kv_tokens=exact,
        step_tokens=2048,
        threads=given.threads,
    )
    static = replace(base, kv_tokens=given.batch * given.max_context, step_tokens=given.batch * given.context)
    found = [base]
    for k in given.naive_k:
        found.append(replace(static, name=f"naive k={k}", kind="naive", drafter=given.naive, k=k))
    for k in given.naive_k:
        found.append(replace(base, name=f"exact k={k}", kind="exact", drafter=given.naive, k=k))
    return found


def budgeted(given: argparse.Namespace, base: Turn, naive: dict[str, Any]) -> list[Turn]:
    """Steeple at every share of the naive engine's generation memory, with every drafter and k."""
    found = []
    for drafter in given.drafters:
        for k in given.k:
            for share in given.shares:
                budget = naive["weight_bytes"] + int(share * naive["planned_bytes"])
                name = f"steeple {drafter} k={k} at {share:.0%}"
                found.append(replace(base, name=name, kind="steeple", drafter=drafter, k=k, budget=budget, share=share))
    return found


def summary(turns: Sequence[Turn], results: dict[str, list[dict[str, Any]]], reference: Turn) -> list[dict[str, Any]]:
    """A row for each contestant: medians, and how they stand to the reference."""

    def middle(name: str, field: str) -> float:
        return statistics.median(result[field] for result in results[name])

    rows = []
    fastest = max(middle(turn.name, "tokens_per_second") for turn in turns if turn.kind == "naive")
    for turn in turns:
        of = results[turn.name]
        row = {
            **asdict(turn),
            "tokens_per_second": middle(turn.name, "tokens_per_second"),
            "tokens_per_second_all": [result["tokens_per_second"] for result in of],
            "peak_bytes": middle(turn.name, "peak_bytes"),
            **{name: of[0][name] for name in ("planned_bytes", "held_bytes", "chosen", "sacrificed", "parts")},
            "tokens_per_pass": of[0]["tokens_per_pass"],
            "same_text": [result["outputs"] == results[reference.name][0]["outputs"] for result in of],
        }
        for field in ("tokens_per_second", "peak_bytes", "planned_bytes", "held_bytes"):
            row[f"{field}_of_naive"] = row[field] / middle(reference.name, field)
        row["tokens_per_second_of_fastest_naive"] = row["tokens_per_second"] / fastest
        rows.append(row)
    return rows


def plot(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Throughput against the measured peak of generation memory."""
    from matplotlib.figure import Figure  # only whoever asks for plots waits for it

    from steeple.bench.figures import write_figures

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        label = f"{row['drafter']} k={row['k']} in budgets" if row["kind"] == "steeple" else row["name"]
        groups.setdefault(label, []).append(row)
    for label, members in groups.items():
        members.sort(key=lambda row: row["peak_bytes"])
        at = [row["peak_bytes"] / 2**20 for row in members]
        axes.plot(at, [row["tokens_per_second"] for row in members], "o-", label=label)
    first = rows[0]
    axes.set(xlabel="peak generation memory, MiB", ylabel="tokens per second, whole run", ylim=(0, None))
    axes.set_title(f"{first['model']}, {first['dtype']}, batch {first['batch']}, context {first['context']}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    write_figures({"specmemo": figure}, folder)


def markdown(rows: Sequence[dict[str, Any]], repeats: int) -> str:
    """A table of all contestants."""
    first = rows[0]
    lines = [
        f"{first['model']}, {first['dtype']}, batch {first['batch']}, prompts of {first['context']} tokens, "
        f"{first['max_tokens']} written, static caches for {first['max_context']}; T = {first['temperature']:g}; "
        f"medians of {repeats} turns. Memory and the first share of speed are compared with {rows[1]['name']}.",
        "",
        "| contestant | tokens/s | of naive | of the fastest naive | peak MiB | of naive | allocated at the start MiB "
        "| given up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['name']} | {row['tokens_per_second']:.1f} | {row['tokens_per_second_of_naive']:.2f} "
        f"| {row['tokens_per_second_of_fastest_naive']:.2f} | {row['peak_bytes'] / 2**20:.1f} "
        f"| {row['peak_bytes_of_naive']:.2f} | {row['held_bytes'] / 2**20:.1f} "
        f"| {'; '.join(row['sacrificed']) or 'nothing'} |"
        for row in rows
    ]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", default="demo")
    found.add_argument("--dtype", default="bfloat16")
    found.add_argument("--device", default="auto")
    found.add_argument("--threads", type=int, default=0)
    found.add_argument("--batch", type=int, default=8)
    found.add_argument("--context", type=int, default=1024, help="tokens of each prompt")
    found.add_argument("--max-tokens", type=int, default=128)
    found.add_argument("--max-context", type=int, default=4096, help="what static caches are made for")
    found.add_argument("--temperature", type=float, default=0.0)
    found.add_argument("--naive", default="small_lm", help="drafter of the naive engine")
    found.add_argument("--naive-k", type=int, nargs="+", default=[16, 4], help="the first is the reference for memory")
    found.add_argument("--drafters", nargs="+", default=["small_lm", "spire"], help="of Steeple in budgets")
    found.add_argument("--k", type=int, nargs="+", default=[4])
    found.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.5, 0.35, 0.25, 0.15])
    found.add_argument("--repeats", type=int, default=5)
    found.add_argument("--json", type=Path)
    found.add_argument("--plots", type=Path)
    found.add_argument("--page", type=Path, help="put the table into this page")
    found.add_argument("--tiny", action="store_true", help="one small turn of each, to see that it works")
    found.add_argument("--turn", help=argparse.SUPPRESS)
    return found


def run_all(given: argparse.Namespace) -> tuple[list[Turn], dict[str, list[dict[str, Any]]]]:
    """All turns of all contestants, repeat by repeat; the second contestant is the reference."""
    turns = contestants(given)
    results = {turn.name: [child(turn)] for turn in turns}
    more = budgeted(given, turns[0], results[turns[1].name][0])
    results.update({turn.name: [child(turn)] for turn in more})
    turns += more
    for repeat in range(1, given.repeats):
        for place in range(len(turns)):  # one later each time: a machine that slows down slows all alike
            turn = turns[(place + repeat) % len(turns)]
            results[turn.name].append(child(turn))
    return turns, results


def write(given: argparse.Namespace, rows: Sequence[dict[str, Any]], first: dict[str, Any]) -> None:
    """JSON, plot and page, as far as they are asked for. ``first``: a result of the reference."""
    if given.json:
        whole = {
            "command": command_line(),
            "environment": first["environment"],
            "reference": rows[1]["name"],
            "target_weight_bytes": first["weight_bytes"],
            "repeats": given.repeats,
            "rows": rows,
        }
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if given.plots:
        plot(rows, given.plots)
    if given.page:
        page = given.page.read_text(encoding="utf-8")
        given.page.write_text(fill_page(page, "specmemo", markdown(rows, given.repeats)), encoding="utf-8")


def main() -> None:
    """Turns, a table on the terminal, and files."""
    given = parser().parse_args()
    if given.turn:
        sys.stdout.write(json.dumps(run_turn(Turn(**json.loads(given.turn)))) + "\n")
        return
    if given.tiny:
        given.batch, given.context, given.max_tokens, given.max_context, given.repeats = 2, 64, 16, 512, 1
        given.shares, given.drafters, given.naive_k = [0.5, 0.2], given.drafters[:1], given.naive_k[:1]
    turns, results = run_all(given)
    rows = summary(turns, results, turns[1])
    for row in rows:
        sys.stdout.write(
            f"{row['name']:36} {row['tokens_per_second']:8.1f} tok/s ({row['tokens_per_second_of_naive']:.2f}x)  "
            f"peak {row['peak_bytes'] / 2**20:8.1f} MiB ({row['peak_bytes_of_naive']:.2f})  "
            f"planned {row['planned_bytes'] / 2**20:8.1f} MiB  {'; '.join(row['sacrificed'])}\n"
        )
    write(given, rows, results[turns[1].name][0])


if __name__ == "__main__":
    main()
