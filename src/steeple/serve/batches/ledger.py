"""Batches as rows, and a row for each of their requests. Blocking calls, for the store's thread.

A request's answer and its mark are one row, written once and only while the batch is in progress: whatever happens
between two commits, a request has an answer or it has none.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steeple.serve.batches.contents import StoredFile, Writing, show
from steeple.serve.batches.store import Store

VALIDATING, IN_PROGRESS, FINALIZING, COMPLETED = "validating", "in_progress", "finalizing", "completed"
FAILED, EXPIRED, CANCELLING, CANCELLED = "failed", "expired", "cancelling", "cancelled"
OPEN = (VALIDATING, IN_PROGRESS, FINALIZING, CANCELLING)
WINDOW, WINDOW_SECONDS = "24h", 24 * 3600
STAMPS = (
    "created",
    "in_progress",
    "expires",
    "finalizing",
    "completed",
    "failed",
    "expired",
    "cancelling",
    "cancelled",
)
_OPEN = "('validating', 'in_progress', 'finalizing', 'cancelling')"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a client wants of a batch. Args: keep_seconds: life of the files that come out, None = for good."""

    endpoint: str
    file: StoredFile
    metadata: dict[str, str] | None = None
    keep_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """One row, as it was when it was read."""

    row: sqlite3.Row

    @property
    def number(self) -> int:
        """Grows with time."""
        return int(self.row["number"])

    @property
    def id(self) -> str:
        """Its name for clients."""
        return str(self.row["id"])

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return str(self.row["tenant"])

    @property
    def endpoint(self) -> str:
        """The path that its requests are for."""
        return str(self.row["endpoint"])

    @property
    def status(self) -> str:
        """OpenAI's word for its state."""
        return str(self.row["status"])

    @property
    def file(self) -> int:
        """Number of its input."""
        return int(self.row["file"])

    @property
    def expires_at(self) -> int:
        """Seconds since 1970 at which it is given up."""
        return int(self.row["expires_at"])

    @property
    def keep_seconds(self) -> int | None:
        """Life of the files that come out."""
        kept: int | None = self.row["keep_seconds"]
        return kept

    def as_json(self) -> dict[str, Any]:
        """OpenAI's batch object."""
        row = self.row
        names = ("id", "endpoint", "input_file_id", "status", "output_file_id", "error_file_id")
        errors = None if row["errors"] is None else {"object": "list", "data": json.loads(row["errors"])}
        return {
            **{name: row[name] for name in names},
            "object": "batch",
            "errors": errors,
            "completion_window": WINDOW,
            **{f"{stamp}_at": row[f"{stamp}_at"] for stamp in STAMPS},
            "request_counts": {name: row[name] for name in ("total", "completed", "failed")},
            "metadata": None if row["metadata"] is None else json.loads(row["metadata"]),
        }


@dataclass(frozen=True, slots=True)
class Task:
    """A request of a batch: ``length`` bytes of the input from ``start`` on. ``custom_id`` is the user's name of it."""

    line: int
    custom_id: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a request. ``answer``: a line of the output or, unless ``ok``, of the error file."""

    batch: int
    line: int
    ok: bool
    answer: str


class Ledger:
    """Args: store: the database."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def create(self, tenant: str, asked: Asked, most: int, now: int) -> Batch | None:
        """A new batch, to be validated. None if ``tenant`` has ``most`` unfinished ones."""
        id = f"batch_{secrets.token_hex(12)}"
        metadata = None if asked.metadata is None else json.dumps(asked.metadata)
        values = (id, tenant, asked.endpoint, asked.file.id, asked.file.number, metadata, asked.keep_seconds)
        with self._store.write() as db:
            query = f"SELECT COUNT(*) FROM batches WHERE tenant = ? AND status IN {_OPEN}"
            if db.execute(query, (tenant,)).fetchone()[0] >= most:
                return None
            db.execute(
                "INSERT INTO batches (id, tenant, endpoint, input_file_id, file, metadata, keep_seconds, status,"
                " created_at, expires_at) VALUES (?, ?, ?, ?, ?, ?, ?, 'validating', ?, ?)",
                (*values, now, now + WINDOW_SECONDS),
            )
        return self.get(tenant, id)

    def get(self, tenant: str, id: str) -> Batch | None:
        """A batch of ``tenant``."""
        rows = self._store.read("SELECT * FROM batches WHERE id = ? AND tenant = ?", (id, tenant))
        return Batch(rows[0]) if rows else None

    def find(self, number: int) -> Batch:
        """Anybody's batch that is known to be there."""
        return Batch(self._store.read("SELECT * FROM batches WHERE number = ?", (number,))[0])

    def page(self, tenant: str, after: int | None, most: int) -> list[Batch]:
        """At most so many batches of ``tenant`` older than number ``after``, the newest first."""
        rows = self._store.read(
            "SELECT * FROM batches WHERE tenant = ? AND (? IS NULL OR number < ?) ORDER BY number DESC LIMIT ?",
            (tenant, after, after, most),
        )
        return [Batch(row) for row in rows]

    def unfinished(self) -> list[Batch]:
        """Everybody's, the oldest first."""
        return [
            Batch(row) for row in self._store.read(f"SELECT * FROM batches WHERE status IN {_OPEN} ORDER BY number")
        ]

    def cancel(self, tenant: str, id: str, now: int) -> Batch | None:
        """Ask a batch to end, if it has not begun to; the batch as it is then."""
        with self._store.write() as db:
            db.execute(
                "UPDATE batches SET status = 'cancelling', cancelling_at = ?"
                " WHERE id = ? AND tenant = ? AND status IN ('validating', 'in_progress')",
                (now, id, tenant),
            )
        return self.get(tenant, id)

    # ------------------------------------------------------------------ validation

    def forget_tasks(self, number: int) -> None:
        """Validation begins, perhaps again."""
        with self._store.write() as db:
            db.execute("DELETE FROM tasks WHERE batch = ?", (number,))

    def add_tasks(self, number: int, tasks: Sequence[Task]) -> None:
        """Requests that validation has found."""
        with self._store.write() as db:
            db.executemany(
                "INSERT INTO tasks (batch, line, custom_id, start, length) VALUES (?, ?, ?, ?, ?)",
                [(number, task.line, json.dumps(task.custom_id), task.start, task.length) for task in tasks],
            )

    def begin(self, number: int, total: int, now: int) -> None:
        """The input is in order."""
        with self._store.write() as db:
            db.execute(
                "UPDATE batches SET status = 'in_progress', in_progress_at = ?, total = ?"
                " WHERE number = ? AND status = 'validating'",
                (now, total, number),
            )

    def fail(self, number: int, errors: Sequence[dict[str, Any]], now: int) -> None:
        """The input is not in order: nothing of it is run."""
        with self._store.write() as db:
            db.execute("DELETE FROM tasks WHERE batch = ?", (number,))
            db.execute(
                "UPDATE batches SET status = 'failed', failed_at = ?, errors = ?"
                " WHERE number = ? AND status = 'validating'",
                (now, json.dumps(errors), number),
            )

    # ------------------------------------------------------------------ answers

    def pending(self, number: int, after: int, most: int) -> list[Task]:
        """At most so many requests beyond line ``after`` that have no answer; none unless it is in progress."""
        rows = self._store.read(
            "SELECT line, custom_id, start, length FROM tasks WHERE batch = ? AND line > ? AND answer IS NULL"
            " AND (SELECT status FROM batches WHERE number = ?) = 'in_progress' ORDER BY line LIMIT ?",
            (number, after, number, most),
        )
        return [Task(row["line"], json.loads(row["custom_id"]), row["start"], row["length"]) for row in rows]

    def record(self, results: Sequence[Result]) -> None:
        """Keep answers, all or none. One that comes twice, or after its batch ended, changes nothing."""
        with self._store.write() as db:
            for result in results:
                kept = db.execute(
                    "UPDATE tasks SET ok = ?, answer = ? WHERE batch = ? AND line = ? AND answer IS NULL"
                    " AND (SELECT status FROM batches WHERE number = ?) = 'in_progress'",
                    (result.ok, result.answer, result.batch, result.line, result.batch),
                )
                count = "completed" if result.ok else "failed"
                if kept.rowcount:
                    db.execute(f"UPDATE batches SET {count} = {count} + 1 WHERE number = ?", (result.batch,))

    def close(self, number: int, now: int) -> None:
        """No more answers are taken: all are there, or the time is over."""
        with self._store.write() as db:
            db.execute(
                "UPDATE batches SET status = 'finalizing', finalizing_at = ?"
                " WHERE number = ? AND status = 'in_progress'",
                (now, number),
            )

    def lacks(self, number: int) -> bool:
        """Whether a request has no answer."""
        rows = self._store.read("SELECT 1 FROM tasks WHERE batch = ? AND answer IS NULL LIMIT 1", (number,))
        return bool(rows)

    def answers(self, number: int, ok: bool, after: int, most: int) -> list[tuple[int, str, str | None]]:
        """Line, custom id and answer of requests beyond line ``after``: the good ones, or all others."""
        which = "ok IS 1" if ok else "ok IS NOT 1"
        rows = self._store.read(
            f"SELECT line, custom_id, answer FROM tasks WHERE batch = ? AND line > ? AND {which} ORDER BY line LIMIT ?",
            (number, after, most),
        )
        return [(row["line"], json.loads(row["custom_id"]), row["answer"]) for row in rows]

    def finish(self, number: int, status: str, output: Writing | None, errors: Writing | None, now: int) -> None:
        """The end: files become visible, rows of requests go, what has no answer counts as failed; all at once."""
        with self._store.write() as db:
            show(db, [file for file in (output, errors) if file is not None])
            db.execute("DELETE FROM tasks WHERE batch = ?", (number,))
            db.execute(
                f"UPDATE batches SET status = ?, {status}_at = ?, output_file_id = ?, error_file_id = ?,"
                " failed = total - completed WHERE number = ?",
                (status, now, output and output.id, errors and errors.id, number),
            )
