"""What a worker speaks: one JSON object a line, asked on standard input and answered on standard output.

``load`` (a ``Load`` as JSON) is answered by ``{"versions", "max_batch"}``; ``run`` (``prompts``, ``max_tokens``) by
``{"outputs", "times"}``: the token ids of every request and the seconds after the start of the run at which each of
them was known. A failure is answered by ``{"error"}``. This file runs in every peer's interpreter: no imports beyond
the standard library's.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Load:
    """What a contestant loads.

    Attributes:
        model, draft: folders of checkpoints; draft is empty if there is none. method: one of the adapter's own.
        dtype: of weights and keys. threads: of compute. k: most drafted tokens a round. batch: most requests of a run.
        length: most tokens of one request. kv_tokens: most positions of a whole run. step_tokens: most rows of one
        forward, where a peer has such a limit. folder: for converted checkpoints, kept between invocations.
    """

    model: str
    draft: str
    method: str
    dtype: str
    threads: int
    k: int
    batch: int
    length: int
    kv_tokens: int
    step_tokens: int
    folder: str


def kv_bytes_per_token(folder: str) -> int:
    """Bytes of keys and values per position of the checkpoint in ``folder``, in bfloat16."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * 2 * int(config["num_hidden_layers"]) * int(heads) * int(size)


class Timeline:
    """When each request's tokens came, in seconds after the start of the run."""

    def __init__(self, requests: int) -> None:
        self.times: list[list[float]] = [[] for _ in range(requests)]
        self.start = time.perf_counter()

    def add(self, request: int, tokens: int, at: float | None = None) -> None:
        """``tokens`` more of ``request`` are known now, or were ``at`` (``time.perf_counter``)."""
        moment = time.perf_counter() if at is None else at
        self.times[request].extend([moment - self.start] * tokens)

    def answer(self, outputs: list[list[int]]) -> dict[str, Any]:
        """The answer of a run: ``outputs`` with a time for every token."""
        return {"outputs": outputs, "times": self.times}


class Adapter(Protocol):
    """One peer with one method, loaded. Built from a ``Load``."""

    max_batch: int  # 0: any

    def run(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Complete all prompts greedily with exactly ``max_tokens`` tokens; a ``Timeline.answer``."""


def versions(*packages: str) -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def serve(adapter: type[Any], *packages: str) -> None:
    """Answer until standard input ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    loaded: Adapter | None = None
    for line in sys.stdin:
        ask = json.loads(line)
        try:
            if ask["op"] == "load":
                loaded = adapter(Load(**ask["load"]))
                answer = {"versions": versions(*packages), "max_batch": loaded.max_batch}
            elif loaded is None:
                raise RuntimeError("asked to run before anything was loaded")
            else:
                answer = loaded.run(ask["prompts"], ask["max_tokens"])
        except Exception as error:  # noqa: BLE001  whatever a peer raises is a row of the table
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
