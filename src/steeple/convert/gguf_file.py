"""GGUF files: weights and configuration through transformers, the vocabulary through the gguf package."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from steeple.convert.source import Checkpoint, file_size
from steeple.errors import StorageError, UnsupportedModel

# What the two readers raise on bytes that make no sense; they have no error of their own.
BROKEN = (ValueError, IndexError, KeyError, OverflowError, TypeError)


class _SizedReader(GGUFReader):
    """A reader that says how long the file ought to be before it maps any tensor."""

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        expected = start_offs
        for field in fields:
            dims, kind, offset = field.parts[3], field.parts[4], field.parts[5]
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(int(kind[0]))]
            elements = 1
            for dim in dims.tolist():
                elements *= dim
            expected = max(expected, start_offs + int(offset[0]) + elements // block * size)
        if expected > len(self.data):
            raise StorageError(f"it is truncated: its header asks for {expected} bytes, found {len(self.data)}")
        super()._build_tensors(start_offs, fields)


def open_gguf(path: Path) -> GGUFReader:
    """Open ``path``; ``StorageError`` says where it ends too early or what cannot be read."""
    size = file_size(path, "GGUF file")
    try:
        return _SizedReader(path)
    except StorageError as error:
        raise StorageError(f"GGUF file {str(path)!r} is broken: {error}. Fetch it again.") from error
    except BROKEN as error:
        raise StorageError(
            f"GGUF file {str(path)!r} is broken or truncated inside its header ({size} bytes found): {error}. "
            "Fetch it again."
        ) from error


def metadata(reader: GGUFReader) -> dict[str, Any]:
    """The keys and values of the file."""
    return {key: field.contents() for key, field in reader.fields.items()}


def token_id(values: dict[str, Any], name: str, vocab: int) -> int | None:
    """The id of the special token ``name``; None where absent or no id at all (older writers store 2**32 - 1)."""
    found = values.get(f"tokenizer.ggml.{name}_token_id")
    return found if isinstance(found, int) and 0 <= found < vocab else None


def read_gguf(path: Path, dtype: torch.dtype) -> Checkpoint:
    """Read the model in ``path`` and dequantise its weights to ``dtype``.

    Raises:
        StorageError: the file is truncated or broken.
        UnsupportedModel: an architecture, a tensor or a rotary scaling that transformers does not read; a model that
            loads only in part writes wrong text without a word.
    """
    reader = open_gguf(path)
    values = metadata(reader)
    architecture = values.get("general.architecture")
    scaling = values.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise UnsupportedModel(
            f"GGUF file {str(path)!r} scales its rotary embedding ({scaling!r}), which the GGUF reader of transformers "
            "drops; use the Hugging Face folder of this model."
        )
    with _readable(path, architecture):
        shape = load_gguf_checkpoint(str(path))["config"]
        config = AutoConfig.for_model(**_sane(shape))
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        # The reader draws a progress bar on stderr and has no switch for it.
        with contextlib.redirect_stderr(io.StringIO()):
            weights = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=empty, torch_dtype=dtype)[
                "tensors"
            ]
    if len(weights) != len(reader.tensors):
        known = ("blk.", "token_embd.", "output")
        odd = [tensor.name for tensor in reader.tensors if not tensor.name.startswith(known)]
        raise UnsupportedModel(
            f"GGUF file {str(path)!r} ({architecture}) holds {len(reader.tensors)} tensors, {len(weights)} of which "
            f"transformers can place{' (look at ' + ', '.join(odd) + ')' if odd else ''}; "
            "use the Hugging Face folder of this model."
        )
    if "model.embed_tokens.weight" not in weights:
        raise UnsupportedModel(
            f"GGUF file {str(path)!r} ({architecture}) is of a family whose weights are not laid out like Llama's; "
            "use the Hugging Face folder of this model."
        )
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    return Checkpoint(config, weights)


@contextlib.contextmanager
def _readable(path: Path, architecture: object) -> Iterator[None]:
    """Turn what transformers raises on an architecture it cannot read into ``UnsupportedModel``."""
    try:
        yield
    except (*BROKEN, NotImplementedError) as error:
        raise UnsupportedModel(
            f"GGUF file {str(path)!r} holds a model of architecture {architecture!r} that transformers cannot read: "
            f"{error}"
        ) from error


def _sane(shape: dict[str, Any]) -> dict[str, Any]:
    """The configuration without name and token ids, which the tokenizer knows better, and with fractions as meant.

    GGUF stores fractions in float32: read as doubles, 1e-5 is 9.999999747378752e-06, and no other format agrees.
    """
    kept = {key: value for key, value in shape.items() if not key.endswith(("_token_id", "_name_or_path"))}
    return {key: float(str(np.float32(value))) if isinstance(value, float) else value for key, value in kept.items()}
