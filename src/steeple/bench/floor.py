"""The floor of a plain decoding step: what the machine's bandwidth and arithmetic allow at best.

A step of B requests reads every weight once (of the embedding only B rows), and the keys and values of all requests;
it multiplies every weight with B rows. Roofline: Williams et al. 2009. A model that fits into the processor's caches
can be faster than the floor, because the bandwidth is that of the memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from steeple.config import ModelConfig
from steeple.hardware import Hardware


@dataclass(frozen=True, slots=True)
class StepCost:
    """Bytes that one step must read and floating-point operations that it must do."""

    bytes: float
    flops: float

    def seconds(self, hardware: Hardware, dtype: str) -> float:
        """The larger of the two times on ``hardware``."""
        return max(self.bytes / hardware.read_bytes_per_second, self.flops / hardware.flops_per_second[dtype])


def matrix_parameters(decoder: nn.Module, shape: ModelConfig) -> int:
    """Weights that every step multiplies: all but the embedding, or all where the head is the embedding."""
    total = sum(parameter.numel() for parameter in decoder.parameters())  # tied weights come once
    return total if shape.tie_embeddings else total - shape.vocab_size * shape.hidden_size


def plain_step(shape: ModelConfig, parameters: int, itemsize: int, batch: int, context: float) -> StepCost:
    """The cost of one plain step.

    Args:
        parameters: from ``matrix_parameters``. itemsize: bytes of an element.
        context: positions that each request's newest token sees, on average.
    """
    seen = sum(min(context, shape.window(layer) or context) for layer in range(shape.num_layers))
    kv_elements = 2 * shape.num_kv_heads * shape.head_dim * seen * batch
    embedding = batch * shape.hidden_size
    attention = 4 * shape.num_heads * shape.head_dim * seen * batch
    return StepCost((parameters + kv_elements + embedding) * itemsize, 2 * parameters * batch + attention)
