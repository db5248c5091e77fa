"""Settings of batch files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from steeple.config import check_range

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class BatchStoreConfig:
    """Where batch files are kept, and how much of it one key may take."""

    batch_db: Path | None = field(
        default=None, metadata={"help": "the SQLite database of files and batches; without it there are none"}
    )
    max_file_bytes: int = field(default=200 * MIB, metadata={"help": "most bytes of an uploaded file"})
    max_stored_bytes: int = field(default=8 * GIB, metadata={"help": "most bytes of all files of one API key"})
    max_batch_lines: int = field(default=50_000, metadata={"help": "most requests in a batch"})
    max_open_batches: int = field(default=64, metadata={"help": "most unfinished batches of one API key"})
    batch_in_flight: int = field(
        default=0, metadata={"help": "most sequences of batches in the engine at once, 0 = half of its batch"}
    )

    def __post_init__(self) -> None:
        check_range("BatchStoreConfig", "max_file_bytes", self.max_file_bytes, 1, 1 << 34)
        check_range("BatchStoreConfig", "max_stored_bytes", self.max_stored_bytes, 1, 1 << 50)
        check_range("BatchStoreConfig", "max_batch_lines", self.max_batch_lines, 1, 10_000_000)
        check_range("BatchStoreConfig", "max_open_batches", self.max_open_batches, 1, 1 << 20)
        check_range("BatchStoreConfig", "batch_in_flight", self.batch_in_flight, 0, 1 << 20)
