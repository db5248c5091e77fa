"""Our step-time model: bytes, operations, links and overheads of a pass over a ragged batch, and their seconds.

Beyond a roofline over body weights and keys (SPIRe, MatX 2025) it counts attention's arithmetic, the head and its
logits, written keys, activations, per-row, per-request, per-layer and fixed costs, and tensor parallel communication.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from steeple.config import check_range, from_dict
from steeple.errors import ConfigError
from steeple.plan.machines import DTYPE_BYTES, Machine
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
        return np.broadcast_shapes(*(np.shape(getattr(self, field.name)) for field in fields(self)))

    def flat(self) -> Work:
        """All fields broadcast to one shape and flattened to one axis."""
        arrays = np.broadcast_arrays(*(getattr(self, field.name) for field in fields(self)))
        return Work(**{field.name: array.ravel() for field, array in zip(fields(self), arrays, strict=True)})


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
    count, depth = _array(batch), _array(rows)
    seen = np.minimum(_array(context), _array(window))
    logits = depth if logit_rows is None else _array(logit_rows)
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
    seen, depth = np.broadcast_arrays(np.minimum(_array(contexts), _array(window)), _array(rows))
    logits = depth if logit_rows is None else np.broadcast_to(_array(logit_rows), depth.shape)
    read = shape.kv_elements_read(seen)
    requests = np.full(seen.shape[:-1], float(seen.shape[-1]))
    rows_, logits_, read_, scores = (array.sum(-1) for array in (depth, logits, read, depth * read))
    return _work(shape, requests, rows_, logits_, read_, scores, precision or Precision(), devices)


@dataclass(frozen=True, kw_only=True)
class StepModel:
    """Seconds of a pass from its work. The defaults are a machine that costs nothing but what is given.

    A phase (blocks, attention, head) takes the longer of its memory and its arithmetic time and a share
    ``1 - overlap`` of the shorter; phases, links and overheads add up.

    Args:
        bytes_per_second: weights, activations and logits.
        flops_per_second: products with weights.
        attention_bytes_per_second: keys and values; 0 = as ``bytes_per_second``.
        attention_flops_per_second: attention's arithmetic; 0 = as ``flops_per_second``.
        attention_efficiency: (rows per request, share of attention's speed) pairs, interpolated over log rows.
        overlap: 1 = memory and arithmetic fully at once, 0 = one after the other.
        seconds_per_row: of the batch, whatever its model.
        seconds_per_request: of the batch.
        seconds_per_layer: launches and barriers.
        fixed_seconds: of every pass.
        link_bytes_per_second: between devices; needed only where ``Work.link_bytes`` is not 0.
        seconds_per_message: latency of a collective operation.
    """

    bytes_per_second: float
    flops_per_second: float
    attention_bytes_per_second: float = 0.0
    attention_flops_per_second: float = 0.0
    attention_efficiency: tuple[tuple[float, float], ...] = ()
    overlap: float = 1.0
    seconds_per_row: float = 0.0
    seconds_per_request: float = 0.0
    seconds_per_layer: float = 0.0
    fixed_seconds: float = 0.0
    link_bytes_per_second: float = 0.0
    seconds_per_message: float = 0.0

    def __post_init__(self) -> None:
        for name in ("bytes_per_second", "flops_per_second"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"StepModel.{name} = {getattr(self, name)!r}; give more than 0.")
        check_range("StepModel", "overlap", self.overlap, 0.0, 1.0)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "attention_efficiency" and not value >= 0:
                raise ConfigError(f"StepModel.{field.name} = {value!r}; give 0 or more.")
        if any(rows <= 0 or share <= 0 for rows, share in self.attention_efficiency):
            raise ConfigError("StepModel.attention_efficiency: give rows and shares of more than 0.")

    @classmethod
    def of_machine(cls, machine: Machine, dtype: str = "bfloat16", **terms: Any) -> StepModel:
        """The datasheet's rates: efficiency 1, full overlap, no overheads unless ``terms`` says otherwise."""
        return replace(
            cls(
                bytes_per_second=machine.bytes_per_second,
                flops_per_second=machine.flops(dtype),
                link_bytes_per_second=machine.link_bytes_per_second,
            ),
            **terms,
        )

    def predict(self, work: Work) -> Floats:
        """Seconds of each pass.

        Raises:
            ConfigError: the work goes through links and no speed of links is given.
        """
        linear = self._phase(work.linear_bytes / self.bytes_per_second, work.linear_flops / self.flops_per_second)
        head = self._phase(work.head_bytes / self.bytes_per_second, work.head_flops / self.flops_per_second)
        attention = self.attention_seconds(work)
        overheads = (
            work.rows * self.seconds_per_row
            + work.requests * self.seconds_per_request
            + work.layers * self.seconds_per_layer
            + self.fixed_seconds
        )
        return linear + attention + head + self._link_seconds(work) + overheads

    def attention_seconds(self, work: Work) -> Floats:
        """Attention's part of ``predict``."""
        memory = work.attention_bytes / (self.attention_bytes_per_second or self.bytes_per_second)
        arithmetic = work.attention_flops / (self.attention_flops_per_second or self.flops_per_second)
        return self._phase(memory, arithmetic) / self.efficiency(work.rows / np.maximum(work.requests, 1.0))

    def efficiency(self, rows_per_request: ArrayLike) -> Floats:
        """The share of attention's speed that is reached at so many rows per request."""
        depth = np.maximum(_array(rows_per_request), 1e-9)
        if not self.attention_efficiency:
            return np.ones_like(depth)
        points = sorted(self.attention_efficiency)
        return np.interp(np.log(depth), [math.log(rows) for rows, _ in points], [share for _, share in points])

    def bound(self, work: Work) -> Floats:
        """Memory time of a pass over its arithmetic time, without links and overheads: above 1 memory binds."""
        memory = (work.linear_bytes + work.head_bytes) / self.bytes_per_second
        memory = memory + work.attention_bytes / (self.attention_bytes_per_second or self.bytes_per_second)
        arithmetic = (work.linear_flops + work.head_flops) / self.flops_per_second
        arithmetic = arithmetic + work.attention_flops / (self.attention_flops_per_second or self.flops_per_second)
        return memory / arithmetic

    def to_dict(self) -> dict[str, Any]:
        """JSON types; an infinite rate (a term that costs nothing) is null."""
        values = asdict(self)
        values["attention_efficiency"] = [list(pair) for pair in self.attention_efficiency]
        return {name: None if value == math.inf else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StepModel:
        """The inverse of ``to_dict``; ``ConfigError`` for a field that there is not."""
        known: dict[str, Any] = {name: math.inf if value is None else value for name, value in values.items()}
        pairs = known.get("attention_efficiency", ())
        known["attention_efficiency"] = tuple((float(rows), float(share)) for rows, share in pairs)
        return from_dict(cls, known)

    def _phase(self, memory: Floats, arithmetic: Floats) -> Floats:
        return np.maximum(memory, arithmetic) + (1.0 - self.overlap) * np.minimum(memory, arithmetic)

    def _link_seconds(self, work: Work) -> Floats:
        if not np.any(work.link_bytes):
            return work.messages * self.seconds_per_message
        if not self.link_bytes_per_second:
            raise ConfigError(
                "StepModel.link_bytes_per_second = 0, but the model is spread over several devices; give the speed of "
                "their links, or one device."
            )
        return work.link_bytes / self.link_bytes_per_second + work.messages * self.seconds_per_message


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
    )


def _size(dtype: str) -> float:
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"dtype = {dtype!r} is unknown; give one of {', '.join(DTYPE_BYTES)}.")
    return DTYPE_BYTES[dtype]


def _array(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64)
