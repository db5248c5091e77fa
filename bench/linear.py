"""Native linear layers against torch's, by rows: microseconds, GB/s of weights, GFLOP/s. Prints a table and JSON.

    python bench/linear.py --json bench/results/linear.json

The weights are those of the embedded target's layers, more than the caches hold, so that every pass reads memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from steeple.ops.linear import LinearOperation, NativeLinear
from steeple.ops.native import library_path

SHAPES = ((3072, 512), (512, 1024), (2816, 512), (512, 1408))
LAYERS = 8


def seconds(operation: LinearOperation, weights: list[Tensor], inputs: dict[int, Tensor], repeat: int) -> float:
    """The best of ``repeat`` passes over all weights."""
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        for weight in weights:
            operation(inputs[weight.shape[1]], weight, None)
        best = min(best, time.perf_counter() - start)
    return best


@torch.inference_mode()
def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,2,5,8,10,16,32,64,160")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--json", default="-")
    given = parser.parse_args()
    path = library_path(native=True)
    if path is None:
        sys.exit("the native library could not be built")
    every = {torch.float32: 1 << 30, torch.bfloat16: 1 << 30}
    operations = {"torch": F.linear, "native": NativeLinear(path, most_rows=every)}
    rows: list[dict[str, Any]] = []
    for name in given.dtype.split(","):
        dtype = getattr(torch, name)
        weights = [torch.randn(shape).to(dtype) for _ in range(LAYERS) for shape in SHAPES]
        size = sum(w.numel() for w in weights)
        for count in map(int, given.rows.split(",")):
            inputs = {shape[1]: torch.randn(count, shape[1]).to(dtype) for shape in SHAPES}
            for label, operation in operations.items():
                best = seconds(operation, weights, inputs, given.repeat)
                row = {
                    "dtype": name,
                    "rows": count,
                    "operation": label,
                    "microseconds": best * 1e6,
                    "gbs": size * dtype.itemsize / best / 1e9,
                    "gflops": 2 * count * size / best / 1e9,
                }
                rows.append(row)
                sys.stderr.write(
                    "{dtype} {rows:4d} {operation:7s} {microseconds:9.0f} us {gbs:6.1f} GB/s".format(**row)
                )
                sys.stderr.write(" {gflops:6.0f} GFLOP/s\n".format(**row))
    result = {
        "command": " ".join(sys.argv),
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
