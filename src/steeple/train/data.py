"""The training corpus: which files, which of them are kept apart, and the cache of their tokens.

The default corpus is the standard library of the running interpreter, so everybody has it and nothing is downloaded.

Glossary. *relpath*: a file's posix path below the standard library, its only identity. *held-out*: never trained on and
never looked at while training; prompts of the benches and demos are cut from it. *validation*: never trained on, but
its loss is watched. A *document* is one file; documents are joined by one end-of-text token.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from steeple.errors import ConfigError, StorageError

MAX_FILE_BYTES = 300_000
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "encodings", "__pycache__"})
SKIPPED_PREFIX = "_sysconfigdata"  # paths and flags of one machine
KEPT_LARGE = frozenset({"pydoc_data/topics.py"})  # the language reference as text
TEXT_SUFFIXES = frozenset({".py", ".txt", ".md", ".jsonl"})
SPLITS = ("train", "validation", "held_out")


def bucket(relpath: str, buckets: int) -> int:
    """The bucket ``0..buckets-1`` of a file: sha256 of its posix relative path, modulo ``buckets``."""
    return int.from_bytes(hashlib.sha256(relpath.encode()).digest(), "big") % buckets


def is_held_out(relpath: str) -> bool:
    """True for about one file in twenty: its bucket of 20 is 0."""
    return bucket(relpath, 20) == 0


def is_validation(relpath: str) -> bool:
    """True for about one file in a hundred, never a held-out one: its bucket of 100 is 1."""
    return bucket(relpath, 100) == 1


def read_text(path: Path) -> str | None:
    """The file as text, or None where it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None


def corpus_files(stdlib: Path | None = None) -> list[tuple[str, Path]]:
    """Every ``(relpath, path)`` of the standard-library corpus, sorted by relpath.

    Skipped: installed packages, ``encodings/`` (character tables), ``_sysconfigdata*`` (one machine's build), files
    above 300 kB (tables; ``pydoc_data/topics.py`` stays) and files that are not UTF-8.

    Raises:
        StorageError: ``stdlib`` holds no Python file.
    """
    root = Path(sysconfig.get_path("stdlib")) if stdlib is None else Path(stdlib)
    found: list[tuple[str, Path]] = []
    for path in sorted(root.rglob("*.py")):
        relpath = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relpath.parts) or relpath.name.startswith(SKIPPED_PREFIX):
            continue
        if not path.is_file() or (path.stat().st_size > MAX_FILE_BYTES and relpath.as_posix() not in KEPT_LARGE):
            continue
        if read_text(path) is not None:
            found.append((relpath.as_posix(), path))
    if not found:
        raise StorageError(f"No Python files under {str(root)!r}; give the folder of a standard library.")
    return sorted(found)


def held_out_texts(stdlib: Path | None = None) -> list[tuple[str, str]]:
    """``(relpath, text)`` of the held-out files of this machine's standard library, sorted by relpath."""
    files = [(name, read_text(path)) for name, path in corpus_files(stdlib) if is_held_out(name)]
    return [(name, text) for name, text in files if text is not None]


@dataclass(frozen=True)
class Document:
    """One text of the corpus under the name that decides its split."""

    name: str
    text: str

    @property
    def split(self) -> str:
        """``train``, ``validation`` or ``held_out``."""
        if is_held_out(self.name):
            return "held_out"
        return "validation" if is_validation(self.name) else "train"


def _jsonl_texts(name: str, text: str) -> Iterator[Document]:
    for number, line in enumerate(text.splitlines()):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ConfigError(f"{name}, line {number + 1}: no string under 'text'; each line needs {{\"text\": ...}}.")
        yield Document(f"{name}:{number}", record["text"])


def _given_files(sources: Sequence[str]) -> Iterator[tuple[str, Path]]:
    for source in map(Path, sources):
        if not source.exists():
            raise StorageError(f"The data {str(source)!r} does not exist; give a file or a folder.")
        if source.is_file():
            yield source.name, source
            continue
        for path in sorted(source.rglob("*")):
            if path.is_file() and path.suffix in TEXT_SUFFIXES:
                yield path.relative_to(source).as_posix(), path


def documents(sources: Sequence[str] = ()) -> list[Document]:
    """The documents of ``sources``, files or folders of .py, .txt, .md, .jsonl; of the standard library if empty."""
    found: list[Document] = []
    for name, path in _given_files(sources) if sources else corpus_files():
        text = read_text(path)
        if text is None:
            continue
        found.extend(_jsonl_texts(name, text) if path.suffix == ".jsonl" else [Document(name, text)])
    if not found:
        raise StorageError(f"No readable text in {', '.join(sources)}; files must be UTF-8 .py, .txt, .md or .jsonl.")
    return found


def token_dtype(vocab: int) -> str:
    """How the tokens of a vocabulary of this size are stored: in 16 bits where they fit."""
    return "<u2" if vocab <= 1 << 16 else "<u4"


def write_tokens(
    docs: Sequence[Document],
    encode: Callable[[list[str]], list[list[int]]],
    eos: int,
    path: Path,
    *,
    seed: int = 0,
    dtype: str = "<u2",
) -> int:
    """Write the documents, shuffled by ``seed``, each followed by ``eos``, as one file; returns its tokens."""
    order = np.random.default_rng(seed).permutation(len(docs))
    rows = encode([docs[i].text for i in order])
    stream = np.fromiter((token for row in rows for token in (*row, eos)), dtype=np.int64)
    largest = int(np.iinfo(dtype).max)
    if len(stream) and stream.max() > largest:
        bits = np.dtype(dtype).itemsize * 8
        raise ConfigError(
            f"Token id {stream.max()} does not fit in {bits} bits; use a vocabulary of at most {largest + 1:,}."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    stream.astype(dtype).tofile(partial)
    partial.replace(path)
    return len(stream)


@dataclass(frozen=True)
class TokenStream:
    """A memory-mapped token file; batches are a pure function of ``(seed, phase, index)``."""

    tokens: np.ndarray
    seed: int

    @staticmethod
    def open(path: Path, seed: int = 0, dtype: str = "<u2") -> TokenStream:
        """Map the file ``path``; an empty one, which cannot be mapped, is an empty stream."""
        size = path.stat().st_size
        return TokenStream(np.memmap(path, dtype=dtype, mode="r") if size else np.zeros(0, dtype=dtype), seed)

    def batch(self, phase: int, index: int, rows: int, seq_len: int) -> Tensor:
        """Batch ``index`` of ``phase``: int64 ``[rows, seq_len + 1]``, windows without overlap within an epoch."""
        windows = (len(self.tokens) - 1) // seq_len
        if windows < 1:
            raise ConfigError(f"The data has {len(self.tokens)} tokens, less than one window of {seq_len}; add text.")
        starts = []
        for place in range(index * rows, (index + 1) * rows):
            epoch, within = divmod(place, windows)
            order = np.random.default_rng((self.seed, phase, epoch)).permutation(windows)
            starts.append(int(order[within]) * seq_len)
        return torch.from_numpy(np.stack([self.tokens[s : s + seq_len + 1].astype(np.int64) for s in starts]))

    def windows(self, count: int, seq_len: int) -> Tensor:
        """At most ``count`` windows spread evenly over the stream, int64 ``[<= count, seq_len + 1]``."""
        available = (len(self.tokens) - 1) // seq_len
        picked = np.linspace(0, available - 1, min(count, available)).astype(int)
        rows = [self.tokens[i * seq_len : i * seq_len + seq_len + 1].astype(np.int64) for i in picked]
        return torch.from_numpy(np.stack(rows))
