"""The commands as a user types them, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steeple import __version__
from steeple.cli import convert as convert_command
from steeple.cli import demo as demo_command
from steeple.cli import generate as generate_command
from steeple.cli import main
from steeple.cli import train as train_command
from steeple.cli import verify as verify_command
from steeple.cli.app import COMMANDS, TRAIN
from steeple.convert import ConvertConfig
from steeple.jobs import GenerateConfig, JobInterrupted, Progress
from steeple.train.lm import LMConfig


def steeple(*args: str) -> int:
    """The exit status."""
    with pytest.raises(SystemExit) as ended:
        main(args)
    return int(ended.value.code or 0)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "p.txt"
    path.write_text("def area(width\nclass Box:\n")
    return path


def test_the_list_of_commands_and_the_version(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert steeple("--help") == 0
    text = capsys.readouterr().out
    for name, (_, help_) in COMMANDS.items():
        assert name in text
        assert help_ in text
    assert steeple("train", "--help") == 0
    assert TRAIN["lm"][1] in capsys.readouterr().out
    assert steeple("--version") == 0
    assert capsys.readouterr().out == f"steeple {__version__}\n"


def test_an_unknown_command_or_option_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert steeple("generat") == 2
    assert "Did you mean 'generate'?" in capsys.readouterr().err
    assert steeple("generate", "--temprature", "1") == 2
    assert "--temperature" in capsys.readouterr().err


@pytest.mark.parametrize("command", [*((name,) for name in COMMANDS), ("bench", "step"), ("train", "lm")])
def test_every_command_has_help_with_the_fields_of_its_settings(
    capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    assert steeple(*command, "--help") == 0
    text = capsys.readouterr().out
    assert "--json" in text
    assert " options " in text


def test_generate_writes_file_table_and_json(
    prompts: Path, target_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = prompts.with_name("o.jsonl")
    arguments = ("generate", str(prompts), "-o", str(output), "--model", str(target_folder), "--drafter", "ngram")
    arguments += ("--k", "3", "--max-tokens", "5", "--ignore-eos", "--batch-size", "1", "--stop", "zz,", "--json", "-")
    assert steeple(*arguments) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert (summary["requests"], summary["completion_tokens"], summary["k"], summary["batch_size"]) == (2, 10, 3, 1)
    for part in ("tokens/s", "tau", "acceptance by position", str(output)):
        assert part in captured.err
    assert [len(json.loads(line)["token_ids"]) for line in output.read_text().splitlines()] == [5, 5]

    assert steeple(*arguments) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["tokens_per_second"] is None
    assert "All 2 requests are in" in captured.err


def test_generate_with_a_small_model(
    prompts: Path, target_folder: Path, draft_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("generate", str(prompts), "--model", str(target_folder), "--max-tokens", "6", "--ignore-eos")
    plain, drafted = prompts.with_name("plain.jsonl"), prompts.with_name("drafted.jsonl")
    assert steeple(*common, "-o", str(plain), "--drafter", "none") == 0
    assert steeple(*common, "-o", str(drafted), "--drafter", f"small_lm:{draft_folder}") == 0
    tokens = [[json.loads(line)["token_ids"] for line in path.read_text().splitlines()] for path in (plain, drafted)]
    assert tokens[0] == tokens[1]
    assert json.loads(drafted.read_text().splitlines()[0])["metrics"]["drafted"] > 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--drafter", "smal_lm"], "Unknown drafter 'smal_lm'. Did you mean 'small_lm'?"),
        (["--temperature", "nan"], "temperature = nan is out of range; give a value from 0.0 to 100.0."),
        (["--top-p", "0"], "top_p = 0.0 is out of range"),
        (["--dtype", "floot32"], "EngineConfig.dtype = 'floot32'. Did you mean 'float32'?"),
        (["--stop-token-ids", "1,x"], "--stop-token-ids: 'x' is no int"),
        (["--model", "./nothing"], "Model './nothing': there is no such folder."),
        (["-o", "nowhere/o.jsonl"], "there is no folder nowhere; make it first"),
    ],
)
def test_a_wrong_setting_is_one_message_and_status_2(
    prompts: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(prompts.parent)
    assert steeple("generate", str(prompts), "-o", "o.jsonl", *options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error ")
    assert says in captured.err
    assert "Traceback" not in captured.err


def test_ctrl_c_is_status_130(
    prompts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(config: GenerateConfig, progress: Any) -> dict[str, Any]:
        raise JobInterrupted("Interrupted. 3 finished requests are kept.")

    monkeypatch.setattr(generate_command, "run_generate", interrupted)
    assert steeple("generate", str(prompts), "-o", str(prompts.with_name("o.jsonl"))) == 130
    assert capsys.readouterr().err == "Interrupted. 3 finished requests are kept.\n"


def test_the_bar_reads_the_engine_while_a_request_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.progress import Progress as Bar

    from steeple.engine.stats import EngineStats
    from steeple.request import SpeculationStats

    stats = EngineStats()
    column = generate_command.LiveColumn()
    bar = Bar(column, disable=True)
    bar.add_task("generating", progress=None)
    task = bar.tasks[0]
    assert column.render(task).plain == "loading"
    task.fields["progress"] = Progress(total=9, done=1, errors=2, stats=stats, begun=0.0)
    stats.speculation = SpeculationStats(rounds=2, committed=5)
    assert column.render(task).plain.endswith("tokens/s  tau 2.50  2 errors")
    stats.committed = 10**9
    assert not column.render(task).plain.startswith("0 ")


def test_demo_shows_the_same_tokens_from_every_drafter(
    target_folder: Path, draft_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", str(target_folder), "--drafters", f"ngram,small_lm:{draft_folder}", "--batch", "1,2")
    assert steeple("demo", *arguments, "--requests", "2", "--context", "24", "--max-tokens", "12", "--json", "-") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert [(row["batch"], row["drafter"].split(":")[0]) for row in result["rows"]] == [
        (batch, drafter) for batch in (1, 2) for drafter in ("none", "ngram", "small_lm")
    ]
    assert all(row["identical"] for row in result["rows"])
    assert "speed-up" in captured.err
    assert "All outputs are identical" in captured.err


def test_a_demo_with_different_tokens_is_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"batch": 1, "drafter": "ngram", "tokens_per_second": 2.0, "speed_up": 1.5, "tau": 1.0}
    row |= {"acceptance_by_position": [], "identical": False}
    result = {"rows": [row], "identical": False, "examples": [{"prompt": "p", "text": "[t]"}], "dtype": "float32"}
    monkeypatch.setattr(demo_command, "run_demo", lambda config, progress: result)
    assert steeple("demo") == 1
    error = capsys.readouterr().err
    assert "OUTPUTS DIFFER" in error
    assert "p[t]" in error


@pytest.mark.parametrize(("lossless", "status", "word"), [(True, 0, "lossless"), (False, 1, "NOT lossless")])
def test_verify_ends_with_the_verdict(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lossless: bool, status: int, word: str
) -> None:
    greedy = {"requests": 4, "identical": 3, "oracle_identical": None, "worst_gap": 0.5}
    sampling = {"samples": 100, "tv": 0.1, "tv_noise": 0.2, "p_value": 0.3}
    proof = {"greedy": greedy, "sampling": sampling, "lossless": lossless}
    padded = {"align": {"greedy": greedy, "sampling": sampling, "lossless": lossless}, "holes": {"refused": "ALiBi"}}
    result = {"drafters": {"ngram": proof}, "padded": padded, "lossless": lossless}
    monkeypatch.setattr(verify_command, "run_proof", lambda config, progress: result)
    assert steeple("verify", "--drafter", "ngram", "--json", "-") == status
    captured = capsys.readouterr()
    assert json.loads(captured.out) == result
    assert "3 of 4" in captured.err
    assert captured.err.splitlines()[-1] == word


def test_convert_takes_source_and_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(config: ConvertConfig) -> dict[str, Any]:
        assert config == ConvertConfig(source="a.bin", out="folder", tokenizer="tok.bin", context=512)
        facts = {"out": config.out, "format": "llama2.c v0", "dtype": "float32", "parameters": 260_032}
        return {**facts, "layers": 5, "vocab_size": 512, "context": 512}

    monkeypatch.setattr(convert_command, "convert", convert)
    assert steeple("convert", "a.bin", "folder", "--tokenizer", "tok.bin", "--context", "512") == 0
    assert "folder: 260,032 parameters in float32, 5 layers" in capsys.readouterr().err


def test_train_takes_a_file_of_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tmp_path / "recipe.toml"
    settings.write_text(
        'shape = "tiny"\nout = "model"\nseq_lens = [64, 128]\nshares = [0.5, 0.5]\nbatch_tokens = 256\n'
    )
    got: list[LMConfig] = []

    def train(config: LMConfig) -> dict[str, Any]:
        got.append(config)
        return {}

    monkeypatch.setattr(train_command, "train", train)
    assert steeple("train", "lm", "--config", str(settings), "--run", "run", "--shares", "0.75,0.25") == 0
    expected = {"shape": "tiny", "seq_lens": (64, 128), "shares": (0.75, 0.25), "batch_tokens": 256}
    assert got == [LMConfig(out=Path("model"), run=Path("run"), **expected)]


def test_the_list_of_commands_imports_none_of_them() -> None:
    """What a command needs is heavy; listing them must stay quick."""
    import subprocess
    import sys

    code = "import sys; from steeple.cli import main\ntry:\n    main(['--help'])\n"
    code += "except SystemExit:\n    pass\n"
    code += "print([m for m in sys.modules if m.startswith(('steeple.cli.', 'steeple.jobs'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['steeple.cli.app']"
