"""Files as rows: their names and owners, and their contents in pieces. Blocking calls, for the store's thread."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steeple.errors import InternalError
from steeple.serve.batches.store import Store

PIECE = 1 << 16  # bytes; small, because a request is read from the pieces it lies in
GROUP = 16  # pieces written in one transaction
INPUT, OUTPUT = "batch", "batch_output"
USED = "SELECT file FROM batches WHERE status IN ('validating', 'in_progress', 'cancelling', 'finalizing')"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One row. ``number`` grows with time. Times in seconds since 1970."""

    number: int
    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int | None

    def as_json(self) -> dict[str, Any]:
        """OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


def _stored(row: sqlite3.Row) -> StoredFile:
    return StoredFile(*(row[name] for name in StoredFile.__dataclass_fields__))


class Files:
    """Args: store: the database."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def begin(
        self, tenant: str, filename: str, purpose: str, created_at: int, keep_seconds: int | None = None
    ) -> Writing:
        """A file that nobody sees until it is published. Args: keep_seconds: its life, None = for good."""
        id = f"file-{secrets.token_hex(12)}"
        expires = None if keep_seconds is None else created_at + keep_seconds
        with self._store.write() as db:
            number = db.execute(
                "INSERT INTO files (id, tenant, filename, purpose, created_at, expires_at, state)"
                " VALUES (?, ?, ?, ?, ?, ?, 'writing')",
                (id, tenant, filename, purpose, created_at, expires),
            ).lastrowid
        if number is None:
            raise InternalError("SQLite gave a new file no number.")
        return Writing(self._store, id, number)

    def get(self, tenant: str, id: str, now: float) -> StoredFile | None:
        """A file of ``tenant``, if it is there and has not expired."""
        rows = self._store.read(
            "SELECT * FROM files WHERE id = ? AND tenant = ? AND state = 'whole'"
            " AND (expires_at IS NULL OR expires_at > ?)",
            (id, tenant, now),
        )
        return _stored(rows[0]) if rows else None

    def page(
        self, tenant: str, purpose: str | None, after: int | None, most: int, now: float, *, newest: bool
    ) -> list[StoredFile]:
        """At most so many files of ``tenant`` beyond number ``after``."""
        sign, order = ("<", "DESC") if newest else (">", "ASC")
        rows = self._store.read(
            "SELECT * FROM files WHERE tenant = ? AND state = 'whole' AND (? IS NULL OR purpose = ?)"
            f" AND (expires_at IS NULL OR expires_at > ?) AND (? IS NULL OR number {sign} ?)"
            f" ORDER BY number {order} LIMIT ?",
            (tenant, purpose, purpose, now, after, after, most),
        )
        return [_stored(row) for row in rows]

    def held(self, tenant: str) -> int:
        """Bytes of all files of ``tenant``."""
        query = "SELECT TOTAL(bytes) FROM files WHERE tenant = ? AND state = 'whole'"
        return int(self._store.read(query, (tenant,))[0][0])

    def delete(self, tenant: str, id: str) -> bool:
        """Hide a file; ``sweep`` gives back its room. False if there is none."""
        with self._store.write() as db:
            gone = db.execute(
                "UPDATE files SET state = 'gone' WHERE id = ? AND tenant = ? AND state = 'whole'", (id, tenant)
            )
            return gone.rowcount > 0

    def sweep(self, now: float) -> None:
        """Remove deleted and expired files, except those that an unfinished batch still reads."""
        with self._store.write() as db:
            db.execute("UPDATE files SET state = 'gone' WHERE state = 'whole' AND expires_at <= ?", (now,))
            self._remove(db, f"state = 'gone' AND number NOT IN ({USED})")

    def recover(self) -> None:
        """Remove what a process that was killed had begun to write."""
        with self._store.write() as db:
            self._remove(db, "state = 'writing'")

    def drop(self, number: int) -> None:
        """Remove a file that was not published."""
        with self._store.write() as db:
            self._remove(db, f"state = 'writing' AND number = {number:d}")

    @staticmethod
    def _remove(db: sqlite3.Connection, which: str) -> None:
        db.execute(f"DELETE FROM pieces WHERE file IN (SELECT number FROM files WHERE {which})")
        db.execute(f"DELETE FROM files WHERE {which}")

    def pieces(self, number: int, first: int, most: int) -> bytes:
        """At most so many pieces of a file from ``first`` on, in one; empty at its end."""
        rows = self._store.read(
            "SELECT data FROM pieces WHERE file = ? AND place >= ? AND place < ? ORDER BY place",
            (number, first, first + most),
        )
        return b"".join(row[0] for row in rows)

    def cut(self, number: int, start: int, length: int) -> bytes:
        """``length`` bytes of a file from byte ``start`` on."""
        first, last = start // PIECE, (start + length - 1) // PIECE
        begin = start - first * PIECE
        return self.pieces(number, first, last - first + 1)[begin : begin + length]


class Writing:
    """A file while it is written: bytes come in, pieces go out. Args: id, number: of its row."""

    def __init__(self, store: Store, id: str, number: int) -> None:
        self.id, self.number, self.bytes = id, number, 0
        self._store = store
        self._place = 0
        self._rest = bytearray()

    def add(self, data: bytes) -> None:
        """Append."""
        self._rest += data
        self.bytes += len(data)
        if len(self._rest) >= GROUP * PIECE:
            self._flush(len(self._rest) // PIECE * PIECE)

    def flush(self) -> None:
        """Write down what is left. Only at the end: every other piece is full."""
        self._flush(len(self._rest))

    def publish(self) -> None:
        """From now on it is there, whole."""
        self.flush()
        with self._store.write() as db:
            show(db, [self])

    def _flush(self, size: int) -> None:
        starts = range(0, size, PIECE)
        pieces = [bytes(self._rest[start : min(start + PIECE, size)]) for start in starts]
        with self._store.write() as db:
            db.executemany(
                "INSERT INTO pieces VALUES (?, ?, ?)",
                [(self.number, self._place + i, piece) for i, piece in enumerate(pieces)],
            )
        self._place += len(pieces)
        del self._rest[:size]


def show(db: sqlite3.Connection, files: Sequence[Writing]) -> None:
    """Make files visible, inside somebody's transaction."""
    db.executemany("UPDATE files SET state = 'whole', bytes = ? WHERE number = ?", [(f.bytes, f.number) for f in files])
