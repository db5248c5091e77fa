"""What a pass over a ragged batch does: bytes, operations, rows and messages, counted from a model's shape."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import ArrayLike

from steeple.errors import ConfigError
from steeple.plan.machines import DTYPE_BYTES
from steeple.plan.shapes import Floats, ModelShape


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Bytes per element of weights, of keys and values, and of activations (logits included)."""

    weights: float = 2.0
    keys: float = 2.0
    activations: float = 2.0

    @classmethod
    def of(cls, dtype: str, weights: str = "") -> Precision:
        """Everything in ``dtype``, or the weights in another one. Activations have two bytes or more."""
        size, weight = _size(dtype), _size(weights or dtype)
        return cls(weights=weight, keys=size, activations=max(size, 2.0))


@dataclass(frozen=True, kw_only=True)
class Work:
    """What passes do on each device, as arrays that broadcast against each other; an element is one pass.

    Args:
        linear_bytes: weights of the blocks, embedding rows and activations, read or written.
        linear_flops: products with those weights.
        attention_bytes: keys and values read and written.
        attention_flops: scores and sums over values.
        head_bytes: weights of the head, and logits.
        head_flops: products with the head.
        rows: tokens that the pass computes.
        requests: requests in the batch.
        layers: blocks of the model.
        link_bytes: sent and received by a device through its links, one direction.
        messages: collective operations.
        logits: elements of the laws that tokens are drawn from.
    """

    linear_bytes: Floats
    linear_flops: Floats
    attention_bytes: Floats
    attention_flops: Floats
    head_bytes: Floats
    head_flops: Floats
    rows: Floats
    requests: Floats
    layers: Floats
    link_bytes: Floats
    messages: Floats
    logits: Floats = field(default_factory=lambda: np.zeros(()))

    @property
    def bytes(self) -> Floats:
        """All that memory moves."""
        return self.linear_bytes + self.attention_bytes + self.head_bytes

    @property
    def flops(self) -> Floats:
        """All operations."""
        return self.linear_flops + self.attention_flops + self.head_flops

    @property
    def shape(self) -> tuple[int, ...]:
        """What the fields broadcast to."""
        return np.broadcast_shapes(*(np.shape(getattr(self, item.name)) for item in fields(self)))

    def flat(self) -> Work:
        """All fields broadcast to one shape and flattened to one axis."""
        arrays = np.broadcast_arrays(*(getattr(self, item.name) for item in fields(self)))
        return Work(**{item.name: column.ravel() for item, column in zip(fields(self), arrays, strict=True)})


def pass_work(
    shape: ModelShape,
    batch: ArrayLike,
    context: ArrayLike,
    rows: ArrayLike = 1,
    *,
    window: ArrayLike = math.inf,
    logit_rows: ArrayLike | None = None,
    precision: Precision | None = None,
    devices: int = 1,
) -> Work:
    """A forward pass over ``batch`` requests, all of ``context`` positions and ``rows`` new tokens; arrays broadcast.

    Args:
        window: positions of each request that attention reads at most, sink included.
        logit_rows: rows per request whose logits are computed; None = all.
        devices: how many share each layer (tensor parallel); keys are copied where there are more devices than heads.
    """
    count, depth = array(batch), array(rows)
    seen = np.minimum(array(context), array(window))
    logits = depth if logit_rows is None else array(logit_rows)
    read = shape.kv_elements_read(seen)
    return _work(
        shape,
        count,
        count * depth,
        count * logits,
        count * read,
        count * depth * read,
        precision or Precision(),
        devices,
    )


def ragged_work(
    shape: ModelShape,
    contexts: ArrayLike,
    rows: ArrayLike = 1,
    *,
    window: ArrayLike = math.inf,
    logit_rows: ArrayLike | None = None,
    precision: Precision | None = None,
    devices: int = 1,
) -> Work:
    """As ``pass_work`` for requests of their own lengths: the last axis of ``contexts`` [..., requests] is summed over.

    ``rows``, ``window`` and ``logit_rows`` broadcast against ``contexts``.
    """
    seen, depth = np.broadcast_arrays(np.minimum(array(contexts), array(window)), array(rows))
    logits = depth if logit_rows is None else np.broadcast_to(array(logit_rows), depth.shape)
    read = shape.kv_elements_read(seen)
    requests = np.full(seen.shape[:-1], float(seen.shape[-1]))
    rows_, logits_, read_, scores = (part.sum(-1) for part in (depth, logits, read, depth * read))
    return _work(shape, requests, rows_, logits_, read_, scores, precision or Precision(), devices)


def _work(
    shape: ModelShape,
    requests: Floats,
    rows: Floats,
    logits: Floats,
    read: Floats,
    scores: Floats,
    precision: Precision,
    devices: int,
) -> Work:
    """From sums over the batch. ``read``: elements of keys and values; ``scores``: the same, once for every row."""
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1 or shape.heads % devices:
        raise ConfigError(f"devices = {devices!r} do not divide the {shape.heads} heads of {shape.name}; give another.")
    widths = shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads) + 4 * shape.hidden
    widths += (3 if shape.gated else 2) * shape.intermediate
    activations = rows * (shape.layers * widths / devices + shape.hidden) * precision.activations
    key_devices = min(devices, shape.kv_heads)
    stored = (read + rows * shape.kv_elements_per_token) * precision.keys
    # Scores and weighted sums take 2 operations each per element of a query head; a kv head serves several of them.
    attention_flops = 2.0 * scores * shape.heads / shape.kv_heads
    reduced = 2 * shape.layers * rows * shape.hidden * precision.activations
    gathered = logits * shape.vocab * precision.activations
    share = (devices - 1) / devices
    collectives = 2 * shape.layers + (1 if shape.vocab else 0) if devices > 1 else 0
    return Work(
        linear_bytes=shape.body_parameters * precision.weights / devices + activations,
        linear_flops=2.0 * shape.linear_parameters * rows / devices,
        attention_bytes=stored / key_devices,
        attention_flops=attention_flops / devices,
        head_bytes=(shape.head_parameters * precision.weights * (logits > 0) + gathered) / devices,
        head_flops=2.0 * shape.head_parameters * logits / devices,
        rows=rows,
        requests=requests,
        layers=np.float64(shape.layers) * np.ones_like(rows),
        link_bytes=2.0 * share * reduced + share * gathered,
        messages=np.float64(collectives) * np.ones_like(rows),
        logits=logits * shape.vocab,
    )


def _size(dtype: str) -> float:
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"dtype = {dtype!r} is unknown; give one of {', '.join(DTYPE_BYTES)}.")
    return DTYPE_BYTES[dtype]


def array(values: ArrayLike) -> Floats:
    """``values`` as doubles."""
    return np.asarray(values, dtype=np.float64)
