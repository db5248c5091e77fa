"""The bench of padded generation: what it runs, that all methods write the same, and what it makes of their times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from steeple.bench.padded.config import ARCHITECTURES, PaddedBenchConfig
from steeple.bench.padded.methods import METHODS
from steeple.bench.padded.pairs import random_pair, work
from steeple.bench.padded.run import run_padded_bench, split
from steeple.bench.padded.table import COLUMNS, padded_markdown, padded_table, texts
from steeple.errors import ConfigError
from steeple.hf import load_tokenizer
from steeple.padded import generate


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("\n".join(f"def box_{i}(side, {i}):\n    return side * {i}" for i in range(60)))
    return path


def test_every_method_in_every_cell(target_folder: Path, draft_folder: Path, text_file: Path, tmp_path: Path) -> None:
    config = PaddedBenchConfig(
        model=str(target_folder), assistant=str(draft_folder), batch=(1, 3), requests=5, shortest=3, longest=9,
        least_tokens=2, max_tokens=7, repeat=2, prompts=str(text_file), plots=str(tmp_path), device="cpu",
    )  # fmt: skip
    told = []
    result = run_padded_bench(config, lambda *what: told.append(what), argv=["x"])
    assert json.loads(json.dumps(result))["kind"] == "padded"
    rows = result["rows"]
    assert [row["method"] for row in rows if row["batch"] == 1] == list(METHODS)
    assert [row["method"] for row in rows if row["batch"] == 3] == [m for m in METHODS if not METHODS[m].one_row]
    assert len(told) == 2 * len(rows)
    for row in rows:
        assert row["like_transformers"] == 1.0, row["method"]
        assert row["tokens_per_second_range"][0] <= row["tokens_per_second"] <= row["tokens_per_second_range"][1]
        if row["shares"] is not None:
            assert sum(row["shares"].values()) == pytest.approx(1.0)
            assert (row["shares"]["draft"] > 0) == row["drafts"]
            assert row["shares"]["group"] == 0 or row["method"] == "pool"
    assert [gain["batch"] for gain in result["gains"]] == [1, 3]
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".svg"}
    assert len(list(tmp_path.iterdir())) == 6
    assert padded_table(result).row_count == len(rows)
    assert len(padded_markdown(result).splitlines()) == len(rows) + 2
    assert all(len(texts(row)) == len(COLUMNS) for row in rows)


def test_gains_are_ratios_of_what_differs_in_one_thing() -> None:
    speeds = {
        "transformers": 2.0, "plain, no refill": 3.0, "plain": 6.0, "align, no refill": 5.0, "align": 8.0, "pool": 4.0
    }  # fmt: skip
    gains = split([{"method": method, "tokens_per_second": speed} for method, speed in speeds.items()])
    assert gains == {
        "refill_plain": 2.0,
        "refill_drafted": 1.6,
        "drafting": pytest.approx(8 / 6),
        "grouping": 0.5,
        "no_alignment": None,
        "best_over_transformers": 4.0,
    }


def test_work_is_ragged_and_fixed_by_its_seed(target_folder: Path, text_file: Path) -> None:
    tokenizer = load_tokenizer(target_folder)

    def made(seed: int) -> tuple[list[list[int]], list[int]]:
        return work(PaddedBenchConfig(requests=9, shortest=3, longest=20, seed=seed, prompts=str(text_file)), tokenizer)

    prompts, counts = made(1)
    assert made(1) == (prompts, counts) != made(2)
    assert sorted(map(len, prompts))[:: len(prompts) - 1] == [3, 20]
    assert (min(counts), max(counts)) == (16, 96)
    assert len({tuple(prompt) for prompt in prompts}) == 9


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_random_pairs_agree_now_and_then(name: str) -> None:
    state = torch.random.get_rng_state()
    target, assistant = random_pair(name, 90, 64, seed=0)
    out = generate(target, assistant, [[3, 4, 5], [7]], max_tokens=30, ignore_eos=True)
    assert torch.equal(state, torch.random.get_rng_state())
    assert out.stats.speculation.tau > 1.0
    assert len(out[0].token_ids) == 30


def test_wrong_settings_are_refused() -> None:
    for wrong in ({"batch": ()}, {"longest": 8, "shortest": 9}, {"dtype": "int8"}, {"waste": 1.0}, {"requests": 0}):
        with pytest.raises(ConfigError):
            PaddedBenchConfig(**wrong)
