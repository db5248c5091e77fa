"""Prompts: exact lengths, different from each other, the same every time, and honest when the text is too short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_tokenizer

from steeple.errors import ConfigError, StorageError
from steeple.evidence.prompts import HELD_OUT, PromptCutter, Source, read_source

SOURCE = Source("test", tuple(f"def f{i}(x, y):\n    return x * {i} + y\n" * 6 for i in range(5)))


def cutter(seed: int = 0, source: Source = SOURCE) -> PromptCutter:
    return PromptCutter(source, tiny_tokenizer(), seed)


def test_prompts_have_exactly_the_length_and_differ() -> None:
    prompts = cutter().cut(12, 8)
    assert [len(p) for p in prompts] == [12] * 8
    assert len({tuple(p) for p in prompts}) == 8


def test_prompts_are_windows_of_the_text() -> None:
    tokenizer = tiny_tokenizer()
    texts = [tokenizer.encode(text, add_special_tokens=False) for text in SOURCE.texts]
    for prompt in cutter().cut(12, 8):
        assert any(text[i : i + 12] == prompt for text in texts for i in range(0, len(text), 12))


def test_one_window_of_every_text_comes_before_a_second_of_any() -> None:
    tokenizer = tiny_tokenizer()
    names = [tokenizer.encode(f"f{i}(", add_special_tokens=False) for i in range(5)]
    found = set()
    for prompt in cutter().cut(40, 5):
        found.add(next(n for n, name in enumerate(names) if any(prompt[i : i + len(name)] == name for i in range(40))))
    assert found == set(range(5))


def test_the_seed_decides_and_more_prompts_begin_with_fewer() -> None:
    assert cutter(3).cut(12, 8) == cutter(3).cut(12, 8)
    assert cutter(3).cut(12, 8)[:4] == cutter(3).cut(12, 4)
    assert cutter(3).cut(12, 8) != cutter(4).cut(12, 8)


def test_texts_that_say_the_same_give_no_prompt_twice() -> None:
    twice = Source("test", SOURCE.texts[:1] * 3)
    windows = {tuple(p) for p in cutter(source=twice).cut(12, 5)}
    assert len(windows) == 5


def test_a_tokenizer_that_begins_texts_begins_prompts() -> None:
    class Beginning:
        def encode(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
            return [1] * add_special_tokens + [ord(c) for c in text]

    prompts = PromptCutter(SOURCE, Beginning(), 0).cut(9, 4)
    assert all(p[0] == 1 and 1 not in p[1:] and len(p) == 9 for p in prompts)


def test_too_little_text_says_how_much_there_is() -> None:
    texts = Source("small.txt", ("a b c d e f g h",))
    with pytest.raises(ConfigError, match=r"3 different prompts of 6 tokens.*small\.txt: 1 texts.*gives 2"):
        PromptCutter(texts, tiny_tokenizer(), 0).cut(6, 3)


def test_the_default_source_is_the_held_out_standard_library() -> None:
    source = read_source()
    assert source.name == HELD_OUT
    assert sum(map(len, source.texts)) > 100_000


def test_files(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one text\n\nof two lines")
    assert read_source(str(text)).texts == ("one text\n\nof two lines",)
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join([json.dumps({"prompt": "x"}), "", json.dumps({"text": "y"}), json.dumps("z")]))
    assert read_source(str(lines)).texts == ("x", "y", "z")
    assert read_source(str(lines)).digest != read_source(str(text)).digest


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither \.jsonl nor \.txt"):
        read_source("prompts.csv")
    with pytest.raises(StorageError, match="cannot be read"):
        read_source(str(tmp_path / "absent.txt"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x"}\n{"prompt":')
    with pytest.raises(ConfigError, match=r"bad\.jsonl, line 2: no JSON"):
        read_source(str(bad))
    bad.write_text('{"question": "x"}')
    with pytest.raises(ConfigError, match="line 1: no string under 'prompt' or 'text'"):
        read_source(str(bad))
