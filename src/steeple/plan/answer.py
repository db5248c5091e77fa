"""Answers of ``steeple plan`` in JSON types: a search over drafters, k and windows, or a published heatmap."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from steeple.errors import ConfigError, StorageError, did_you_mean
from steeple.plan.acceptance import Acceptance, from_bench
from steeple.plan.calibration import read_calibration
from steeple.plan.config import PlanConfig
from steeple.plan.machines import Machine
from steeple.plan.ours import Precision, StepModel
from steeple.plan.paper import Window
from steeple.plan.pipeline import advice
from steeple.plan.presets import TABLE_1, K, find_preset
from steeple.plan.rounds import METHODS, Deployment, form_of, memory_bytes
from steeple.plan.search import (
    Candidate,
    Drafting,
    Grid,
    Limits,
    best,
    best_by_cell,
    best_of_each,
    candidates,
    pareto,
)
from steeple.plan.shapes import ModelShape, find_shape

SCHEMA = 1
GIGA = 1e9


def published(config: PlanConfig) -> dict[str, Any]:
    """The heatmap of ``config.preset``: its cells and what they rest on."""
    preset = find_preset(config.preset)
    if config.window:
        preset = preset.with_window(Window.parse(config.window))
    return {"schema_version": SCHEMA, "kind": "plan-preset", **preset.about(), "cells": preset.cells()}


def searched(config: PlanConfig, machine: Machine) -> dict[str, Any]:
    """The search on ``machine``: every candidate, the best ones, and the Pareto front of each context.

    Raises:
        ModelError: the model or the draft is not known. CapacityError: nothing is within the limits.
        ConfigError: a drafter, a tau or a file that cannot be used.
    """
    target = find_shape(config.model)
    small = find_shape(config.draft) if config.draft else None
    where = _deployment(config, machine, target)
    devices = where.devices
    tried, notes = draftings(config, target, small)
    grid = Grid(batches=config.batch, contexts=config.context, ks=config.ks, windows=config.windows)
    found = candidates(where, tried, grid, price_per_hour=config.price * devices)
    limits = Limits(
        memory_bytes=config.memory * GIGA or machine.memory_bytes * devices,
        seconds_per_token=config.latency / 1e3,
        cost_per_million_tokens=config.cost,
    )
    chosen = best(found, limits)
    winners = best_by_cell(found, limits)
    return {
        "schema_version": SCHEMA,
        "kind": "plan",
        "model": target.name,
        "hardware": asdict(machine),
        "devices": devices,
        "dtype": config.dtype,
        "weights": config.weights or config.dtype,
        "step_model": where.step.to_dict(),
        "limits": asdict(limits),
        "notes": [*notes, *_cautions(config, where, tried), *_pipelining(where, tried, chosen)],
        "best": chosen.to_dict(),
        "cells": [_shown(c, limits, winners) for c in best_of_each(found)],
        "pareto": {str(c): [x.to_dict() for x in _front(found, limits, c)] for c in config.context},
        "candidates": [c.to_dict() for c in found],
    }


def _deployment(config: PlanConfig, machine: Machine, target: ModelShape) -> Deployment:
    """With ``config.devices``, or with the fewest of a power of two that hold plain decoding in every cell."""
    where = Deployment(
        target=target,
        step=_step(config, machine),
        precision=Precision.of(config.dtype, config.weights),
        devices=max(config.devices, 1),
    )
    if config.devices or not machine.link_bytes_per_second:
        return where
    while 2 * where.devices <= target.heads and target.heads % (2 * where.devices) == 0:
        if memory_bytes(where, None, max(config.batch), max(config.context), 0) <= where.devices * machine.memory_bytes:
            break
        where = replace(where, devices=2 * where.devices)
    return where


def _step(config: PlanConfig, machine: Machine) -> StepModel:
    if not config.calibration:
        return StepModel.of_machine(machine, config.dtype)
    return read_calibration(config.calibration).step.at_temperature(config.temperature)


def draftings(config: PlanConfig, target: ModelShape, small: ModelShape | None) -> tuple[list[Drafting], list[str]]:
    """The drafters to try with what is known of their acceptance, and why others are left out."""
    measured = from_bench(_json(config.acceptance, "acceptance"), config.temperature) if config.acceptance else {}
    own = _given_taus(config)
    names = config.drafters or tuple(measured) or tuple(method.name for method in METHODS)
    unused = [name for name in own if name and name not in names]
    if unused:
        raise ConfigError(f"--tau names {unused[0]!r}, which is not tried. {did_you_mean(unused[0], names)}")
    tried, notes = [], []
    for name in names:
        form = form_of(name, target, small)
        tau = own.get(name, own.get(""))
        acceptance = tau or measured.get(name) or _stand_in(name)
        if form is None:
            notes.append(f"{name} is left out: no small model of this family is known; give --draft.")
        elif acceptance is None:
            notes.append(f"{name} is left out: its tau is not known; give --tau {name}=TAU or --acceptance.")
        else:
            tried.append(Drafting(form=form, acceptance=acceptance))
    return tried, notes


def _given_taus(config: PlanConfig) -> dict[str, Acceptance]:
    """Drafter -> acceptance from ``--tau``; the empty name stands for all."""
    found = {}
    for text in config.tau:
        name, _, number = text.rpartition("=")
        try:
            tau = float(number)
        except ValueError as error:
            raise ConfigError(f"--tau {text!r}; give DRAFTER=TAU such as spire=3.4, or a number.") from error
        found[name] = Acceptance.of_tau({1.0: tau}, config.tau_k, f"given at k = {config.tau_k}")
    return found


def _stand_in(name: str) -> Acceptance | None:
    """The paper's tau of the drafter's like, where there is one."""
    sources = {method.name: method.source for method in METHODS}
    source = sources.get(name.partition(":")[0], "")
    return Acceptance.of_tau(TABLE_1[source], K, "SPIRe paper, small model") if source else None


def _cautions(config: PlanConfig, where: Deployment, tried: list[Drafting]) -> list[str]:
    """What a reader must know before believing the numbers."""
    target, notes = where.target, []
    if where.devices > max(config.devices, 1):
        notes.append(
            f"{where.devices} devices are the fewest that hold plain decoding in every cell; --devices decides."
        )
    if not config.calibration:
        notes.append("Times are an upper bound of speed: rates at their peak, no overheads. Calibrate to have better.")
    if target.max_context and max(config.context) > target.max_context:
        notes.append(f"{target.name} was made for {target.max_context} positions; longer contexts are arithmetic only.")
    outside = {d.form.name for d in tried for c in config.context if len(d.acceptance.contexts) > 1
               and not d.acceptance.covers(c)}  # fmt: skip
    if outside:
        names = ", ".join(sorted(outside))
        notes.append(f"tau of {names} was not measured at all of these contexts; the nearest one stands in.")
    if config.windows:
        notes.append("tau is held while the window changes; it was measured with the drafter's own.")
    return notes


def _pipelining(where: Deployment, tried: list[Drafting], chosen: Candidate) -> list[str]:
    """What micro-batches would do for the best choice, if that drafts."""
    forms = {drafting.form.name: drafting.form.with_window(chosen.window) for drafting in tried}
    form = forms.get(chosen.drafter)
    return [advice(where, form, chosen.batch, chosen.context, chosen.k)] if form is not None and chosen.k else []


def _shown(candidate: Candidate, limits: Limits, winners: Mapping[tuple[int, int], Candidate]) -> dict[str, Any]:
    """A cell of the answer: the candidate, whether it is the fastest of its cell, and the limits it breaks."""
    fastest = winners.get((candidate.batch, candidate.context)) == candidate
    return {**candidate.to_dict(), "best": fastest, "breaks": limits.broken(candidate)}


def _front(found: list[Candidate], limits: Limits, context: int) -> list[Candidate]:
    return pareto(c for c in found if c.context == context and limits.allows(c))


def _json(path: str, field: str) -> Mapping[str, Any]:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"--{field} {path} cannot be read ({error.strerror}); give a JSON file.") from error
    except ValueError as error:
        raise ConfigError(f"--{field} {path} is no valid JSON ({error}); make it again.") from error
    if not isinstance(value, Mapping):
        raise ConfigError(f"--{field} {path} holds no JSON object; give the file that the command wrote.")
    return value
