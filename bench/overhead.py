"""What a step costs beside the models: scheduling, batch assembly, drafting, verification, commit. Microseconds.

    python bench/overhead.py --json bench/results/overhead.json

Forward and logits are stubs that answer at once, and their time is not counted, so what is left is the engine's own.
Each figure is the median over the steps of a run; the parts are timed in a run of their own, apart from the total.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steeple.cache.paged import PagedCache
from steeple.config import ModelConfig
from steeple.draft.base import Drafter, Surroundings
from steeple.draft.ngram import NGramConfig
from steeple.draft.small_lm import SmallLM, SmallLMConfig
from steeple.engine.engine import Engine, EngineParts
from steeple.model.decoder import Decoder, Hidden
from steeple.ops.attention import ReferenceAttention
from steeple.request import Request
from steeple.types import Batch, SamplingParams

VOCAB = 4096
PROMPT, STEPS, WARM = 96, 150, 20
BLOCK = 16
CONFIG = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=8,
    max_context=1 << 14,
    rope_inv_freq=(1.0, 0.1, 0.01, 0.001),
)
PARAMS = {
    "greedy": SamplingParams(max_tokens=5 * (STEPS + WARM), ignore_eos=True),
    "T=1": SamplingParams(max_tokens=5 * (STEPS + WARM), ignore_eos=True, temperature=1.0, seed=1),
    "T=1 top_p": SamplingParams(max_tokens=5 * (STEPS + WARM), ignore_eos=True, temperature=1.0, top_p=0.95, seed=1),
}
PARTS = ("schedule", "draft", "batch", "verify", "commit")


class StubRunner:
    """Answers at once with rows of a table, and notes how long even that took.

    The best tokens go round in a circle of three, so that prompt lookup finds something to propose.
    """

    def __init__(self, decoder: Decoder, rows: int) -> None:
        self.decoder = decoder
        self.seconds = 0.0
        self._hidden = torch.zeros(rows, CONFIG.hidden_size)
        generator = torch.Generator().manual_seed(0)
        self._logits = torch.randn(512, VOCAB, generator=generator) * 2
        self._logits[torch.arange(512), torch.arange(512) % 3 + 5] += 12.0
        self._best = self._logits.argmax(dim=-1)

    def forward(self, batch: Batch, *, keep: Sequence[int] = ()) -> Hidden:  # noqa: ARG002
        start = time.perf_counter()
        out = Hidden(self._hidden[: batch.tokens.shape[0]])
        self.seconds += time.perf_counter() - start
        return out

    def logits(self, hidden_RD: Tensor) -> Tensor:
        start = time.perf_counter()
        out = self._logits[: hidden_RD.shape[0]]
        self.seconds += time.perf_counter() - start
        return out

    def best(self, hidden_RD: Tensor) -> Tensor:
        start = time.perf_counter()
        out = self._best[: hidden_RD.shape[0]]
        self.seconds += time.perf_counter() - start
        return out


def make_engine(method: str, batch: int) -> tuple[Engine, list[StubRunner]]:
    """An engine whose models are stubs, and these."""
    decoder = Decoder(CONFIG).requires_grad_(False)
    blocks = batch * ((PROMPT + 5 * (STEPS + WARM) + 64) // BLOCK + 1)
    around = Surroundings(
        decoder=decoder,
        tokenizer=None,
        attention=ReferenceAttention(),
        device=torch.device("cpu"),
        dtype=torch.float32,
        block_size=BLOCK,
        step_tokens=8192,
    )
    cache = PagedCache(CONFIG, blocks=blocks, block_size=BLOCK, dtype=torch.float32, attention=around.attention)
    drafter: Drafter | None = None
    stubs = [StubRunner(decoder, 8192)]
    if method == "ngram":
        drafter = NGramConfig(k=4).build(around)
    elif method == "small_lm":
        small = SmallLM(SmallLMConfig(k=4), decoder, around)
        small.prepare(cache)
        stubs.append(StubRunner(decoder, 8192))
        small._runner = stubs[1]  # type: ignore[assignment]
        drafter = small
    engine = Engine(
        EngineParts(
            decoder=decoder,
            cache=cache,
            attention=around.attention,
            drafter=drafter,
            tokenizer=None,
            batch_size=batch,
            step_tokens=8192,
            max_context=CONFIG.max_context,
        )
    )
    engine._runner = engine._judge._runner = stubs[0]  # type: ignore[assignment]
    return engine, stubs


def run(method: str, kind: str, batch: int, *, parts: bool) -> dict[str, float]:
    """Median microseconds per step: ``total``, or every part."""
    engine, stubs = make_engine(method, batch)
    generator = torch.Generator().manual_seed(1)
    for index in range(batch):
        prompt = torch.randint(8, VOCAB, (PROMPT - index % BLOCK,), generator=generator).tolist()
        engine.add(Request(f"r{index}", prompt, PARAMS[kind]))
    samples: dict[str, list[float]] = {}
    spent: dict[str, float] = {}

    def stubbed() -> float:
        return sum(stub.seconds for stub in stubs)

    def watch(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start, before = time.perf_counter(), stubbed()
            try:
                return function(*args)
            finally:
                spent[part] = time.perf_counter() - start - (stubbed() - before)

        return timed

    if parts:
        owners = (engine.scheduler, engine, engine, engine._judge, engine)
        names = ("next", "_propose", "_assemble", "judge", "_commit")
        for part, owner, name in zip(PARTS, owners, names, strict=True):
            setattr(owner, name, watch(part, getattr(owner, name)))
    for step in range(STEPS + WARM):
        spent.clear()
        start, before = time.perf_counter(), stubbed()
        engine.step()
        total = time.perf_counter() - start - (stubbed() - before)
        if step >= WARM:
            for part, seconds in spent.items() if parts else (("total", total),):
                samples.setdefault(part, []).append(seconds)
    return {part: statistics.median(times) * 1e6 for part, times in samples.items()}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", default="1,8,32,64")
    parser.add_argument("--methods", default="none,ngram,small_lm")
    parser.add_argument("--kinds", default="greedy,T=1,T=1 top_p")
    parser.add_argument("--repeat", type=int, default=3, help="the best of so many runs counts")
    parser.add_argument("--json", default="-")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for method in given.methods.split(","):
        for kind in given.kinds.split(","):
            for batch in map(int, given.batches.split(",")):
                row: dict[str, Any] = {"method": method, "kind": kind, "batch": batch}
                for parts in (False, True):
                    runs = [run(method, kind, batch, parts=parts) for _ in range(given.repeat)]
                    row.update({part: round(min(r[part] for r in runs), 1) for part in runs[0]})
                rows.append(row)
                figures = " ".join(f"{part} {row[part]:7.1f}" for part in ("total", *PARTS) if part in row)
                sys.stderr.write(f"{method:8s} {kind:9s} B={batch:<3d} {figures}\n")
    result = {
        "command": " ".join(sys.argv),
        "unit": "microseconds per step, median of a run, best of the runs",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": rows,
    }
    text = json.dumps(result, indent=1)
    if given.json == "-":
        sys.stdout.write(text + "\n")
    else:
        Path(given.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
