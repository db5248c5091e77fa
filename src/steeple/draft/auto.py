"""The drafter that the planner expects to pay, with its depth corrected by what is observed while running.

At the start the planner compares the drafters that there are for the target, at the batch and context expected; then
``auto-k`` runs the best one, down to no draft at all. Choosing anew for every request is not this drafter's business.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from steeple.config import check_range
from steeple.draft.auto_k import AutoKConfig
from steeple.draft.base import Drafter, Surroundings
from steeple.draft.declared import DeclaresMemory
from steeple.errors import ConfigError, SteepleError, StorageError
from steeple.hardware import measure
from steeple.plan.acceptance import Acceptance, from_bench
from steeple.plan.calibration import read_calibration
from steeple.plan.loaded import shape_of_config
from steeple.plan.memory_parts import DraftMemory, Lay
from steeple.plan.ours import Precision, StepModel
from steeple.plan.presets import TABLE_1
from steeple.plan.presets import K as TABLE_K
from steeple.plan.rounds import METHODS, Deployment, form_of
from steeple.plan.search import Candidate, Drafting, Grid, best_of_each, candidates
from steeple.types import MAX_NODES

log = logging.getLogger(__name__)

LIKELY_BATCH = 32  # where neither the settings nor the engine say how many requests run at once
OWNER = "auto"


@dataclass(frozen=True, kw_only=True)
class AutoConfig:
    """Settings: what is expected, what is known of the machine and of acceptance, and ``k``, the greatest depth."""

    batch: int = field(default=0, metadata={"help": "requests decoded together; 0: the engine's batch_size, else 32"})
    context: int = field(default=0, metadata={"help": "positions of each; 0: half of what the model takes"})
    temperature: float = field(default=0.0, metadata={"help": "of the requests; decides what counts of acceptance"})
    calibration: str = field(
        default="", metadata={"help": "JSON of steeple plan calibrate; empty: memory and arithmetic are measured"}
    )
    acceptance: str = field(
        default="", metadata={"help": "JSON of steeple bench on this target; empty: the SPIRe paper's tau stands in"}
    )
    k: int = field(default=8, metadata={"help": "greatest depth of a draft"})

    adaptive = True

    def __post_init__(self) -> None:
        check_range(OWNER, "batch", self.batch, 0, 65536)
        check_range(OWNER, "context", self.context, 0, 1 << 24)
        check_range(OWNER, "temperature", self.temperature, 0.0, 100.0)
        check_range(OWNER, "k", self.k, 1, MAX_NODES)

    def build(self, around: Surroundings) -> Drafter:
        """The first drafter in the planner's order that can be built, its depth chosen while running.

        Raises:
            ConfigError, StorageError: a file that cannot be used, or no drafter can be built.
        """
        refused: SteepleError | None = None
        for choice in self.order(around):
            try:
                drafter = AutoKConfig(model=choice.drafter, k=self.k).build(around)
            except SteepleError as error:
                log.info("auto goes on without %s: %s", choice.drafter, error)
                refused = error
                continue
            _tell(choice)
            return drafter
        raise ConfigError("auto: none of the drafters can be built for this target; name one instead.") from refused

    def memory(self, around: Surroundings, lay: Lay) -> DraftMemory:
        """That of the drafter that the planner prefers."""
        chosen = self.order(around)[0].drafter
        return AutoKConfig(model=chosen, k=self.k).memory(around, lay)

    def order(self, around: Surroundings) -> list[Candidate]:
        """Each drafter that there is for the target at its best depth, the fastest by the planner's word first.

        Raises:
            ConfigError: there is none whose acceptance is known; or a file of another kind. StorageError: no such file.
        """
        target = shape_of_config(around.decoder.config, "the target")
        context = self.context or max(1, around.decoder.config.max_context // 2)
        grid = Grid(
            batches=(self.batch or around.batch_size or LIKELY_BATCH,),
            contexts=(context,),
            ks=tuple(range(1, self.k + 1)),
        )
        dtype = str(around.dtype).removeprefix("torch.")
        where = Deployment(target=target, step=self._step(around, dtype), precision=Precision.of(dtype))
        found = candidates(where, self._draftings(around), grid)
        drafted = [candidate for candidate in best_of_each(found) if candidate.k]
        if not drafted:
            raise ConfigError(
                "auto: there is no drafter for this target whose acceptance is known; give auto:acceptance=FILE (the "
                "JSON of steeple bench), or name a drafter."
            )
        return sorted(drafted, key=lambda candidate: -candidate.tokens_per_second)

    def _step(self, around: Surroundings, dtype: str) -> StepModel:
        if self.calibration:
            step = read_calibration(self.calibration, "auto: calibration =").step
        else:
            step = _measured(around.device, around.dtype, dtype)
        return step.at_temperature(self.temperature)

    def _draftings(self, around: Surroundings) -> list[Drafting]:
        """The drafters that there are, as the planner counts them, with what is known of their acceptance."""
        measured = from_bench(_json(self.acceptance), self.temperature) if self.acceptance else {}
        target = shape_of_config(around.decoder.config, "the target")
        found = []
        for method in METHODS:
            acceptance = measured.get(method.name) or _stand_in(method.source)
            memory = _declared(method.name, self.k, around)
            if acceptance is None or memory is None:
                continue
            runs = shape_of_config(memory.runs, method.name) if memory.runs is not None else None
            form = form_of(method.name, target, runs)
            if form is not None:
                found.append(Drafting(form=replace(form, shape=runs), acceptance=acceptance))
        return found


def _declared(name: str, k: int, around: Surroundings) -> DraftMemory | None:
    """What the drafter ``name`` says of itself; None where there is none for this target."""
    from steeple.draft import drafter_config  # the register knows this class, so it cannot be known before

    config = drafter_config(name, k=k)
    if not isinstance(config, DeclaresMemory):
        return None
    try:
        return config.memory(around, Lay(element=around.dtype.itemsize))
    except SteepleError as error:
        log.info("auto leaves out %s: %s", name, error)
        return None


def _stand_in(source: str) -> Acceptance | None:
    """The paper's tau of a drafter's like."""
    return Acceptance.of_tau(TABLE_1[source], TABLE_K, "SPIRe paper") if source else None


@functools.cache
def _measured(device: torch.device, dtype: torch.dtype, name: str) -> StepModel:
    """The machine's rates without overheads; measured once, so that one process makes one choice."""
    hardware = measure(device, dtype)
    return StepModel(bytes_per_second=hardware.read_bytes_per_second, flops_per_second=hardware.flops_per_second[name])


def _json(path: str) -> Mapping[str, Any]:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(
            f"auto: acceptance = {path} cannot be read ({error.strerror}); give the JSON of steeple bench."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"auto: acceptance = {path} is no valid JSON ({error}); give that of steeple bench."
        ) from error
    if not isinstance(value, Mapping):
        raise ConfigError(f"auto: acceptance = {path} holds no JSON object; give the JSON of steeple bench.")
    return value


def _tell(choice: Candidate) -> None:
    """Say what was chosen and why."""
    hope = "expected" if choice.throughput_multiplier > 1 else "not expected to pay, so it may stay at depth 0;"
    log.info(
        "auto chose %s: %s %.2f times plain decoding at batch %d, context %d with k = %d, tau %.2f (%s), a round of "
        "%.2f plain steps",
        choice.drafter,
        hope,
        choice.throughput_multiplier,
        choice.batch,
        choice.context,
        choice.k,
        choice.tau,
        choice.tau_source,
        choice.dt,
    )
