"""The grid of drafts on a tiny random target: every cell once, resumed where it was stopped, and a table that fits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, tiny_model

from steeple.errors import ConfigError, StorageError
from steeple.model.load import load_decoder
from steeple.plan.laws import fit_acceptance
from steeple.plan.laws_table import read_table
from steeple.train import laws as training
from steeple.train import lm, spire
from steeple.train.laws import TABLE, rounds_of_models, train_laws
from steeple.train.laws_config import LawsConfig, small_shape
from steeple.train.loss import CausalRows

BATCH = 128


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model only waits for a second thread; and what share of a peak it reaches is of no interest."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for module in (lm, spire):
            patch.setattr(module, "measured_peak", lambda device: 1e12)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target of 4 layers and text."""
    root = tmp_path_factory.mktemp("laws")
    tiny_model(root / "target", layers=4)
    (root / "text").mkdir()
    for i in range(120):
        lines = [f"def f{i}_{j}(a, b):\n    return a * {j} + b[{i}]\n" for j in range(3)]
        (root / "text" / f"part{i}.py").write_text("\n".join(lines))
    return root


def settings(place: Path, out: Path, **changes: Any) -> LawsConfig:
    given: dict[str, Any] = {
        "target": place / "target",
        "out": out,
        "data": (str(place / "text"),),
        "small": ("1x16", "1x32", "2x32"),
        "spire": (1, 2, 3),
        "tokens": (BATCH, 2 * BATCH, 4 * BATCH),
        "k": 3,
        "sink": 3,
        "window": 20,
        "page": 8,
        "seq_lens": (64,),
        "batch_tokens": BATCH,
        "micro_tokens": BATCH,
        "warmup": 1,
        "eval_tokens": 256,
        "device": "cpu",
        "save_every": 1,
    }
    return LawsConfig(**(given | changes))


@pytest.fixture(scope="module")
def grid(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LawsConfig, dict[str, Any]]:
    """The whole grid, trained once."""
    config = settings(place, tmp_path_factory.mktemp("grid"))
    return config, train_laws(config)


def test_the_grid_is_whole_and_the_laws_read_it(grid: tuple[LawsConfig, dict[str, Any]]) -> None:
    config, table = grid
    cells = {(run["kind"], run["size"], run["tokens"]) for run in table["runs"]}
    assert len(cells) == len(table["runs"]) == 18
    assert {(kind, size) for kind, size, _ in cells} == {
        *(("small", size) for size in config.small),
        *(("spire", str(layers)) for layers in config.spire),
    }
    assert all(1.0 <= run["tau"] <= config.k + 1 for run in table["runs"])
    assert all(run["steps"] == run["tokens"] // BATCH for run in table["runs"])
    assert json.loads((config.out / TABLE).read_text())["runs"] == table["runs"]
    tables = read_table(config.out / TABLE)
    assert set(tables) == {"small", "spire"}
    for found in tables.values():
        assert (found.k, found.target) == (3, table["target_parameters"])
        law = fit_acceptance(found)
        assert law.fit.r2 <= 1.0
        assert len({run.parameters for run in found.runs}) == 3


def test_sizes_of_one_kind_grow_and_a_spire_draft_counts_its_layers_and_head(
    grid: tuple[LawsConfig, dict[str, Any]],
) -> None:
    config, table = grid
    by_layers = {run["size"]: run for run in table["runs"] if run["kind"] == "spire"}
    body = by_layers["1"]["body_parameters"]
    assert by_layers["3"]["body_parameters"] == 3 * body
    assert by_layers["3"]["parameters"] == 3 * body + 32 * VOCAB
    assert table["target_parameters"] == 4 * body + 32 * VOCAB
    small = {run["size"]: run["parameters"] for run in table["runs"] if run["kind"] == "small"}
    assert small["1x16"] < small["1x32"] < small["2x32"]
    del config


def test_what_is_finished_is_not_trained_again(
    grid: tuple[LawsConfig, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, table = grid

    def never(*_: Any) -> dict[str, Any]:
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "train_small", never)
    monkeypatch.setattr(training, "train_spire_cell", never)
    assert train_laws(config)["runs"] == table["runs"]
    fewer = train_laws(replace(config, small=(), spire=(2,)))
    assert fewer["runs"] == [run for run in table["runs"] if (run["kind"], run["size"]) == ("spire", "2")]
    train_laws(config)
    with pytest.raises(StorageError, match="was trained with k = 3, not 2"):
        train_laws(replace(config, k=2))


def test_a_cell_that_was_stopped_goes_on_and_ends_the_same(
    place: Path, tmp_path: Path, grid: tuple[LawsConfig, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = grid[1]
    config = settings(place, tmp_path, small=("1x32",), spire=(), tokens=(4 * BATCH,))
    steps: list[int] = []
    step = training.Trainer.step

    def stops_once(trainer: Any, number: int) -> float:
        steps.append(number)
        if steps == [0, 1, 2]:
            raise KeyboardInterrupt
        return step(trainer, number)

    monkeypatch.setattr(training.Trainer, "step", stops_once)
    with pytest.raises(KeyboardInterrupt):
        train_laws(config)
    again = train_laws(config)
    assert steps == [0, 1, 2, 2, 3]
    same = next(r for r in whole["runs"] if (r["size"], r["tokens"]) == ("1x32", 4 * BATCH))
    assert again["runs"][0]["tau"] == same["tau"]
    assert not (tmp_path / "cells" / "small-1x32-512" / "run" / "checkpoint.pt").exists()


def test_tau_of_two_models_is_the_overlap_of_their_laws(place: Path, tmp_path: Path) -> None:
    """Against a plain computation in full precision; and a model agrees with itself."""
    target = load_decoder(place / "target", dtype=torch.float32, device=torch.device("cpu"))
    draft = load_decoder(tiny_model(tmp_path / "draft", seed=3), dtype=torch.float32, device=torch.device("cpu"))
    windows = torch.randint(0, VOCAB, (3, 22), generator=torch.Generator().manual_seed(0))
    assert rounds_of_models(target, target, windows, 4, 2).tau(4) == pytest.approx(5.0, abs=1e-3)
    found = rounds_of_models(target, draft, windows, 4, 2)
    inputs = windows[:, :-1]
    positions = torch.arange(21).repeat(3)
    with torch.no_grad():
        p, q = (m.logits(m(inputs.reshape(-1), positions, CausalRows(3)).final_TD).softmax(-1) for m in (target, draft))
    alpha = torch.minimum(p, q).sum(-1).view(3, 21)[:, :20].reshape(15, 4)
    expected = 1 + sum(alpha[:, : j + 1].prod(dim=1).mean().item() for j in range(4))
    assert found.tau(4) == pytest.approx(expected, rel=0.02)
    assert found.begins.tolist() == [0, 4, 8, 12, 16] * 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"small": ("2by3",)}, "LAYERSxWIDTH"),
        ({"small": ("2x33",)}, "even width"),
        ({"small": (), "spire": ()}, "both empty"),
        ({"spire": (1, 1)}, "twice"),
        ({"tokens": ()}, "tokens is empty"),
        ({"tokens": (5,)}, "LawsConfig.tokens = 5"),
        ({"k": 0}, "LawsConfig.k = 0"),
    ],
)
def test_bad_settings_say_what_to_do(place: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(place, tmp_path, **changes)


def test_a_grid_that_does_not_fit_says_so_before_it_trains(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="5 layers and the target 4"):
        train_laws(settings(place, tmp_path, spire=(1, 5)))
    (tmp_path / "one.py").write_text("x = 1\n" * 2000)
    alone = {"data": (str(tmp_path / "one.py"),), "seq_lens": (128,), "spire": (), "tokens": (BATCH,)}
    with pytest.raises(ConfigError, match="leaves no 128 tokens"):
        train_laws(settings(place, tmp_path, **alone))


def test_heads_divide_the_width() -> None:
    for size in ("1x128", "3x200", "2x16", "4x384"):
        shape = small_shape(size, 100, 64)
        assert shape.heads * shape.head_dim == shape.hidden
        assert shape.head_dim % 2 == 0
