"""What is on disk at any moment of a job, and what the next run makes of it."""

from __future__ import annotations

import json
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from steeple.errors import ConfigError, StorageError
from steeple.jobs.journal import Journal
from steeple.jobs.lines import Line

SETTINGS = {"model": "m", "temperature": 0.0}
A, B, C = Line(1, "a", "da"), Line(2, "b", "db"), Line(3, 3, "dc")


def record(line: Line, text: str = "text", reason: str = "stop") -> dict[str, Any]:
    return {"id": line.id, "text": text, "finish_reason": reason}


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def begin(output: Path, lines: Sequence[tuple[Line, dict[str, Any]]]) -> None:
    """A run that is killed after ``lines``."""
    with Journal(output, SETTINGS) as journal:
        journal.begin()
        for line, answer in lines:
            journal.append(line, answer)


def order(*lines: Line) -> list[tuple[int, str]]:
    return [(line.number, line.key) for line in lines]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_output_has_the_order_of_the_input(output: Path) -> None:
    with Journal(output, SETTINGS) as journal:
        journal.begin()
        for line in (C, A, B):
            journal.append(line, record(line, f"of {line.id} \u2713 \ud800"))
            assert not output.exists()
        journal.publish(order(A, B, C))
    assert texts(output) == ["of a \u2713 \ud800", "of b \u2713 \ud800", "of 3 \u2713 \ud800"]
    assert sorted(path.name for path in output.parent.iterdir()) == ["out.jsonl", "out.jsonl.job.json"]


def test_a_finished_request_survives_and_an_error_is_tried_again(output: Path) -> None:
    with Journal(output, SETTINGS) as journal:
        journal.begin()
        journal.append(B, record(B))
        journal.append(A, record(A, reason="error"))
        assert journal.kept == 1
    with Journal(output, SETTINGS) as journal:
        assert (journal.has(A), journal.has(B), journal.has(C)) == (False, True, False)
        assert journal.kept == 1
        assert not journal.has(Line(2, "b", "another line with this id"))


def test_a_torn_last_line_is_cut_off(output: Path) -> None:
    begin(output, [(A, record(A)), (B, record(B))])
    partial = output.with_name("out.jsonl.partial")
    partial.write_bytes(partial.read_bytes()[:-9])
    with Journal(output, SETTINGS) as journal:
        assert (journal.has(A), journal.has(B)) == (True, False)
        journal.begin()
        journal.append(B, record(B, "again"))
    with Journal(output, SETTINGS) as journal:
        assert (journal.has(A), journal.has(B)) == (True, True)
        journal.begin()
        journal.publish(order(A, B))
    assert texts(output) == ["text", "again"]


def test_a_damaged_line_runs_again(output: Path) -> None:
    begin(output, [(A, record(A)), (B, record(B))])
    partial = output.with_name("out.jsonl.partial")
    partial.write_bytes(partial.read_bytes().replace(b'"input"', b'"inqut"', 1).replace(b'"da"', b"[[[[", 1))
    with Journal(output, SETTINGS) as journal:
        assert (journal.has(A), journal.has(B)) == (False, True)


def test_a_published_job_is_continued_with_more_lines(output: Path) -> None:
    with Journal(output, SETTINGS) as journal:
        journal.begin()
        journal.append(A, record(A, "first"))
        journal.publish(order(A))
    with Journal(output, SETTINGS) as journal:
        assert journal.has(A)
        journal.begin()
        journal.append(B, record(B, "second"))
        assert texts(output) == ["first"]
        journal.publish(order(B, A))
    assert texts(output) == ["second", "first"]
    with Journal(output, SETTINGS) as journal:
        assert journal.has(A)
        assert journal.has(B)


def test_of_lines_with_one_id_the_first_counts(output: Path) -> None:
    twin = Line(9, "a", "other digest")
    with Journal(output, SETTINGS) as journal:
        journal.begin()
        journal.append(twin, record(twin, "refused", "error"))
        journal.append(A, record(A, "answer"))
        journal.publish(order(A, twin))
    assert texts(output) == ["answer", "refused"]
    with Journal(output, SETTINGS) as journal:
        assert journal.has(A)


def test_other_settings_are_named(output: Path) -> None:
    begin(output, [(A, record(A))])
    with pytest.raises(ConfigError, match=r"other settings: temperature was 0.0 and is 1.0\. .*--overwrite"):
        Journal(output, {**SETTINGS, "temperature": 1.0})
    begin(output, [])  # the refusal let go of the files


def test_settings_of_a_run_without_a_record_do_not_matter(output: Path) -> None:
    begin(output, [])
    with Journal(output, {**SETTINGS, "temperature": 1.0}) as journal:
        journal.begin()
        journal.append(A, record(A))
    with pytest.raises(ConfigError, match=r"temperature was 1\.0 and is 0\.0"):
        Journal(output, SETTINGS)


def test_overwrite_starts_again_but_not_before_it_begins(output: Path) -> None:
    with Journal(output, SETTINGS) as journal:
        journal.begin()
        journal.append(A, record(A))
        journal.publish(order(A))
    with Journal(output, {"model": "other"}, overwrite=True) as journal:
        assert not journal.has(A)
        assert output.exists()
        journal.begin()
        assert not output.exists()


def test_a_file_of_somebody_else_is_left_alone(output: Path) -> None:
    output.write_text("precious\n")
    with pytest.raises(ConfigError, match=r"out.jsonl exists, but no job's settings .* --overwrite to replace it"):
        Journal(output, SETTINGS)
    assert output.read_text() == "precious\n"
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]


def test_two_jobs_cannot_write_one_output(output: Path) -> None:
    with Journal(output, SETTINGS), pytest.raises(StorageError, match="written by another process"):
        Journal(output, SETTINGS)


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"there is no folder .*gone; make it first"):
        Journal(tmp_path / "gone" / "out.jsonl", SETTINGS)
    with pytest.raises(StorageError, match=r"is a folder; give the name of a \.jsonl file"):
        Journal(tmp_path, SETTINGS)


def test_a_full_disk_keeps_what_was_finished(output: Path) -> None:
    """The limit on a file's size stands for the end of the disk: the kernel refuses the same write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(output, SETTINGS) as journal:
        journal.begin()
        journal.append(A, record(A))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            with pytest.raises(StorageError, match=r"out.jsonl cannot be written \(File too large\)") as caught:
                journal.append(B, record(B, "long" * 1000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"1 finished requests are kept in {output}.partial" in str(caught.value)
    assert "run the same command again" in str(caught.value)
    with Journal(output, SETTINGS) as journal:
        assert journal.has(A)
        assert not journal.has(B)
        journal.begin()
        journal.append(B, record(B, "now"))
        journal.publish(order(A, B))
    assert texts(output) == ["text", "now"]
