"""What a file is, told by its first bytes, and what every reader hands to the writer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from struct import unpack
from typing import Any

from torch import Tensor

from steeple.errors import StorageError, UnsupportedModel

MAGIC_LLAMA2C = b"24ka"  # 0x616b3432, little-endian: "ak42"
MAGIC_GGUF = b"GGUF"
FOREIGN_MAGICS = {
    b"PK\x03\x04": "a PyTorch checkpoint; export it with the export.py of llama2.c first",
    b"\x80\x02": "a Python pickle; export it with the export.py of llama2.c first",
    b"ggjt": "a GGML file from before GGUF; convert it with the scripts of llama.cpp first",
    b"lmgg": "a GGML file from before GGUF; convert it with the scripts of llama.cpp first",
}


class Format(Enum):
    """The checkpoint formats that ``convert`` reads."""

    LLAMA2C_V0 = "llama2.c v0 (float32)"
    LLAMA2C_V1 = "llama2.c v1 (float32)"
    LLAMA2C_V2 = "llama2.c v2 (q80)"
    GGUF = "gguf"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model in Hugging Face's terms: its configuration and every weight under its Hugging Face name."""

    config: Any  # transformers.PreTrainedConfig
    weights: dict[str, Tensor]


def file_size(path: Path, what: str) -> int:
    """Bytes of the file ``path``; ``StorageError`` unless it is a file that can be read."""
    if path.is_dir():
        raise StorageError(f"{what} {str(path)!r} is a folder; give one file.")
    if not path.is_file():
        raise StorageError(f"{what} {str(path)!r} does not exist; check the path.")
    try:
        with path.open("rb"):
            return path.stat().st_size
    except OSError as error:
        raise StorageError(f"{what} {str(path)!r} cannot be read: {error.strerror}.") from error


def detect_format(path: Path) -> Format:
    """The format of the checkpoint ``path``, by its magic.

    A llama2.c v0 file has no magic: whatever has none either is taken for one if the seven numbers of its header are
    positive (the vocabulary may be negative) and fit each other.

    Raises:
        StorageError: there is no such file, it is too short, or no known format begins like this.
        UnsupportedModel: a llama2.c export of a version other than 1 and 2.
    """
    size = file_size(path, "checkpoint")
    with path.open("rb") as file:
        head = file.read(28)
    if head[:4] == MAGIC_GGUF:
        return Format.GGUF
    for magic, meaning in FOREIGN_MAGICS.items():
        if head.startswith(magic):
            raise StorageError(f"checkpoint {str(path)!r} is {meaning}.")
    if size < 28:
        raise StorageError(f"checkpoint {str(path)!r} ends inside its header: expected 28 bytes or more, found {size}.")
    if head[:4] == MAGIC_LLAMA2C:
        return _llama2c_version(path, head)
    if not _plausible(unpack("<7i", head)):
        raise StorageError(
            f"checkpoint {str(path)!r} is of no known format (it begins with {head[:4]!r}). "
            f"Known: {', '.join(known.value for known in Format)}."
        )
    return Format.LLAMA2C_V0


def _llama2c_version(path: Path, head: bytes) -> Format:
    (version,) = unpack("<i", head[4:8])
    if version == 1:
        return Format.LLAMA2C_V1
    if version == 2:
        return Format.LLAMA2C_V2
    raise UnsupportedModel(
        f"checkpoint {str(path)!r} is a llama2.c export of version {version}; export it as version 0, 1 or 2."
    )


def _plausible(numbers: tuple[int, ...]) -> bool:
    """Whether seven numbers can be dim, hidden dim, layers, heads, kv heads, vocabulary and context."""
    dim, _, layers, heads, kv_heads, vocab, _ = numbers
    positive = all(number > 0 for number in (*numbers[:5], numbers[6])) and vocab != 0
    small = max(numbers) < 1 << 24 and layers < 1 << 16
    return positive and small and dim % heads == 0 and heads % kv_heads == 0
