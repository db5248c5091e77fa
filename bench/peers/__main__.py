"""The command: same prompts, same checkpoint, every engine in its turn, one table.

python -m bench.peers --model models/target --draft models/small --cells 1x64,8x64,8x1024 --json peers.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.peers.contestants import CATALOG, REFERENCE, Contestant
from bench.peers.driver import Contest, Plan
from bench.peers.install import DEFAULT_ENVS, installed, interpreter
from bench.peers.table import peers_table
from steeple import hf
from steeple.evidence.environment import revision
from steeple.evidence.prompts import PromptCutter, Source, read_source
from steeple.hardware import cpu_name

SCHEMA_VERSION = 1
SLACK = 64  # positions beyond the last token, for drafts and for rounding to blocks
WIDTH = 150  # of the table in a file
OURS = "steeple"


def options() -> argparse.ArgumentParser:
    """What can be given."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/target", help="folder of the checkpoint")
    parser.add_argument("--draft", default="", help="folder of a draft model; without it those that need one skip")
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--context", default="64,1024")
    parser.add_argument("--cells", default="", help="BATCHxCONTEXT,... instead of all pairs of --batch and --context")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cell-seconds", type=float, default=120, help="no further repeat in a cell after so long")
    parser.add_argument("--timeout", type=float, default=120, help="seconds a worker may take for one run")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--k", type=int, default=4, help="drafted tokens per round")
    parser.add_argument("--step-tokens", type=int, default=8192, help="most rows of a forward, where there is a limit")
    parser.add_argument(
        "--compared", type=int, default=4, help="requests of a cell that the float32 reference completes"
    )
    parser.add_argument("--only", default="", help="names or peers, e.g. openvino,steeple/none")
    parser.add_argument("--prompts", default="", help=".txt or .jsonl; without it held-out files of the interpreter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--envs", type=Path, default=DEFAULT_ENVS, help="folder of the peers' environments")
    parser.add_argument("--logs", type=Path, help="folder for what the workers print")
    parser.add_argument("--json", default="", help="file for the result")
    return parser


def cells(given: argparse.Namespace) -> list[tuple[int, int]]:
    """``(batch, context)`` of every cell."""
    if given.cells:
        pairs = (cell.split("x") for cell in given.cells.split(","))
        return [(int(batch), int(context)) for batch, context in pairs]
    return [(int(b), int(c)) for b in given.batch.split(",") for c in given.context.split(",")]


def chosen(only: str) -> list[Contestant]:
    """Those that ``only`` names, all of them if it is empty. ``SystemExit`` if it names nobody that is known."""
    names = [name for name in only.split(",") if name]
    known = {who.name for who in CATALOG} | {who.peer for who in CATALOG}
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"--only: {unknown[0]!r} is unknown; give some of {', '.join(sorted(known))}")
    return [who for who in CATALOG if not names or who.name in names or who.peer in names]


def make_plan(given: argparse.Namespace, source: Source, logs: Path) -> Plan:
    """Prompts, room and limits for all cells."""
    every = cells(given)
    cutter = PromptCutter(source, hf.load_tokenizer(Path(given.model)), given.seed)
    most = {context: max(b for b, c in every if c == context) for _, context in every}
    length = max(context for _, context in every) + given.max_tokens
    limit = json.loads((Path(given.model) / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    load = {
        "model": str(Path(given.model).resolve()),
        "draft": str(Path(given.draft).resolve()) if given.draft else "",
        "dtype": given.dtype,
        "threads": given.threads,
        "k": given.k,
        "batch": max(batch for batch, _ in every),
        "length": min(length + SLACK, limit or length + SLACK),
        "kv_tokens": max(batch * (context + given.max_tokens + SLACK) for batch, context in every),
        "step_tokens": given.step_tokens,
        "folder": str((given.envs / "models" / _digest(given.model, given.draft)).resolve()),
    }
    prompts = {context: cutter.cut(context, batch) for context, batch in most.items()}
    limits = {"cell_seconds": given.cell_seconds, "compared": given.compared, "timeout": given.timeout}
    return Plan(every, prompts, load, logs, given.max_tokens, given.repeat, **limits)


def _digest(*folders: str) -> str:
    """Changes when a checkpoint does, so that nobody runs an outdated conversion of it."""
    files = [file for folder in folders if folder for file in sorted(Path(folder).resolve().iterdir())]
    what = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def skipped(given: argparse.Namespace, everyone: Sequence[Contestant]) -> dict[str, str]:
    """Why somebody takes no part, by name."""
    reasons = {}
    for who in everyone:
        if who.peer != OURS and not installed(given.envs, who.peer):
            reasons[who.name] = f"not installed: python bench/peers/install.py {who.peer}"
        elif who.draft and not given.draft:
            reasons[who.name] = "no draft model was given"
    return reasons


def python_of(envs: Path, peer: str) -> Path:
    """The interpreter that a peer's worker runs in."""
    return Path(sys.executable) if peer == OURS else interpreter(envs, peer)


def surroundings(given: argparse.Namespace) -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        "revision": revision(Path(__file__).resolve().parents[2] / "src" / OURS),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": given.threads,
        "loadavg": [round(value, 2) for value in os.getloadavg()],
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print the table, write the file; returns what was written."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    given = options().parse_args(arguments)
    everyone = chosen(given.only)
    started = time.perf_counter()
    source = read_source(given.prompts)
    logs = given.logs or Path(tempfile.mkdtemp(prefix="steeple-peers-"))
    logs.mkdir(parents=True, exist_ok=True)
    reference = (REFERENCE, python_of(given.envs, REFERENCE.peer)) if installed(given.envs, REFERENCE.peer) else None

    def tell(text: str) -> None:
        sys.stderr.write(f"[{time.perf_counter() - started:4.0f} s] {text}\n")

    contest = Contest(
        make_plan(given, source, logs),
        [(who, python_of(given.envs, who.peer)) for who in everyone],
        skipped(given, everyone),
        reference,
        tell,
    )
    environment = surroundings(given)
    rows = contest.run()
    result = {
        "schema_version": SCHEMA_VERSION,
        "kind": "peers",
        "command": ["python", "-m", "bench.peers", *arguments],
        "config": {name: str(v) if isinstance(v, Path) else v for name, v in vars(given).items() if name != "envs"},
        "environment": environment,
        "versions": contest.versions,
        "prompts": {"source": source.name, "sha256": source.digest},
        "seconds": time.perf_counter() - started,
        "rows": rows,
    }
    if given.json:
        Path(given.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    Console(width=None if sys.stdout.isatty() else WIDTH).print(peers_table(result))
    return result


if __name__ == "__main__":
    main()
