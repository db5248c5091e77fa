"""Dataclass to options and back."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer

from steeple.cli.bridge import Look, leaves
from steeple.cli.shell import Shell, command
from steeple.errors import ConfigError, RequestError


@dataclass(frozen=True, kw_only=True)
class InnerConfig:
    """Inner.

    Args:
        rate: how fast,
            in lines of two.
        words: may hold commas.
    """

    rate: float = 0.5
    words: tuple[str, ...] = ()
    fast: bool = True


@dataclass(frozen=True, kw_only=True)
class OuterParams:
    """Outer."""

    source: Path = field(metadata={"help": "where from"})
    sizes: tuple[int, ...] = field(default=(1, 8), metadata={"help": "how large [each]"})
    limit: int | None = field(default=None, metadata={"help": "at most"})
    name: str = "x"
    inner: InnerConfig = field(default_factory=lambda: InnerConfig(rate=0.25))

    def __post_init__(self) -> None:
        if self.limit == 13:
            raise ConfigError("OuterParams.limit = 13 brings bad luck; give another.")


LOOK = Look(positional=("source",), short={"name": "-x"}, repeated=("words",))


def call(
    *args: str, look: Look = LOOK, fails: BaseException | None = None, failed: Any = None
) -> tuple[int, OuterParams | None]:
    """Exit status of a command over ``OuterParams``, and the settings that it got."""
    got: list[OuterParams] = []

    def run(config: OuterParams, shell: Shell) -> dict[str, Any]:
        got.append(config)
        if fails is not None:
            raise fails
        shell.console.print("for people")
        return {"sizes": config.sizes, "limit": config.limit}

    app = command(OuterParams, run, help="Does it.", look=look, failed=failed)
    with pytest.raises(SystemExit) as ended:
        typer.main.get_command(app).main(list(args))
    return int(ended.value.code or 0), got[0] if got else None


def test_defaults_are_those_of_the_dataclass() -> None:
    assert call("here") == (0, OuterParams(source=Path("here")))


def test_one_field_given_leaves_its_neighbours_as_the_outer_default_has_them() -> None:
    _, got = call("here", "--no-fast")
    assert got is not None
    assert got.inner == InnerConfig(rate=0.25, fast=False)


def test_every_kind_of_option() -> None:
    options = [
        "--sizes",
        "2, 4",
        "--limit",
        "3",
        "-x",
        "y",
        "--rate",
        "2",
        "--no-fast",
        "--words",
        "a,b",
        "--words",
        "c",
    ]
    inner = InnerConfig(rate=2.0, words=("a,b", "c"), fast=False)
    expected = OuterParams(source=Path("here"), sizes=(2, 4), limit=3, name="y", inner=inner)
    assert call("here", *options) == (0, expected)


def test_help_shows_meaning_and_default_in_a_panel_for_each_dataclass(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, _ = call("--help")
    text = capsys.readouterr().out
    assert status == 0
    for part in ("Outer options", "Inner options", "where from", "how large [each]", "1,8", "0.25", "--no-fast"):
        assert part in text
    assert "how fast, in lines of two" in text
    assert "-x" in text


def test_wrong_values_end_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("here", "--sizes", "1,many") == (2, None)
    assert "--sizes: 'many' is no int; separate values by commas" in capsys.readouterr().err
    assert call("here", "--limit", "13") == (2, None)
    captured = capsys.readouterr()
    assert captured.err == "error OuterParams.limit = 13 brings bad luck; give another.\n"
    assert captured.out == ""
    assert call()[0] == 2


def test_settings_from_a_file_and_options_over_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    look = Look(file=True)
    toml = tmp_path / "c.toml"
    toml.write_text('source = "here"\nsizes = [3]\nrate = 1\nlimit = 5\n')
    expected = OuterParams(source=Path("here"), sizes=(3,), limit=6, inner=InnerConfig(rate=1.0))
    assert call("--config", str(toml), "--limit", "6", look=look) == (0, expected)
    as_json = tmp_path / "c.json"
    as_json.write_text(json.dumps({"source": "here", "no-such": 1}))
    assert call("--config", str(as_json), look=look)[0] == 2
    assert "there is no setting 'no_such'. " in capsys.readouterr().err
    assert call(look=look)[0] == 2
    assert "--source is missing; give it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("limit = true", "limit = True in the config file is no int"),
        ('limit = "5"', "limit = '5' in the config file is no int"),
        ("sizes = 5", "sizes = 5 in the config file is no list"),
        ("sizes = [1.5]", "sizes = 1.5 in the config file is no int"),
        ("source = ", "is not valid"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f'source = "here"\n{text}\n')
    assert call("--config", str(path), look=Look(file=True)) == (2, None)
    assert says in capsys.readouterr().err.replace("\n", " ")


def test_a_file_that_is_not_there_or_of_no_known_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--config", str(tmp_path / "c.toml"), look=Look(file=True))[0] == 2
    assert "cannot be read (No such file" in capsys.readouterr().err
    assert call("--config", "c.yaml", look=Look(file=True))[0] == 2
    assert "give a file that ends in .toml or .json" in capsys.readouterr().err


def test_json_goes_to_stdout_alone_or_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("here", "--json", "-")[0] == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"sizes": [1, 8], "limit": None}
    assert captured.err == "for people\n"
    path = tmp_path / "r.json"
    assert call("here", "--json", str(path))[0] == 0
    assert capsys.readouterr().out == ""
    assert json.loads(path.read_text()) == {"sizes": [1, 8], "limit": None}


def test_a_json_file_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("here", "--json", str(tmp_path / "gone" / "r.json")) == (2, None)
    assert "its folder does not exist" in capsys.readouterr().err
    status, config = call("here", "--json", str(tmp_path))  # a folder: found out at the end, and nothing is lost
    assert status == 2
    assert config is not None
    captured = capsys.readouterr()
    assert json.loads(captured.out)["limit"] is None
    assert "the result is on stdout instead" in captured.err


def test_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("here", failed=lambda result: result["limit"] is None)[0] == 1
    assert call("here", failed=lambda result: False)[0] == 0
    error = RequestError("subject = 1 is wrong; give 2.")
    error.add_note("3 are kept.")
    capsys.readouterr()
    assert call("here", fails=error)[0] == 2
    assert capsys.readouterr().err == "error subject = 1 is wrong; give 2.\n3 are kept.\n"
    assert call("here", fails=KeyboardInterrupt("what [is] kept"))[0] == 130
    assert capsys.readouterr().err == "what [is] kept\n"
    assert call("here", fails=KeyboardInterrupt())[0] == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_verbose_says_where_an_error_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    call("here", fails=ConfigError("wrong"))
    assert "Traceback" not in capsys.readouterr().err
    call("here", "-v", fails=ConfigError("wrong"))
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "level"), [([], logging.WARNING), (["-v"], logging.INFO), (["-v", "--verbose"], logging.DEBUG)]
)
def test_verbose_lowers_the_level_of_the_log(options: list[str], level: int) -> None:
    call("here", *options)
    assert logging.getLogger("steeple").level == level


def test_two_options_of_one_name_are_refused() -> None:
    @dataclass(frozen=True)
    class Inner:
        k: int = 1

    @dataclass(frozen=True)
    class Outer:
        k: int = 1
        inner: Any = None

    Outer.__annotations__["inner"] = Inner
    with pytest.raises(TypeError, match="k would be two options"):
        leaves(Outer, Outer(inner=Inner()))


def test_a_type_that_no_option_can_have_is_refused() -> None:
    @dataclass(frozen=True)
    class Odd:
        table: dict[str, int] = field(default_factory=dict)

    with pytest.raises(TypeError, match=r"Odd\.table: dict\[str, int\] cannot become an option"):
        leaves(Odd)
