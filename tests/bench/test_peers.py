"""The contest between engines, with workers that only pretend: turns, sleep, failures, figures, table, file."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # ``bench`` is no part of the installed package

from bench.peers.__main__ import main  # noqa: E402
from bench.peers.contestants import Contestant, agreement, figures  # noqa: E402
from bench.peers.driver import Contest, Plan  # noqa: E402
from bench.peers.table import peers_table  # noqa: E402
from bench.peers.worker import Worker, WorkerError  # noqa: E402

# Behaves as its method says, and writes down who ran and whether all others slept meanwhile.
FAKE = """
import os, sys, time
sys.path.insert(0, {adapters!r})
from pathlib import Path
from protocol import Timeline, serve

HERE = Path(__file__).parent

def state(pid):
    try:
        return Path(f"/proc/{{pid}}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "gone"

def others_sleep():
    pids = [int(file.name) for file in (HERE / "pids").iterdir() if file.name != str(os.getpid())]
    for _ in range(100):
        if all(state(pid) in "Tgone" for pid in pids):
            return True
        time.sleep(0.01)
    return False

class Fake:
    def __init__(self, load):
        if load.method == "no-load":
            raise RuntimeError("no such engine")
        self.max_batch = 1 if load.method == "alone" else 0
        self.method, self.spoiled = load.method, False
        (HERE / "pids" / str(os.getpid())).touch()
        print("chatter of a library")

    def run(self, prompts, max_tokens):
        if max_tokens > 3:
            with (HERE / "journal").open("a") as journal:
                journal.write(f"{{self.method}} {{others_sleep()}}\\n")
            if self.method == "dies" and len(prompts) == 1:
                os._exit(3)
            self.spoiled |= self.method == "raises" and len(prompts) == 1
            if self.spoiled:
                raise ValueError("out of keys")
        timeline = Timeline(len(prompts))
        step = 2 if self.method == "two" else 1
        for place in range(0, max_tokens, step):
            for request in range(len(prompts)):
                timeline.add(request, min(step, max_tokens - place), timeline.start + 1 + place)
        outputs = [[prompt[0] + place for place in range(max_tokens)] for prompt in prompts]
        if self.method == "short":
            outputs[0].pop()
        return timeline.answer(outputs)

serve(Fake, "pytest")
"""
METHODS = ("one", "two", "dies", "raises", "short", "alone", "no-load", "absent")


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A worker's script."""
    (tmp_path / "pids").mkdir()
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(adapters=str(ROOT / "bench" / "peers" / "adapters")))
    return script


@pytest.fixture
def worker(fake: Path, tmp_path: Path) -> Iterator[Worker]:
    """A fake that nothing was asked yet."""
    made = Worker(Path(sys.executable), fake, {}, tmp_path / "log.txt")
    yield made
    made.close()


def load(method: str = "one") -> dict[str, Any]:
    empty = {"model": "", "draft": "", "folder": "", "dtype": "bfloat16", "method": method}
    return empty | dict.fromkeys(("threads", "k", "batch", "length", "kv_tokens", "step_tokens"), 1)


def contest(fake: Path, folder: Path, methods: tuple[str, ...], **limits: Any) -> list[dict[str, Any]]:
    everyone = [Contestant("fake", method, "one", adapter=fake) for method in methods]
    given = load()
    del given["method"]
    prompts = {8: [[10 * i + j for j in range(8)] for i in range(2)]}
    plan = Plan([(1, 8), (2, 8)], prompts, given, folder, max_tokens=4, repeat=2, compared=1, **limits)
    python = Path(sys.executable)
    reference = (Contestant("fake", "one", "one", adapter=fake), python)
    skipped = {"fake/absent": "not installed"}
    return Contest(plan, [(who, python) for who in everyone], skipped, reference, lambda _: None).run()


def test_every_contestant_takes_its_turn_in_every_repeat_while_the_others_sleep(fake: Path, tmp_path: Path) -> None:
    contest(fake, tmp_path, ("one", "two"))
    lines = (tmp_path / "journal").read_text().splitlines()
    assert {line.split()[1] for line in lines} == {"True"}
    first = ["one", "two"]
    # The reference; then in each of two cells a warm-up of all, and two repeats of which the second begins one later.
    assert [line.split()[0] for line in lines] == ["one", *2 * [*first, *first, "two", "one"]]


def test_a_failure_is_a_row_and_the_rest_goes_on(fake: Path, tmp_path: Path) -> None:
    rows = contest(fake, tmp_path, METHODS)
    assert len(rows) == 2 * len(METHODS)
    single = {row["method"]: row for row in rows if row["batch"] == 1}
    double = {row["method"]: row for row in rows if row["batch"] == 2}
    assert "ended with code 3" in single["dies"]["error"]
    assert "error" not in double["dies"]  # it was started again
    assert single["raises"]["error"] == "ValueError: out of keys"
    assert "error" not in double["raises"]  # this one too, since who knows what an error leaves behind
    assert "tokens where 4" in single["short"]["error"]
    assert "error" not in single["alone"]
    assert double["alone"]["skipped"] == "batch 1 only"
    assert (tmp_path / "journal").read_text().count("alone") == 3  # a warm-up and two repeats of the one cell
    assert "no such engine" in single["no-load"]["skipped"]
    assert single["absent"]["skipped"] == "not installed"
    assert single["one"]["agreement"] == double["two"]["agreement_plain"] == 1.0


def test_figures_of_the_rows(fake: Path, tmp_path: Path) -> None:
    rows = {(row["method"], row["batch"]): row for row in contest(fake, tmp_path, ("one", "two"))}
    plain, ahead = rows["one", 2], rows["two", 2]
    # A token per second and request from second 1 on; "two" writes two every second second.
    assert (plain["tokens_per_second"], plain["step_ms"], plain["tokens_per_round"]) == (2.0, 1000.0, 1.0)
    assert (plain["prompt_seconds"], plain["tokens_per_second_total"], plain["repeats"]) == (1.0, 2.0, 2)
    assert (ahead["tokens_per_second"], ahead["step_ms"], ahead["tokens_per_round"]) == (2.0, None, 2.0)


def test_no_repeat_begins_when_the_cell_has_taken_too_long(fake: Path, tmp_path: Path) -> None:
    assert [row["repeats"] for row in contest(fake, tmp_path, ("one", "two"), cell_seconds=0.0)] == [1] * 4


def test_steady_part_leaves_out_prompts_and_stragglers() -> None:
    found = figures([[1.0, 2.0, 3.0, 3.0], [2.0, 4.0, 5.0, 9.0]])
    assert (found.prompt_seconds, found.total) == (2.0, 8 / 9)
    assert (found.steady, found.per_round) == (2.0, 2.0)  # between 2 and 3: two tokens of the first request, one round
    assert figures([[1.0, 2.0], [3.0, 4.0]]).steady is None


def test_agreement_counts_places() -> None:
    assert agreement([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 9, 4]]) == 0.75
    assert agreement([[1]], []) is None


def test_a_worker_that_does_not_answer_is_killed(worker: Worker) -> None:
    with pytest.raises(WorkerError, match="no answer within 0 s"):
        worker.ask({"op": "load", "load": load()}, 0.0)
    assert not worker.alive


def test_table_tells_figures_and_reasons(fake: Path, tmp_path: Path) -> None:
    rows = contest(fake, tmp_path, ("one", "raises", "absent"))
    out = io.StringIO()
    result = {"config": {"model": "toy", "dtype": "bfloat16", "threads": 1}, "rows": rows}
    Console(file=out, width=140).print(peers_table(result))
    text = out.getvalue()
    assert "1000.00" in text
    assert "100.0 %" in text
    assert "fake/raises: ValueError: out of keys" in text
    assert "fake/absent: not installed" in text


def test_command_runs_steeple_and_names_who_is_not_installed(target_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 40)
    file = tmp_path / "peers.json"
    names = "steeple/none,steeple/ngram,steeple/small_lm,vllm/plain"
    command = (
        f"--model {target_folder} --cells 2x16 --max-tokens 8 --repeat 1 --dtype float32 --threads 1 --only {names}"
    )
    main([*command.split(), "--prompts", str(text), "--envs", str(tmp_path / "envs"), "--json", str(file)])
    result = json.loads(file.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert result["schema_version"] == 1
    assert result["kind"] == "peers"
    assert set(result["versions"]) == {"steeple"}
    assert rows["steeple/none"]["tokens_per_second"] > 0
    assert rows["steeple/ngram"]["agreement_plain"] == 1.0
    assert rows["steeple/small_lm"]["skipped"] == "no draft model was given"
    assert rows["vllm/plain"]["skipped"].startswith("not installed")


def test_unknown_name_is_refused() -> None:
    with pytest.raises(SystemExit, match="'openvno' is unknown"):
        main(["--only", "openvno"])
