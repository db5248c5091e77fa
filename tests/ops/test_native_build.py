"""Building and choosing the native attention, with a compiler of our own making: nothing is compiled here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from steeple.errors import ConfigError
from steeple.ops import native as native_module
from steeple.ops.attention import ReferenceAttention
from steeple.ops.native import LEVELS, build, level
from steeple.ops.native_attention import _native, attention_backend


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(native_module.SWITCH, raising=False)
    native_module._load.cache_clear()
    _native.cache_clear()
    yield tmp_path / "cache" / "steeple"
    native_module._load.cache_clear()
    _native.cache_clear()


def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\nfor last; do :; done\ncase "$*" in *-dM*) echo "$MACROS"; exit 0;; esac\n{body}\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", f"{script} -some-flag")
    return script


def test_a_library_is_compiled_once_per_machine(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(tmp_path, monkeypatch, f'echo built >> {tmp_path}/log; echo "$@" > "$last"')
    first = build(()).path
    assert first is not None
    assert "-some-flag" in first.read_text()
    assert build(()).path == first
    assert [p.name for p in cache.iterdir()] == [first.name]
    monkeypatch.setenv("MACROS", "another processor")
    assert build(()).path != first
    assert (tmp_path / "log").read_text() == "built\nbuilt\n"


def test_without_a_compiler_the_reference_serves_and_the_log_says_why_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with caplog.at_level(logging.WARNING):
        assert isinstance(attention_backend("cpu"), ReferenceAttention)
        assert isinstance(attention_backend("cpu"), ReferenceAttention)
    assert len(caplog.records) == 1
    assert "no C++ compiler" in caplog.text
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        attention_backend("cpu", native=True)


@pytest.mark.parametrize(
    ("body", "reason"), [("echo boom >&2; exit 1", "boom"), ('echo x > "$last"', "invalid ELF|short")]
)
def test_a_failed_build_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, reason: str) -> None:
    pretend(tmp_path, monkeypatch, body)
    with pytest.raises(ConfigError, match=reason):
        attention_backend("cpu", native=True)
    assert isinstance(attention_backend("cpu"), ReferenceAttention)


def test_the_environment_decides_what_the_caller_leaves_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    monkeypatch.setenv(native_module.SWITCH, "1")
    with pytest.raises(ConfigError):
        attention_backend("cpu")
    assert isinstance(attention_backend("cpu", native=False), ReferenceAttention)
    monkeypatch.setenv(native_module.SWITCH, "0")
    assert isinstance(attention_backend("cpu"), ReferenceAttention)


def test_native_is_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(attention_backend("cuda", native=False), ReferenceAttention)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)  # no triton
    assert isinstance(attention_backend("cuda"), ReferenceAttention)
    with pytest.raises(ConfigError, match="cuda"):
        attention_backend("cuda", native=True)


def processor(monkeypatch: pytest.MonkeyPatch, features: str) -> None:
    monkeypatch.setattr(native_module, "_features", lambda: frozenset(features.split()))


AVX2 = "sse2 avx2 fma f16c bmi2"
AVX512 = f"{AVX2} avx512f avx512bw avx512cd avx512dq avx512vl"


@pytest.mark.parametrize(
    ("features", "best"),
    [
        (f"{AVX512} avx512_bf16", "avx512bf16"),
        (AVX512, "avx512"),
        (AVX2, "avx2"),
        ("sse2", "x86-64"),
        ("", "native"),
    ],
)
def test_the_best_instruction_set_of_the_processor_is_chosen(
    features: str, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(native_module.LEVEL, raising=False)
    processor(monkeypatch, features)
    assert level() == best


def test_a_lesser_instruction_set_can_be_named_but_none_that_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, AVX2)
    monkeypatch.setenv(native_module.LEVEL, "x86-64")
    assert level() == "x86-64"
    monkeypatch.setenv(native_module.LEVEL, "avx2")
    pretend(tmp_path, monkeypatch, f'echo "$@" > {tmp_path}/command; exit 1')
    attention_backend("cpu")
    monkeypatch.setenv(native_module.LEVEL, "avx512")
    with pytest.raises(ConfigError, match=r"STEEPLE_LEVEL = 'avx512' is not possible here; give one of avx2, x86-64"):
        level()
    monkeypatch.setenv(native_module.LEVEL, "avx3")
    with pytest.raises(ConfigError, match="avx3"):
        level()


def test_a_compiler_that_does_not_know_the_processor_builds_for_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, AVX2)
    monkeypatch.delenv(native_module.LEVEL, raising=False)
    log = tmp_path / "log"
    pretend(tmp_path, monkeypatch, f'echo "$*" >> {log}; case "$*" in *march*) exit 1;; esac; echo x > "$last"')
    assert isinstance(attention_backend("cpu"), ReferenceAttention)  # what was built is no library
    commands = log.read_text().splitlines()
    assert [LEVELS["avx2"].flags[0] in command for command in commands] == [True, False]
