"""Our step-time model: bytes, operations, links and overheads of a pass over a ragged batch, and their seconds.

Beyond a roofline over body weights and keys (SPIRe, MatX 2025) it counts attention's arithmetic, the head and its
logits, written keys, activations, per-row, per-request, per-layer and fixed costs, tensor parallel communication, what
the processor's caches keep from one pass to the next, and the host's part of drafting and of drawing.
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
from steeple.plan.machines import Machine
from steeple.plan.shapes import Floats
from steeple.plan.work import Precision, Work, array, pass_work, ragged_work

__all__ = ["DraftTerms", "Precision", "StepModel", "Work", "pass_work", "ragged_work"]


@dataclass(frozen=True, kw_only=True)
class DraftTerms:
    """What drafting takes beside the memory, arithmetic and launches of its passes: the host's part, in seconds.

    Args:
        seconds_per_pass: of every pass.
        seconds_per_row: of every token that is drafted.
        seconds_per_round: once a round, however many passes it has.
        seconds_per_request: once a round for every request.
        seconds_per_logit: where tokens are drawn rather than chosen, per element of the law.
    """

    seconds_per_pass: float = 0.0
    seconds_per_row: float = 0.0
    seconds_per_round: float = 0.0
    seconds_per_request: float = 0.0
    seconds_per_logit: float = 0.0

    def __post_init__(self) -> None:
        for item in fields(self):
            if not getattr(self, item.name) >= 0:
                raise ConfigError(f"DraftTerms.{item.name} = {getattr(self, item.name)!r}; give 0 or more.")


@dataclass(frozen=True, kw_only=True)
class StepModel:
    """Seconds of a pass from its work. The defaults are a machine that costs nothing but what is given.

    A phase (blocks, attention, head) takes the longer of its memory and its arithmetic time and a share
    ``1 - overlap`` of the shorter; phases, links and overheads add up. Where passes follow each other that read
    ``n`` bytes each, the processor's caches hold a share ``min(1, cache_bytes / n)``, squared, of what the next one
    reads: everything if it fits, and the less of it the sooner it is driven out.

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
        verify_seconds: of a pass that verifies drafts, beside it.
        link_bytes_per_second: between devices; needed only where ``Work.link_bytes`` is not 0.
        seconds_per_message: latency of a collective operation.
        cache_bytes: capacity of the processor's caches; 0 = nothing is kept.
        cache_bytes_per_second: rate of what is read from them; 0 = as from memory.
        seconds_per_logit: of the laws that tokens are drawn from, where they are ``drawn``.
        draft: the host's part of drafting; None = a draft's pass costs what any pass costs.
        drawn: tokens are drawn (temperature above 0), not chosen.
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
    verify_seconds: float = 0.0
    link_bytes_per_second: float = 0.0
    seconds_per_message: float = 0.0
    cache_bytes: float = 0.0
    cache_bytes_per_second: float = 0.0
    seconds_per_logit: float = 0.0
    draft: DraftTerms | None = None
    drawn: bool = False

    def __post_init__(self) -> None:
        for name in ("bytes_per_second", "flops_per_second"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"StepModel.{name} = {getattr(self, name)!r}; give more than 0.")
        check_range("StepModel", "overlap", self.overlap, 0.0, 1.0)
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name not in ("attention_efficiency", "draft") and not value >= 0:
                raise ConfigError(f"StepModel.{item.name} = {value!r}; give 0 or more.")
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

    def at_temperature(self, temperature: float) -> StepModel:
        """The same, with tokens drawn if ``temperature`` is above 0."""
        return replace(self, drawn=temperature > 0)

    def predict(self, work: Work, memory: ArrayLike = 1.0) -> Floats:
        """Seconds of each pass, one of many like it.

        Args:
            memory: speed of the memory over that which the model is of; a shared machine's changes all the time.

        Raises:
            ConfigError: the work goes through links and no speed of links is given.
        """
        overheads = (
            work.rows * self.seconds_per_row
            + work.requests * self.seconds_per_request
            + work.layers * self.seconds_per_layer
            + (work.rows > work.requests) * self.verify_seconds
            + self.fixed_seconds
        )
        if self.drawn:
            overheads = overheads + work.logits * self.seconds_per_logit
        return self.phases(work, 0.0, memory) + self._link_seconds(work) + overheads

    def drafting(self, work: Work, k: ArrayLike, between: ArrayLike = math.inf, memory: ArrayLike = 1.0) -> Floats:
        """Seconds of the ``k`` passes of ``work`` that draft in a round; arrays broadcast.

        Args:
            between: bytes that the target's pass reads between two drafts, which drive out what the caches held.
            memory: as for ``predict``.
        """
        count = array(k)
        first, further = self.draft_pass(work, between, memory), self.draft_pass(work, 0.0, memory)
        return self.draft_start(work) * (count > 0) + first * (count > 0) + further * np.maximum(count - 1, 0)

    def draft_pass(self, work: Work, between: ArrayLike = 0.0, memory: ArrayLike = 1.0) -> Floats:
        """Seconds of one pass of a draft, as ``drafting`` counts it; what it costs once a round is ``draft_start``."""
        if self.draft is None:
            return self.predict(work, memory)
        each = self.draft.seconds_per_pass + work.requests * self.draft.seconds_per_row
        if self.drawn:
            each = each + work.logits * self.draft.seconds_per_logit
        launches = work.layers * self.seconds_per_layer
        return self.phases(work, between, memory) + self._link_seconds(work) + launches + each

    def draft_start(self, work: Work) -> Floats:
        """Seconds that drafting takes once a round for the requests of ``work``."""
        terms = self.draft or DraftTerms()
        return terms.seconds_per_round + work.requests * terms.seconds_per_request

    def phases(self, work: Work, between: ArrayLike = 0.0, memory: ArrayLike = 1.0) -> Floats:
        """Seconds of memory and arithmetic of each pass. ``between``: bytes that others read before it comes again."""
        kept = self.kept(work.bytes + array(between))
        weights, keys = (self._per_byte(rate, kept, memory) for rate in (self.bytes_per_second, self._attention_rate))
        linear = self._phase(work.linear_bytes * weights, work.linear_flops / self.flops_per_second)
        head = self._phase(work.head_bytes * weights, work.head_flops / self.flops_per_second)
        arithmetic = work.attention_flops / (self.attention_flops_per_second or self.flops_per_second)
        attention = self._phase(work.attention_bytes * keys, arithmetic)
        return linear + head + attention / self.efficiency(work.rows / np.maximum(work.requests, 1.0))

    def kept(self, amount: ArrayLike) -> Floats:
        """The share of what is read that the caches still hold, if ``amount`` bytes pass from one time to the next."""
        if not self.cache_bytes:
            return np.zeros_like(array(amount))
        return np.square(np.minimum(1.0, self.cache_bytes / np.maximum(array(amount), 1.0)))

    def attention_seconds(self, work: Work) -> Floats:
        """Attention's part of ``predict``."""
        memory = work.attention_bytes * self._per_byte(self._attention_rate, self.kept(work.bytes), 1.0)
        arithmetic = work.attention_flops / (self.attention_flops_per_second or self.flops_per_second)
        return self._phase(memory, arithmetic) / self.efficiency(work.rows / np.maximum(work.requests, 1.0))

    def efficiency(self, rows_per_request: ArrayLike) -> Floats:
        """The share of attention's speed that is reached at so many rows per request."""
        depth = np.maximum(array(rows_per_request), 1e-9)
        if not self.attention_efficiency:
            return np.ones_like(depth)
        points = sorted(self.attention_efficiency)
        return np.interp(np.log(depth), [math.log(rows) for rows, _ in points], [share for _, share in points])

    def bound(self, work: Work) -> Floats:
        """Memory time of a pass over its arithmetic time, without links and overheads: above 1 memory binds."""
        memory = (work.linear_bytes + work.head_bytes) / self.bytes_per_second
        memory = memory + work.attention_bytes / self._attention_rate
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
        known: dict[str, Any] = {
            name: math.inf if value is None and name != "draft" else value for name, value in values.items()
        }
        if isinstance(known.get("draft"), Mapping):
            known["draft"] = from_dict(DraftTerms, dict(known["draft"]))
        pairs = known.get("attention_efficiency", ())
        known["attention_efficiency"] = tuple((float(rows), float(share)) for rows, share in pairs)
        return from_dict(cls, known)

    @property
    def _attention_rate(self) -> float:
        return self.attention_bytes_per_second or self.bytes_per_second

    def _per_byte(self, rate: float, kept: Floats, memory: ArrayLike) -> Floats:
        """Seconds per byte of which a share ``kept`` lies in the caches."""
        return (1.0 - kept) / (rate * array(memory)) + kept / (self.cache_bytes_per_second or rate)

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
