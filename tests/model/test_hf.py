"""Finding models and tokenizers, and the words when they cannot be found."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from steeple import hf
from steeple.errors import ModelError, TokenizerMismatch
from steeple.model import model_config


def word_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    model = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token=words[0])


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def test_a_folder_is_itself(llama_folder: Path) -> None:
    assert hf.resolve(llama_folder) == hf.resolve(str(llama_folder)) == llama_folder


@pytest.mark.usefixtures("offline")
def test_an_unknown_hub_name_offline() -> None:
    with pytest.raises(
        ModelError, match=r"Model 'nobody/nothing' is neither a local folder nor a hub model.*demo/small"
    ):
        hf.resolve("nobody/nothing")


@pytest.mark.usefixtures("offline")
def test_a_name_that_the_hub_does_not_allow() -> None:
    with pytest.raises(ModelError, match=r"Model 'no body!' is neither .*HFValidationError"):
        hf.resolve("no body!")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", Path("owner/name"), "~/nowhere-at-all"])
def test_a_path_never_goes_to_the_hub(name: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match=r"there is no such folder\. Give a folder with config\.json"):
        hf.resolve(name)


def test_a_file_is_no_folder(llama_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.safetensors' is a file; give the folder"):
        hf.resolve(llama_folder / "model.safetensors")


def test_only_harmless_files_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, list[str]] = {}

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(hf, "snapshot_download", download)
    assert hf.resolve("owner/name") == tmp_path

    def fetched(file: str) -> bool:
        return any(fnmatch(file, pattern) for pattern in asked["owner/name"])

    wanted = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    assert all(map(fetched, [*wanted, "tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt"]))
    refused = ["pytorch_model.bin", "modeling_x.py", "tokenization_x.py", "consolidated.safetensors", "original/x.pth"]
    assert not any(map(fetched, refused))


def test_embedded_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package, repository = tmp_path / "src" / "steeple", tmp_path / "models"
    monkeypatch.setattr(hf, "__file__", str(package / "hf.py"))
    with pytest.raises(ModelError, match=r"embedded model 'demo/small' is not installed.*small/config\.json"):
        hf.resolve("demo/small")
    for folder in (repository / "target", repository / "small"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    assert hf.resolve("demo") == repository / "target"
    assert hf.resolve("demo/small") == repository / "small"
    (package / "models" / "target").mkdir(parents=True)
    (package / "models" / "target" / "config.json").write_text("{}")
    assert hf.resolve("demo") == package / "models" / "target"


def test_generation_config_decides_where_to_stop(llama_folder: Path) -> None:
    assert model_config(hf.load_hf_config(llama_folder)).eos_token_ids == (2,)
    (llama_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert model_config(hf.load_hf_config(llama_folder)).eos_token_ids == (3, 4)
    (llama_folder / "generation_config.json").write_text("{}")
    assert model_config(hf.load_hf_config(llama_folder)).eos_token_ids == (2,)


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    saved = word_tokenizer("<unk>", "a", "b")
    saved.save_pretrained(tmp_path)
    assert hf.load_tokenizer(tmp_path).get_vocab() == {"<unk>": 0, "a": 1, "b": 2}


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_no_tokenizer(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelError, match=rf"The tokenizer in {tmp_path} cannot be read .*needs tokenizer\.json"):
        hf.load_tokenizer(tmp_path)


def test_same_tokenizer() -> None:
    one, two = word_tokenizer("<unk>", "a", "b"), word_tokenizer("<unk>", "a", "b")
    hf.check_same_tokenizer(one, two)
    assert hf.tokenizer_fingerprint(one) == hf.tokenizer_fingerprint(two)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("<unk>", "b", "a"), r"token id 1 is 'a' in the target \(3 tokens\) and 'b' in the drafter \(3 tokens\)"),
        (("<unk>", "a"), r"token id 2 is 'b' in the target \(3 tokens\) and None in the drafter \(2 tokens\)"),
        (("<unk>", "a", "b", "c"), r"token id 3 is None in the target .* and 'c' in the drafter \(4 tokens\)"),
    ],
)
def test_tokenizer_mismatch(words: tuple[str, ...], message: str) -> None:
    target, draft = word_tokenizer("<unk>", "a", "b"), word_tokenizer(*words)
    assert hf.tokenizer_fingerprint(target) != hf.tokenizer_fingerprint(draft)
    with pytest.raises(TokenizerMismatch, match=message + ".*Choose a drafter of the target's own family"):
        hf.check_same_tokenizer(target, draft)
