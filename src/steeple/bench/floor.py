"""The floor of a decoding step: what the machine's bandwidth and arithmetic allow at best, part by part.

A step of B requests with r rows each reads every weight once (of the embedding only B r rows) and all keys and values
once; it multiplies every weight with B r rows. Roofline: Williams et al. 2009. A model that fits into the processor's
caches can be faster than the floor, because the bandwidth is that of the memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from steeple.config import ModelConfig
from steeple.hardware import Hardware

MEMORY, ARITHMETIC = "memory", "arithmetic"


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes that must be read and floating-point operations that must be done."""

    bytes: float
    flops: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, hardware: Hardware, dtype: str) -> float:
        """The larger of the two times on ``hardware``."""
        return max(self._reading(hardware), self.flops / hardware.flops_per_second[dtype])

    def bound(self, hardware: Hardware, dtype: str) -> str:
        """What decides on ``hardware``: memory or arithmetic."""
        return MEMORY if self._reading(hardware) >= self.seconds(hardware, dtype) else ARITHMETIC

    def _reading(self, hardware: Hardware) -> float:
        return self.bytes / hardware.read_bytes_per_second


@dataclass(frozen=True, slots=True)
class StepCost:
    """A step by its parts: attention over the cache, linear layers and norms, head, rows of the embedding."""

    attention: Cost
    linear: Cost
    logits: Cost
    embedding: Cost

    @property
    def total(self) -> Cost:
        return self.attention + self.linear + self.logits + self.embedding


def step_cost(
    shape: ModelConfig, parameters: int, itemsize: int, *, batch: int, context: float, rows: int = 1
) -> StepCost:
    """The cost of one step: plain decoding, or the verification of a chain of ``rows - 1`` nodes per request.

    Args:
        parameters: weights that a step multiplies, the head included. itemsize: bytes of an element.
        context: positions that each request's newest token sees, itself included, on average; node j sees j + 1 more.
    """
    head = shape.vocab_size * shape.hidden_size
    read, seen = _positions(shape, context, rows)
    keys = 2 * shape.num_kv_heads * shape.head_dim * read * batch
    products = 4 * shape.num_heads * shape.head_dim * seen * batch
    return StepCost(
        attention=Cost(keys * itemsize, products),
        linear=Cost((parameters - head) * itemsize, 2 * (parameters - head) * batch * rows),
        logits=Cost(head * itemsize, 2 * head * batch * rows),
        embedding=Cost(shape.hidden_size * batch * rows * itemsize, 0),
    )


def _positions(shape: ModelConfig, context: float, rows: int) -> tuple[float, float]:
    """Of one request, summed over layers: positions that are read once, and positions that its rows see together."""
    read, seen = 0.0, 0.0
    for layer in range(shape.num_layers):
        window = shape.window(layer)
        each = [min(context + row, window) if window else context + row for row in range(rows)]
        read += each[0] + rows - 1
        seen += sum(each)
    return read, seen
