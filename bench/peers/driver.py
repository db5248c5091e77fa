"""Cell by cell, repeat by repeat, every contestant in its turn; all others sleep meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.peers.contestants import Contestant, Figures, agreement, figures, summary
from bench.peers.worker import Worker, WorkerError
from steeple.bench.workload import turns

WARM_CONTEXT, WARM_TOKENS = 64, 12  # enough to build kernels for the shapes of decoding
LOAD_SECONDS = 300
Prompts = list[list[int]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run. ``prompts``: by context, enough for the largest batch. ``load``: a worker's ``Load`` but for the
    method. ``cell_seconds``: no further repeat begins in a cell that has taken so long. ``compared``: requests of a
    cell that the reference completes too. ``timeout``: seconds a worker may take for one run.
    """

    cells: Sequence[tuple[int, int]]
    prompts: Mapping[int, Prompts]
    load: dict[str, Any]
    logs: Path
    max_tokens: int = 32
    repeat: int = 3
    cell_seconds: float = 120.0
    compared: int = 4
    timeout: float = 120.0


@dataclass(slots=True)
class _Entry:
    """A contestant's state: its worker, or why it has none; and what it did in the cell at hand."""

    contestant: Contestant
    interpreter: Path
    dtype: str
    worker: Worker | None = None
    max_batch: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    never: str = ""  # why it takes no part at all
    error: str = ""
    runs: list[Figures] = field(default_factory=list)
    outputs: Prompts = field(default_factory=list)


class Contest:
    """Runs a plan.

    Args:
        contestants: with the interpreter of each. skipped: reasons by name, for those that do not take part.
        reference: whose float32 outputs are the measure of agreement, with its interpreter; None: nobody's.
        tell: is told what is being done.
    """

    def __init__(
        self,
        plan: Plan,
        contestants: Sequence[tuple[Contestant, Path]],
        skipped: Mapping[str, str],
        reference: tuple[Contestant, Path] | None,
        tell: Callable[[str], None],
    ) -> None:
        self._plan, self._tell = plan, tell
        dtype = plan.load["dtype"]
        self._entries = [_Entry(who, where, dtype, never=skipped.get(who.name, "")) for who, where in contestants]
        self._reference = _Entry(*reference, dtype="float32") if reference is not None else None
        self._exact: dict[int, Prompts] = {}

    @property
    def versions(self) -> dict[str, dict[str, str]]:
        """Of every peer that was loaded."""
        return {entry.contestant.peer: entry.versions for entry in self._entries if entry.versions}

    def run(self) -> list[dict[str, Any]]:
        """All rows: one for every contestant in every cell, measured, failed or skipped."""
        try:
            self._exact_outputs()
            for entry in self._entries:
                self._wake(entry)
            return [row for batch, context in self._plan.cells for row in self._cell(batch, context)]
        finally:
            for entry in self._entries:
                if entry.worker is not None:
                    entry.worker.close()

    def _exact_outputs(self) -> None:
        """The reference's outputs, once per context: a request's do not depend on its neighbours'."""
        entry = self._reference
        if entry is None:
            return
        self._wake(entry)
        for context, prompts in self._plan.prompts.items():
            if entry.worker is None:
                break
            self._tell(f"reference, context {context}")
            if self._ask(entry, prompts[: self._plan.compared], self._plan.max_tokens):
                self._exact[context] = entry.outputs
            else:
                self._tell(f"no reference for context {context}: {entry.error}")
        if entry.worker is not None:
            entry.worker.close()  # its float32 weights and keys would only be in the way

    def _wake(self, entry: _Entry) -> None:
        """Start a worker that is not there; after a failure to load it is not tried again."""
        if entry.never:
            return
        who = entry.contestant
        self._tell(f"load {who.name}")
        threads = str(self._plan.load["threads"])
        variables = os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        log = self._plan.logs / f"{who.name.replace('/', '-')}.txt"
        entry.worker = Worker(entry.interpreter, who.script, variables, log)
        load = self._plan.load | {"method": who.method, "dtype": entry.dtype}
        try:
            answer = entry.worker.ask({"op": "load", "load": load}, LOAD_SECONDS)
        except WorkerError as error:
            entry.never = f"does not load: {error}"
            self._tell(f"{who.name} {entry.never}")
            entry.worker.close()
            entry.worker = None
            return
        entry.max_batch, entry.versions = answer["max_batch"], answer["versions"]

    def _ask(self, entry: _Entry, prompts: Prompts, max_tokens: int) -> Figures | None:
        """One run; its figures, or None and the reason in ``entry.error``."""
        assert entry.worker is not None
        try:
            answer = entry.worker.ask({"op": "run", "prompts": prompts, "max_tokens": max_tokens}, self._plan.timeout)
        except WorkerError as error:
            entry.error = str(error)
            entry.worker.close()  # who knows what it left behind; the next cell begins with a new one
            self._tell(f"{entry.contestant.name}: {error}")
            return None
        lengths = {len(output) for output in answer["outputs"]}
        if lengths != {max_tokens} or [len(of) for of in answer["times"]] != [max_tokens] * len(prompts):
            entry.error = f"wrote {sorted(lengths)} tokens where {max_tokens} were asked for"
            return None
        entry.outputs = answer["outputs"]
        return figures(answer["times"])

    def _cell(self, batch: int, context: int) -> list[dict[str, Any]]:
        plan, where = self._plan, f"batch {batch}, context {context}"
        prompts = plan.prompts[context][:batch]
        playing = {e.contestant.name: e for e in self._entries if self._warm_up(e, prompts, where)}
        started, order = time.monotonic(), list(playing)
        for number, name in turns(order, plan.repeat):
            if number and name == order[number % len(order)]:  # a repeat begins
                used = time.monotonic() - started
                if used + used / number > plan.cell_seconds:
                    break
            entry = playing[name]
            if not entry.error:
                self._tell(f"{where}: {name}, repeat {number + 1}")
                run = self._ask(entry, prompts, plan.max_tokens)
                entry.runs.extend([run] if run is not None else [])
        return [self._row(entry, batch, context) for entry in self._entries]

    def _warm_up(self, entry: _Entry, prompts: Prompts, where: str) -> bool:
        """Make ``entry`` ready for a cell; whether it takes part in it."""
        entry.error, entry.runs, entry.outputs = "", [], []
        if entry.max_batch and len(prompts) > entry.max_batch:
            return False
        if entry.worker is None or not entry.worker.alive:  # it failed in the cell before
            self._wake(entry)
        if entry.worker is None:
            return False
        self._tell(f"{where}: {entry.contestant.name}, warm-up")
        short = [prompt[:WARM_CONTEXT] for prompt in prompts]
        return self._ask(entry, short, min(self._plan.max_tokens, WARM_TOKENS)) is not None

    def _row(self, entry: _Entry, batch: int, context: int) -> dict[str, Any]:
        who = entry.contestant
        row: dict[str, Any] = {"name": who.name, "peer": who.peer, "method": who.method, "batch": batch}
        row |= {"context": context, "speculative": who.speculative}
        if entry.never:
            return row | {"skipped": entry.never}
        if entry.max_batch and batch > entry.max_batch:
            return row | {"skipped": f"batch {entry.max_batch} only"}
        if entry.error:
            return row | {"error": entry.error}
        row |= summary(entry.runs, batch, who.speculative)
        row["agreement"] = agreement(entry.outputs, self._exact.get(context, []))
        plain = next((e for e in self._entries if e.contestant.name == f"{who.peer}/{who.plain}"), None)
        row["agreement_plain"] = agreement(entry.outputs, plain.outputs) if plain is not None else None
        return row
