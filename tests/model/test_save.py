"""Saving: what is written is what was meant, whole, and beside other files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import tiny

from steeple.errors import ModelError, StorageError
from steeple.hf import load_hf_config
from steeple.model import load_decoder, save_decoder


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_decoder(folder, dtype=torch.float32).state_dict()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_bfloat16_by_default_and_said_in_the_configuration(llama_folder: Path, tmp_path: Path) -> None:
    decoder = load_decoder(llama_folder, dtype=torch.float32)
    save_decoder(decoder, tmp_path / "saved", load_hf_config(llama_folder))
    expected = {name: value.to(torch.bfloat16).float() for name, value in decoder.state_dict().items()}
    assert_same(state(tmp_path / "saved"), expected)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert model.dtype == torch.bfloat16
    assert decoder.dtype == torch.float32


def test_shards_replace_one_file_and_back(llama_folder: Path) -> None:
    decoder = load_decoder(llama_folder, dtype=torch.float32)
    config, expected = load_hf_config(llama_folder), decoder.state_dict()
    (llama_folder / "tokenizer.json").write_text("{}")
    save_decoder(decoder, llama_folder, config, dtype=torch.float32, max_shard_bytes=60_000)
    assert not (llama_folder / "model.safetensors").exists()
    assert len(list(llama_folder.glob("model-*.safetensors"))) > 2
    assert_same(state(llama_folder), expected)
    save_decoder(decoder, llama_folder, config, dtype=torch.float32)
    assert_same(state(llama_folder), expected)
    assert len({path.stat().st_mode for path in llama_folder.glob("[cm]*")}) == 1
    names = {path.name for path in llama_folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


def test_an_interrupted_save_leaves_the_old_model(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load_decoder(llama_folder, dtype=torch.float32)
    expected = {name: value.clone() for name, value in decoder.state_dict().items()}
    decoder.norm.weight.mul_(2.0)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("steeple.model.save.save_torch_state_dict", full)
    with pytest.raises(StorageError, match=r"cannot be written to .*llama: .*No space left on device"):
        save_decoder(decoder, llama_folder, load_hf_config(llama_folder))
    assert_same(state(llama_folder), expected)
    assert not list(llama_folder.glob(".saving*"))


@pytest.mark.parametrize("shard_bytes", [60_000, 1 << 30])
def test_an_interrupted_move_never_loads_as_a_mixture(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    decoder = load_decoder(llama_folder, dtype=torch.float32)
    config = load_hf_config(llama_folder)
    save_decoder(decoder, llama_folder, config, max_shard_bytes=shard_bytes)
    original, moved = Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        moved.append(target)
        if len(moved) == 2:
            raise OSError(5, "Input/output error")
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(StorageError, match="Input/output error"):
        save_decoder(decoder, llama_folder, config, max_shard_bytes=shard_bytes)
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        load_decoder(llama_folder, dtype=torch.float32)


def test_a_configuration_of_another_shape_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    decoder = load_decoder(llama_folder, dtype=torch.float32)
    other = tiny("Llama", rms_norm_eps=1e-3).config
    with pytest.raises(ModelError, match=r"decoder's norm_eps = 1e-06, but the configuration to be saved says 0\.001"):
        save_decoder(decoder, tmp_path / "saved", other)
    assert not (tmp_path / "saved").exists()
