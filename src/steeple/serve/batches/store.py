"""The SQLite database of batch files: opened for one process alone, written by one thread.

Why these settings. WAL: a commit appends to one file and does not wait for readers. ``synchronous = FULL``: a commit is
on the disk before anybody is told of it, so that neither kill -9 nor a loss of power takes back what a client has seen;
answers are committed in groups, so a group costs one fsync. ``locking_mode = EXCLUSIVE``: a second server on the same
database would answer the same requests again, so it is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from steeple.errors import StorageError

P = ParamSpec("P")
T = TypeVar("T")
VERSION = 1
SCHEMA = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL DEFAULT 0,
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    state TEXT NOT NULL          -- writing, whole, gone
);
CREATE INDEX files_of ON files (tenant, number);
CREATE TABLE pieces (
    file INTEGER NOT NULL,
    place INTEGER NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (file, place)
);
CREATE TABLE batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    input_file_id TEXT NOT NULL,
    file INTEGER NOT NULL,       -- number of the input
    metadata TEXT,
    keep_seconds INTEGER,        -- life of the files that come out
    status TEXT NOT NULL,
    errors TEXT,
    total INTEGER NOT NULL DEFAULT 0,
    completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    output_file_id TEXT,
    error_file_id TEXT,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    in_progress_at INTEGER,
    finalizing_at INTEGER,
    completed_at INTEGER,
    failed_at INTEGER,
    expired_at INTEGER,
    cancelling_at INTEGER,
    cancelled_at INTEGER
);
CREATE INDEX batches_of ON batches (tenant, number);
CREATE INDEX batches_by_status ON batches (status);
CREATE TABLE tasks (
    batch INTEGER NOT NULL,
    line INTEGER NOT NULL,
    custom_id TEXT NOT NULL,     -- as JSON, which spells out what is no text
    start INTEGER NOT NULL,      -- byte in the input
    length INTEGER NOT NULL,
    ok INTEGER,                  -- NULL until there is an answer
    answer TEXT,
    PRIMARY KEY (batch, line)
) WITHOUT ROWID;
"""


class Store:
    """The database at ``path``, which is made if it is not there. Not for two threads at once.

    Raises ``StorageError`` if it cannot be opened, is none, or another process has it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Prompts and answers are nobody else's business; SQLite gives its other files the same mode.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._db = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"{path} cannot be opened ({error}); give another database for batches.") from error
        try:
            self._prepare()
        except sqlite3.Error as error:
            self._db.close()
            why = "another server uses it" if "locked" in str(error) else str(error)
            raise StorageError(f"{path} cannot be used for batches: {why}; give another.") from error
        except StorageError:
            self._db.close()
            raise

    def _prepare(self) -> None:
        self._db.row_factory = sqlite3.Row
        for setting in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL"):
            self._db.execute(f"PRAGMA {setting}")
        with self.write():
            found = int(self._db.execute("PRAGMA user_version").fetchone()[0])
            empty = self._db.execute("SELECT 1 FROM sqlite_master").fetchone() is None
            if found == 0 and empty:
                for statement in SCHEMA.split(";\n"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {VERSION}")
            elif found != VERSION:
                raise StorageError(
                    f"{self.path} is a database of version {found}, this is {VERSION}; give another for batches."
                )

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def read(self, query: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """All rows of a query."""
        return self._db.execute(query, values).fetchall()

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it or nothing."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
            self._db.execute("COMMIT")
        except BaseException:
            # SQLite itself rolls back after some errors, a full disk for one.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise


class Desk:
    """Runs calls on a store one after the other, in a thread of their own: the only one that touches it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="steeple-batches")

    async def __call__(self, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """What ``call`` returns. ``StorageError`` if the database fails."""

        def run() -> T:
            try:
                return call(*args, **options)
            except sqlite3.Error as error:
                raise StorageError(f"the database of batches failed ({error}); make room, then try again.") from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    def close(self) -> None:
        """Finish what was begun, and close the store."""
        self._thread.submit(self._store.close)
        self._thread.shutdown()
