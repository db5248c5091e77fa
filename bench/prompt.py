"""How fast prompts are read: tokens/s and GFLOP/s of a forward over a chunk of one prompt, against the matrix peak.

    python bench/prompt.py --json bench/results/prompt.json

Products of square matrices and forwards take turns in one process. ``fraction_of_peak`` is of the whole forward
(linear layers and attention over what lies before, norms, rotation, writing the cache), ``linear_fraction_of_peak`` of
its linear layers alone. A chunk begins where the one before it ended, so the last one attends to all of the prompt.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steeple.cache.batch import Span, make_batch
from steeple.cache.paged import PagedCache
from steeple.engine import EngineConfig
from steeple.evidence.random_model import load_any
from steeple.model.run import Runner
from steeple.model.whole import NativeForward
from steeple.types import Draft

PEAK_SIZE = 2048


def peak() -> float:
    """FLOP/s of one product of square matrices."""
    a = torch.ones(PEAK_SIZE, PEAK_SIZE, dtype=torch.bfloat16)
    start = time.perf_counter()
    torch.mm(a, a)
    return 2 * PEAK_SIZE**3 / (time.perf_counter() - start)


def measure(model: str, chunk: int, length: int, repeat: int) -> dict[str, Any]:
    """A prompt of ``length`` tokens in chunks, ``repeat`` times."""
    loaded = load_any(model, EngineConfig(dtype="bfloat16"))
    shape = loaded.decoder.config
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, length)
    seconds, linear, peaks = [], [], []
    for _ in range(repeat + 1):
        cache = PagedCache(
            shape, blocks=length // 16 + 1, block_size=16, dtype=torch.bfloat16, attention=loaded.attention
        )
        forward = Runner(loaded.decoder, cache, loaded.attention).whole
        if not isinstance(forward, NativeForward):
            sys.exit("there is no native forward for this model on this machine")
        forward.timing = True
        cache.attach("prompt", tokens)
        cache.reserve("prompt", length)
        peaks.append(peak())
        start = time.perf_counter()
        for at in range(0, length, chunk):
            span = Span("prompt", at, tokens[at : at + chunk], cache.table("prompt"))
            forward(make_batch([span], Draft.empty(1), 16, "cpu"), ())
        seconds.append(time.perf_counter() - start)
        linear.append(forward.parts["linear"])
        peaks.append(peak())
    body = 2.0 * shape.body_parameters() * length
    attention = 2.0 * shape.num_heads * shape.head_dim * shape.num_layers * length * (length + 1)
    median, best = statistics.median(seconds[1:]), max(peaks)
    return {
        "model": model,
        "length": length,
        "chunk": chunk,
        "tokens_per_second": round(length / median, 1),
        "gflops": round((body + attention) / median / 1e9, 1),
        "linear_gflops": round(body / statistics.median(linear[1:]) / 1e9, 1),
        "peak_gflops": round(best / 1e9, 1),
        "fraction_of_peak": round((body + attention) / median / best, 3),
        "linear_fraction_of_peak": round(body / statistics.median(linear[1:]) / best, 3),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo", "random-100m"])
    parser.add_argument("--length", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--chunk", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cases = [(m, c, n) for m in args.models for n in args.length for c in args.chunk if c <= n]
    rows = []
    for case in cases:
        rows.append(measure(*case, args.repeat))
        sys.stdout.write(f"{rows[-1]}\n")
    if args.json:
        head = {"command": shlex.join(["python", "bench/prompt.py", *sys.argv[1:]]), "dtype": "bfloat16"}
        head |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
        args.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
