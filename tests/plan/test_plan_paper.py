"""The paper's model against every number that was published with it (SPIRe, MatX 2025)."""

from __future__ import annotations

import numpy as np
import pytest

from steeple.errors import ConfigError
from steeple.plan import paper
from steeple.plan.costs import advantage, break_even_budget, savings
from steeple.plan.paper import PaperDraft, Window
from steeple.plan.presets import (
    MAGICDEC_DRAFT,
    MAGICDEC_VERIFY,
    PRESETS,
    TABLE_1,
    Preset,
    find_preset,
    magicdec_ratios,
)
from steeple.plan.shapes import SHAPES

ROUNDING = 0.0055  # tables have two decimals
TARGET = SHAPES["spire-target"]
TAUS = {name: taus[512] for name, taus in TABLE_1.items()}
# drafter -> batch -> multipliers by context
FIGURE_4 = {
    "vanilla": {
        1: (1.76, 1.76, 1.75, 1.73, 1.70, 1.65, 1.59, 1.51, 1.44),
        2: (1.76, 1.75, 1.73, 1.70, 1.65, 1.59, 1.51, 1.44, 1.39),
        4: (1.75, 1.73, 1.70, 1.65, 1.59, 1.51, 1.44, 1.39, 1.36),
        8: (1.73, 1.70, 1.65, 1.59, 1.51, 1.44, 1.39, 1.36, 1.34),
        16: (1.70, 1.65, 1.59, 1.51, 1.44, 1.39, 1.36, 1.34, 1.33),
        32: (1.65, 1.59, 1.51, 1.44, 1.39, 1.36, 1.34, 1.33, 1.33),
        64: (1.59, 1.51, 1.44, 1.39, 1.36, 1.34, 1.33, 1.33, 1.33),
        128: (1.46, 1.44, 1.39, 1.36, 1.34, 1.33, 1.33, 1.33, 1.32),
    },
    "magicdec": {
        1: (0.78, 0.79, 0.79, 0.81, 0.84, 0.90, 1.01, 1.20, 1.46),
        2: (0.79, 0.79, 0.81, 0.84, 0.90, 1.01, 1.20, 1.46, 1.77),
        4: (0.79, 0.81, 0.84, 0.90, 1.01, 1.20, 1.46, 1.77, 2.06),
        8: (0.81, 0.84, 0.90, 1.01, 1.20, 1.46, 1.77, 2.06, 2.28),
        16: (0.84, 0.90, 1.01, 1.19, 1.46, 1.77, 2.06, 2.28, 2.42),
        32: (0.90, 1.01, 1.19, 1.45, 1.76, 2.06, 2.28, 2.42, 2.50),
        64: (1.00, 1.19, 1.45, 1.76, 2.05, 2.28, 2.42, 2.50, 2.55),
        128: (1.15, 1.44, 1.75, 2.04, 2.27, 2.42, 2.50, 2.55, 2.57),
    },
    "spire": {
        1: (1.71, 1.71, 1.72, 1.75, 1.79, 1.86, 1.99, 2.18, 2.40),
        2: (1.71, 1.72, 1.75, 1.79, 1.86, 1.99, 2.18, 2.40, 2.62),
        4: (1.72, 1.74, 1.79, 1.86, 1.99, 2.18, 2.40, 2.62, 2.78),
        8: (1.74, 1.79, 1.86, 1.99, 2.18, 2.40, 2.62, 2.78, 2.89),
        16: (1.78, 1.86, 1.99, 2.17, 2.40, 2.61, 2.78, 2.89, 2.95),
        32: (1.86, 1.98, 2.17, 2.40, 2.61, 2.78, 2.89, 2.95, 2.99),
        64: (1.98, 2.17, 2.39, 2.61, 2.78, 2.89, 2.95, 2.99, 3.00),
        128: (2.07, 2.38, 2.60, 2.77, 2.89, 2.95, 2.99, 3.00, 3.01),
    },
}
FIGURE_4_CONTEXTS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
FIGURE_6 = {
    "vanilla": {
        1: (1.86, 1.85, 1.82, 1.77, 1.69, 1.56, 1.42, 1.28, 1.17),
        16: (1.69, 1.56, 1.42, 1.28, 1.17, 1.10, 1.06, 1.04, 1.03),
        64: (1.42, 1.28, 1.17, 1.10, 1.06, 1.04, 1.03, 1.02, 1.02),
        128: (1.28, 1.17, 1.10, 1.06, 1.04, 1.03, 1.02, 1.02, 1.02),
    },
    "magicdec": {
        1: (0.78, 0.79, 0.80, 0.82, 0.86, 0.93, 1.07, 1.27, 1.56),
        16: (0.86, 0.93, 1.07, 1.27, 1.56, 1.87, 2.14, 2.34, 2.45),
        64: (1.07, 1.27, 1.56, 1.87, 2.14, 2.34, 2.45, 2.52, 2.56),
        128: (1.27, 1.56, 1.87, 2.14, 2.34, 2.45, 2.52, 2.56, 2.58),
    },
    "spire": {
        1: (1.71, 1.71, 1.73, 1.76, 1.81, 1.90, 2.05, 2.25, 2.47),
        16: (1.81, 1.90, 2.05, 2.25, 2.47, 2.68, 2.82, 2.92, 2.97),
        64: (2.05, 2.25, 2.47, 2.68, 2.82, 2.92, 2.97, 2.99, 3.01),
        128: (2.25, 2.47, 2.68, 2.82, 2.92, 2.97, 2.99, 3.01, 3.02),
    },
}
FIGURE_6_CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576)
# batch -> (MagicDec, SPIRe) by context, the window fixed at 64 positions
FIXED_WINDOW = {
    16: ((1.46, 2.40), (1.94, 2.72), (2.50, 2.99), (3.00, 3.17), (3.38, 3.28)),
    64: ((2.05, 2.78), (2.64, 3.04), (3.13, 3.21), (3.46, 3.30), (3.66, 3.35)),
    128: ((2.27, 2.89), (2.85, 3.11), (3.28, 3.25), (3.56, 3.32), (3.72, 3.36)),
}
FIXED_WINDOW_CONTEXTS = (512, 1024, 2048, 4096, 8192)


def draft(name: str, window: Window) -> PaperDraft:
    """A draft of Figure 4 with another window."""
    (found,) = [item.draft for item in PRESETS["spire-figure4"].with_window(window).drafts if item.draft.name == name]
    return found


def multipliers(preset: Preset) -> dict[tuple[str, int, int], float]:
    return {(c["drafter"], c["batch"], c["context"]): c["throughput_multiplier"] for c in preset.cells()}


@pytest.mark.parametrize(
    ("name", "figure", "contexts"),
    [("spire-figure4", FIGURE_4, FIGURE_4_CONTEXTS), ("spire-figure6", FIGURE_6, FIGURE_6_CONTEXTS)],
)
def test_every_published_cell(
    name: str, figure: dict[str, dict[int, tuple[float, ...]]], contexts: tuple[int, ...]
) -> None:
    ours = multipliers(find_preset(name))
    seen = 0
    for drafter, rows in figure.items():
        for batch, values in rows.items():
            for context, value in zip(contexts, values, strict=True):
                assert ours[drafter, batch, context] == pytest.approx(value, abs=ROUNDING), (drafter, batch, context)
                seen += 1
    assert seen == {"spire-figure4": 216, "spire-figure6": 108}[name]


def test_the_headline_and_what_it_is_made_of() -> None:
    cells = [c for c in PRESETS["spire-figure4"].cells() if (c["batch"], c["context"]) == (64, 512)]
    assert [round(c["throughput_multiplier"], 2) for c in cells] == [1.36, 2.05, 2.78]
    assert [c["tau"] for c in cells] == pytest.approx([2.647, 3.891, 3.401])
    assert [c["dt"] for c in cells] == pytest.approx([1.944, 1.896, 1.224], abs=5e-4)
    assert [c["tau"] / c["dt"] for c in cells] == pytest.approx([c["throughput_multiplier"] for c in cells])
    times = [paper.round_time(TARGET, item.draft, 64, 512) for item in PRESETS["spire-figure4"].drafts]
    assert [float(t.draft) for t in times] == pytest.approx([0.236, 0.224, 0.056], abs=5e-4)
    assert [float(t.verify) for t in times] == [1.0, 1.0, 1.0]
    large = multipliers(PRESETS["spire-figure6"])
    assert [round(large[name, 64, 65536], 2) for name in TAUS] == [1.06, 2.14, 2.82]


def test_limits_of_the_model() -> None:
    """Weights alone: 1.5 / 5 / 2 plain steps. Keys alone, windows an eighth: 2 / 1.5 / 1.125."""
    drafts = [item.draft for item in PRESETS["spire-figure4"].drafts]
    weights = [float(paper.round_time(TARGET, d, 1, 1e-6).dt) for d in drafts]
    keys = [float(paper.round_time(TARGET, d, 1e6, 1e9).dt) for d in drafts]
    assert weights == pytest.approx([1.5, 5.0, 2.0], abs=1e-3)
    assert keys == pytest.approx([2.0, 1.5, 1.125], abs=1e-3)


@pytest.mark.parametrize("batch", FIXED_WINDOW)
def test_a_fixed_window_changes_the_ranking(batch: int) -> None:
    window = Window(positions=64)
    for context, expected in zip(FIXED_WINDOW_CONTEXTS, FIXED_WINDOW[batch], strict=True):
        got = [
            float(paper.throughput_multiplier(TARGET, draft(name, window), batch, context, tau=TAUS[name]))
            for name in ("magicdec", "spire")
        ]
        assert got == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize(
    ("contexts", "expected"),
    [([64] * 32 + [8192] * 32, (1.33, 3.47, 3.30)), ([32] * 56 + [8192] * 8, (1.34, 2.86, 3.12))],
)
def test_mixed_batches(contexts: list[int], expected: tuple[float, ...]) -> None:
    got = [
        TAUS[name] / float(paper.ragged_round_time(TARGET, draft(name, Window(positions=64)), contexts).dt)
        for name in TAUS
    ]
    assert got == pytest.approx(expected, abs=ROUNDING)


def test_a_uniform_batch_is_a_ragged_one() -> None:
    for name in TAUS:
        sparse = draft(name, Window(share=1 / 8))
        uniform = paper.round_time(TARGET, sparse, 16, 700)
        ragged = paper.ragged_round_time(TARGET, sparse, [[700] * 16])
        assert float(uniform.dt) == pytest.approx(float(ragged.dt[0]), rel=1e-12)


def test_growth_while_64_tokens_are_written() -> None:
    got = [
        paper.multiplier_with_growth(TARGET, draft(name, Window(positions=64)), 64, 512, tau=TAUS[name])
        for name in TAUS
    ]
    assert got == pytest.approx([1.31, 2.04, 2.78], abs=ROUNDING)


def test_critical_lengths() -> None:
    small, large = (paper.critical_context(SHAPES[name]) for name in ("spire-target", "llama-3-70b"))
    assert round(small) == 55
    assert large == pytest.approx(5570, abs=1)
    assert [paper.power_below(value) for value in (small, large)] == [32, 4096]
    assert paper.power_below(64) == 32


def test_critical_batch() -> None:
    """Below the critical length verification becomes bound by arithmetic; beyond it never does."""
    few, many = paper.critical_batch(TARGET, [32, 100])
    assert many == np.inf
    spire = draft("spire", Window(share=1 / 8))
    below, above = (float(paper.round_time(TARGET, spire, few * factor, 32).verify) for factor in (0.99, 1.01))
    assert below == 1.0
    assert above > 1.0


def test_cost_analysis() -> None:
    assert float(savings(2.78, training=0.25)) == pytest.approx(6.15, abs=0.005)
    assert float(savings(2.05)) == pytest.approx(5.12, abs=0.005)
    assert advantage(2.78, 2.05) == pytest.approx(0.20, abs=0.005)
    assert advantage(2.82, 2.14) == pytest.approx(0.16, abs=0.005)
    cells = multipliers(PRESETS["spire-figure4"])
    assert advantage(cells["spire", 64, 512], cells["magicdec", 64, 512]) == pytest.approx(0.20, abs=0.005)
    assert float(savings(2.0, training=0.25, budget=break_even_budget(2.0, 0.25))) == pytest.approx(0.0)
    with pytest.raises(ConfigError, match="saves nothing"):
        advantage(2.0, 0.9)
    with pytest.raises(ConfigError, match="multiplier above 0"):
        savings(0.0)


def test_magicdecs_ratios() -> None:
    rows = magicdec_ratios()
    verify = {row["context"]: row["verify"] for row in rows if "verify" in row}
    drafting = {row["context"]: row["draft"] for row in rows if "draft" in row}
    assert [verify[c] for c in MAGICDEC_VERIFY] == pytest.approx(list(MAGICDEC_VERIFY.values()), abs=0.12)
    assert [drafting[c] for c in MAGICDEC_DRAFT] == pytest.approx(list(MAGICDEC_DRAFT.values()), abs=0.04)


def test_windows() -> None:
    assert Window.parse("1/8") == Window(share=0.125)
    assert Window.parse("64", sink=4) == Window(sink=4, positions=64)
    assert Window(positions=64).keys([32, 65, 512]).tolist() == [32, 65, 65]
    assert Window(share=1 / 8).keys([512, 8]).tolist() == [65, 2]
    assert str(Window(share=1 / 8)) == "1/8 of the context"
    for text in ("0", "-3", "1.5", "x", "1/0"):
        with pytest.raises(ConfigError, match="window"):
            Window.parse(text)
    with pytest.raises(ConfigError, match="give one of them"):
        Window(positions=3, share=0.5)


def test_an_unknown_preset() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'spire-figure4'\?"):
        find_preset("spire-figur4")
