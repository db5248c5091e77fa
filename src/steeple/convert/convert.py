"""``convert``: one checkpoint file and its tokenizer -> a Hugging Face folder, written whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from steeple.convert.gguf_file import read_gguf
from steeple.convert.llama2c import read_llama2c
from steeple.convert.source import Checkpoint, Format, detect_format
from steeple.convert.tokenizer import read_tokenizer
from steeple.errors import ConfigError, StorageError, TokenizerMismatch, WeightError, did_you_mean

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SPACES = ("auto", "keep", "collapse")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What to convert.

    Args:
        source: the checkpoint: llama2.c v0, v1, v2 or GGUF; told by its content, not by its name.
        out: the folder to write; it must be empty or absent.
        tokenizer: sentencepiece ``.model``, llama2.c ``tokenizer.bin``, ``.gguf`` or Hugging Face folder;
            None = the one inside a GGUF source.
        dtype: of the weights written: float32, bfloat16 or float16.
        context: positions the model may be given; 0 = as many as the source states.
        spaces: keep or collapse runs of spaces before tokenising; auto = what the tokenizer says of itself.
        overwrite: replace ``out`` where it exists and holds a model.
    """

    source: str
    out: str
    tokenizer: str | None = None
    dtype: str = "float32"
    context: int = 0
    spaces: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("source", "out"):
            if not getattr(self, name):
                raise ConfigError(f"ConvertConfig.{name} is empty; give a path.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"ConvertConfig.dtype = {self.dtype!r} is unknown. {did_you_mean(self.dtype, DTYPES)}")
        if self.spaces not in SPACES:
            raise ConfigError(f"ConvertConfig.spaces = {self.spaces!r} is unknown. {did_you_mean(self.spaces, SPACES)}")
        if self.context < 0:
            raise ConfigError(f"ConvertConfig.context = {self.context} is out of range; give 0 or more positions.")


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Convert the checkpoint ``config.source`` to the Hugging Face folder ``config.out``.

    Returns:
        A summary: ``format``, ``tokenizer`` (its format), ``out``, ``dtype``, ``parameters`` (a tied head counts
        once), ``bytes`` (of the weight files), ``tied``, ``vocab_size``, ``layers``, ``context`` and
        ``shapes`` (weight name -> sizes).

    Raises:
        StorageError: a file is missing, truncated, of no known format, or ``out`` cannot be written.
        ModelError: the model or tokenizer is of a kind that cannot be converted, or the two do not fit.
    """
    source, out = Path(config.source), Path(config.out).absolute()
    form = detect_format(source)
    tokenizer_path = _tokenizer_path(config, source, form)
    _check_out(out, config.overwrite, (source, tokenizer_path))
    dtype = DTYPES[config.dtype]
    checkpoint = read_gguf(source, dtype) if form is Format.GGUF else read_llama2c(source, form)
    tokenizer, tokenizer_format = read_tokenizer(tokenizer_path, config.spaces)
    if len(tokenizer) != checkpoint.config.vocab_size:
        raise TokenizerMismatch(
            f"tokenizer {str(tokenizer_path)!r} has {len(tokenizer)} tokens, the model in {str(source)!r} has "
            f"{checkpoint.config.vocab_size}; give the tokenizer that the model was trained with."
        )
    if config.context:
        checkpoint.config.max_position_embeddings = config.context
    model = assemble(checkpoint, dtype, tokenizer)
    with _written_whole(out) as folder, _quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    shapes = {name: list(weight.shape) for name, weight in model.named_parameters()}
    return {
        "format": form.value,
        "tokenizer": tokenizer_format,
        "out": config.out,
        "dtype": config.dtype,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "bytes": size,
        "tied": bool(model.config.tie_word_embeddings),
        "vocab_size": model.config.vocab_size,
        "layers": model.config.num_hidden_layers,
        "context": model.config.max_position_embeddings,
        "shapes": shapes,
    }


def assemble(checkpoint: Checkpoint, dtype: torch.dtype, tokenizer: Any) -> Any:
    """The Hugging Face model of ``checkpoint`` in ``dtype``; ``WeightError`` unless each weight is there and finite.

    A head that equals the embedding is tied to it, as some writers store both. A BOS that the model writes begins
    another document, so it ends this one, as in llama2.c: generation stops at EOS or BOS.
    """
    config = checkpoint.config
    weights = {name: _cast(name, weight, dtype) for name, weight in checkpoint.weights.items()}
    if torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"]):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        config.tie_word_embeddings = True
    config.dtype = dtype
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise WeightError(f"the weights do not make up the model that the source describes: {error}") from error
    model.tie_weights()
    ends = {index for index in (config.eos_token_id, config.bos_token_id) if index is not None}
    model.generation_config = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=sorted(ends) or None)
    return model


def _cast(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    cast = weight.to(dtype)
    if not cast.isfinite().all():
        remedy = "convert to bfloat16 or float32" if weight.isfinite().all() else "the file is damaged, fetch it again"
        raise WeightError(f"weight {name!r} holds values that are infinite or no number in {dtype}; {remedy}.")
    return cast


def _tokenizer_path(config: ConvertConfig, source: Path, form: Format) -> Path:
    """Where the tokenizer is; without one, the error lists what beside the source looks like one."""
    if config.tokenizer is not None:
        path = Path(config.tokenizer)
        if not path.exists():
            raise StorageError(f"tokenizer {str(path)!r} does not exist; check the path.")
        return path
    if form is Format.GGUF:
        return source
    near = sorted(path.name for path in source.parent.iterdir() if path.suffix == ".model" or path.match("tok*.bin"))
    hint = f" Beside the checkpoint: {', '.join(near)}." if near else ""
    raise StorageError(
        f"checkpoint {str(source)!r} ({form.value}) holds no tokenizer; give the sentencepiece .model or the "
        f"tokenizer.bin that belongs to it.{hint}"
    )


def _check_out(out: Path, overwrite: bool, inputs: tuple[Path, ...]) -> None:
    """``StorageError`` unless ``out`` may be written without losing anything that was not asked for."""
    if out.exists() and not out.is_dir():
        raise StorageError(f"out {str(out)!r} is a file; name a folder.")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise StorageError(f"out {str(out)!r} is not empty; name another folder or set overwrite.")
        if not (out / "config.json").is_file():
            raise StorageError(f"out {str(out)!r} holds other things than a model; name another folder.")
        if any(path.resolve().is_relative_to(out.resolve()) for path in inputs):
            raise StorageError(f"out {str(out)!r} holds the source itself; name another folder.")


@contextmanager
def _written_whole(out: Path) -> Iterator[str]:
    """A new folder beside ``out`` that takes its place if the body succeeds and vanishes if it does not."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            folder = Path(scratch) / out.name
            folder.mkdir()
            yield str(folder)
            if out.exists():
                shutil.rmtree(out)
            folder.replace(out)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"out {str(out)!r} cannot be written: {error}.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of transformers."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
