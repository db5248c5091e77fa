"""Training end to end on a tiny model: it learns, resumes exactly, and exports what transformers loads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steeple.errors import ConfigError, ModelError, StorageError
from steeple.model.decoder import Decoder
from steeple.model.families import model_config
from steeple.model.load import load_decoder
from steeple.model.save import save_decoder
from steeple.train.data import TokenStream
from steeple.train.lm import LMConfig, Trainer, train
from steeple.train.loss import CausalRows, next_token_loss
from steeple.train.progress import read_log
from steeple.train.shape import SHAPES, llama_config

STEPS, BATCH = 20, 128


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model only waits for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(240):
        lines = [f"def f{i}_{j}(a, b):\n    return a * {j} + b[{i}]\n" for j in range(4)]
        (folder / f"part{i}.py").write_text("\n".join(lines))
    return folder


def settings(text: Path, folder: Path, **changes: Any) -> LMConfig:
    given: dict[str, Any] = {
        "shape": "tiny",
        "data": (str(text),),
        "out": folder / "model",
        "run": folder / "run",
        "tokens": STEPS * BATCH,
        "seq_lens": (32, 64),
        "shares": (0.8, 0.2),
        "batch_tokens": BATCH,
        "micro_tokens": 64,
        "warmup": 2,
        "device": "cpu",
        "save_every": 5,
        "validate_every": 10,
        "validate_windows": 2,
    }
    return LMConfig(**(given | changes))


class KilledError(Exception):
    """Stands for a process that ends in the middle."""


def kill_at(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    step = Trainer.step

    def dying(self: Trainer, number: int) -> float:
        if number == last:
            raise KilledError
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", dying)


@pytest.fixture(scope="module")
def straight(text: Path, tmp_path_factory: pytest.TempPathFactory) -> LMConfig:
    config = settings(text, tmp_path_factory.mktemp("straight"))
    train(config)
    return config


def losses(config: LMConfig) -> list[float]:
    return [record["loss"] for record in read_log(config.run)]


def test_the_loss_falls(straight: LMConfig) -> None:
    curve = losses(straight)
    assert len(curve) == STEPS
    assert curve[0] == pytest.approx(torch.tensor(512.0).log().item(), abs=1e-3)
    assert sum(curve[-3:]) / 3 < curve[0] - 1.0


def test_a_killed_run_goes_on_with_the_same_losses(
    straight: LMConfig, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(text, tmp_path)
    with monkeypatch.context() as patch:
        kill_at(patch, 12)
        with pytest.raises(KilledError):
            train(config)
    assert len(losses(config)) == 12
    train(config)
    lines = (config.run / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 13), *range(11, STEPS + 1)]
    assert losses(config) == losses(straight)
    ours, theirs = (load_decoder(c.out, dtype=torch.float32).state_dict() for c in (config, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_going_on_with_fewer_tokens_equals_having_planned_them(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, shortened = (settings(text, tmp_path / name, tokens=10 * BATCH) for name in "ab")
    train(planned)
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(KilledError):
            train(replace(shortened, tokens=STEPS * BATCH))
    train(shortened)
    assert losses(shortened) == losses(planned)


def test_transformers_loads_the_model_with_the_same_logits(straight: LMConfig) -> None:
    tokens = torch.randint(0, 512, (1, 48), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(straight.out, dtype=torch.float32)
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == 0
    ours = load_decoder(straight.out, dtype=torch.float32)
    with torch.no_grad():
        hidden = ours(tokens[0], torch.arange(48), CausalRows(1)).final_TD
        torch.testing.assert_close(ours.logits(hidden), theirs(tokens).logits[0], atol=1e-4, rtol=1e-4)
    assert len(AutoTokenizer.from_pretrained(straight.out)) <= 512


def test_the_loss_is_that_of_transformers(tmp_path: Path) -> None:
    config = llama_config(SHAPES["tiny"], 0)
    torch.manual_seed(0)
    model = Decoder(model_config(config))
    save_decoder(model, tmp_path, config, dtype=torch.float32)
    window = torch.randint(0, 512, (3, 41))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(window, labels=window).loss
    torch.testing.assert_close(next_token_loss(model, window), theirs, atol=1e-5, rtol=1e-5)


def test_the_record_and_the_card_say_the_same(straight: LMConfig) -> None:
    record = json.loads((straight.out / "training.json").read_text())
    card = (straight.out / "README.md").read_text()
    assert record["steps"] == STEPS
    assert record["tokens"] == STEPS * BATCH
    assert set(record["losses"]) == {f"{s}_loss_{n}" for s in ("validation", "held_out") for n in (32, 64)}
    assert [point["step"] for point in record["curve"]] == list(range(1, STEPS + 1))
    assert record["curve"][9]["validation"] == round(read_log(straight.run)[9]["validation"], 4)
    for value in (f"{record['tokens']:,}", f"{record['parameters']:,}", str(record["train_loss"]), record["command"]):
        assert value in card
    assert f"--tokens {STEPS * BATCH}" in record["command"]
    assert "--seq-lens 32,64" in record["command"]
    assert "--clip" not in record["command"]


def test_a_checkpoint_of_another_shape_is_refused(straight: LMConfig, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint.pt").write_bytes((straight.run / "checkpoint.pt").read_bytes())
    with pytest.raises(StorageError, match="does not fit"):
        Trainer(settings(text, tmp_path, shape="small"))


def test_a_loss_that_is_not_finite_stops_the_run(text: Path, tmp_path: Path) -> None:
    trainer = Trainer(settings(text, tmp_path))
    with torch.no_grad():
        trainer.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="lower matrix_lr"):
        trainer.step(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": "targt"}, "Did you mean 'target'"),
        ({"shares": (1.0,)}, "one share for each"),
        ({"shares": (0.8, 0.3)}, "sum to 1"),
        ({"seq_lens": (32, 512)}, "out of range"),
        ({"batch_tokens": 100}, "no multiple of 32"),
        ({"tokens": 0}, r"LMConfig\.tokens = 0"),
        ({"device": "tpu"}, "'tpu'"),
        ({"clip": 0.0}, r"LMConfig\.clip"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, tmp_path, **changes)


def test_phases_cover_the_budget_in_order(tmp_path: Path) -> None:
    config = settings(tmp_path, tmp_path)
    assert [config.phase(s) for s in (0, 15, 16, 19)] == [(0, 0), (0, 15), (1, 0), (1, 3)]
    with pytest.raises(ConfigError, match="beyond"):
        config.phase(STEPS)


def test_each_step_reads_its_own_batch(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = TokenStream.batch
    seen: list[tuple[int, int, int, int]] = []

    def watched(self: TokenStream, phase: int, index: int, rows: int, seq_len: int) -> torch.Tensor:
        seen.append((phase, index, rows, seq_len))
        return read(self, phase, index, rows, seq_len)

    monkeypatch.setattr(TokenStream, "batch", watched)
    Trainer(settings(text, tmp_path, tokens=5 * BATCH, shares=(0.6, 0.4))).run()
    assert seen == [(0, 0, 4, 32), (0, 1, 4, 32), (0, 2, 4, 32), (1, 0, 2, 64), (1, 1, 2, 64)]


def test_the_embedded_shapes_are_the_stated_ones() -> None:
    target, small = (model_config(llama_config(SHAPES[name], 0)) for name in ("target", "small"))
    assert target.body_parameters() == 8 * small.body_parameters() == 34_078_720
