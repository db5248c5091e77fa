"""A fleet simulation from its settings: the load, the replica, every way to decode, and the report of each."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steeple.errors import ConfigError, StorageError, did_you_mean
from steeple.plan.fleet.config import AUTO, FIXED, LOADS, RATE, TRACE, FleetConfig, LoadConfig, ReplicaConfig
from steeple.plan.fleet.drafting import Drafting, from_conditional, from_tau
from steeple.plan.fleet.load import Floats, Ints, Load, drawn_from, fixed, lognormal, poisson, read_trace
from steeple.plan.fleet.models import DraftPasses, ModelStep, cache_tokens
from steeple.plan.fleet.replica import Limits
from steeple.plan.fleet.report import report
from steeple.plan.fleet.search import fewest_replicas, highest_rate
from steeple.plan.fleet.simulate import Fleet, simulate, tabulate
from steeple.plan.fleet.steps import DraftTime, NoDraft, ShareOfStep
from steeple.plan.machines import find_machine
from steeple.plan.ours import Precision, StepModel
from steeple.plan.shapes import ModelShape, find_shape

Progress = Callable[[str, int, int], None]
FIELDS = ("k", "tau", "rates", "share", "model", "window", "cache")


@dataclass(frozen=True)
class Way:
    """One way to decode, and the positions that a replica's cache then holds."""

    drafting: Drafting
    kv_tokens: int


def plan_fleet(config: FleetConfig, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Simulate the fleet of ``config`` with plain decoding and with each drafter.

    Returns:
        ``config``, and ``rows``: a report per way to decode (see ``report.report``) with its k, tau, cache and, at
        ``loads`` multiples of the load on as many replicas as plain decoding has, ``loads``.

    Raises:
        ConfigError, ModelError, StorageError: a setting, the model or the trace cannot be used.
        CapacityError: the weights do not fit, or no fleet meets the objectives.
    """
    load = make_load(config.load)
    step = make_step(config.replica)
    ways = [plain_way(config.replica, step), *(make_way(text, config.replica, step) for text in config.drafter)]
    names = [way.drafting.name for way in ways]
    if len(set(names)) < len(names):
        raise ConfigError(f"FleetConfig.drafter: the names {', '.join(names)} are not all different; rename one.")
    multiples = config.loads or (LOADS if config.plots else ())
    rows: list[dict[str, Any]] = []
    for number, way in enumerate(ways):
        progress(f"{way.drafting.name}: the fleet", number, len(ways))
        row = _sized(config, load, step, way)
        base = _fleet(config, way, rows[0]["replicas"] if rows else row["replicas"])
        if config.highest_rate:
            progress(f"{way.drafting.name}: the highest rate", number, len(ways))
            limit = highest_rate(load, base, step, way.drafting, config.objectives, warmup=config.warmup)
            row["highest_rate"] = limit
        row["loads"] = []
        table = tabulate(base, step, way.drafting)
        for multiple in multiples:
            progress(f"{way.drafting.name}: load x {multiple:g}", number, len(ways))
            outcome = simulate(load.at_rate(load.rate * multiple), base, step, way.drafting, table=table)
            found = report(outcome, base, config.objectives, price=config.replica.price, warmup=config.warmup)
            row["loads"].append({"multiple": multiple, **found})
        rows.append(row)
    for row in rows:
        row["gpus_of_plain"] = row["gpus"] / rows[0]["gpus"]
    return {"config": asdict(config), "rows": rows}


def _fleet(config: FleetConfig, way: Way, replicas: int) -> Fleet:
    replica = config.replica
    limits = Limits(
        max_batch=replica.max_batch, kv_tokens=way.kv_tokens, chunk=replica.chunk, watermark=replica.watermark
    )
    return Fleet(
        replicas=replicas,
        gpus=replica.tp,
        route=config.route,
        limits=limits,
        drawn=config.drawn,
        seed=config.load.seed,
    )


def _sized(config: FleetConfig, load: Load, step: ModelStep, way: Way) -> dict[str, Any]:
    """The report of as many replicas as were asked for, or as are needed."""
    if config.replicas:
        fleet = _fleet(config, way, config.replicas)
        outcome = simulate(load, fleet, step, way.drafting)
    else:
        begin = _fleet(config, way, 1)
        fleet, outcome = fewest_replicas(
            load, begin, step, way.drafting, config.objectives, most=config.max_replicas, warmup=config.warmup
        )
    found = report(outcome, fleet, config.objectives, price=config.replica.price, warmup=config.warmup)
    drafting = way.drafting
    return {
        "drafter": drafting.name,
        "k": drafting.k,
        "tau": drafting.tau,
        "reached": list(drafting.reached),
        "kv_tokens": way.kv_tokens,
        "highest_rate": None,
        **found,
    }


def make_load(config: LoadConfig) -> Load:
    """The requests of ``config``."""
    rng = np.random.default_rng((config.seed, 0))
    trace = read_trace(Path(config.trace)) if config.trace else None
    count = config.requests
    prompt: Ints
    output: Ints
    if trace is not None and config.lengths in (AUTO, TRACE):
        if config.arrivals in (AUTO, TRACE):
            same = trace.first(count)
            return same.at_rate(config.rate) if config.rate else same
        prompt, output = drawn_from(trace, count, rng)
    elif config.lengths == FIXED:
        prompt, output = fixed(config.prompt, count), fixed(config.output, count)
    else:
        prompt = lognormal(config.prompt, config.sigma, count, rng)
        output = lognormal(config.output, config.sigma, count, rng)
    return Load(_arrivals(config, trace, rng), prompt, output)


def _arrivals(config: LoadConfig, trace: Load | None, rng: np.random.Generator) -> Floats:
    if trace is not None and config.arrivals in (AUTO, TRACE):
        same = trace.first(config.requests)
        return (same.at_rate(config.rate) if config.rate else same).arrival
    rate = config.rate or (trace.rate if trace is not None else RATE)
    return poisson(rate, config.requests, rng)


def make_step(config: ReplicaConfig) -> ModelStep:
    """The step time of a replica: its model on its machine, by the datasheet or by a calibration."""
    machine = find_machine(config.hardware)
    if config.step_model:
        model = _read_step_model(Path(config.step_model))
    else:
        model = StepModel.of_machine(machine, config.weights or config.dtype)
    return ModelStep(
        shape=find_shape(config.model),
        model=model,
        precision=Precision.of(config.dtype, config.weights),
        devices=config.tp,
    )


def _read_step_model(path: Path) -> StepModel:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"The step model {path} cannot be read ({error}); give a JSON file.") from error
    if not isinstance(values, dict):
        raise StorageError(f"The step model {path} holds no JSON object; give what a calibration wrote.")
    inner = values.get("model", values)
    return StepModel.from_dict(inner if isinstance(inner, dict) else values)


def plain_way(config: ReplicaConfig, step: ModelStep) -> Way:
    """No drafting."""
    return Way(Drafting(), _kv_tokens(config, step, ()))


def make_way(text: str, config: ReplicaConfig, step: ModelStep) -> Way:
    """A drafter from ``"name,k=4,tau=2.8,share=0.2"``; see ``FleetConfig``.

    Raises:
        ConfigError: a field is unknown, is no number, or is missing.
    """
    name, *parts = (part.strip() for part in text.split(","))
    fields: dict[str, str] = {}
    for part in parts:
        key, sign, value = part.partition("=")
        if not sign or key not in FIELDS:
            raise ConfigError(f"--drafter {text!r}: {part!r} is no setting. {did_you_mean(key, FIELDS)}")
        fields[key] = value
    if "rates" in fields:
        reached = from_conditional([_number(text, rate) for rate in fields["rates"].split("/")])
    elif "k" in fields and "tau" in fields:
        reached = from_tau(int(_number(text, fields["k"])), _number(text, fields["tau"]))
    else:
        raise ConfigError(f"--drafter {text!r} does not say what is accepted; give k=.. and tau=.., or rates=../..")
    time: DraftTime = NoDraft()
    models: tuple[ModelShape, ...] = ()
    if "share" in fields:
        time = ShareOfStep(step, _number(text, fields["share"]))
    elif "model" in fields:
        shape = find_shape(fields["model"])
        window = _number(text, fields["window"]) if "window" in fields else math.inf
        passes = ModelStep(shape=shape, model=step.model, precision=step.precision, devices=step.devices)
        time = DraftPasses(step=passes, k=len(reached), window=window)
        models = () if fields.get("cache") == "no" else (shape,)
    return Way(Drafting(name, reached, time), _kv_tokens(config, step, models))


def _number(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"--drafter {text!r}: {value!r} is no number; give one.") from None


def _kv_tokens(config: ReplicaConfig, step: ModelStep, drafts: tuple[ModelShape, ...]) -> int:
    if config.kv_tokens:
        return config.kv_tokens
    machine = find_machine(config.hardware)
    return cache_tokens(
        step.shape, machine, step.precision, devices=step.devices, share=config.memory_share, drafts=drafts
    )
