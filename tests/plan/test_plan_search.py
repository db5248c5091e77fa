"""The search: what it tries, what it picks under limits, what it says when nothing fits; no torch on the way."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

import steeple.plan
from steeple.errors import CapacityError, ConfigError
from steeple.plan.acceptance import Acceptance
from steeple.plan.machines import find_machine
from steeple.plan.ours import Precision, StepModel
from steeple.plan.presets import magicdec_ratios
from steeple.plan.rounds import Deployment, form_of, memory_bytes, round_of
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
from steeple.plan.shapes import SHAPES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "planner.md"
TARGET = SHAPES["llama-3.1-8b"]
WHERE = Deployment(target=TARGET, step=StepModel.of_machine(find_machine("h200")), precision=Precision())
RATES = {"small_lm": 0.7, "sparse_self": 0.88, "spire": 0.8}
GRID = Grid(batches=(1, 16, 128), contexts=(1024, 16384), ks=(1, 3, 6))


def draftings() -> list[Drafting]:
    found = []
    for name, rate in RATES.items():
        form = form_of(name, TARGET)
        assert form is not None
        found.append(Drafting(form=form, acceptance=Acceptance.iid({1.0: rate}, "assumed")))
    return found


FOUND = candidates(WHERE, draftings(), GRID, price_per_hour=3.6)
ONE = FOUND[0]


def make(**values: float) -> Candidate:
    return replace(ONE, **values)  # type: ignore[arg-type]


def test_everything_is_tried() -> None:
    places = [(c.drafter, c.k, c.batch, c.context) for c in FOUND]
    assert len(places) == len(set(places)) == 6 * (1 + 3 * 3)
    assert {c.k for c in FOUND if c.drafter == "none"} == {0}


def test_a_candidate_is_tau_over_dt_at_its_place() -> None:
    (got,) = [c for c in FOUND if (c.drafter, c.k, c.batch, c.context) == ("spire", 3, 16, 16384)]
    form = form_of("spire", TARGET)
    assert form is not None
    times, tau = round_of(WHERE, form, 16, 16384, 3), 1 + 0.8 + 0.64 + 0.512
    assert got.tau == pytest.approx(tau)
    assert got.dt == pytest.approx(float(times.dt))
    assert got.throughput_multiplier == pytest.approx(tau / float(times.dt))
    assert got.tokens_per_second == pytest.approx(16 * tau / float(times.seconds))
    assert got.seconds_per_token == pytest.approx(float(times.seconds) / tau)
    assert got.memory_bytes == float(memory_bytes(WHERE, form, 16, 16384, 3))
    assert got.cost_per_million_tokens == pytest.approx(1000.0 / got.tokens_per_second)
    assert (got.window, got.tau_source) == (64, "assumed")
    plain = [c for c in FOUND if (c.drafter, c.batch, c.context) == ("none", 16, 16384)]
    assert [(c.dt, c.tau, c.throughput_multiplier) for c in plain] == [(1.0, 1.0, 1.0)]


def test_windows_are_tried_where_there_is_one() -> None:
    grid = replace(GRID, batches=(16,), contexts=(1024,), ks=(3,), windows=(32, 256))
    found = [(c.drafter, c.window) for c in candidates(WHERE, draftings(), grid)]
    sparse = [(name, window) for name in ("sparse_self", "spire") for window in (32, 256)]
    assert found == [("none", 0), ("small_lm", 0), *sparse]


def test_the_best_without_limits_and_by_another_wish() -> None:
    assert best(FOUND, Limits()) == max(FOUND, key=lambda c: c.tokens_per_second)
    quickest = best(FOUND, Limits(), key=lambda c: -c.seconds_per_token)
    assert quickest == min(FOUND, key=lambda c: c.seconds_per_token)
    with pytest.raises(ConfigError, match="nothing to choose from"):
        best([], Limits())


@pytest.mark.parametrize("name", ["memory_bytes", "seconds_per_token", "cost_per_million_tokens"])
def test_each_limit_is_kept_and_binds(name: str) -> None:
    values = sorted({getattr(c, name) for c in FOUND})
    limits = Limits(**{name: values[len(values) // 3]})
    chosen = best(FOUND, limits)
    assert getattr(chosen, name) <= values[len(values) // 3]
    assert all(c.tokens_per_second <= chosen.tokens_per_second for c in FOUND if limits.allows(c))
    words = {"memory_bytes": "memory", "seconds_per_token": "latency", "cost_per_million_tokens": "cost"}[name]
    with pytest.raises(CapacityError, match=f"limit on {words}.* binds: .* is the least of all"):
        best(FOUND, Limits(**{name: values[0] * 0.99}))


def test_limits_that_only_together_are_impossible() -> None:
    fast, small = make(seconds_per_token=1.0, memory_bytes=10e9), make(seconds_per_token=4.0, memory_bytes=5e9, batch=7)
    limits = Limits(memory_bytes=6e9, seconds_per_token=1.5)
    with pytest.raises(CapacityError) as raised:
        best([fast, small], limits)
    assert "not memory and latency per token together" in str(raised.value)
    assert "memory 10 GB, latency per token 1000 ms" in str(raised.value)
    assert limits.broken(small) == ["seconds_per_token"]
    alone = Limits(memory_bytes=1e9, seconds_per_token=9.0)
    with pytest.raises(CapacityError, match="limit on memory binds: 1 GB were allowed, 5 GB") as raised:
        best([fast, small], alone)
    assert "latency" not in str(raised.value)


def test_best_of_cells_and_of_drafters() -> None:
    limits = Limits(memory_bytes=80e9)
    winners = best_by_cell(FOUND, limits)
    assert (128, 16384) not in winners
    for (batch, context), winner in winners.items():
        rivals = [c for c in FOUND if (c.batch, c.context) == (batch, context) and limits.allows(c)]
        assert winner.tokens_per_second == max(c.tokens_per_second for c in rivals)
    each = best_of_each(FOUND)
    assert len(each) == 6 * 4
    for one in each:
        own = [c for c in FOUND if (c.drafter, c.batch, c.context) == (one.drafter, one.batch, one.context)]
        assert one.tokens_per_second == max(c.tokens_per_second for c in own)


def test_the_pareto_front() -> None:
    own = [c for c in FOUND if c.context == 1024]
    front = pareto(own)
    assert len(front) > 1
    for a, b in pairwise(front):
        assert a.seconds_per_token < b.seconds_per_token
        assert a.tokens_per_second < b.tokens_per_second
    for one in own:
        beaten = any(
            c.seconds_per_token <= one.seconds_per_token
            and c.tokens_per_second >= one.tokens_per_second
            and (c.seconds_per_token, c.tokens_per_second) != (one.seconds_per_token, one.tokens_per_second)
            for c in own
        )
        assert beaten != (one in front)


def test_more_is_drafted_where_keys_decide() -> None:
    """The longer the context, the deeper the best draft of one that reads few keys."""
    depths = {c.context: c.k for c in best_of_each(FOUND) if (c.drafter, c.batch) == ("sparse_self", 128)}
    assert depths[16384] > depths[1024]


def test_the_example_of_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, str(PAGE), "exec"), {})
    assert capsys.readouterr().out.startswith("Candidate(drafter='spire'")


def test_the_ratios_of_the_documentation_are_the_computed_ones() -> None:
    rows = magicdec_ratios()
    for name in ("verify", "draft"):
        shown = " / ".join(f"{row[name]:.2f}" for row in rows if name in row)
        assert f"| {shown} |" in PAGE.read_text()


def test_the_planner_needs_no_torch() -> None:
    """Every module of the planner in a fresh interpreter."""
    folder = Path(next(iter(steeple.plan.__path__)))
    names = sorted(
        ".".join(("steeple.plan", *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
        for path in folder.rglob("*.py")
    )
    assert "steeple.plan.search" in names
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
print([heavy for heavy in ("torch", "transformers") if heavy in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
