"""The cost model of the SPIRe paper, exactly: a pass takes max(operations, bytes x HOI), a multiplier is tau / dt.

Source: SPIRe (MatX 2025) and its appendix notebook. One byte per element, body parameters only, attention's operations
ignored, keys charged once for a verification. The window is an argument: the paper's text says 64 positions, its
figures use an eighth of the context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

from steeple.config import check_range
from steeple.errors import ConfigError
from steeple.plan.shapes import Floats, ModelShape

HOI = 600.0
"""Operations per byte of an H100 SXM in float8, as the paper rounds it."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """What a sparse draft reads of each request: the first ``sink`` positions and the latest ones.

    Args:
        sink: first positions.
        positions: latest positions, whatever the context.
        share: latest positions as a share of the context instead; 0 = ``positions`` counts.
    """

    sink: int = 1
    positions: int = 0
    share: float = 0.0

    def __post_init__(self) -> None:
        check_range("Window", "sink", self.sink, 0, 1 << 30)
        check_range("Window", "positions", self.positions, 0, 1 << 30)
        check_range("Window", "share", self.share, 0.0, 1.0)
        if bool(self.positions) == bool(self.share):
            raise ConfigError(
                f"Window.positions = {self.positions} and share = {self.share:g}; give one of them, more than 0."
            )

    @classmethod
    def parse(cls, text: str, sink: int = 1) -> Window:
        """``64``: so many positions; ``1/8`` or ``0.125``: that share of the context."""
        try:
            value = Fraction(text.strip())
        except (ValueError, ZeroDivisionError) as error:
            raise ConfigError(f"window {text!r}; give positions such as 64, or a share such as 1/8.") from error
        if value >= 1 and value.denominator == 1:
            return cls(sink=sink, positions=int(value))
        if not 0 < value < 1:
            raise ConfigError(f"window {text!r}; give positions of 1 or more, or a share between 0 and 1.")
        return cls(sink=sink, share=float(value))

    def keys(self, context: ArrayLike) -> Floats:
        """Positions read of a request at ``context`` positions, never more than there are (any shape)."""
        length = np.asarray(context, dtype=np.float64)
        latest = length * self.share if self.share else np.full_like(length, self.positions)
        return np.minimum(length, self.sink + latest)

    def __str__(self) -> str:
        return f"{Fraction(self.share).limit_denominator(1024)} of the context" if self.share else str(self.positions)


@dataclass(frozen=True, kw_only=True)
class PaperDraft:
    """A drafter of the paper.

    Args:
        name: how tables call it.
        shape: whose body is read in each of the k passes.
        window: what it reads of the keys; None = all.
        extra_flops_per_token: beyond two per body parameter.
    """

    name: str
    shape: ModelShape
    window: Window | None = None
    extra_flops_per_token: float = 0.0

    def keys(self, context: ArrayLike) -> Floats:
        """Positions read of a request (any shape)."""
        return np.asarray(context, dtype=np.float64) if self.window is None else self.window.keys(context)


@dataclass(frozen=True, slots=True)
class RoundTime:
    """Times of one round, in units of a plain step: ``draft`` of one of the k passes, ``verify``, and dt of all."""

    draft: Floats
    verify: Floats
    dt: Floats


def projection_flops(shape: ModelShape) -> float:
    """Operations of projecting target activations to keys and values for one token: what a SPIRe draft does beside."""
    return 2.0 * shape.hidden * shape.kv_elements_per_token


def pass_time(
    shape: ModelShape, rows: ArrayLike, positions: ArrayLike, *, hoi: float = HOI, extra_flops: ArrayLike = 0.0
) -> Floats:
    """Time of a pass in operations: ``max(2 x body x rows + extra, (body + keys) x hoi)``.

    ``rows``: tokens of the batch. ``positions``: keys of all requests together. Arrays broadcast.
    """
    flops = 2.0 * shape.body_parameters * np.asarray(rows, dtype=np.float64) + np.asarray(extra_flops)
    elements = shape.body_parameters + shape.kv_elements_per_token * np.asarray(positions, dtype=np.float64)
    return np.maximum(flops, elements * hoi)


def round_time(
    target: ModelShape, draft: PaperDraft, batch: ArrayLike, context: ArrayLike, *, k: int = 4, hoi: float = HOI
) -> RoundTime:
    """A round over ``batch`` requests of ``context`` positions each; arrays broadcast."""
    count, length = (np.asarray(value, dtype=np.float64) for value in (batch, context))
    return _round(target, draft, count, count * length, count * draft.keys(length), k, hoi)


def ragged_round_time(
    target: ModelShape, draft: PaperDraft, contexts: ArrayLike, *, k: int = 4, hoi: float = HOI
) -> RoundTime:
    """A round over requests of their own lengths: the last axis of ``contexts`` [..., requests] is one batch."""
    lengths = np.asarray(contexts, dtype=np.float64)
    count = np.full(lengths.shape[:-1], float(lengths.shape[-1]))
    return _round(target, draft, count, lengths.sum(-1), draft.keys(lengths).sum(-1), k, hoi)


def _round(
    target: ModelShape, draft: PaperDraft, count: Floats, keys: Floats, draft_keys: Floats, k: int, hoi: float
) -> RoundTime:
    check_range("round", "k", k, 1, 1 << 20)
    plain = pass_time(target, count, keys, hoi=hoi)
    extra = draft.extra_flops_per_token * count
    drafting = pass_time(draft.shape, count, draft_keys, hoi=hoi, extra_flops=extra) / plain
    verify = pass_time(target, (k + 1) * count, keys, hoi=hoi) / plain
    return RoundTime(drafting, verify, k * drafting + verify)


def throughput_multiplier(
    target: ModelShape,
    draft: PaperDraft,
    batch: ArrayLike,
    context: ArrayLike,
    *,
    tau: ArrayLike,
    k: int = 4,
    hoi: float = HOI,
) -> Floats:
    """Tokens per second over plain decoding's at the same batch: tau / dt. Arrays broadcast."""
    return np.asarray(tau) / round_time(target, draft, batch, context, k=k, hoi=hoi).dt


def multiplier_with_growth(
    target: ModelShape,
    draft: PaperDraft,
    batch: float,
    context: float,
    *,
    tau: float,
    tokens: int = 64,
    k: int = 4,
    hoi: float = HOI,
) -> float:
    """The multiplier while ``tokens`` are written to each request and its keys grow.

    Plain decoding takes one step per token. Rounds are whole: the last one counts although a part of it is not needed.
    """
    steps = context + np.arange(tokens)
    rounds = context + tau * np.arange(math.ceil(tokens / tau))
    plain = pass_time(target, batch, batch * steps, hoi=hoi).sum()
    base = pass_time(target, batch, batch * rounds, hoi=hoi)
    return float(plain / (round_time(target, draft, batch, rounds, k=k, hoi=hoi).dt * base).sum())


def critical_context(target: ModelShape, *, k: int = 4, hoi: float = HOI) -> float:
    """Context from which verification is bound by memory at any batch: ``2 x body x k / (hoi x keys per token)``."""
    return 2.0 * target.body_parameters * k / (hoi * target.kv_elements_per_token)


def power_below(context: float) -> int:
    """The largest power of two below ``context``: what the paper plots for a critical context."""
    return 1 << (math.ceil(math.log2(context)) - 1)


def critical_batch(target: ModelShape, context: ArrayLike, *, k: int = 4, hoi: float = HOI) -> Floats:
    """Batch from which verification is bound by arithmetic at ``context``; infinite where it never is."""
    length = np.asarray(context, dtype=np.float64)
    per_request = 2.0 * (k + 1) * target.body_parameters - hoi * target.kv_elements_per_token * length
    with np.errstate(divide="ignore"):
        return np.where(per_request > 0, target.body_parameters * hoi / np.maximum(per_request, 0.0), np.inf)
