"""Scaling laws: known coefficients come back within their intervals, and intervals cover as often as they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from steeple.cli.plan_laws import LawsConfig, app, run
from steeple.cli.shell import Shell
from steeple.errors import ConfigError, StorageError
from steeple.plan.bootstrap import fit_linear
from steeple.plan.laws import AcceptanceLaw, DraftCost, advise, fit_acceptance, fit_width
from steeple.plan.laws_table import Run, Table, WidthRun, read_table

A, B, C = -6.0, 0.55, 0.70
TOKENS, SIZES = (1e6, 3e6, 1e7, 3e7), (3e5, 1e6, 3e6, 1e7)


def law_at(tokens: float, parameters: float) -> float:
    return float(A + B * np.log10(tokens) + C * np.log10(parameters))


def grid(noise: float, seed: int = 0, k: int = 0) -> Table:
    rng = np.random.default_rng(seed)
    runs = (Run(d, n, law_at(d, n) + noise * rng.normal()) for d in TOKENS for n in SIZES)
    return Table(tuple(runs), k=k)


def test_coefficients_without_noise_are_exact() -> None:
    law = fit_acceptance(grid(0.0))
    np.testing.assert_allclose(law.fit.coefficients, [A, B, C], rtol=1e-9)
    assert law.fit.r2 == pytest.approx(1.0)
    assert law.predict(5e6, 2e6).value == pytest.approx(law_at(5e6, 2e6))


def test_coefficients_with_noise_lie_in_their_intervals() -> None:
    law = fit_acceptance(grid(0.03, seed=1))
    for row, true in zip(np.eye(3), (A, B, C), strict=True):
        found = law.fit.interval(row.tolist())
        assert found.low < true < found.high
        assert 0 < found.high - found.low < 0.5 * abs(true)
    assert law.fit.residual == pytest.approx(0.03, rel=0.5)
    assert 0.97 < law.fit.r2 < 1.0
    wide, narrow = (law.predict(5e6, 2e6, level) for level in (0.99, 0.6))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_intervals_cover_as_often_as_they_say() -> None:
    """Of 400 tables, the share whose interval holds the truth; its own deviation is about 1 %."""
    hits = np.zeros(4)
    tries = 400
    for seed in range(tries):
        law = fit_acceptance(grid(0.05, seed), samples=400, seed=seed)
        for place, (row, true) in enumerate(zip(np.eye(3), (A, B, C), strict=True)):
            found = law.fit.interval(row.tolist(), 0.9)
            hits[place] += found.low <= true <= found.high
        found = law.predict(1e8, 3e7, 0.9)
        hits[3] += found.low <= law_at(1e8, 3e7) <= found.high
    assert (hits / tries > 0.85).all()
    assert (hits / tries < 0.95).all()


def test_a_seed_decides_the_bootstrap() -> None:
    first, again, other = (fit_acceptance(grid(0.05), seed=seed).predict(1e7, 1e6) for seed in (1, 1, 2))
    assert first == again
    assert first.value == other.value
    assert first != other


def test_predictions_stay_within_a_round() -> None:
    law = fit_acceptance(grid(0.03, k=4))
    assert law.predict(1e20, 1e12).value == 5.0
    assert law.predict(2.0, 2.0).value == 1.0


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        (
            [Run(d, n, 2.0) for d in TOKENS for n in SIZES[:2]],
            "parameters with at least 3 different values.*there are 2",
        ),
        ([Run(d, n, 2.0) for d in TOKENS[:1] for n in (*SIZES, 2e7)], "tokens with at least 3 .* there are 1"),
        ([Run(d, n, 2.0) for d, n in zip(TOKENS, SIZES, strict=True)], "at least 5 runs, of which there are 4"),
        ([Run(10.0**i, 10.0 ** (i + 1), 2.0) for i in range(2, 9)], "cannot be told apart"),
    ],
)
def test_a_table_that_decides_nothing_says_what_is_missing(runs: list[Run], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        fit_acceptance(Table(tuple(runs)))
    with pytest.raises(ConfigError, match="give at least 3"):
        fit_linear(("a", "b"), np.ones((2, 2)), np.ones(2))


def widths(best: dict[float, float]) -> Table:
    rows = [WidthRun(b, w, 100.0 - abs(np.log2(w / best[b]))) for b in best for w in (1.0, 2.0, 4.0, 8.0)]
    return Table((), tuple(rows))


def test_the_best_width_falls_with_the_batch() -> None:
    law = fit_width(widths({1.0: 8.0, 4.0: 4.0, 16.0: 2.0, 64.0: 1.0}))
    assert dict(law.best) == {1.0: 8.0, 4.0: 4.0, 16.0: 2.0, 64.0: 1.0}
    assert law.predict(2.0).value == pytest.approx(8 / 2**0.5)
    assert law.falls_to(1.0) == pytest.approx(64.0)
    rising = fit_width(widths({1.0: 1.0, 4.0: 2.0, 16.0: 4.0, 64.0: 8.0}))
    assert rising.falls_to(1.0) is None


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([WidthRun(b, w, 1.0) for b in (1.0, 2.0) for w in (1.0, 2.0)], "at least 3 batches, of which there are 2"),
        ([WidthRun(b, w, 1.0) for b in (1.0, 2.0, 4.0) for w in (1.0, 2.0)][:-1], "batch 4 has 1 only"),
    ],
)
def test_widths_that_decide_nothing_say_what_is_missing(rows: list[WidthRun], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        fit_width(Table((), tuple(rows)))


def exact() -> AcceptanceLaw:
    return fit_acceptance(grid(0.0))


def test_advice_is_where_the_derivative_vanishes() -> None:
    """tau / dt is largest where tau' dt = tau dt'; with dt = v + k N / T that is one equation in N."""
    cost = DraftCost(target=1e8, k=4, verify=1.1)
    found = advise(exact(), cost, tokens=3e7, points=4000)
    n = found.parameters
    slope = C / np.log(10) / n
    assert slope * cost(n) == pytest.approx(law_at(3e7, n) * 4 / 1e8, rel=0.01)
    assert found.multiplier.value == pytest.approx(law_at(3e7, n) / cost(n))
    assert not found.bound
    assert found.tokens == 3e7
    cheap = advise(exact(), DraftCost(target=1e9, k=4), tokens=3e7)
    assert cheap.parameters > n
    assert cheap.extrapolated
    assert advise(exact(), lambda parameters: 1.0).bound


def test_a_budget_of_operations_is_shared_between_size_and_tokens() -> None:
    cost = DraftCost(target=1e8, k=4)
    rich = advise(exact(), cost, tokens=1e9, flops=1e20)
    poor = advise(exact(), cost, tokens=1e9, flops=6e13)
    assert 6 * poor.parameters * poor.tokens == pytest.approx(6e13)
    assert poor.parameters < rich.parameters
    assert poor.tokens < rich.tokens == 1e9
    with pytest.raises(ConfigError, match="do not train even"):
        advise(exact(), cost, flops=1e6)


def written(folder: Path, value: Any) -> Path:
    path = folder / "table.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_a_table_is_read_by_kind(tmp_path: Path) -> None:
    runs = [
        {"tokens": 10, "parameters": 5, "tau": 2.5, "kind": "x", "more": 1},
        {"tokens": 20, "parameters": 5, "acceptance": 1.25, "kind": "y"},
    ]
    widths_ = [{"batch": 1, "width": 4, "throughput": 9.5}]
    found = read_table(written(tmp_path, {"k": 4, "target_parameters": 90, "runs": runs, "widths": widths_}))
    assert found == {
        "x": Table((Run(10, 5, 2.5, "x"),), (WidthRun(1, 4, 9.5),), 4, 90.0),
        "y": Table((Run(20, 5, 2.25, "y"),), (WidthRun(1, 4, 9.5),), 4, 90.0),
    }


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ("{", StorageError, "not valid JSON"),
        ({"rows": []}, ConfigError, "under 'runs'"),
        ({"runs": [{"tokens": 1, "tau": 2}]}, ConfigError, r"runs\[0\].parameters = None"),
        ({"runs": [{"tokens": 1, "parameters": -1, "tau": 2}]}, ConfigError, "no number above 0"),
        ({"runs": [{"tokens": 1, "parameters": 1}]}, ConfigError, "tau = None"),
        ({"runs": [3]}, ConfigError, r"runs\[0\].tokens = None"),
        ({"runs": [], "widths": [{"batch": 1}]}, ConfigError, r"widths\[0\].width"),
    ],
)
def test_a_bad_table_says_where(tmp_path: Path, value: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        read_table(written(tmp_path, value))
    with pytest.raises(StorageError, match="cannot be read"):
        read_table(tmp_path / "nowhere.json")


def command_table(folder: Path) -> Path:
    """A table of two kinds with widths."""
    runs = [
        {"kind": kind, "tokens": run.tokens, "parameters": run.parameters, "tau": run.tau}
        for kind, seed in (("small", 1), ("view", 2))
        for run in grid(0.02, seed).runs
    ]
    rows = [vars(row) for row in widths({1.0: 8.0, 4.0: 4.0, 16.0: 2.0, 64.0: 1.0}).widths]
    return written(folder, {"k": 4, "target_parameters": 1e8, "runs": runs, "widths": rows})


def test_the_command_fits_advises_and_draws(tmp_path: Path) -> None:
    config = LawsConfig(table=command_table(tmp_path), tokens=3e7, samples=300, plots=str(tmp_path / "charts"))
    with (tmp_path / "told.txt").open("w") as file:
        result = run(config, Shell(Console(file=file, width=200), 0, None))
    told = (tmp_path / "told.txt").read_text()
    assert [entry["kind"] for entry in result["laws"]] == ["small", "view"]
    for entry in result["laws"]:
        slope = entry["coefficients"]["per decade of parameters"]
        assert slope["low"] < C < slope["high"]
        assert f"{entry['kind']}: next train {entry['advice']['parameters']:,.0f} parameters" in told
    assert result["width"]["falls_to_one_at"] == pytest.approx(64.0)
    names = {path.name for path in (tmp_path / "charts").iterdir()}
    charts = ("acceptance-small", "acceptance-view", "width")
    assert names == {f"{name}.{kind}" for name in charts for kind in ("png", "svg")}
    json.dumps(result, default=str)


def test_without_a_target_the_command_says_what_advice_needs(tmp_path: Path) -> None:
    runs = [{"tokens": r.tokens, "parameters": r.parameters, "tau": r.tau} for r in grid(0.02).runs]
    with (tmp_path / "told.txt").open("w") as file:
        result = run(LawsConfig(table=written(tmp_path, {"runs": runs})), Shell(Console(file=file, width=200), 0, None))
    assert result["laws"][0]["advice"] is None
    assert result["width"] is None
    assert "give --k and --target" in (tmp_path / "told.txt").read_text()


def test_the_command_line_takes_the_table_by_place(tmp_path: Path) -> None:
    told = CliRunner().invoke(app, [str(command_table(tmp_path)), "--samples", "200", "--json", "-"])
    assert told.exit_code == 0
    assert json.loads(told.stdout)["laws"][1]["kind"] == "view"
    failed = CliRunner().invoke(app, [str(tmp_path / "nowhere.json")])
    assert failed.exit_code == 2
    assert "cannot be read" in failed.stderr
