"""The calibration itself: measure the machine and the engine's rounds by turns, fit, and say how well it fits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from statistics import median
from typing import Any

import numpy as np
import torch

from steeple.bench.calibrate.config import CalibrateConfig
from steeple.bench.calibrate.measure import Place, Subject, Visit, subject, visit
from steeple.bench.calibrate.models import names_of
from steeple.bench.step.turns import no_garbage_collection
from steeple.errors import ConfigError
from steeple.evidence.environment import command_line, environment
from steeple.evidence.progress import Progress, silent
from steeple.hardware import Hardware, ReadProbe, measure, pick_device
from steeple.plan.calibration import KIND
from steeple.plan.fit_rounds import Drafts, RoundFit, Steps, fit_rounds, summary
from steeple.plan.loaded import shape_of_config
from steeple.plan.ours import Precision, Work, pass_work
from steeple.plan.shapes import Floats, ModelShape

SCHEMA_VERSION = 1
COPY_BYTES = 256 << 20
COPIES = 5


def run_calibrate(
    config: CalibrateConfig, progress: Progress = silent, argv: Sequence[str] | None = None
) -> dict[str, Any]:
    """Measure and fit; the result is ready for JSON.

    Args:
        progress: told after every visit. argv: the command to put on record; the process's own by default.

    Raises:
        ConfigError, ModelError, CapacityError: before anything long begins.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    progress("measure the machine", 0, 1)
    hardware = measure(device, getattr(torch, config.dtype))
    copy = copy_bytes_per_second(device)
    probe = ReadProbe(device)
    subjects = []
    for name in names_of(config):
        progress(f"make {name}", 0, 1)
        subjects.append(subject(name, config))
    started = time.perf_counter()
    with no_garbage_collection():
        _measure(config, subjects, probe, started, progress)
    seconds = time.perf_counter() - started
    progress("fit", 0, 1)
    observed = Observed.of(config, subjects)
    fit = observed.fit(hardware, config.dtype)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "command": command_line() if argv is None else list(argv),
        "config": asdict(config),
        "environment": environment(subjects[0].target),
        "seconds": seconds,
        "visits": sum(len(own.visits) for own in subjects),
        "memory": memory_facts(hardware, copy, observed.readings, config.dtype),
        "shapes": [asdict(shape_of_config(own.target.decoder.config, own.name)) for own in subjects],
        "model": fit.model.to_dict(),
        "summary": {"steps": summary(fit.step_residuals), "drafts": summary(fit.draft_residuals)},
        "cells": observed.cells(fit),
        "parts": [row for own in subjects for row in parts(own, config.dtype)],
    }


def copy_bytes_per_second(device: torch.device) -> float:
    """Bytes read and written per second by the best of a few copies."""
    source = torch.ones(COPY_BYTES // 8, dtype=torch.float64, device=device)
    goal = torch.empty_like(source)
    times = []
    for _ in range(COPIES):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        goal.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * COPY_BYTES / min(times)


def memory_facts(hardware: Hardware, copy: float, readings: Floats, dtype: str) -> dict[str, Any]:
    """The machine by itself. ``read_bytes_per_second`` is the median beside the visits: the model holds at it."""
    low, high = np.quantile(readings, [0.1, 0.9]).tolist()
    return {
        "name": hardware.name,
        "threads": hardware.threads,
        "read_bytes_per_second": float(np.median(readings)),
        "read_bytes_per_second_range": [low, high],
        "read_bytes_per_second_best": hardware.read_bytes_per_second,
        "copy_bytes_per_second": copy,
        "flops_per_second": hardware.flops_per_second[dtype],
    }


def _measure(
    config: CalibrateConfig, subjects: Sequence[Subject], probe: ReadProbe, started: float, progress: Progress
) -> None:
    """Everything once; then again and again, in the same order, until the time is over."""
    order = list(_turns(subjects))
    if not order:
        raise ConfigError("CalibrateConfig: no batch and context fits; raise positions or lower context.")
    turn = 0
    while turn == 0 or time.perf_counter() - started < config.seconds:
        for done, (own, place) in enumerate(order):
            if turn and time.perf_counter() - started >= config.seconds:
                return
            own.visits.append(visit(own, place, probe, config.seed))
            progress(f"{own.name}, round {turn + 1}", done + 1, len(order))
        turn += 1


def _turns(subjects: Sequence[Subject]) -> Iterator[tuple[Subject, Place]]:
    """A place of each model by turns, so that a slow moment of the machine falls on all alike."""
    for number in range(max(len(own.places) for own in subjects)):
        for own in subjects:
            if number < len(own.places):
                yield own, own.places[number]


@dataclass(frozen=True)
class Observed:
    """All visits of all models with the work that the planner counts for them.

    steps, drafts: what is fitted; the rows of ``visits`` that are drafts are ``drafting``.
    """

    names: list[str]
    visits: list[Visit]
    kinds: list[str]
    work: Work
    draft_work: Work | None
    readings: Floats

    @staticmethod
    def of(config: CalibrateConfig, subjects: Sequence[Subject]) -> Observed:
        """The visits of ``subjects``."""
        precision = Precision.of(config.dtype)
        names: list[str] = []
        visits: list[Visit] = []
        kinds: list[str] = []
        work: list[Work] = []
        drafts: list[Work] = []
        for own in subjects:
            shape = shape_of_config(own.target.decoder.config, own.name)
            for item in own.visits:
                names.append(own.name)
                visits.append(item)
                kinds.append(own.kinds[item.place.draft].name if item.place.draft >= 0 else "")
                work.append(_drawn(_step_work(shape, item, precision), item))
                if item.place.draft >= 0:
                    form = own.kinds[item.place.draft].form(shape)
                    drafted = pass_work(
                        form.shape or shape, item.place.batch, item.context, window=form.positions, precision=precision
                    )
                    drafts.append(_drawn(drafted, item))
        readings = np.array([item.read_bytes_per_second for item in visits])
        return Observed(names, visits, kinds, _joined(work), _joined(drafts) if drafts else None, readings)

    @property
    def drafting(self) -> Floats:
        """Places of the visits that drafted."""
        return np.array([index for index, kind in enumerate(self.kinds) if kind], dtype=np.int64)

    def fit(self, hardware: Hardware, dtype: str) -> RoundFit:
        """The step model at the median reading of the memory's speed."""
        typical = float(np.median(self.readings))
        memory = self.readings / typical
        steps = Steps(work=self.work, seconds=np.array([item.step for item in self.visits]), memory=memory)
        drafts = None
        if self.draft_work is not None:
            at = self.drafting
            drafts = Drafts(
                work=self.draft_work,
                k=np.array([float(self.visits[index].place.k) for index in at]),
                between=self.work.bytes[at],
                seconds=np.array([self.visits[index].draft for index in at]),
                memory=memory[at],
            )
        return fit_rounds(steps, drafts, bytes_per_second=typical, flops_per_second=hardware.flops_per_second[dtype])

    def cells(self, fit: RoundFit) -> list[dict[str, Any]]:
        """A row for every place: medians of its visits and of what the model says of them."""
        drafts = dict(zip(self.drafting.tolist(), range(len(fit.drafts)), strict=True))
        groups: dict[tuple[str, Place], list[int]] = {}
        for index, (name, item) in enumerate(zip(self.names, self.visits, strict=True)):
            groups.setdefault((name, item.place), []).append(index)
        rows = []
        for (name, place), own in groups.items():
            row: dict[str, Any] = {"model": name, **asdict(place), "draft": self.kinds[own[0]], "visits": len(own)}
            row["step_ms"] = median(self.visits[i].step for i in own) * 1e3
            row["step_residual"] = float(np.median(fit.step_residuals[own]))
            if place.draft >= 0:
                row["draft_ms"] = median(self.visits[i].draft for i in own) * 1e3
                row["draft_residual"] = float(np.median(fit.draft_residuals[[drafts[i] for i in own]]))
            row["read_bytes_per_second"] = median(self.visits[i].read_bytes_per_second for i in own)
            rows.append(row)
        return rows


def _step_work(shape: ModelShape, item: Visit, precision: Precision) -> Work:
    return pass_work(shape, item.place.batch, item.context, item.place.k + 1, precision=precision)


def _drawn(work: Work, item: Visit) -> Work:
    """``work`` with logits to draw from only where tokens are drawn."""
    return work if item.place.temperature > 0 else replace(work, logits=np.zeros_like(work.rows))


def _joined(works: Sequence[Work]) -> Work:
    flat = [work.flat() for work in works]
    return Work(**{item.name: np.concatenate([getattr(one, item.name) for one in flat]) for item in fields(Work)})


def parts(own: Subject, dtype: str) -> list[dict[str, Any]]:
    """What products with weights and attention reach within a step, by rows: medians over visits."""
    shape, precision = shape_of_config(own.target.decoder.config, own.name), Precision.of(dtype)
    groups: dict[Place, list[Visit]] = {}
    for item in own.visits:
        if item.place.draft < 0 and item.attention and item.linear and not item.place.temperature:
            groups.setdefault(item.place, []).append(item)
    rows = []
    for place, visits in groups.items():
        work = _step_work(shape, visits[0], precision)
        attention, linear = (median(getattr(item, name) for item in visits) for name in ("attention", "linear"))
        rows.append(
            {
                "model": own.name,
                "batch": place.batch,
                "context": place.context,
                "rows_per_request": place.k + 1,
                "attention_bytes_per_second": float(work.attention_bytes) / attention,
                "attention_flops_per_second": float(work.attention_flops) / attention,
                "linear_bytes_per_second": float(work.linear_bytes) / linear,
                "linear_flops_per_second": float(work.linear_flops) / linear,
            }
        )
    return rows
