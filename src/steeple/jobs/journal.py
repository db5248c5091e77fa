"""What a job keeps on disk, so that a kill loses nothing that was finished.

For the output ``OUT.jsonl`` there are, while the job runs,

    OUT.jsonl.partial     one line per finished request, in the order they finish, each written at once
    OUT.jsonl.job.json    the settings the records were made with

and at its end ``OUT.jsonl`` appears whole, in input order; ``.partial`` goes, and ``.job.json`` stays, with a digest of
each request's line, so that a longer or corrected prompts file can be continued.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from steeple.errors import ConfigError, StorageError
from steeple.jobs.lines import Line
from steeple.request import FinishReason

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record's line lies, bytes, and the digest of the request it answers. ``wrapped``: a journal entry."""

    path: Path
    start: int
    length: int
    digest: str
    wrapped: bool


class Journal:
    """The files of one job. Use as a context manager; ``begin``, ``append`` what finishes, then ``publish``.

    Args:
        output: the file to write.
        settings: what decides the records; JSON types only.
        overwrite: what an earlier run left does not count; ``begin`` removes it.

    Raises ``ConfigError`` if the output was made with other settings or by something else, ``StorageError`` if it
    cannot be written or another process is writing it.
    """

    def __init__(self, output: Path, settings: dict[str, Any], *, overwrite: bool = False) -> None:
        self.output = output
        self.partial = output.with_name(output.name + ".partial")
        self.facts = output.with_name(output.name + ".job.json")
        self._settings, self._overwrite = settings, overwrite
        self._finished: dict[str, Place] = {}
        self._answers: dict[int, Place] = {}
        _check_folder(output)
        with self._storage("be opened"):
            self._file = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            if not overwrite:
                digests = self._check_settings()
                self._read(self.output, digests)
                self._read(self.partial, {})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files; an empty journal leaves no trace."""
        if self._file >= 0:
            with contextlib.suppress(OSError):
                if os.fstat(self._file).st_size == 0 and self.partial.is_file():
                    self.partial.unlink()
            os.close(self._file)
            self._file = -1

    def begin(self) -> None:
        """The first record is about to come: what does not count goes, and the settings are written down."""
        if self._overwrite:
            with self._storage("be removed"):
                self.output.unlink(missing_ok=True)
                self.facts.unlink(missing_ok=True)
                os.ftruncate(self._file, 0)
        self._end = os.lseek(self._file, 0, os.SEEK_END)
        if not self._finished:
            self._write_facts({})

    @property
    def kept(self) -> int:
        """Finished requests on disk."""
        return len(self._finished)

    def has(self, line: Line) -> bool:
        """Whether an earlier run finished this very request."""
        place = self._finished.get(line.key)
        return place is not None and place.digest == line.digest

    def append(self, line: Line, record: dict[str, Any]) -> None:
        """Keep the answer to ``line``. Once this returns, a kill cannot take it."""
        entry = {"input": line.digest, "record": record}
        data = _line_of(entry)
        with self._storage("be written"):
            left = memoryview(data)
            while left:
                left = left[os.write(self._file, left) :]
        place = Place(self.partial, self._end, len(data), line.digest, wrapped=True)
        self._end += len(data)
        self._answers[line.number] = place
        if record["finish_reason"] != FinishReason.ERROR.value:
            self._finished[line.key] = place

    def publish(self, lines: Sequence[tuple[int, str]]) -> None:
        """Write the output, whole or not at all. Args: number and key of every line, in the order of the input."""
        places = {number: self._answers.get(number) or self._finished[key] for number, key in lines}
        draft = self.output.with_name(self.output.name + ".tmp")
        with self._storage("be written"):
            try:
                with draft.open("wb") as out:
                    for record in _records(places[number] for number, _ in lines):
                        out.write(record)
                    out.flush()
                    os.fsync(out.fileno())
                draft.replace(self.output)
            finally:
                draft.unlink(missing_ok=True)
            # of lines with one id only the first counts; the others were answered with an error
            self._write_facts({key: places[number].digest for number, key in reversed(lines)})
            self.partial.unlink()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(f"{self.output} is being written by another process; wait, or give another.") from error

    def _check_settings(self) -> dict[str, str]:
        """Compare with the run before; returns the digests of its requests by id."""
        if not self.facts.is_file():
            if self.output.exists():
                raise ConfigError(
                    f"{self.output} exists, but no job's settings lie beside it ({self.facts.name}). "
                    "Give another output, or --overwrite to replace it."
                )
            return {}
        try:
            facts = json.loads(self.facts.read_text(encoding="utf-8"))
            before, digests = dict(facts["settings"]), dict(facts["inputs"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{self.facts} cannot be read ({error}); give --overwrite to start again.") from error
        changed = [
            f"{name} was {before.get(name)!r} and is {self._settings.get(name)!r}"
            for name in sorted(before.keys() | self._settings.keys())
            if before.get(name) != self._settings.get(name)
        ]
        if changed and (self.output.exists() or os.fstat(self._file).st_size):
            raise ConfigError(
                f"{self.output} was begun with other settings: {'; '.join(changed)}. "
                "Give the same again, another output, or --overwrite to start again."
            )
        return digests

    def _read(self, path: Path, digests: dict[str, str]) -> None:
        """Find the finished requests in ``path``. A torn last line is cut off, a damaged one runs again."""
        if not path.is_file():
            return
        start = 0
        with path.open("rb") as file:
            for data in file:
                if not data.endswith(b"\n"):
                    break
                found = _entry(data)
                if found is not None:
                    record, digest = found
                    key = str(record["id"])
                    wrapped = digest is not None
                    place = Place(path, start, len(data), digest or digests.get(key, ""), wrapped)
                    if record["finish_reason"] != FinishReason.ERROR.value:
                        self._finished[key] = place
                start += len(data)
        if path == self.partial:
            os.ftruncate(self._file, start)

    def _write_facts(self, inputs: dict[str, str]) -> None:
        facts = {"schema_version": SCHEMA_VERSION, "settings": self._settings, "inputs": inputs}
        draft = self.facts.with_name(self.facts.name + ".tmp")
        with self._storage("be written", self.facts):
            draft.write_text(json.dumps(facts, ensure_ascii=False) + "\n", encoding="utf-8")
            draft.replace(self.facts)

    @contextlib.contextmanager
    def _storage(self, what: str, path: Path | None = None) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = f" {self.kept} finished requests are kept in {self.partial}." if self.kept else ""
            raise StorageError(
                f"{path or self.output} cannot {what} ({error.strerror}).{kept} "
                "Make room or give another output, then run the same command again."
            ) from error


def _check_folder(output: Path) -> None:
    if not output.parent.is_dir():
        raise StorageError(f"{output} cannot be written: there is no folder {output.parent}; make it first.")
    if output.is_dir():
        raise StorageError(f"{output} is a folder; give the name of a .jsonl file.")


def _entry(data: bytes) -> tuple[dict[str, Any], str | None] | None:
    """Record and digest of a line; a line of a finished output has no digest. None if it is neither."""
    try:
        value = json.loads(data)
        record = value.get("record", value)
        digest = str(value["input"]) if "record" in value else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return (record, digest) if isinstance(record, dict) and {"id", "finish_reason"} <= record.keys() else None


def _line_of(value: dict[str, Any]) -> bytes:
    """One line of JSON. Half of a surrogate pair becomes its escape, which is JSON again."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _records(places: Iterator[Place]) -> Iterator[bytes]:
    """The lines of the output."""
    with contextlib.ExitStack() as stack:
        files: dict[Path, Any] = {}
        for place in places:
            if place.path not in files:
                files[place.path] = stack.enter_context(place.path.open("rb"))
            files[place.path].seek(place.start)
            data = files[place.path].read(place.length)
            if place.wrapped:
                data = _line_of(json.loads(data)["record"])
            yield data
