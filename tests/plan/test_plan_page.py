"""The planner's HTML page: its arithmetic equals Python's, and in a real browser it does what it says."""

from __future__ import annotations

import functools
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from steeple.bench.plan_page import page_data, plotly_source, write_page
from steeple.cli import main
from steeple.errors import ConfigError, StorageError
from steeple.plan.acceptance import Acceptance
from steeple.plan.answer import draftings, searched
from steeple.plan.config import PlanConfig
from steeple.plan.machines import DTYPE_BYTES, find_machine
from steeple.plan.ours import DraftTerms, Precision, StepModel
from steeple.plan.paper import Window
from steeple.plan.presets import PRESETS
from steeple.plan.rounds import Deployment
from steeple.plan.search import Candidate, Drafting, Grid, candidates
from steeple.plan.shapes import find_shape

MODEL_JS = Path(sys.modules["steeple.bench.plan_page"].__file__ or "").parent / "page" / "plan_model.js"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
TOLERANCE = 1e-9
ALL = ("small_lm", "sparse_self", "spire", "ngram")
NUMBERS = ("tau", "dt", "throughput_multiplier", "tokens_per_second", "seconds_per_token", "memory_bytes",
           "cost_per_million_tokens")  # fmt: skip
CONFIG = PlanConfig(model="llama-3.1-8b", hardware="h100", batch=(64,), context=(8192,), price=2.5, ks=(4,))

# A cell of the page's data as the page itself computes it.
OURS_JS = """
(rows) => rows.map(({data, model, machine, dtype, weights, devices, drafter, window, tau, step, ...at}) => {
  const named = (list, name) => list.find((item) => item.name === name);
  const target = named(data.models, model), size = data.dtypes[dtype];
  const precision = {weights: data.dtypes[weights], keys: size, activations: Math.max(size, 2)};
  const where = {target, step: step || named(data.machines, machine).steps[dtype], precision, devices};
  const form = named(target.drafters, drafter);
  const acceptance = form && (tau ? M.ofTau(tau, 4, "") : form.acceptance);
  return M.evaluate(where, form ? M.withWindow(form, window) : null, acceptance, at.batch, at.context, at.k, at.price);
})
"""
PAPER_JS = """
({data, preset, window}) => {
  const found = data.presets.find((item) => item.name === preset);
  return found.drafters.flatMap((draft) => found.batches.flatMap((batch) => found.contexts.map((context) => {
    const own = {...draft, window: draft.window && window ? window : draft.window};
    return M.paperCell(found, own, draft.acceptance, batch, context, found.k);
  })));
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no chromium on this machine")
    with api.sync_playwright() as play:
        running = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return searched(CONFIG, find_machine(CONFIG.hardware))


@pytest.fixture(scope="module")
def data(result: dict[str, Any]) -> dict[str, Any]:
    return page_data(result, CONFIG)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory, result: dict[str, Any]) -> Path:
    pytest.importorskip("plotly", reason="plotly is not installed")
    path = tmp_path_factory.mktemp("page") / "new" / "plan.html"
    write_page(result, CONFIG, path, plotly_source())
    return path


def in_node(function: str, argument: Any) -> Any:
    """``function`` of the page's arithmetic ``M``, run by node."""
    node = shutil.which("node")
    if not node:
        pytest.skip("no node on this machine")
    code = f"const M = require({json.dumps(str(MODEL_JS))});\n"
    code += "const text = require('fs').readFileSync(0, 'utf8');\n"
    code += f"process.stdout.write(JSON.stringify(({function.strip()})(JSON.parse(text))));"
    ran = subprocess.run([node, "-e", code], input=json.dumps(argument), capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def settings(rng: random.Random, data: dict[str, Any]) -> dict[str, Any]:
    """One random place of the page's controls."""
    model, machine = rng.choice(data["models"]), rng.choice(data["machines"])
    counts = [n for n in (1, 2, 4, 8, 16, 32) if n == 1 or (machine["linked"] and model["heads"] % n == 0)]
    return {
        "model": model["name"],
        "machine": machine["name"],
        "dtype": rng.choice(list(machine["steps"])),
        "weights": rng.choice(list(DTYPE_BYTES)),
        "devices": rng.choice(counts),
        "drafter": rng.choice(["", *(drafter["name"] for drafter in model["drafters"])]),
        "window": rng.choice([0, 16, 200, 4096]),
        "tau": rng.choice([0, 1.0, 1.7, 3.2, 5.0]),
        "batch": round(2 ** rng.uniform(0, 10)),
        "context": round(2 ** rng.uniform(5, 20)),
        "k": rng.randint(1, 16),
        "price": rng.choice([0, 2.5]),
    }


@functools.cache
def drafters_of(model: str) -> dict[str, Drafting]:
    """Those of the page, the ones with an unknown tau at 1."""
    target = find_shape(model)
    known = {d.form.name: d for d in draftings(PlanConfig(tau=("1",), drafters=ALL), target, None)[0]}
    return known | {d.form.name: d for d in draftings(PlanConfig(), target, None)[0]}


def in_python(at: dict[str, Any], step: StepModel | None = None) -> Candidate:
    """The same place by ``steeple.plan``."""
    target, machine = find_shape(at["model"]), find_machine(at["machine"])
    known = drafters_of(at["model"])
    where = Deployment(
        target=target,
        step=step or StepModel.of_machine(machine, at["dtype"]),
        precision=Precision.of(at["dtype"], at["weights"]),
        devices=at["devices"],
    )
    tried = []
    if at["drafter"]:
        own = known[at["drafter"]]
        acceptance = Acceptance.of_tau({1.0: at["tau"]}, 4) if at["tau"] else own.acceptance
        tried = [Drafting(form=own.form, acceptance=acceptance)]
    windows = (at["window"],) if at["window"] else ()
    grid = Grid(batches=(at["batch"],), contexts=(at["context"],), ks=(at["k"],), windows=windows)
    return candidates(where, tried, grid, price_per_hour=at["price"])[-1]


def test_the_page_computes_what_python_computes(data: dict[str, Any]) -> None:
    rng = random.Random(5)
    places = [settings(rng, data) for _ in range(150)]
    slim = {"models": data["models"], "machines": data["machines"], "dtypes": data["dtypes"]}
    function = f"({{data, rows}}) => ({OURS_JS.strip()})(rows.map((row) => ({{...row, data}})))"
    found = in_node(function, {"data": slim, "rows": places})
    for at, cell in zip(places, found, strict=True):
        wanted = in_python(at)
        for name in NUMBERS:
            assert cell[name] == pytest.approx(getattr(wanted, name), rel=TOLERANCE), (name, at)


def terms(kind: Any) -> dict[str, float]:
    """A value for each number of ``kind``, of the size that its unit has, no two alike."""
    sizes = {"flops_per_second": 1e12, "bytes_per_second": 1e11, "cache_bytes": 1e9, "seconds": 1e-4}
    found = {}
    for place, item in enumerate(fields(kind)):
        size = next((size for unit, size in sizes.items() if unit in item.name), None)
        if size:
            found[item.name] = size * (1 + 0.3 * place) * (1e-5 if "logit" in item.name else 1.0)
    return found


def test_every_term_of_a_calibrated_step_is_in_the_page(data: dict[str, Any]) -> None:
    # every field, so that a term which is added to the step model fails here until the page has it
    full = StepModel(**{**terms(StepModel), "attention_efficiency": ((4.0, 0.7), (1.0, 0.4), (9.0, 0.9)),
                        "overlap": 0.6, "draft": DraftTerms(**terms(DraftTerms)), "drawn": True})  # fmt: skip
    infinite = StepModel(bytes_per_second=2e11, flops_per_second=float("inf"), cache_bytes_per_second=float("inf"))
    rng = random.Random(6)
    places = [settings(rng, data) for _ in range(60)]
    slim = {"models": data["models"], "machines": data["machines"], "dtypes": data["dtypes"]}
    steps = [full, infinite]
    rows = [
        {**at, "step": steps[i % 2].to_dict(), "devices": 1 if i % 2 else at["devices"]} for i, at in enumerate(places)
    ]
    function = f"({{data, rows}}) => ({OURS_JS.strip()})(rows.map((row) => ({{...row, data}})))"
    for i, (at, cell) in enumerate(zip(rows, in_node(function, {"data": slim, "rows": rows}), strict=True)):
        wanted = in_python(at, steps[i % 2])
        for name in NUMBERS:
            assert cell[name] == pytest.approx(getattr(wanted, name), rel=TOLERANCE), (name, at)


def test_measured_acceptance_by_position_and_context() -> None:
    measured = Acceptance(contexts=(256, 1024, 9000), survival=((0.9, 0.7, 0.6), (0.8, 0.5, 0.3), (0.5, 0.0, 0.0)))
    table = {"contexts": measured.contexts, "survival": measured.survival}
    places = [(context, k) for context in (1, 256, 500, 1024, 4000, 1e6) for k in (1, 2, 3, 4, 9)]
    found = in_node(
        "({table, places}) => places.map(([c, k]) => M.tauAt(table, c, k))", {"table": table, "places": places}
    )
    assert found == pytest.approx([float(measured.tau(context, k)) for context, k in places], rel=TOLERANCE)


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("window", [0, 64])
def test_the_page_has_the_published_figures(data: dict[str, Any], name: str, window: int) -> None:
    # beyond the figure, where a draft's arithmetic binds as well
    larger = {"batches": (*PRESETS[name].batches, 1000), "contexts": (30, *PRESETS[name].contexts)}
    preset = replace(PRESETS[name], **larger)
    data = {"presets": [{**found, **larger} for found in data["presets"]]}
    own = {"sink": 1, "positions": window, "share": 0} if window else None
    found = in_node(PAPER_JS, {"data": data, "preset": name, "window": own})
    wanted = (preset.with_window(Window(positions=window)) if window else preset).cells()
    assert len(found) == len(wanted)
    for cell, truth in zip(found, wanted, strict=True):
        for key in ("tau", "dt", "throughput_multiplier"):
            assert cell[key] == pytest.approx(truth[key], rel=TOLERANCE), truth


def test_a_calibration_and_measured_taus_are_in_the_data(tmp_path: Path) -> None:
    stored = tmp_path / "step.json"
    stored.write_text(json.dumps({"model": StepModel(bytes_per_second=1e12, flops_per_second=1e14).to_dict()}))
    config = PlanConfig(model="llama-3.1-8b", hardware="h100", calibration=str(stored), tau=("3",), drafters=("spire",))
    data = page_data(searched(config, find_machine("h100")), config)
    assert data["machines"][0]["name"] == data["start"]["hardware"] == "h100, calibrated"
    assert data["machines"][0]["steps"]["bfloat16"]["bytes_per_second"] == 1e12
    (drafter,) = data["models"][0]["drafters"]
    assert drafter["acceptance"]["source"] == "given at k = 4"


def numbers(page: Any) -> dict[str, dict[str, float]]:
    """Drafter -> label -> number, as the table has them."""
    return page.evaluate(
        """() => {
        const cells = (row) => [...row.cells].slice(1).map((cell) => [cell.dataset.label, Number(cell.dataset.value)]);
        const rows = [...document.querySelectorAll("#table tbody tr")];
        return Object.fromEntries(rows.map((row) => [row.dataset.drafter, Object.fromEntries(cells(row))]));
        }"""
    )


def drawn(page: Any, change: Any) -> None:
    """Do ``change`` and wait until the page has drawn it."""
    before = page.evaluate("document.body.dataset.drawn")
    change()
    page.wait_for_function(f"document.body.dataset.drawn !== {json.dumps(before)}")


def agree(page: Any, config: PlanConfig) -> None:
    """The table shows what ``steeple plan`` answers to ``config``."""
    shown = numbers(page)
    answer = searched(config, find_machine(config.hardware))
    cells = {cell["drafter"]: cell for cell in answer["cells"] if cell["k"]}
    assert set(shown) - {"plain decoding"} == set(cells)
    for name, cell in cells.items():
        row = shown[name]
        assert row["k"] == cell["k"]
        assert row["multiplier"] == pytest.approx(cell["throughput_multiplier"], rel=TOLERANCE)
        assert row["tokens/s"] == pytest.approx(cell["tokens_per_second"], rel=TOLERANCE)
        assert row["memory, GB"] == pytest.approx(cell["memory_bytes"] / 1e9, rel=TOLERANCE)
        assert row["cost per million tokens"] == pytest.approx(cell["cost_per_million_tokens"], rel=TOLERANCE)


def test_in_a_browser(browser: Any, page_file: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None
    )
    page.set_default_timeout(120_000)  # a busy machine
    page.goto(page_file.as_uri())
    page.wait_for_function("document.body.dataset.drawn")
    base = {"model": "llama-3.1-8b", "hardware": "h100", "price": 2.5, "ks": (4,)}
    agree(page, PlanConfig(**base, batch=(64,), context=(8192,)))

    # sliders, by keyboard; the batch has four steps in an octave
    page.focus("#batch")
    drawn(page, lambda: page.keyboard.press("ArrowRight"))
    assert page.input_value("#batch-number") == "76"
    drawn(page, lambda: page.fill("#context-number", "3000"))
    page.focus("#window")
    drawn(page, lambda: page.keyboard.press("ArrowRight"))
    agree(page, PlanConfig(**base, batch=(76,), context=(3000,), windows=(16,)))
    page.focus("#k")
    drawn(page, lambda: page.keyboard.press("ArrowRight"))
    drawn(page, lambda: page.select_option("#hardware", "a100"))
    drawn(page, lambda: page.fill("#tau-spire", "2.5"))
    agree(page, PlanConfig(**{**base, "hardware": "a100", "ks": (5,)}, batch=(76,), context=(3000,), windows=(16,),
                           tau=("spire=2.5",)))  # fmt: skip
    drawn(page, lambda: page.check("#best-k"))
    drawn(page, lambda: page.click("#reset"))
    every = tuple(range(1, 17))
    agree(page, PlanConfig(**{**base, "hardware": "a100", "ks": every}, batch=(76,), context=(3000,), windows=(16,)))

    # the paper's figure, at the cell that its text prints
    drawn(page, lambda: page.select_option("#preset", "spire-figure4"))
    drawn(page, lambda: page.fill("#batch-number", "64"))
    drawn(page, lambda: page.fill("#context-number", "512"))
    shown = [round(row["multiplier"], 2) for row in numbers(page).values()]
    assert shown == [1.0, 1.36, 2.05, 2.78]
    assert said == []
    page.close()


def test_a_phone_has_no_sideways_scrolling_and_every_control_a_name(browser: Any, page_file: Path) -> None:
    page = browser.new_page(viewport={"width": 400, "height": 800}, color_scheme="dark")
    page.set_default_timeout(120_000)  # a busy machine
    page.goto(page_file.as_uri())
    page.wait_for_function("document.body.dataset.drawn")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input, select")]
        .filter((item) => !item.labels.length && !item.getAttribute("aria-label")).map((item) => item.id)"""
    )
    assert unnamed == []
    page.close()


def test_the_command_writes_it(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed")
    path = tmp_path / "page.html"
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--preset", "spire-figure6", "--html", str(path)])
    assert not ended.value.code
    text = path.read_text(encoding="utf-8")
    assert '"preset": "spire-figure6"' in text
    assert "@data@" not in text
    assert len(text) > 1_000_000  # plotly is inside


def test_without_plotly_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ConfigError, match=r"pip install 'steeple\[page\]'"):
        plotly_source()


def test_a_place_that_cannot_be_written(tmp_path: Path, result: dict[str, Any]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_page(result, CONFIG, tmp_path / "file" / "page.html", "")
