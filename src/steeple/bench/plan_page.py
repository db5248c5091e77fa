"""The planner as one HTML page that works offline: batch, context, k, window and hardware are moved in a browser.

The page's arithmetic is ``page/plan_model.js``, which a test holds equal to ``steeple.plan``; this file gives it the
tables (shapes, machines, acceptance, published figures) and puts everything into one file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from steeple.bench.plots import COLOURS, GREY
from steeple.errors import ConfigError, StorageError
from steeple.plan.acceptance import Acceptance
from steeple.plan.answer import draftings
from steeple.plan.config import PlanConfig
from steeple.plan.machines import DTYPE_BYTES, MACHINES, Machine
from steeple.plan.ours import StepModel
from steeple.plan.paper import critical_context
from steeple.plan.presets import PRESETS, Preset
from steeple.plan.rounds import METHODS, form_of
from steeple.plan.search import Drafting
from steeple.plan.shapes import EMBEDDED, SHAPES, ModelShape, find_shape

PARTS = ("plan.css", "plan_model.js", "plan_charts.js", "plan_app.js")
"""Files of ``page/`` that stand in ``plan.html``, each at the mark ``@NAME@``."""
START_MODEL, START_MACHINE = "llama-3.1-8b", "h100"
COUNTS = ("body_parameters", "linear_parameters", "head_parameters", "parameters", "kv_elements_per_layer")


def plotly_source() -> str:
    """The JavaScript of plotly, to be inlined.

    Raises:
        ConfigError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError(
            "PlanConfig.html needs plotly, which is not installed; pip install 'steeple[page]', or leave --html out."
        ) from error
    return str(get_plotlyjs())


def write_page(result: Mapping[str, Any], config: PlanConfig, path: Path, plotly: str) -> None:
    """Write the page to ``path``, opened at ``result`` (the answer of ``steeple plan`` to ``config``).

    ``plotly``: what ``plotly_source`` gives.

    Raises:
        StorageError: the file cannot be written.
    """
    page = files("steeple.bench") / "page"
    text = (page / "plan.html").read_text(encoding="utf-8")
    # Within a script element "</" would end it.
    data = json.dumps(page_data(result, config), allow_nan=False).replace("</", "<\\/")
    marks = {"plotly.js": plotly, "data": data}
    marks |= {name: (page / name).read_text(encoding="utf-8") for name in PARTS}
    text = re.sub("@([a-z_.]+)@", lambda found: marks[found[1]], text)  # once, so that no part's text is a mark
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"--html {path} cannot be written ({error.strerror}); give another file.") from error


def page_data(result: Mapping[str, Any], config: PlanConfig) -> dict[str, Any]:
    """What the page computes with, in JSON types: tables, published figures, and where its controls start."""
    models = _models(config)
    return {
        "models": models,
        "machines": _machines(result, config),
        "dtypes": dict(DTYPE_BYTES),
        "presets": [_preset(preset) for preset in PRESETS.values()],
        "start": _start(result, config),
        "colours": {"plain": GREY, "drafters": list(COLOURS)},
    }


def _models(config: PlanConfig) -> list[dict[str, Any]]:
    """Every known model with its drafters; the one that was asked for first, with what was asked for it."""
    chosen = None if config.preset else find_shape(config.model)
    named = [find_shape(name) for name in (*EMBEDDED, *SHAPES)]
    others = [shape for shape in named if chosen is None or shape.name != chosen.name]
    rows = [_model(shape, draftings(PlanConfig(), shape, None)[0], ()) for shape in others]
    if chosen is None:
        return rows
    small = find_shape(config.draft) if config.draft else None
    return [_model(chosen, draftings(config, chosen, small)[0], config.drafters), *rows]


def _model(shape: ModelShape, known: Sequence[Drafting], wanted: Sequence[str]) -> dict[str, Any]:
    """A target and its drafters; those without a known tau, and so without a source, unless some were asked for."""
    drafters = [_drafter(drafting) for drafting in known]
    if not wanted:
        there = {drafting.form.name.partition(":")[0] for drafting in known}
        rest = [form_of(method.name, shape) for method in METHODS if method.name not in there]
        nothing = Acceptance.of_tau({1.0: 1.0}, 4)
        drafters += [_drafter(Drafting(form=form, acceptance=nothing)) for form in rest if form]
    return {**_shape(shape), "drafters": drafters}


def _shape(shape: ModelShape) -> dict[str, Any]:
    return {**asdict(shape), **{name: getattr(shape, name) for name in COUNTS}}


def _drafter(drafting: Drafting) -> dict[str, Any]:
    form = drafting.form
    shape = _shape(form.shape) if form.shape else None
    return {**asdict(form), "shape": shape, "acceptance": _acceptance(drafting.acceptance)}


def _acceptance(acceptance: Acceptance) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(acceptance)))


def _machines(result: Mapping[str, Any], config: PlanConfig) -> list[dict[str, Any]]:
    """The table, before it the machine of the answer if the table does not have it as it is."""
    rows = [_machine(machine) for machine in MACHINES.values()]
    if config.preset:
        return rows
    own = Machine(**result["hardware"])
    if config.calibration:
        name = f"{own.name}, calibrated"
        return [{**_machine(own), "name": name, "steps": {config.dtype: result["step_model"]}}, *rows]
    return rows if own.name in MACHINES else [_machine(own), *rows]


def _machine(machine: Machine) -> dict[str, Any]:
    return {
        "name": machine.name,
        "memory_bytes": machine.memory_bytes if math.isfinite(machine.memory_bytes) else 0.0,
        "linked": bool(machine.link_bytes_per_second),
        "source": machine.source,
        "steps": {dtype: StepModel.of_machine(machine, dtype).to_dict() for dtype in machine.flops_per_second},
    }


def _preset(preset: Preset) -> dict[str, Any]:
    target = find_shape(preset.target)
    drafters = [
        {
            "name": item.draft.name,
            "shape": _shape(item.draft.shape),
            "window": asdict(item.draft.window) if item.draft.window else None,
            "extra_flops_per_token": item.draft.extra_flops_per_token,
            "acceptance": _acceptance(item.acceptance),
        }
        for item in preset.drafts
    ]
    return {
        "name": preset.name,
        "title": preset.title,
        "target": _shape(target),
        "drafters": drafters,
        "batches": list(preset.batches),
        "contexts": list(preset.contexts),
        "k": preset.k,
        "hoi": preset.hoi,
        "critical_context": critical_context(target, k=preset.k, hoi=preset.hoi),
        "note": preset.note,
    }


def _start(result: Mapping[str, Any], config: PlanConfig) -> dict[str, Any]:
    """Where the controls stand when the page opens."""
    if config.preset:
        preset = PRESETS[config.preset]
        place = {"preset": preset.name, "model": START_MODEL, "hardware": START_MACHINE, "dtype": "bfloat16"}
        middle = {"batch": preset.batches[-1] // 2, "context": preset.contexts[len(preset.contexts) // 2]}
        return {**place, **middle, "weights": "", "devices": 0, "k": preset.k, "best_k": False, "window": 0, "price": 0}
    best = result["best"]
    name = result["hardware"]["name"]
    return {
        "preset": "",
        "model": result["model"],
        "hardware": f"{name}, calibrated" if config.calibration else name,
        "dtype": config.dtype,
        "weights": config.weights,
        "devices": config.devices,
        "batch": best["batch"],
        "context": best["context"],
        "k": best["k"] or 4,
        "best_k": len(config.ks) > 1,
        "window": config.windows[0] if config.windows else 0,
        "price": config.price,
    }
