"""The two ends of a batch: its input becomes tasks, its answers become files. Either can be begun again at any time."""

from __future__ import annotations

import time

from steeple.serve.batches.answer import not_run
from steeple.serve.batches.contents import GROUP, OUTPUT, Files, Writing
from steeple.serve.batches.ledger import (
    CANCELLED,
    CANCELLING,
    COMPLETED,
    EXPIRED,
    VALIDATING,
    Batch,
    Ledger,
)
from steeple.serve.batches.scan import LineError, Scan
from steeple.serve.batches.store import Desk

PAGE = 64  # answers copied at a time


class Clerk:
    """Args: desk: runs calls on the store; most_lines, most_bytes: of a batch and of a line."""

    def __init__(self, desk: Desk, files: Files, ledger: Ledger, most_lines: int, most_bytes: int) -> None:
        self._desk, self._files, self._ledger = desk, files, ledger
        self._most_lines, self._most_bytes = most_lines, most_bytes

    async def validate(self, batch: Batch) -> None:
        """Look the input through. Afterwards the batch is in progress or has failed, unless it was cancelled."""
        scan = Scan(batch.endpoint, self._most_lines, self._most_bytes)
        await self._desk(self._ledger.forget_tasks, batch.number)
        place = 0
        while await self._desk(self._read, batch, scan, place):
            place += GROUP
        now = int(time.time())
        if scan.errors:
            await self._desk(self._ledger.fail, batch.number, scan.errors, now)
        else:
            await self._desk(self._ledger.begin, batch.number, scan.total, now)

    def _read(self, batch: Batch, scan: Scan, place: int) -> bool:
        """Some pieces of the input; False at its end."""
        if self._ledger.find(batch.number).status != VALIDATING:
            return False
        data = self._files.pieces(batch.file, place, GROUP)
        if not data and not place:
            gone = LineError("input_file_not_found", "the input file was deleted.", "input_file_id")
            scan.errors.append(gone.as_json(None))
            return False
        tasks = scan.feed(data) if data else scan.end()
        if not scan.errors:
            self._ledger.add_tasks(batch.number, tasks)
        return bool(data) and not scan.over

    async def finish(self, batch: Batch) -> None:
        """Write the files of a batch that takes no more answers, and end it."""
        if batch.status == CANCELLING:
            status, reason = CANCELLED, "batch_cancelled"
        else:
            late = await self._desk(self._ledger.lacks, batch.number)
            status, reason = (EXPIRED if late else COMPLETED), "batch_expired"
        output = await self._file(batch, "output", True, reason)
        errors = await self._file(batch, "error", False, reason)
        await self._desk(self._ledger.finish, batch.number, status, output, errors, int(time.time()))

    async def _file(self, batch: Batch, kind: str, ok: bool, reason: str) -> Writing | None:
        """The good answers, or all others, in the order of the input; None if there are none."""
        name = f"{batch.id}_{kind}.jsonl"
        now = int(time.time())
        file = await self._desk(self._files.begin, batch.tenant, name, OUTPUT, now, batch.keep_seconds)
        line = 0
        while (last := await self._desk(self._copy, batch, file, ok, line, reason)) is not None:
            line = last
        if file.bytes:
            await self._desk(file.flush)
            return file
        await self._desk(self._files.drop, file.number)
        return None

    def _copy(self, batch: Batch, file: Writing, ok: bool, after: int, reason: str) -> int | None:
        """Some answers; the last one's line, or None if there are no more."""
        rows = self._ledger.answers(batch.number, ok, after, PAGE)
        for _, custom_id, answer in rows:
            file.add((answer or not_run(custom_id, reason)).encode() + b"\n")
        return rows[-1][0] if rows else None
