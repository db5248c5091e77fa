"""The one decoder -> a folder that Steeple and transformers load, in the layout of the model's family."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import fields
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PretrainedConfig

from steeple.errors import ModelError, StorageError
from steeple.hf import INDEX
from steeple.model.decoder import Decoder
from steeple.model.families import Family, family_of, model_config, norm_offset, pieces, row_order

GIB = 1 << 30


def save_decoder(
    decoder: Decoder,
    folder: str | Path,
    hf_config: PretrainedConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 5 * GIB,
) -> None:
    """Write config.json and the weights; ``load_decoder`` and transformers read them back.

    Other files of the folder stay. Everything is written beside the old files first and then moved over them, so an
    interrupted save leaves the old model, the new one, or one that ``load_decoder`` refuses, never half a file.

    Args:
        hf_config: the published form of ``decoder.config``; says the family.
        dtype: of the stored weights.
        max_shard_bytes: larger models are split into several files and an index.

    Raises:
        ModelError: ``hf_config`` describes another shape than ``decoder.config``.
        StorageError: the folder cannot be written.
    """
    family = family_of(hf_config)
    _check_same_shape(decoder, hf_config)
    folder = Path(folder)
    written = copy.deepcopy(hf_config)
    written.architectures = [family.architecture]
    written.dtype = dtype
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as name:
            staged = Path(name)
            written.save_pretrained(staged)
            save_torch_state_dict(
                published_weights(decoder, family, dtype),
                staged,
                max_shard_size=max_shard_bytes,
                metadata={"format": "pt"},
            )
            _move(staged, folder)
    except OSError as error:
        raise StorageError(
            f"The model cannot be written to {folder}: {error}. Free space or choose another."
        ) from error


@torch.no_grad()
def published_weights(decoder: Decoder, family: Family, dtype: torch.dtype) -> dict[str, Tensor]:
    """The decoder's weights under the names and in the layout of ``family``, on the CPU, as ``dtype``."""
    found: dict[str, Tensor] = {}
    for name, parameter in decoder.named_parameters():
        value = parameter.detach()
        order = row_order(family, decoder.config, name)
        if order is not None:
            value = value[order.argsort().to(value.device)]
        offset = norm_offset(family, name)
        if offset:
            value = value.float() - offset
        for piece in pieces(family, decoder.config, name, value.shape[0]):
            part = value[piece.start : piece.start + piece.rows].to("cpu", dtype, copy=True)
            found[piece.name] = part
    return found


def _check_same_shape(decoder: Decoder, hf_config: PretrainedConfig) -> None:
    described = model_config(hf_config, decoder.config.max_context)
    for item in fields(described):
        ours, theirs = getattr(decoder.config, item.name), getattr(described, item.name)
        if ours != theirs:
            raise ModelError(
                f"The decoder's {item.name} = {ours!r}, but the configuration to be saved says {theirs!r}. "
                "Save with the configuration that the decoder was built from."
            )


def _move(staged: Path, folder: Path) -> None:
    """Replace the model in ``folder``. config.json goes first and comes last, so that no mixture ever loads."""
    config = folder / "config.json"
    config.unlink(missing_ok=True)
    new = sorted(path for path in staged.iterdir() if path.name != config.name)
    names = {path.name for path in new}
    for old in (*folder.glob("model*.safetensors"), folder / INDEX):
        if old.name not in names:
            old.unlink(missing_ok=True)
    mode = (staged / config.name).stat().st_mode  # safetensors are written for their owner's eyes only
    for path in (*new, staged / config.name):
        path.chmod(mode)
        path.replace(folder / path.name)
