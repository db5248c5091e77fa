"""A local folder or a hub name -> config, tokenizer and safetensors shards.

Only ``*.safetensors``, ``*.json`` and tokenizer files are ever fetched or read; no code from a model repository runs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError, StrictDataclassError  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from steeple.errors import ModelError, TokenizerMismatch, UnsupportedModel, WeightError

EMBEDDED = {"demo": "target", "demo/small": "small", "demo/little": "little"}
"""The special names of the embedded models and their folders."""

PATTERNS = ("model*.safetensors", "*.json", "*.model", "*.tiktoken", "*.jinja", "merges.txt", "vocab.txt")
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def resolve(model: str | Path) -> Path:
    """The local folder of ``model``: a folder, a hub name (downloaded once), ``"demo"``, ``"demo/small"``
    or ``"demo/little"``.

    The special names win over folders of the same name; write ``./demo`` for such a folder.

    Raises:
        ModelError: there is no such folder or hub model, or it cannot be reached.
    """
    if isinstance(model, str) and model in EMBEDDED:
        return _embedded(model)
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"Model {str(model)!r} is a file; give the folder that holds config.json and the weights.")
    if isinstance(model, Path) or model.startswith((".", "/", "~")) or not 0 < len(model.split("/")) <= 2:
        raise ModelError(
            f"Model {str(model)!r}: there is no such folder. Give a folder with config.json and safetensors weights, "
            f"a hub name such as 'owner/name', or one of the embedded models: {', '.join(EMBEDDED)}."
        )
    try:
        return Path(snapshot_download(model, allow_patterns=list(PATTERNS)))
    except (OSError, ValueError, HTTPError) as error:
        raise ModelError(
            f"Model {model!r} is neither a local folder nor a hub model that can be reached "
            f"({type(error).__name__}: {_first_line(error)}). Check the name, log in if the model is gated, or, "
            f"without a network, give a local folder or one of the embedded models: {', '.join(EMBEDDED)}."
        ) from error


def load_hf_config(folder: Path) -> PretrainedConfig:
    """The configuration of the model in ``folder``, with the end-of-sequence ids that its generation config says.

    Raises:
        ModelError: ``config.json`` is absent, unreadable or lacks a field.
        UnsupportedModel: transformers does not know the architecture.
    """
    path = folder / "config.json"
    raw = _read_json(path, ModelError)
    if "model_type" not in raw:
        raise ModelError(f"{path} lacks the field 'model_type'; give the folder of a transformers model.")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        kind = UnsupportedModel if "does not recognize" in str(error) else ModelError
        raise kind(
            f"{path} (model_type {raw['model_type']!r}) cannot be used: {_first_line(error)} "
            "Correct the file, or give a model of a supported family."
        ) from error
    # transformers fills absent fields with the defaults of one published model; a shape must never be guessed
    missing = [name for name in REQUIRED if name not in raw and config.attribute_map.get(name, name) not in raw]
    if missing and "text_config" not in raw:
        raise ModelError(f"{path} lacks {', '.join(map(repr, missing))}; download the model again or add the fields.")
    generation = folder / "generation_config.json"
    if generation.is_file():
        eos = _read_json(generation, ModelError).get("eos_token_id")
        config.eos_token_id = config.eos_token_id if eos is None else eos
    return config


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the model in ``folder``; raises ``ModelError`` if there is none or it cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # the Rust tokenizer raises bare Exception for a malformed file; whatever it is, the user must hear which folder
    except Exception as error:
        raise ModelError(
            f"The tokenizer in {folder} cannot be read ({type(error).__name__}: {_first_line(error)}). "
            "The folder needs tokenizer.json and tokenizer_config.json, or tokenizer.model."
        ) from error


def safetensors_files(folder: Path) -> tuple[Path, ...]:
    """The weight files of the model in ``folder``: one, or the shards that the index names, each checked to be whole.

    Raises:
        WeightError: a file is absent, truncated or corrupt.
    """
    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).is_file():
        mapping = _read_json(folder / INDEX, WeightError).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise WeightError(f"{folder / INDEX} has no 'weight_map'; download the file again.")
        files = [folder / Path(str(name)).name for name in sorted(set(mapping.values()))]
    else:
        raise WeightError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}. Only safetensors weights are read; "
            "convert others with transformers' save_pretrained."
        )
    for path in files:
        if not path.is_file():
            raise WeightError(f"{path} is named by {INDEX} but does not exist; download it.")
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise WeightError(
                f"{path} is truncated or corrupt ({_first_line(error)}); download the file again."
            ) from error
    return tuple(files)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of every (id, token) pair; equal if and only if two tokenizers speak the same token ids."""
    digest = hashlib.blake2b(digest_size=16)
    for index, token in sorted(_by_id(tokenizer).items()):
        digest.update(f"{index}\0{token}\0".encode())
    return digest.hexdigest()


def check_same_tokenizer(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> None:
    """Raise ``TokenizerMismatch`` unless both give the same ids to the same tokens."""
    ours, theirs = _by_id(target), _by_id(draft)
    if ours == theirs:
        return
    first = min(index for index in ours.keys() | theirs.keys() if ours.get(index) != theirs.get(index))
    raise TokenizerMismatch(
        f"Target and drafter have different tokenizers: token id {first} is {ours.get(first)!r} in the target "
        f"({len(ours)} tokens) and {theirs.get(first)!r} in the drafter ({len(theirs)} tokens). "
        "Choose a drafter of the target's own family, or one that needs no tokenizer, such as n-gram."
    )


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _embedded(name: str) -> Path:
    package = Path(__file__).resolve().parent
    places = (package / "models" / EMBEDDED[name], package.parents[1] / "models" / EMBEDDED[name])
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise ModelError(
        f"The embedded model {name!r} is not installed: {EMBEDDED[name]}/config.json was found neither in the package "
        "nor in the repository's models folder. Install Steeple again, or give another model."
    )


def _read_json(path: Path, kind: type[ModelError]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise kind(f"{path} does not exist; give the folder of a transformers model.") from error
    except (OSError, ValueError) as error:
        raise kind(f"{path} cannot be read ({_first_line(error)}); download the file again.") from error
    if not isinstance(value, dict):
        raise kind(f"{path} holds no JSON object; download the file again.")
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no details").splitlines()[0]
