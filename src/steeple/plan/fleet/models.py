"""The step time, the draft time and the cache of a replica from a model's shape and a machine."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from steeple.errors import CapacityError
from steeple.plan.fleet.steps import Amount
from steeple.plan.machines import Machine
from steeple.plan.ours import Precision, StepModel, Work, pass_work
from steeple.plan.shapes import ModelShape

ONCE = ("layers", "messages")
"""Parts of the work of a pass that do not grow with what is in it."""


@dataclass(frozen=True, kw_only=True)
class ModelStep:
    """The time of a step of a model on a group of devices; a ``StepTime``.

    Requests in a step are taken to be of equal length. Where requests decode beside a prompt, the rows of the prompt
    attend to each other but not to earlier chunks of it, whose keys are read all the same.
    """

    shape: ModelShape
    model: StepModel
    precision: Precision
    devices: int = 1

    def seconds(
        self, prompt_tokens: float, decode_requests: int, context_tokens: Amount, rows_per_request: int
    ) -> Amount:
        """Seconds of a step; see ``StepTime``."""
        parts: list[Work] = []
        if decode_requests:
            parts.append(self._pass(decode_requests, context_tokens / decode_requests, rows_per_request))
        if prompt_tokens > 0:
            held = context_tokens * (0.0 if decode_requests else 1.0)
            parts.append(self._pass(1, held + prompt_tokens / 2, prompt_tokens, logit_rows=1))
        seconds = self.model.predict(self._together(parts))
        return seconds if isinstance(context_tokens, np.ndarray) else float(seconds)

    def _pass(self, requests: float, context: Any, rows: float, logit_rows: float | None = None) -> Work:
        precision, devices = self.precision, self.devices
        return pass_work(
            self.shape, requests, context, rows, logit_rows=logit_rows, precision=precision, devices=devices
        )

    def _together(self, parts: list[Work]) -> Work:
        """The work of one pass that does all of them: weights are read once."""
        if len(parts) == 1:
            return parts[0]
        sums: dict[str, Any] = {}
        for item in fields(Work):
            values = [getattr(part, item.name) for part in parts]
            sums[item.name] = values[0] if item.name in ONCE else sum(values)
        again = (len(parts) - 1) * self.precision.weights / self.devices
        sums["linear_bytes"] = sums["linear_bytes"] - again * self.shape.body_parameters
        sums["head_bytes"] = sums["head_bytes"] - again * self.shape.head_parameters
        return Work(**sums)


@dataclass(frozen=True, kw_only=True)
class DraftPasses:
    """Drafting by a model: k passes of one row per request, one after the other. A ``DraftTime``.

    Attributes:
        window: positions that a draft's attention reads at most.
    """

    step: ModelStep
    k: int
    window: float = math.inf

    def seconds(self, decode_requests: int, context_tokens: Amount) -> Amount:
        """Seconds of drafting; see ``DraftTime``."""
        seen = np.minimum(context_tokens, self.window * decode_requests)
        seconds = self.k * self.step.seconds(0, decode_requests, seen, 1)
        return seconds if isinstance(context_tokens, np.ndarray) else float(seconds)


def cache_tokens(
    shape: ModelShape,
    machine: Machine,
    precision: Precision,
    *,
    devices: int,
    share: float,
    drafts: tuple[ModelShape, ...] = (),
) -> int:
    """Positions that the caches of a replica hold in ``share`` of its memory, beside the weights of all its models.

    Args:
        drafts: models that keep weights and keys of their own beside the target's.

    Raises:
        CapacityError: the weights alone do not fit.
    """
    models = (shape, *drafts)
    weights = sum(m.parameters for m in models) * precision.weights / devices
    per_token = sum(m.kv_elements_per_token / min(devices, m.kv_heads) for m in models) * precision.keys
    room = machine.memory_bytes * share - weights
    if room < per_token:
        needed = math.ceil(weights * devices / (machine.memory_bytes * share))
        raise CapacityError(
            f"The weights of {' and '.join(m.name for m in models)} take {weights / 1e9:.1f} GB of each of {devices} "
            f"x {machine.name}, of which {machine.memory_bytes * share / 1e9:.1f} GB may be used; give at least "
            f"tp = {max(needed, devices + 1)}, or smaller weights."
        )
    return int(room / per_token)
