"""The engine's memory: planned before the drafter is built and the caches are made, and compared with what is held."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from steeple.config import ModelConfig
from steeple.draft.base import Drafter, DrafterConfig, Surroundings
from steeple.draft.declared import DeclaresMemory
from steeple.engine.config import EngineConfig
from steeple.errors import CapacityError
from steeple.model.decoder import Decoder
from steeple.model.run import Runner
from steeple.ops.held import held_bytes
from steeple.ops.kernels import Kernels
from steeple.plan.memory import FULL_REQUESTS
from steeple.plan.memory_fit import HELD, Load, Setting, Wish, fit, least_budget, memory, total
from steeple.plan.memory_parts import DraftMemory, Lay, weight_bytes
from steeple.plan.memory_units import show_bytes

log = logging.getLogger(__name__)

MOST_REQUESTS = 256
TOLERANCE = 0.02  # of the bytes allocated at the start


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What an engine was built by. ``budget`` is 0 where none was given."""

    setting: Setting
    load: Load
    budget: int = 0
    sacrificed: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, int]:
        """Predicted bytes of each part in the costliest step."""
        return memory(self.setting, self.load)


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Predicted bytes beside allocated ones, of what is there from the start. ``most``: predicted for any step."""

    budget: int
    predicted: Mapping[str, int]
    allocated: Mapping[str, int]
    most: int
    sacrificed: tuple[str, ...]

    @property
    def difference(self) -> float:
        """Allocated bytes beyond the predicted ones, as a share of these; negative if there are fewer."""
        expected = sum(self.predicted.values())
        return sum(self.allocated.values()) / expected - 1.0 if expected else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For a result's JSON."""
        return {
            "budget_bytes": self.budget or None,
            "predicted_bytes": sum(self.predicted.values()),
            "allocated_bytes": sum(self.allocated.values()),
            "most_bytes": self.most,
            "predicted": dict(self.predicted),
            "allocated": dict(self.allocated),
            "sacrificed": list(self.sacrificed),
            "warning": self.warning,
        }

    @property
    def warning(self) -> str | None:
        """What is wrong, if prediction and allocation are further apart than ``TOLERANCE``."""
        if abs(self.difference) <= TOLERANCE:
            return None
        held, expected = (show_bytes(sum(parts.values())) for parts in (self.allocated, self.predicted))
        return (
            f"memory: {held} are allocated, {expected} were predicted ({self.difference:+.1%}); a budget may "
            "not hold. Please report the model and the settings."
        )


def lay_of(config: EngineConfig, shape: ModelConfig, kernels: Kernels, device: torch.device) -> Lay:
    """How the numbers of an engine lie on its device."""
    element = int(getattr(torch, config.dtype).itemsize)
    packs = kernels.panel > 0 and config.dtype != "float16"
    inputs = (shape.hidden_size, shape.num_heads * shape.head_dim, shape.intermediate_size)
    even = shape.head_dim % 2 == 0 and (element == 4 or all(width % 2 == 0 for width in inputs))
    return Lay(
        element=element,
        panel=kernels.panel if packs else 0,
        int8=config.weights == "int8",
        fused=packs and even and kernels.library is not None,
        threads=torch.get_num_threads(),
        gpu=device.type == "cuda",
        recorded=device.type == "cuda" and config.graphs,
    )


def require_room(shape: ModelConfig, config: EngineConfig, kernels: Kernels, device: torch.device) -> None:
    """``CapacityError`` if the budget cannot hold the target whatever is given up; before its weights are read."""
    if config.budget:
        setting = Setting(target=shape, lay=lay_of(config, shape, kernels, device), block_size=config.block_size)
        if least_budget(setting) > config.budget:
            fit(setting, Wish(load=Load(requests=1, blocks=1), most_blocks=1), config.budget)  # says what is missing


def declared(drafter: DrafterConfig, around: Surroundings, lay: Lay) -> DraftMemory | None:
    """What the drafter says it will take; None if it says nothing."""
    return drafter.memory(around, lay.plain) if isinstance(drafter, DeclaresMemory) else None


def measured(built: Drafter, target: Decoder) -> DraftMemory:
    """What a drafter that declares nothing takes, as far as it can be seen; as if it drew from laws of its own."""
    known: dict[int, int] = {}
    held_bytes(target, known)
    needs = built.needs
    held = held_bytes(built, known)
    return DraftMemory(
        held=held, keys=needs.own_cache_bytes_per_token, draws=True, layers=len(needs.hidden), scores=needs.scores
    )


def most_prompt_rows(config: EngineConfig, requests: int, context: int) -> int:
    """Prompt rows that a step may have: ``step_tokens``, or all prompts of the batch where these are fewer."""
    return min(config.step_tokens, requests * context)


def wish_of(config: EngineConfig, setting: Setting, k: int, width: int) -> Wish:
    """What the settings ask for. The keys that the batch needs, before anything of the draft is kept: ``kv_tokens``; or
    ``batch_size`` times ``max_context`` where both are given; or one request of full length."""
    batch = config.batch_size or MOST_REQUESTS
    if config.kv_tokens:
        needed = most = -(-config.kv_tokens // config.block_size)
    else:
        stated = bool(config.batch_size and config.max_context)
        needed = batch * setting.full if stated else max(setting.full, config.batch_size)
        most = max(needed, FULL_REQUESTS * setting.full)
    chunk = most_prompt_rows(config, batch, setting.context)
    load = Load(requests=batch, blocks=needed, chunk=chunk, k=k, width=width)
    return Wish(load=load, most_blocks=most, free_requests=not config.batch_size)


def budgeted(setting: Setting, config: EngineConfig, k: int, width: int, available: int) -> MemoryPlan:
    """The plan within ``config.memory_budget``, and within the ``available`` bytes beside the target's weights."""
    budget = min(config.budget, weight_bytes(setting.target, setting.lay) + available)
    try:
        found = fit(setting, wish_of(config, setting, k, width), budget)
    except CapacityError as error:
        if budget < config.budget:
            error.add_note(f"The machine has {show_bytes(budget)} for it, less than memory_budget.")
        raise
    for what in found.sacrificed:
        log.warning("memory_budget = %s: %s", config.memory_budget, what)
    return MemoryPlan(setting, found.load, config.budget, found.sacrificed)


def within(drafter: DrafterConfig, load: Load) -> DrafterConfig | None:
    """``drafter`` with the depth and width of ``load``; None where there is no room for one."""
    if not load.k:
        return None
    wanted = {"k": load.k, "width": load.width}
    known = {f.name for f in dataclasses.fields(drafter)}  # type: ignore[arg-type]
    return replace(drafter, **{name: value for name, value in wanted.items() if name in known})  # type: ignore[type-var]


def started(plan: MemoryPlan, runner: Runner, drafter: Drafter | None) -> MemoryReport:
    """Take the room of the largest forward, and compare the plan with the tensors that an engine holds at its start.

    Args: runner of the target's forwards; drafter, prepared.
    """
    runner.reserve(plan.load.rows)
    known: dict[int, int] = {}
    pool = (runner.cache.pool,)  # long lists of numbers
    allocated = {
        "target weights": held_bytes(runner.decoder, known),
        "target keys": held_bytes(runner.cache, known, pool),
        "target room": held_bytes(runner, known, pool),
        "draft": held_bytes(drafter, known, pool) if drafter is not None else 0,
    }
    parts = plan.parts
    predicted = {name: parts.get(name, 0) for name in allocated}
    predicted["draft"] = sum(parts.get(name, 0) for name in HELD if name not in allocated)
    found = MemoryReport(plan.budget, predicted, allocated, total(plan.setting, plan.load), plan.sacrificed)
    if found.warning:
        log.warning("%s", found.warning)
    return found
