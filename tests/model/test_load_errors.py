"""A checkpoint that does not fit is an error that names the weight or the file, and says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import published_logits, ragged_logits, sequences, tiny
from torch import Tensor

from steeple.errors import ConfigError, ModelError, UnsupportedModel, WeightError
from steeple.model import load_decoder

Edit = Callable[[Callable[[dict[str, Tensor]], None]], Path]
K = "model.layers.1.self_attn.k_proj.weight"


def load(folder: Path, **options: object) -> None:
    load_decoder(folder, **{"dtype": torch.float32, **options})


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def test_missing_weight(edit_weights: Edit) -> None:
    folder = edit_weights(lambda weights: weights.pop(K))
    with pytest.raises(WeightError, match=rf"weights are missing: {K} \[32, 64\]\. Download"):
        load(folder)


def test_many_missing_weights_are_counted(llama_folder: Path) -> None:
    change_config(llama_folder, num_hidden_layers=4)
    with pytest.raises(WeightError, match=r"weights are missing: model\.layers\.3\..* and 4 more"):
        load(llama_folder)


def test_missing_bias(llama_folder: Path) -> None:
    change_config(llama_folder, attention_bias=True)
    with pytest.raises(WeightError, match=r"missing: model\.layers\.0\.self_attn\.q_proj\.bias \[64\]"):
        load(llama_folder)


def test_unexpected_weight(edit_weights: Edit) -> None:
    folder = edit_weights(lambda weights: weights.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}))
    with pytest.raises(WeightError, match=r"unexpected weights: model\.layers\.0\.self_attn\.q_norm\.weight \[16\]"):
        load(folder)


def test_rotary_frequencies_in_old_checkpoints_are_harmless(edit_weights: Edit) -> None:
    load(edit_weights(lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})))


def test_misshapen_weight(edit_weights: Edit) -> None:
    folder = edit_weights(lambda weights: weights.update({K: torch.ones(31, 64)}))
    with pytest.raises(WeightError, match=rf"weight {K} has shape \[31, 64\], expected \[32, 64\]"):
        load(folder)


def test_quantised_weight(edit_weights: Edit) -> None:
    folder = edit_weights(lambda weights: weights.update({K: torch.ones(32, 64, dtype=torch.int8)}))
    with pytest.raises(WeightError, match=rf"weight {K} has the element type I8, expected one of F64"):
        load(folder)


def test_a_head_that_contradicts_tying(llama_folder: Path, edit_weights: Edit) -> None:
    change_config(llama_folder, tie_word_embeddings=True)
    with pytest.raises(WeightError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(llama_folder)
    load(edit_weights(lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"] * 1})))


@pytest.mark.parametrize(("keep", "label"), [(0.5, "half"), (0.0, "empty")])
def test_truncated_file(llama_folder: Path, keep: float, label: str) -> None:
    path = llama_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(WeightError, match=r"llama/model\.safetensors is truncated or corrupt \(.*download"):
        load(llama_folder)


def test_corrupt_file(llama_folder: Path) -> None:
    path = llama_folder / "model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])
    with pytest.raises(WeightError, match=r"model\.safetensors is truncated or corrupt"):
        load(llama_folder)


def test_damaged_shards(tmp_path: Path) -> None:
    model = tiny("Llama")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    texts = sequences(97, (5, 9))
    expected = published_logits(model, texts)
    found = ragged_logits(load_decoder(tmp_path, dtype=torch.float32), texts)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    with pytest.raises(WeightError, match=rf"{shard.name} is truncated or corrupt"):
        load(tmp_path)
    shard.unlink()
    with pytest.raises(WeightError, match=rf"{shard.name} is named by model\.safetensors\.index\.json but"):
        load(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(WeightError, match="has no 'weight_map'"):
        load(tmp_path)
    index.write_text("{")
    with pytest.raises(WeightError, match=r"index\.json cannot be read \(.*download"):
        load(tmp_path)


def test_no_safetensors(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors").rename(llama_folder / "pytorch_model.bin")
    with pytest.raises(WeightError, match="Only safetensors weights are read; convert others"):
        load(llama_folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"model_type": ...}, ModelError, "lacks the field 'model_type'"),
        ({"model_type": "lama"}, UnsupportedModel, "model_type 'lama'.* does not recognize"),
        ({"model_type": "gpt2"}, UnsupportedModel, "model_type 'gpt2' is not supported. Supported: gemma2"),
        ({"hidden_size": ..., "vocab_size": ...}, ModelError, r"config\.json lacks 'vocab_size', 'hidden_size'"),
        ({"hidden_size": "64"}, ModelError, "config.json .*cannot be used: .*hidden_size"),
        ({"rope_parameters": {"rope_type": "spiral"}}, UnsupportedModel, "rope_type 'spiral' is not supported"),
    ],
)
def test_bad_configuration(llama_folder: Path, values: dict[str, object], kind: type[Exception], message: str) -> None:
    change_config(llama_folder, **values)
    with pytest.raises(kind, match=message):
        load(llama_folder)


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read"), ("[]", "holds no JSON object")])
def test_unreadable_configuration(llama_folder: Path, text: str, message: str) -> None:
    (llama_folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=rf"config\.json {message}"):
        load(llama_folder)


def test_dtype_must_be_floating(llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype = torch\.int8 cannot hold weights; give one of torch\.float32"):
        load(llama_folder, dtype=torch.int8)


def test_memory_of_loading_is_one_model(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read before every header is checked, and each stored tensor is read once."""
    read: list[str] = []
    original = load_decoder.__globals__["Stored"].read

    def counted(self: object) -> Tensor:
        read.append(self.name)
        return original(self)

    monkeypatch.setattr("steeple.model.load.Stored.read", counted)
    decoder = load_decoder(llama_folder, dtype=torch.float32)
    assert len(read) == len(set(read)) == 3 + 9 * decoder.config.num_layers
    read.clear()
    change_config(llama_folder, intermediate_size=81)
    with pytest.raises(WeightError, match=r"\[80, 64\], expected \[81, 64\]"):
        load(llama_folder)
    assert read == []
