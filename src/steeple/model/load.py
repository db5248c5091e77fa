"""Safetensors of any family -> the one decoder. Strict: what does not fit is an error, never a warning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steeple.config import ModelConfig
from steeple.errors import ConfigError, WeightError
from steeple.hf import load_hf_config, safetensors_files
from steeple.model.decoder import Decoder
from steeple.model.families import TOP, Family, Piece, family_of, model_config, norm_offset, pieces, row_order

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STORED = ("F64", "F32", "F16", "BF16")
"""Element types of a checkpoint that are plain numbers; others belong to a quantisation that the decoder lacks."""

HARMLESS_SUFFIX = ".rotary_emb.inv_freq"
"""Old checkpoints carry the rotary frequencies, which follow from the configuration."""

SHOWN = 5  # names in a message


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in an open safetensors file."""

    file: Any
    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Tensor:
        try:
            value: Tensor = self.file.get_tensor(self.name)
        except SafetensorError as error:
            raise WeightError(
                f"{self.path}: weight {self.name!r} cannot be read ({error}); download it again."
            ) from error
        return value


def load_decoder(
    folder: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    max_context: int | None = None,
) -> Decoder:
    """The decoder in ``folder``, for inference (no gradients), with all its weights and nothing but them.

    The decoder is laid out without memory, every name and shape is compared with the files' headers, and only then
    are weights read, one tensor at a time: at most one parameter is in memory twice.

    Args:
        folder: config.json and safetensors, one file or sharded.
        dtype: of the weights, and so of the computation.
        device: where they go.
        max_context: positions to serve; default: what the model was trained for.

    Raises:
        WeightError: a weight is missing, unexpected, misshapen or unreadable.
        UnsupportedModel, ModelError: see ``model_config``.
        ConfigError: ``dtype`` is no floating type, or ``max_context`` is out of range.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype} cannot hold weights; give one of {', '.join(map(str, DTYPES))}.")
    folder = Path(folder)
    hf_config = load_hf_config(folder)
    family, config = family_of(hf_config), model_config(hf_config, max_context)
    with torch.device("meta"):
        decoder = Decoder(config)
    shapes = {name: tuple(value.shape) for name, value in decoder.named_parameters()}
    with ExitStack() as stack:
        stored = _open(stack, safetensors_files(folder), torch.device(device))
        layout = {name: pieces(family, config, name, shape[0]) for name, shape in shapes.items()}
        _check(folder, config, layout, shapes, stored)
        for name, shape in shapes.items():
            value = torch.empty(shape, dtype=dtype, device=device)
            _fill(value, layout[name], stored, norm_offset(family, name))
            _adopt(decoder, name, _reordered(value, family, config, name))
    if config.tie_embeddings:
        decoder.head.weight = decoder.embed.weight
    decoder.reset_rope()
    return decoder.eval().requires_grad_(False)


def _open(stack: ExitStack, paths: Iterable[Path], device: torch.device) -> dict[str, Stored]:
    """Every tensor of the files by name; only headers are read."""
    found: dict[str, Stored] = {}
    for path in paths:
        file = stack.enter_context(safe_open(path, framework="pt", device=str(device)))
        for name in file.keys():  # noqa: SIM118 - the file is no mapping
            part = file.get_slice(name)
            found[name] = Stored(file, path, name, tuple(part.get_shape()), part.get_dtype())
    return found


def _check(
    folder: Path,
    config: ModelConfig,
    layout: Mapping[str, tuple[Piece, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Stored],
) -> None:
    """Raise ``WeightError`` unless the files hold exactly the decoder's weights."""
    expected = {piece.name: (piece.rows, *shapes[name][1:]) for name, parts in layout.items() for piece in parts}
    where = f"{folder} does not fit its config.json"
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in stored]
    if missing:
        raise WeightError(f"{where}: weights are missing: {_some(missing)}. Download the model again.")
    head, embed = f"{TOP['head']}.weight", f"{TOP['embed']}.weight"
    if config.tie_embeddings and head in stored and not torch.equal(stored[head].read(), stored[embed].read()):
        raise WeightError(
            f"{where}: tie_word_embeddings is true, but {head} differs from {embed}. "
            "Set tie_word_embeddings to false to use both."
        )
    known = {*expected, *((head,) if config.tie_embeddings else ())}
    extra = [
        f"{name} {list(value.shape)}"
        for name, value in stored.items()
        if name not in known and not name.endswith(HARMLESS_SUFFIX)
    ]
    if extra:
        raise WeightError(f"{where}: unexpected weights: {_some(extra)}. Remove them, or correct config.json.")
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise WeightError(
                f"{where}: weight {name} has shape {list(stored[name].shape)}, expected {list(shape)}. "
                "Correct config.json, or download the model again."
            )
        if stored[name].dtype not in STORED:
            raise WeightError(
                f"{where}: weight {name} has the element type {stored[name].dtype}, expected one of "
                f"{', '.join(STORED)}. Quantised checkpoints are not supported; give the unquantised model."
            )


def _fill(value: Tensor, parts: Iterable[Piece], stored: Mapping[str, Stored], offset: float) -> None:
    for piece in parts:
        read = stored[piece.name].read()
        value[piece.start : piece.start + piece.rows].copy_(read.float() + offset if offset else read)


def _reordered(value: Tensor, family: Family, config: ModelConfig, name: str) -> Tensor:
    order = row_order(family, config, name)
    return value if order is None else value[order.to(value.device)]


def _adopt(decoder: Decoder, name: str, value: Tensor) -> None:
    module, kind = name.rsplit(".", 1)
    setattr(decoder.get_submodule(module), kind, torch.nn.Parameter(value, requires_grad=False))


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
