"""Ways to draft as numbers, and what a speculative round with one takes: seconds of its passes, and bytes held."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike

from steeple.errors import ConfigError, did_you_mean
from steeple.plan.ours import Precision, StepModel, pass_work, ragged_work
from steeple.plan.shapes import Floats, ModelShape, find_shape


@dataclass(frozen=True, kw_only=True)
class DraftForm:
    """A drafter for one target.

    Args:
        name: how tables call it; a spec such as ``NAME:window=64`` is fine.
        shape: whose pass is done once per drafted token; None: drafting takes no pass.
        window: latest positions that it reads of each request; 0 = all of them.
        sink: first positions that it reads beside a window.
        own_weights: whether its weights lie in memory beside the target's.
        own_keys: whether it keeps keys of its own of the whole text.
    """

    name: str
    shape: ModelShape | None = None
    window: int = 0
    sink: int = 0
    own_weights: bool = False
    own_keys: bool = False

    @property
    def positions(self) -> float:
        """Positions of a request that a draft pass reads at most."""
        return self.sink + self.window if self.window else math.inf

    def with_window(self, window: int) -> DraftForm:
        """The same with another window; one that reads everything stays as it is."""
        return replace(self, window=window) if self.window else self


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Where and how a target runs.

    Args:
        target: the model that verifies.
        step: seconds of a pass.
        precision: bytes per element.
        devices: how many share every layer.
    """

    target: ModelShape
    step: StepModel
    precision: Precision
    devices: int = 1


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds, as arrays: ``draft`` of all k passes, ``verify``, and ``plain`` of a step without a draft."""

    draft: Floats
    verify: Floats
    plain: Floats

    @property
    def seconds(self) -> Floats:
        """Of the whole round."""
        return self.draft + self.verify

    @property
    def dt(self) -> Floats:
        """Of the whole round, in plain steps."""
        return self.seconds / self.plain


def round_of(where: Deployment, form: DraftForm, batch: ArrayLike, context: ArrayLike, k: int) -> Round:
    """A round of ``k`` drafted tokens for ``batch`` requests of ``context`` positions each; arrays broadcast."""
    target, step, precision = where.target, where.step, where.precision
    verify, plain = (
        step.predict(pass_work(target, batch, context, rows, precision=precision, devices=where.devices))
        for rows in (k + 1, 1)
    )
    if form.shape is None:
        return Round(np.zeros_like(verify), verify, plain)
    work = pass_work(
        form.shape, batch, context, window=form.positions, precision=precision, devices=draft_devices(form.shape, where)
    )
    between = pass_work(target, batch, context, k + 1, precision=precision, devices=where.devices).bytes
    return Round(step.drafting(work, k, between), verify, plain)


def ragged_round_of(where: Deployment, form: DraftForm, contexts: ArrayLike, ks: ArrayLike) -> Round:
    """A round over requests of their own lengths and draft lengths: [..., requests] each, broadcast.

    The draft runs as many passes as the longest draft has tokens; a pass counts the requests that still draft.
    """
    lengths, depths = np.broadcast_arrays(np.asarray(contexts, dtype=np.float64), np.asarray(ks))
    target, step, precision = where.target, where.step, where.precision
    verify, plain = (
        step.predict(ragged_work(target, lengths, rows, precision=precision, devices=where.devices))
        for rows in (depths + 1, np.ones_like(depths))
    )
    draft = np.zeros_like(verify)
    if form.shape is None:
        return Round(draft, verify, plain)
    devices = draft_devices(form.shape, where)
    between = ragged_work(target, lengths, depths + 1, precision=precision, devices=where.devices).bytes
    for number in range(int(depths.max(initial=0))):
        drafting = depths > number
        work = ragged_work(
            form.shape, lengths * drafting, drafting, window=form.positions, precision=precision, devices=devices
        )
        # those that have drafted enough cost nothing, neither as rows nor as requests
        work = replace(work, requests=drafting.sum(-1).astype(np.float64))
        seconds = step.draft_pass(work) if number else step.draft_pass(work, between) + step.draft_start(work)
        draft = draft + np.where(drafting.any(-1), seconds, 0.0)
    return Round(draft, verify, plain)


def draft_devices(shape: ModelShape, where: Deployment) -> int:
    """Devices that a draft is spread over: as many of the target's as divide its heads, the rest hold copies."""
    return math.gcd(shape.heads, where.devices)


def memory_bytes(where: Deployment, form: DraftForm | None, batch: ArrayLike, context: ArrayLike, k: int) -> Floats:
    """Bytes on all devices together: weights, keys of every position, and the logits of a verification.

    A first estimate; what the engine allocates to the byte is ``plan.memory``'s business.
    """
    target, precision = where.target, where.precision
    count, length = np.asarray(batch, dtype=np.float64), np.asarray(context, dtype=np.float64)
    positions = count * (length + k + 1)
    copies = max(1, where.devices // target.kv_heads)
    total = target.parameters * precision.weights + copies * positions * target.kv_elements_per_token * precision.keys
    total = total + count * (k + 1) * target.vocab * precision.activations
    if form is None or form.shape is None:
        return total
    copies = where.devices // draft_devices(form.shape, where)
    if form.own_weights:
        total = total + copies * form.shape.parameters * precision.weights
    if form.own_keys:
        copies = max(copies, where.devices // form.shape.kv_heads)
        total = total + copies * positions * form.shape.kv_elements_per_token * precision.keys
    return total


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to draft for any target, with the default window of its kind in the engine.

    Args:
        name: of the drafter, as the engine calls it.
        source: the draft of the SPIRe paper whose tau stands in where nothing was measured; empty: none does.
        small: whether a smaller model drafts. share: of the target's last layers that draft; 0 = none.
        window: latest positions. sink: first ones.
    """

    name: str
    source: str = ""
    small: bool = False
    share: float = 0.0
    window: int = 0
    sink: int = 0


METHODS = (
    Method(name="small_lm", source="vanilla", small=True),
    Method(name="sparse_self", source="magicdec", share=1.0, window=128, sink=16),
    Method(name="spire", source="spire", share=0.25, window=64, sink=16),
    Method(name="ngram"),
)

PARTNERS: Mapping[str, str] = MappingProxyType(
    {
        "llama-3-70b": "llama-3-8b",
        "llama-3.1-70b": "llama-3.2-1b",
        "llama-3.3-70b": "llama-3.2-1b",
        "llama-3.1-8b": "llama-3.2-1b",
        "llama-3.2-3b": "llama-3.2-1b",
        "qwen3-1.7b": "qwen3-0.6b",
        "qwen3-4b": "qwen3-0.6b",
        "qwen3-8b": "qwen3-0.6b",
        "qwen3-14b": "qwen3-0.6b",
        "qwen3-32b": "qwen3-0.6b",
        "spire-target": "spire-vanilla-draft",
        "demo": "demo/small",
    }
)
"""Target -> the small model of its family and vocabulary that drafts if nothing else is said."""

PRUNED: Mapping[str, str] = MappingProxyType({"demo": "demo/spire", "spire-target": "spire-draft"})
"""Target -> a trained draft of its last layers."""


def form_of(spec: str, target: ModelShape, small: ModelShape | None = None) -> DraftForm | None:
    """The drafter ``spec`` of the engine for ``target``; None if it needs a small model and there is none.

    ``NAME``, or ``NAME:field=value+...``, of which ``sink``, ``window`` and ``budget`` (chosen pages) count here.

    Raises:
        ConfigError: the planner has no model of the drafter.
    """
    name, _, rest = spec.partition(":")
    known = {method.name: method for method in METHODS}
    if name not in known:
        raise ConfigError(f"The planner knows no drafter {name!r}. {did_you_mean(name, known)}")
    method = known[name]
    sink, window = _view(method, rest)
    if method.small:
        partner = small or (find_shape(PARTNERS[target.name]) if target.name in PARTNERS else None)
        return DraftForm(name=spec, shape=partner, own_weights=True, own_keys=True) if partner else None
    if method.share == 1.0:
        return DraftForm(name=spec, shape=target, window=window, sink=sink)
    if method.share:
        layers = max(1, round(target.layers * method.share))
        pruned = find_shape(PRUNED[target.name]) if target.name in PRUNED else target.last_layers(layers)
        return DraftForm(name=spec, shape=pruned, window=window, sink=sink, own_weights=True)
    return DraftForm(name=spec)


def _view(method: Method, text: str) -> tuple[int, int]:
    """Sink and window of a spec; chosen pages count as a longer window. Shares of a text are not supported here."""
    given = dict(part.split("=", 1) for part in text.split("+") if "=" in part)
    try:
        sink, window = int(given.get("sink", method.sink)), int(given.get("window", method.window))
        budget = int(float(given.get("budget", 0)))
    except ValueError as error:
        raise ConfigError(f"The drafter's settings {text!r}: sink, window and budget must be numbers.") from error
    return sink, window + budget if window else window
