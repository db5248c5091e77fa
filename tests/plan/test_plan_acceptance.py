"""From acceptance to tau, back, over context, out of a bench; goodput and money."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steeple.errors import ConfigError
from steeple.plan.acceptance import (
    Acceptance,
    extended,
    from_bench,
    goodput,
    iid_rate,
    iid_survival,
    iid_tau,
    tau_of_survival,
)
from steeple.plan.costs import cost_per_million_tokens
from steeple.plan.presets import TABLE_1

SWEEP = Path(__file__).resolve().parents[2] / "bench" / "results" / "sweep.json"


def row(drafter: str, context: int, survival: list[float], **other: Any) -> dict[str, Any]:
    values = {"temperature": 1.0, "rounds": 1, "batch": 1, "adaptive": False, "k": len(survival)}
    return {"drafter": drafter, "context": context, "acceptance_by_position": survival, **values, **other}


def test_tau_is_one_and_the_survivors() -> None:
    assert tau_of_survival([[0.5, 0.25], [1.0, 1.0]]).tolist() == [1.75, 3.0]


def test_the_iid_case_and_its_inverse() -> None:
    rates, ks = np.array([0.0, 0.3, 0.81, 1.0])[:, None], np.array([1, 4, 9])
    taus = iid_tau(rates, ks)
    by_sum = [[float(tau_of_survival(iid_survival(float(a), int(k)))) for k in ks] for a in rates[:, 0]]
    assert taus == pytest.approx(np.array(by_sum))
    assert taus[-1].tolist() == [2.0, 5.0, 10.0]
    assert iid_rate(taus, ks) == pytest.approx(np.broadcast_to(rates, taus.shape), abs=1e-9)


def test_the_papers_rates() -> None:
    rates = [float(iid_rate(TABLE_1[name][512], 4)) for name in TABLE_1]
    assert rates == pytest.approx([0.675, 0.874, 0.806], abs=5e-4)


@pytest.mark.parametrize("tau", [0.9, 5.01, float("nan")])
def test_a_tau_that_no_round_brings(tau: float) -> None:
    with pytest.raises(ConfigError, match="from 1 to 5 tokens"):
        iid_rate([2.0, tau], 4)


def test_survival_beyond_what_was_measured() -> None:
    assert extended([0.8, 0.4], 4).tolist() == pytest.approx([0.8, 0.4, 0.2, 0.1])
    assert extended([0.8, 0.4, 0.3], 2).tolist() == [0.8, 0.4]
    assert extended([0.7], 3).tolist() == pytest.approx([0.7, 0.49, 0.343])
    assert extended([0.5, 0.0], 4).tolist() == [0.5, 0.0, 0.0, 0.0]


def test_acceptance_over_context() -> None:
    got = Acceptance(contexts=(100.0, 10_000.0), survival=((0.8, 0.6), (0.4, 0.2)))
    assert got.at(1000, 2).tolist() == pytest.approx([0.6, 0.4])  # halfway in log context
    assert got.at([[1, 100], [10_000, 99_999]], 2) == pytest.approx(
        np.array([[[0.8, 0.6], [0.8, 0.6]], [[0.4, 0.2], [0.4, 0.2]]])
    )
    assert got.tau([100, 1000], 2).tolist() == pytest.approx([2.4, 2.0])
    assert [got.covers(c) for c in (99, 100, 10_000, 10_001)] == [False, True, True, False]


def test_acceptance_from_the_papers_table() -> None:
    got = Acceptance.of_tau(TABLE_1["magicdec"], 4)
    assert got.tau([256, 512, 960], 4).tolist() == pytest.approx([4.005, 3.891, 3.793])
    assert 3.793 < float(got.tau(700, 4)) < 3.891
    assert float(got.tau(512, 8)) > float(got.tau(512, 4))


@pytest.mark.parametrize(
    ("contexts", "survival"),
    [
        ((), ()),
        ((100.0,), ((0.5,), (0.4,))),
        ((200.0, 100.0), ((0.5,), (0.5,))),
        ((100.0,), ((0.5, 0.6),)),
        ((100.0,), ((1.5,),)),
        ((100.0,), ((),)),
    ],
)
def test_acceptance_that_cannot_be(contexts: tuple[float, ...], survival: tuple[tuple[float, ...], ...]) -> None:
    with pytest.raises(ConfigError, match="Acceptance"):
        Acceptance(contexts=contexts, survival=survival)


def test_a_bench_is_averaged_by_rounds_at_its_largest_k() -> None:
    rows = [
        row("a", 100, [0.9], rounds=1000),
        row("a", 100, [0.8, 0.4], rounds=10, batch=3),
        row("a", 100, [0.6, 0.2], rounds=30, batch=1),
        row("a", 200, [0.5, 0.51]),
        row("a", 100, [0.0, 0.0], temperature=0.0),
        row("b", 100, [0.3]),
        row("c", 100, [0.9, 0.9, 0.9], adaptive=True),
        {"drafter": "none", "context": 100, "acceptance_by_position": [], "temperature": 1.0},
    ]
    found = from_bench({"rows": rows}, 1.0)
    assert list(found) == ["a", "b"]
    assert found["a"].contexts == (100.0, 200.0)
    assert found["a"].survival[0] == pytest.approx((0.7, 0.3))
    assert found["a"].survival[1] == (0.5, 0.5)
    assert found["b"].source == "measured, T = 1"


def test_a_bench_without_what_is_wanted() -> None:
    with pytest.raises(ConfigError, match="has no 'rows'"):
        from_bench({"cells": []}, 0.0)
    with pytest.raises(ConfigError, match=r"nothing at temperature 0; it has \[1\.0\]"):
        from_bench({"rows": [row("a", 100, [0.5])]}, 0.0)


def test_the_recorded_sweep_gives_its_own_taus() -> None:
    result = json.loads(SWEEP.read_text())
    found = from_bench(result, 1.0)
    names = {r["drafter"] for r in result["rows"] if r["acceptance_by_position"] and not r["adaptive"]}
    assert set(found) == names
    for r in result["rows"]:
        if r["drafter"] in names and r["temperature"] == 1.0 and r["k"] == 6 and r["batch"] == 64:
            assert float(found[r["drafter"]].tau(r["context"], 6)) == pytest.approx(r["tau"], rel=0.1)


def test_goodput_and_money() -> None:
    assert goodput([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0]], [2.0, 1.0]).tolist() == [3.0, 3.0]
    assert float(cost_per_million_tokens(1000.0, 3.6)) == pytest.approx(1.0)
