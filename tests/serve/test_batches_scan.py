"""Reading a batch's input: what is wrong with which line, whatever the pieces it comes in."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from batch_lab import COMPLETIONS, greedy, jsonl
from hypothesis import given
from hypothesis import strategies as st

from steeple.serve.batches.ledger import Task
from steeple.serve.batches.scan import BOM, MOST_ERRORS, Scan


def scanned(
    data: bytes, cuts: list[int] | None = None, lines: int = 100, size: int = 10_000
) -> tuple[Scan, list[Task]]:
    scan = Scan(COMPLETIONS, lines, size)
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts or []), len(data)]
    found = [task for a, b in itertools.pairwise(places) for task in scan.feed(data[a:b])]
    return scan, found + scan.end()


GOOD = greedy("a", "x")


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"[1]", "invalid_json_line", None),
        (b'{"custom_id": "\xff"}', "invalid_json_line", None),
        (b"[" * 100_000, "line_too_long", None),
        (b"[" * 9_000, "invalid_json_line", None),
        ({**GOOD, "more": 1}, "unknown_parameter", None),
        ({**GOOD, "\ud800": 1}, "unknown_parameter", None),
        ({**GOOD, "custom_id": 7}, "invalid_custom_id", "custom_id"),
        ({**GOOD, "custom_id": ""}, "invalid_custom_id", "custom_id"),
        ({**GOOD, "custom_id": "x" * 513}, "invalid_custom_id", "custom_id"),
        ({"body": {}}, "invalid_custom_id", "custom_id"),
        ({**GOOD, "method": "GET"}, "invalid_method", "method"),
        ({**GOOD, "url": "/v1/chat/completions"}, "invalid_url", "url"),
        ({**GOOD, "url": ["/v1/completions"]}, "invalid_url", "url"),
        ({**GOOD, "body": "text"}, "missing_required_parameter", "body"),
    ],
)
def test_what_is_wrong_is_named(line: Any, code: str, param: str | None) -> None:
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    scan, _ = scanned(jsonl([greedy("first", "x")]) + raw)
    assert [(e["code"], e["param"], e["line"]) for e in scan.errors] == [(code, param, 2)]
    json.dumps(scan.errors).encode()


def test_an_empty_file_is_refused() -> None:
    assert [e["code"] for e in scanned(b"\n \n")[0].errors] == ["empty_file"]


def test_too_many_requests_are_refused() -> None:
    scan, _ = scanned(jsonl(greedy(f"{i}", "x") for i in range(5)), lines=3)
    assert [(e["code"], e["line"]) for e in scan.errors] == [("too_many_requests", 4)]
    assert not scanned(jsonl(greedy(f"{i}", "x") for i in range(3)), lines=3)[0].errors


def test_errors_are_not_collected_for_ever() -> None:
    scan, _ = scanned(b"bad\n" * 1000)
    assert len(scan.errors) == MOST_ERRORS
    assert scan.over


def test_a_line_without_end_is_not_collected_for_ever() -> None:
    scan = Scan(COMPLETIONS, 10, 1000)
    for _ in range(3):
        scan.feed(b"x" * 600)
    assert [e["code"] for e in scan.errors] == ["line_too_long"]
    assert scan.over


@given(
    st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=6, unique=True),
    st.lists(st.integers(0, 5000), max_size=6),
    st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n  \n"]),
    st.booleans(),
    st.booleans(),
)
def test_requests_are_found_wherever_pieces_end(
    names: list[str], cuts: list[int], newline: bytes, ends: bool, mark: bool
) -> None:
    raw = [json.dumps(greedy(name, "é\n"), ensure_ascii=index % 2 == 0) for index, name in enumerate(names)]
    data = (BOM if mark else b"") + newline.join(line.encode() for line in raw) + (newline if ends else b"")
    scan, tasks = scanned(data, cuts)
    assert not scan.errors
    assert [task.custom_id for task in tasks] == names
    assert scan.total == len(names)
    for task, line in zip(tasks, raw, strict=True):
        cut = data[task.start : task.start + task.length]
        assert json.loads(cut.removeprefix(BOM)) == json.loads(line)
