"""The main job on a tiny model: order, answers, errors, and going on after a stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import steeple
from steeple import LLM, ConfigError, EngineConfig, ModelError, SamplingParams, StorageError
from steeple.jobs import GenerateConfig, JobInterrupted, Progress, run_generate

SAMPLING = SamplingParams(max_tokens=12, ignore_eos=True)
ENGINE = EngineConfig(batch_size=3)


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def config(tmp_path: Path, target_folder: Path) -> GenerateConfig:
    """A job over ten prompts of different lengths that finish out of order."""
    lines = [{"id": f"r{i}", "prompt": [*range(1, 4 + i % 4)], "max_tokens": 20 - 2 * i} for i in range(10)]
    return GenerateConfig(
        prompts=write(tmp_path / "p.jsonl", *lines),
        output=tmp_path / "out.jsonl",
        model=str(target_folder),
        sampling=SAMPLING,
        engine=ENGINE,
    )


def changed(config: GenerateConfig, **fields: Any) -> GenerateConfig:
    return GenerateConfig(**{**{name: getattr(config, name) for name in config.__dataclass_fields__}, **fields})


def test_records_stand_in_input_order_and_are_the_models_own(config: GenerateConfig) -> None:
    seen: list[Progress] = []
    summary = run_generate(config, seen.append)
    found = read(config.output)
    prompts = [line["prompt"] for line in read(config.prompts)]
    params = [SamplingParams(max_tokens=20 - 2 * i, ignore_eos=True) for i in range(10)]
    plain = LLM(config.model, "none").generate(prompts, params)
    assert [r["id"] for r in found] == [f"r{i}" for i in range(10)]
    assert [r["token_ids"] for r in found] == [output.token_ids for output in plain]
    assert [r["text"] for r in found] == [output.text for output in plain]
    assert {r["finish_reason"] for r in found} == {"length"}
    assert found[1]["usage"] == {"prompt_tokens": 4, "completion_tokens": 18, "total_tokens": 22}
    assert found[0]["metrics"].keys() == {
        "tau",
        "rounds",
        "drafted",
        "accepted",
        "acceptance_by_position",
        "seconds",
        "first_token_seconds",
        "preemptions",
    }
    assert summary["requests"] == 10
    assert summary["completion_tokens"] == sum(20 - 2 * i for i in range(10))
    assert summary["tokens_per_second"] == summary["completion_tokens"] / summary["seconds"]
    assert (summary["errors"], summary["resumed"], summary["k"], summary["batch_size"]) == (0, 0, 4, 3)
    assert summary["tau"] >= 1
    assert (summary["drafter"], summary["dtype"], summary["temperature"]) == ("ngram", "float32", 0.0)
    assert summary["environment"]["torch"]
    assert (seen[0].done, seen[-1].done, seen[-1].total) == (0, 10, 10)
    json.dumps(summary, allow_nan=False)


def test_lines_of_every_kind_in_one_file(config: GenerateConfig) -> None:
    write(
        config.prompts,
        {"id": "good", "prompt": "def area(", "logprobs": 2, "max_tokens": 3},
        "{broken",
        {"id": "good", "prompt": "again"},
        {"messages": [{"role": "user", "content": "hi"}], "n": 2, "max_tokens": 4, "temperature": 1.0, "seed": 5},
        {"custom_id": "b", "url": "/v1/completions", "body": {"prompt": "for", "max_tokens": 2}},
        {"custom_id": "t", "url": "/v1/completions", "body": {"prompt": "for", "suffix": "x"}},
        {"id": "long", "prompt": [5] * 256},
        {"id": "foreign", "prompt": [100_000]},
    )
    summary = run_generate(config)
    good, broken, twice, chat, batch, refused, long, foreign = read(config.output)
    assert len(good["logprobs"]) == len(good["token_ids"]) == 3
    assert good["logprobs"][0]["token_id"] == good["token_ids"][0]
    assert [len(token["top"]) for token in good["logprobs"]] == [2, 2, 2]
    assert good["logprobs"][0]["top"][0] == {
        "token_id": good["token_ids"][0],
        "logprob": good["logprobs"][0]["logprob"],
    }
    assert (broken["id"], broken["line"], broken["finish_reason"]) == ("line-2", 2, "error")
    assert "the line is no JSON" in broken["error"]
    assert (twice["id"], twice["line"]) == ("good", 3)
    assert twice["error"] == "id 'good' was given in line 1 already; give another."
    assert [choice["index"] for choice in chat["choices"]] == [0, 1]
    assert chat["choices"][0]["token_ids"] == chat["token_ids"] != chat["choices"][1]["token_ids"]
    assert chat["usage"]["completion_tokens"] == 8
    assert (batch["id"], len(batch["token_ids"])) == ("b", 2)
    assert "body.suffix = 'x' is not supported" in refused["error"]
    assert "the prompt has 256 tokens and leaves no room" in long["error"]
    assert "token ids outside 0..319" in foreign["error"]
    assert (summary["requests"], summary["errors"]) == (8, 5)


def test_text_file(config: GenerateConfig, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("def area(\n\nclass Box:\n")
    run_generate(changed(config, prompts=prompts))
    assert [(r["id"], r["usage"]["completion_tokens"]) for r in read(config.output)] == [("line-1", 12), ("line-3", 12)]


def test_ctrl_c_keeps_what_was_finished_and_the_job_goes_on(config: GenerateConfig) -> None:
    whole = changed(config, output=config.output.with_name("whole.jsonl"))
    run_generate(whole)

    def stop(progress: Progress) -> None:
        if progress.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(JobInterrupted, match=r"4 finished requests are kept in .*\.partial; run the same command"):
        run_generate(config, stop)
    assert not config.output.exists()
    partial = config.output.with_name("out.jsonl.partial")
    lines = partial.read_text().splitlines()
    entry = json.loads(lines[0])
    entry["record"]["text"] = "not run again"
    partial.write_text("\n".join([json.dumps(entry), *lines[1:], '{"input": "torn']))

    summary = run_generate(changed(config, drafter="none"))  # the drafter changes no token, so it may differ
    assert (summary["resumed"], summary["requests"]) == (4, 10)
    found, expected = read(config.output), read(whole.output)
    assert [r["token_ids"] for r in found] == [r["token_ids"] for r in expected]
    texts = {r["id"]: r["text"] for r in expected} | {entry["record"]["id"]: "not run again"}
    assert {r["id"]: r["text"] for r in found} == texts


def test_sigkill_loses_no_finished_request(config: GenerateConfig) -> None:
    lines = [{"id": i, "prompt": [1 + i, 2, 3], "max_tokens": 60} for i in range(30)]
    write(config.prompts, *lines)
    partial = config.output.with_name("out.jsonl.partial")
    arguments = ["generate", str(config.prompts), "-o", str(config.output), "--model", config.model]
    arguments += ["--max-tokens", "12", "--ignore-eos", "--batch-size", "3"]
    code = "from steeple.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(Path(steeple.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment) as process:
        while process.poll() is None and (not partial.exists() or partial.read_bytes().count(b"\n") < 4):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not config.output.exists()
    kept = partial.read_bytes().count(b"\n")
    assert 4 <= kept < 30
    summary = run_generate(config)
    assert summary["resumed"] == kept
    assert [r["id"] for r in read(config.output)] == list(range(30))
    plain = LLM(config.model, "none").generate(
        [line["prompt"] for line in lines], SamplingParams(max_tokens=60, ignore_eos=True)
    )
    assert [r["token_ids"] for r in read(config.output)] == [output.token_ids for output in plain]


def test_a_finished_job_loads_no_model(config: GenerateConfig) -> None:
    run_generate(config)
    before = config.output.read_bytes()
    summary = run_generate(changed(config, model=config.model), lambda progress: pytest.fail("it ran again"))
    assert (summary["resumed"], summary["tokens_per_second"], summary["completion_tokens"]) == (10, None, 0)
    assert config.output.read_bytes() == before


def test_a_corrected_line_runs_and_the_others_do_not(config: GenerateConfig) -> None:
    write(config.prompts, {"id": "a", "prompt": "def"}, "{broken")
    run_generate(config)
    write(config.prompts, {"id": "a", "prompt": "def"}, {"prompt": "class"}, {"id": "new", "prompt": "for"})
    summary = run_generate(config)
    assert (summary["resumed"], summary["errors"]) == (1, 0)
    assert [(r["id"], r["finish_reason"]) for r in read(config.output)] == [
        ("a", "length"),
        ("line-2", "length"),
        ("new", "length"),
    ]


def test_other_settings_do_not_mix_into_one_output(config: GenerateConfig) -> None:
    run_generate(config)
    warmer = changed(config, sampling=SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.7))
    with pytest.raises(ConfigError, match=r"temperature was 0.0 and is 0.7.*--overwrite"):
        run_generate(warmer)
    assert run_generate(changed(warmer, overwrite=True))["resumed"] == 0


def test_an_error_of_the_machine_says_what_is_kept(config: GenerateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(progress: Progress) -> None:
        if progress.done == 2:
            raise StorageError("no space")

    with pytest.raises(StorageError, match="no space") as caught:
        run_generate(config, full)
    assert "2 finished requests are kept in" in caught.value.__notes__[0]


def test_a_model_that_is_not_there_leaves_nothing_behind(config: GenerateConfig) -> None:
    with pytest.raises(ModelError, match="there is no such folder"):
        run_generate(changed(config, model="./nothing"))
    assert list(config.output.parent.iterdir()) == [config.prompts]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"drafter": "ngrm"}, "Unknown drafter 'ngrm'. Did you mean 'ngram'?"),
        ({"k": 1000}, "ngram.k = 1000 is out of range"),
        ({"prompts": Path("p.csv")}, "the name must end in .txt, .jsonl, .ndjson"),
        ({"prompts": Path("a.jsonl"), "output": Path("a.jsonl")}, "is the prompts file"),
    ],
)
def test_wrong_settings_are_told_before_anything_loads(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("?", r"\?").replace(".", r"\.")):
        GenerateConfig(**{"prompts": Path("p.jsonl"), "output": Path("o.jsonl"), **fields})
