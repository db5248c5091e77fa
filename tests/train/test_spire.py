"""Training SPIRe end to end on tiny targets: it learns, keeps the target's keys, resumes exactly, and is checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import VOCAB, tiny_model, tiny_tokenizer
from torch import Tensor

from steeple.convert import ConvertConfig, convert
from steeple.draft.carry import Carry
from steeple.draft.spire_model import FeedbackMemory, SpireShape
from steeple.errors import ConfigError, ModelError, StorageError, TokenizerMismatch
from steeple.model.decoder import Decoder
from steeple.model.load import load_decoder
from steeple.train import spire as training
from steeple.train.progress import read_log
from steeple.train.spire import SpireTrainer, train_spire
from steeple.train.spire_card import LLAMA_8B, spire_card, training_cost
from steeple.train.spire_config import SpireConfig
from steeple.train.spire_forward import Student
from steeple.train.spire_parity import check_parity

STEPS, BATCH = 12, 256
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
STORIES, TEXT = DATA / "stories260K", DATA / "text" / "tinystories"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model only waits for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target of 4 layers and text."""
    root = tmp_path_factory.mktemp("spire")
    tiny_model(root / "target", layers=4)
    (root / "text").mkdir()
    for i in range(160):
        lines = [f"def f{i}_{j}(a, b):\n    return a * {j} + b[{i}]\n" for j in range(3)]
        (root / "text" / f"part{i}.py").write_text("\n".join(lines))
    return root


def settings(place: Path, folder: Path, **changes: Any) -> SpireConfig:
    given: dict[str, Any] = {
        "target": place / "target",
        "data": (str(place / "text"),),
        "out": folder / "draft",
        "run": folder / "run",
        "layers": 2,
        "sink": 3,
        "window": 20,
        "page": 8,
        "k": 5,
        "tokens": STEPS * BATCH,
        "seq_lens": (64, 128),
        "shares": (0.75, 0.25),
        "batch_tokens": BATCH,
        "micro_tokens": 128,
        "warmup": 2,
        "device": "cpu",
        "save_every": 5,
        "validate_every": 6,
        "validate_windows": 2,
    }
    return SpireConfig(**(given | changes))


@pytest.fixture(scope="module")
def straight(place: Path, tmp_path_factory: pytest.TempPathFactory) -> SpireConfig:
    config = settings(place, tmp_path_factory.mktemp("straight"))
    train_spire(config)
    return config


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_loss_falls_and_tau_rises(place: Path, tmp_path: Path) -> None:
    config = settings(
        place, tmp_path, matrix_lr=1e-2, embed_lr=2e-2, head_lr=1e-2, tokens=30 * BATCH, validate_every=10
    )
    SpireTrainer(config).run()
    log = read_log(config.run)
    assert log[-1]["validation"] < log[9]["validation"]
    assert log[-1]["tau_4"] > log[9]["tau_4"] > 1.0
    assert sum(r["alpha"] for r in log[-5:]) > sum(r["alpha"] for r in log[:5])


def test_keys_stay_the_targets_and_all_else_moves(place: Path, straight: SpireConfig) -> None:
    ours, theirs = stored(straight.out), stored(place / "target")
    assert {value.dtype for value in ours.values()} == {torch.float32}  # the target's
    still = ("k_proj.weight", "v_proj.weight", "input_layernorm.weight")
    for name, value in ours.items():
        source = theirs[name.replace("layers.1.", "layers.3.").replace("layers.0.", "layers.2.")]
        assert torch.equal(value, source) == name.endswith(still), name


@pytest.mark.parametrize("changes", [{"own_keys": True}, {"target_activations": False}])
def test_keys_of_a_draft_that_makes_its_own_are_trained(place: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = settings(place, tmp_path, tokens=2 * BATCH, **changes)
    parity = train_spire(config)["parity"]
    assert (parity is None) == (not config.target_activations), (
        "of the two, the engine runs the one with keys of its own"
    )
    assert parity is None or parity < 1e-4
    ours, theirs = stored(config.out), stored(place / "target")
    assert not torch.equal(
        ours["model.layers.1.self_attn.k_proj.weight"], theirs["model.layers.3.self_attn.k_proj.weight"]
    )


def test_a_random_start_keeps_the_keys_alone(place: Path, tmp_path: Path) -> None:
    trainer = SpireTrainer(settings(place, tmp_path, random_init=True))
    layer, theirs = trainer.student.draft.layers[1], stored(place / "target")
    name = "model.layers.3.self_attn.{}_proj.weight"
    kv = torch.cat([theirs[name.format(x)] for x in "kv"])
    assert torch.equal(layer.attention.qkv.weight[-len(kv) :], kv)
    assert not torch.equal(layer.attention.qkv.weight[: -len(kv)], theirs[name.format("q")])
    assert layer.mlp.down.weight.abs().max() == 0.0


def test_the_draft_is_an_ordinary_model_with_its_shape_beside_it(straight: SpireConfig) -> None:
    tokens = torch.randint(0, VOCAB, (1, 20))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(straight.out, dtype=torch.float32)
    assert theirs.config.num_hidden_layers == load_decoder(straight.out, dtype=torch.float32).config.num_layers == 2
    assert theirs(tokens).logits.isfinite().all()
    expected = SpireShape(target_layers=(2, 3), sink=3, window=20, page=8, k=5)
    assert SpireShape.load(straight.out) == expected
    assert not list(straight.out.glob("spire.safetensors"))
    assert len(transformers.AutoTokenizer.from_pretrained(straight.out)) <= VOCAB


class KilledError(Exception):
    """Stands for a process that ends in the middle."""


def test_a_killed_run_goes_on_with_the_same_losses(
    place: Path, straight: SpireConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, step = settings(place, tmp_path), SpireTrainer.step

    def dying(self: SpireTrainer, number: int) -> tuple[float, float]:
        if number == 8:
            raise KilledError
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(SpireTrainer, "step", dying)
        with pytest.raises(KilledError):
            train_spire(config)
    train_spire(config)
    lines = (config.run / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 9), *range(6, STEPS + 1)]
    assert [r["loss"] for r in read_log(config.run)] == [r["loss"] for r in read_log(straight.run)]
    ours, theirs = stored(config.out), stored(straight.out)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_of_another_kind_is_not_continued(place: Path, straight: SpireConfig) -> None:
    with pytest.raises(StorageError, match="was begun with"):
        SpireTrainer(replace(straight, window=24))
    with pytest.raises(StorageError, match="does not fit"):
        SpireTrainer(replace(straight, feedback=True))


def test_a_run_of_another_tokenizer_is_not_continued(straight: SpireConfig, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other", layers=4, vocab=300)
    with pytest.raises(TokenizerMismatch):
        SpireTrainer(replace(straight, target=other))


def test_the_record_and_the_card_say_the_same(straight: SpireConfig) -> None:
    record = json.loads((straight.out / "training.json").read_text())
    card = (straight.out / "README.md").read_text()
    assert card == spire_card(record)
    assert record["steps"] == STEPS
    assert 0 <= record["parity"] < 1e-5
    assert f"| held-out | {record['tau']['held_out']['blocks']:,} |" in card
    assert f"{record['tau']['validation']['tau_4']:.2f}" in card
    assert "--window 20" in record["command"]
    assert record["command"] in card


def test_the_cost_of_an_8b_is_the_stated_arithmetic() -> None:
    cost = training_cost(LLAMA_8B, 8)
    layer = 4096 * 128 * 48 + 4096 * 4096 + 3 * 4096 * 14336
    head = 4096 * 128256
    assert cost.parameters == 8 * layer + 2 * head
    assert cost.tokens == 20 * cost.parameters
    assert cost.flops_per_token == 2 * (32 * layer + head) + 6 * (8 * layer + head)
    assert cost.gpu_hours == pytest.approx(cost.tokens * cost.flops_per_token / (0.4 * 990e12) / 3600)


def test_laws_that_the_engine_does_not_compute_stop_the_model(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def wrong(target: Decoder, student: Student) -> Any:
        """An engine whose rows do not see the newest position of the text."""
        short = replace(student, shape=replace(student.shape, sink=0, window=0))

        def laws(text: Tensor, forced: Tensor) -> Tensor:
            seen.append(len(text))
            return training_laws(target, short, text, forced)

        return laws

    from steeple.train.spire_parity import training_laws

    monkeypatch.setattr(training, "check_parity", lambda *given: check_parity(*given, engine=wrong))
    config = settings(place, tmp_path, tokens=2 * BATCH)
    with pytest.raises(ModelError, match="engine's draft laws differ"):
        train_spire(config)
    assert seen
    assert not config.out.exists()
    assert (config.run / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"feedback": True},
        {"dense": True},
        {"carry": True},
        {"carry": True, "feedback": True},
        {"carry": True, "own_keys": True},
        {"random_init": True, "hard_targets": True},
    ],
)
def test_the_switches_train_and_agree_with_the_engine(place: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = settings(place, tmp_path, tokens=2 * BATCH, **changes)
    record = train_spire(config)
    assert record["parity"] < 1e-5
    assert SpireShape.load(config.out) == config.shape(4)
    if config.feedback:
        assert torch.softmax(FeedbackMemory.load(config.out).mix, -1).tolist() == record["memory_mix"]
        assert FeedbackMemory.load(config.out).mix.abs().max() > 0
    if config.carry:
        carry = Carry.load(config.out, 32, torch.float32, torch.device("cpu"))
        assert carry.projection.weight.abs().max() > 0


def test_a_finished_draft_has_the_weights_that_will_be_stored(place: Path, tmp_path: Path) -> None:
    trainer = training.SpireTrainer(settings(place, tmp_path, tokens=BATCH, carry=True))
    assert trainer.student.carry is not None
    trainer.student.carry.projection.weight.data.normal_()
    draft = training.finished(trainer.student, torch.bfloat16)
    assert draft.carry is not None
    for weight in (draft.carry.projection.weight, draft.draft.embed.weight):
        assert weight.dtype == torch.float32
        assert torch.equal(weight, weight.bfloat16().float())
    assert not torch.equal(draft.carry.projection.weight, trainer.student.carry.projection.weight)


@pytest.mark.parametrize("carry", [False, True])
def test_training_may_begin_from_a_trained_draft(
    place: Path, straight: SpireConfig, tmp_path: Path, carry: bool
) -> None:
    config = settings(place, tmp_path, tokens=BATCH, start=straight.out, carry=carry)
    trainer = training.SpireTrainer(config)
    begun, ended = (
        training.finished(student, torch.float32).draft.state_dict()
        for student in (trainer.student, training.SpireTrainer(straight).student)
    )
    assert all(torch.equal(begun[name], value) for name, value in ended.items())
    record = train_spire(config)
    assert record["parity"] < 1e-5
    assert record["begun_from"]["tokens"] == straight.tokens
    assert "Begun from a trained draft" in (config.out / "README.md").read_text()


def test_a_draft_of_another_shape_is_no_beginning(place: Path, straight: SpireConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has own_keys = False, not True"):
        train_spire(settings(place, tmp_path, start=straight.out, own_keys=True))
    with pytest.raises(ConfigError, match="has target_layers"):
        train_spire(settings(place, tmp_path, start=straight.out, layers=1))


def test_a_qwen3_target_in_bfloat16(place: Path, tmp_path: Path) -> None:
    config = transformers.Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.3, bos_token_id=0,
        eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).bfloat16().save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    ready = settings(place, tmp_path, target=tmp_path / "target", layers=0, tokens=3 * BATCH)
    record = train_spire(ready)
    assert record["parity"] < 1e-5
    assert record["shape"]["target_layers"] == [3]
    ours, theirs = stored(ready.out), stored(tmp_path / "target")
    assert {value.dtype for value in ours.values()} == {torch.bfloat16}
    for part in ("self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm", "input_layernorm"):
        assert torch.equal(ours[f"model.layers.0.{part}.weight"], theirs[f"model.layers.3.{part}.weight"])
    assert not torch.equal(
        ours["model.layers.0.self_attn.q_proj.weight"], theirs["model.layers.3.self_attn.q_proj.weight"]
    )


@pytest.mark.shared
@pytest.mark.skipif(not STORIES.is_dir(), reason="shared/data/stories260K is not beside the repository")
def test_a_converted_model_of_others(tmp_path: Path) -> None:
    source, tokenizer = str(STORIES / "stories260K.bin"), str(STORIES / "tok512.bin")
    convert(ConvertConfig(source=source, out=str(tmp_path / "target"), tokenizer=tokenizer, context=512))
    text = next(path for path in sorted(TEXT.rglob("*")) if path.suffix in {".txt", ".jsonl"})
    lines = text.read_text(encoding="utf-8")[:200_000]
    (tmp_path / "text").mkdir()
    for i in range(100):
        (tmp_path / "text" / f"{i}.txt").write_text(lines[2000 * i : 2000 * (i + 1)])
    config = settings(
        tmp_path, tmp_path, layers=0, tokens=8 * 1024, matrix_lr=3e-3, seq_lens=(256,), shares=(1.0,),
        batch_tokens=1024, micro_tokens=1024, sink=16, window=64, page=16, k=6,
    )  # fmt: skip
    record = train_spire(config)
    assert record["parity"] < 1e-5
    log = read_log(config.run)
    assert log[-1]["alpha"] > 1.5 * log[0]["alpha"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, r"k = 0"),
        ({"alpha_weight": 1.5}, r"SpireConfig\.alpha_weight"),
        ({"shares": (1.0,)}, "one share for each"),
        ({"batch_tokens": 100}, "no multiple of 64"),
        ({"device": "tpu"}, "'tpu'"),
        ({"tokens": 0}, r"SpireConfig\.tokens = 0"),
        ({"feedback": True, "target_activations": False}, "Switch feedback off"),
    ],
)
def test_wrong_settings_are_named(place: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(place, place, **changes)


def test_settings_that_do_not_fit_the_target_are_named(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layers = 5"):
        SpireTrainer(settings(place, tmp_path, layers=5))
    with pytest.raises(ConfigError, match="512, but the target has 256 positions"):
        SpireTrainer(settings(place, tmp_path, seq_lens=(512,), shares=(1.0,), batch_tokens=512))


def test_a_loss_that_is_not_finite_stops_the_run(place: Path, tmp_path: Path) -> None:
    trainer = SpireTrainer(settings(place, tmp_path))
    with torch.no_grad():
        trainer.student.draft.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="lower matrix_lr"):
        trainer.step(0)
