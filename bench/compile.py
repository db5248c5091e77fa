"""What torch.compile gives a decoding step on a CPU: the layers' arithmetic plain, compiled and native, by turns.

    python bench/compile.py --json bench/results/compile.json

Attention is left out of all three (its values are returned as they come), because a compiled graph would have to call
the same kernel; so this compares norms, projections, rotation and activations: what a compiler can fuse.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steeple.cache.batch import Span, make_batch
from steeple.cache.paged import PagedCache
from steeple.hf import resolve
from steeple.model.load import load_decoder
from steeple.model.whole import NativeForward
from steeple.ops.kernels import kernels
from steeple.ops.native_attention import attention_backend
from steeple.types import Draft


def pass_values(_layer: int, q_TNH: Tensor, _k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
    return v_TKH.repeat_interleave(q_TNH.shape[1] // v_TKH.shape[1], dim=1)


def native(folder: Path, dtype: torch.dtype, rows: int) -> Callable[[], float]:
    """Seconds of the native forward without its attention, for ``rows`` requests of one token."""
    decoder = load_decoder(folder, dtype=dtype)
    decoder.use(kernels("cpu", native=True))
    attention = attention_backend("cpu", native=True)
    cache = PagedCache(decoder.config, blocks=rows, block_size=16, dtype=dtype, attention=attention)
    tokens = torch.zeros(1, dtype=torch.int64).numpy()
    for row in range(rows):
        cache.attach(str(row), tokens)
        cache.reserve(str(row), 1)
    spans = [Span(str(row), 0, tokens, cache.table(str(row))) for row in range(rows)]
    batch = make_batch(spans, Draft.empty(rows), 16, "cpu")
    forward = NativeForward(decoder, cache)
    forward.timing = True

    def run() -> float:
        before, start = forward.parts["attention"], time.perf_counter()
        forward(batch, ())
        return time.perf_counter() - start - (forward.parts["attention"] - before)

    return run


def timed(step: Callable[..., Any], *args: Any) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        step(*args)
        return time.perf_counter() - start

    return run


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeat", type=int, default=60)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dtype, folder, results = torch.bfloat16, resolve(args.model), []
    decoder = load_decoder(folder, dtype=dtype)
    for rows in args.rows:
        tokens, positions = torch.zeros(rows, dtype=torch.int64), torch.arange(rows)
        compiled = torch.compile(decoder.forward, dynamic=False)
        start = time.perf_counter()
        compiled(tokens, positions, pass_values)
        first = time.perf_counter() - start
        kinds = {
            "torch": timed(decoder.forward, tokens, positions, pass_values),
            "compiled": timed(compiled, tokens, positions, pass_values),
            "native": native(folder, dtype, rows),
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(args.repeat):
            for kind, run in kinds.items():
                seconds[kind].append(run())
        medians = {f"{kind}_ms": round(statistics.median(times) * 1e3, 3) for kind, times in seconds.items()}
        results.append({"rows": rows, **medians, "first_compiled_call_s": round(first, 1)})
        sys.stdout.write(f"{results[-1]}\n")
    if args.json:
        command = shlex.join(["python", "bench/compile.py", *sys.argv[1:]])
        head = {"command": command, "torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": "bfloat16"}
        args.json.write_text(json.dumps({**head, "model": args.model, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
