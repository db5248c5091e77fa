"""Streams of real prompts: their kinds, their order, and that the second function can be copied from the first."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_tokenizer

from steeple.errors import ConfigError, StorageError
from steeple.evidence import streams
from steeple.evidence.prompts import PromptCutter, Source, read_source
from steeple.evidence.streams import (
    CODE,
    PROSE,
    REPEATS,
    STREAMS,
    Stream,
    StreamConfig,
    load_stream,
    mixed_difficulty,
    repetition,
    spec_bench,
)
from steeple.evidence.texts import functions, parsed, prose, renamed

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TOKENIZER = tiny_tokenizer()
SMALL = StreamConfig(count=12, max_tokens=24, longest=160)
QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Write about the sea.", "Shorter."]},
    {"question_id": 2, "category": "math", "turns": ["What is 2 + 2? " * 40]},
    {"question_id": 3, "category": "math", "turns": ["What is 3 + 3?"]},
]


@pytest.fixture(scope="module", autouse=True)
def files() -> Iterator[tuple[str, ...]]:
    """Every third held-out file is all that there is: reading them all takes seconds."""
    some = Source("some held-out files", read_source().texts[::3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "read_source", lambda path="": some)
        yield some.texts


@pytest.fixture(scope="module")
def mixed(files: tuple[str, ...]) -> Stream:
    return mixed_difficulty(SMALL, TOKENIZER)


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    (tmp_path / "question.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    return tmp_path


def text_of(prompt: tuple[int, ...]) -> str:
    return TOKENIZER.decode(list(prompt))


def test_spec_bench_has_the_first_turn_of_every_question(bench: Path) -> None:
    stream = spec_bench(StreamConfig(longest=40, data=str(bench)), TOKENIZER)
    assert stream.kinds == ("writing", "math")
    found = {
        text_of(prompt): stream.kinds[kind] for prompt, kind in zip(stream.prompts, stream.kind_of_each, strict=True)
    }
    assert found["Write about the sea."] == "writing"
    assert found["What is 3 + 3?"] == "math"
    (long,) = [prompt for prompt in stream.prompts if len(prompt) == 40]
    assert tuple(TOKENIZER.encode(QUESTIONS[1]["turns"][0])[-40:]) == long
    assert stream.shortened == 1
    assert stream == spec_bench(StreamConfig(longest=40, data=str(bench / "question.jsonl")), TOKENIZER)


def test_questions_may_be_put_into_the_chat_template(bench: Path) -> None:
    stream = spec_bench(StreamConfig(data=str(bench), chat=True), TOKENIZER)
    assert "user: What is 3 + 3?\nassistant:" in {text_of(prompt) for prompt in stream.prompts}

    class Bare:
        chat_template = None

    with pytest.raises(ConfigError, match="no chat template"):
        spec_bench(StreamConfig(data=str(bench), chat=True), Bare())


def test_a_missing_file_names_itself_and_where_to_get_it(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(StorageError, match=rf"{missing}.*github\.com/hemingkx/Spec-Bench"):
        load_stream("spec_bench", StreamConfig(data=str(missing)), TOKENIZER)


@pytest.mark.parametrize("line", ["{", "[1]", '{"category": "a"}', '{"category": "a", "turns": []}'])
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "question.jsonl"
    file.write_text(json.dumps(QUESTIONS[0]) + "\n" + line, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"question\.jsonl, line 2"):
        spec_bench(StreamConfig(data=str(file)), TOKENIZER)


@pytest.mark.shared
@pytest.mark.skipif(not (SHARED / "prompts" / "spec_bench").is_dir(), reason="shared/data is not beside the repository")
def test_the_published_file_has_480_questions_of_13_categories() -> None:
    config = StreamConfig(data=str(SHARED / "prompts" / "spec_bench"), longest=2048)
    stream = spec_bench(config, TOKENIZER)
    assert len(stream.prompts) == 480
    sizes = Counter(stream.kind_of_each)
    assert len(stream.kinds) == 13 == len(sizes)
    assert sorted(sizes.values()) == [10] * 8 + [80] * 5


def test_a_renamed_function_keeps_what_is_not_its_own() -> None:
    function = '''@wraps(f)
def add(a, b=1, *rest, key=None):
    """Add a and b."""
    total = a + b.a
    for x in rest:
        total += len(g(x, a=x, b=b))
    return self.add(total, key=key), f, total
'''
    assert (
        renamed(function)
        == '''@wraps(f)
def add_again(a_again, b_again=1, *rest_again, key_again=None):
    """Add a and b."""
    total_again = a_again + b_again.a
    for x_again in rest_again:
        total_again += len(g(x_again, a=x_again, b=b_again))
    return self.add(total_again, key=key_again), f, total_again
'''
    )
    assert renamed("x = 1\n") is None
    assert renamed("def f(:\n") is None


def test_a_prompt_that_repeats_ends_in_the_beginning_of_its_own_function(mixed: Stream, files: tuple[str, ...]) -> None:
    held_out = "\n".join(files)
    texts = functions(parsed(files))
    assert len(texts) > 100
    for place in mixed.places(REPEATS):
        whole = text_of(mixed.prompts[place])
        # The prompt is a function in whole, and a quarter of the same one with other names.
        own = next(text for text in texts if whole.startswith(f"{text}\n\n"))
        assert own.split("\n")[0] in held_out
        again, begun = renamed(own), whole[len(own) + 2 :]
        assert begun
        assert again is not None
        assert again.startswith(begun)
        assert len(TOKENIZER.encode(again[len(begun) :])) >= SMALL.max_tokens
        assert again.replace("_again", "") == own != again
        shapes = [[type(node) for node in ast.walk(ast.parse(text))] for text in (own, again)]
        assert shapes[0] == shapes[1]


def test_code_and_prose_are_windows_of_texts_that_nobody_trained_on(mixed: Stream, files: tuple[str, ...]) -> None:
    for kind, texts in ((CODE, files), (PROSE, prose(parsed(files)).texts)):
        for place in mixed.places(kind):
            assert len(mixed.prompts[place]) == SMALL.longest
            inner = text_of(mixed.prompts[place][2:-2])  # the ends of a window may cut a letter in two
            assert any(inner in text for text in texts)


def test_prose_holds_no_code(files: tuple[str, ...]) -> None:
    texts = prose(parsed(files)).texts
    assert sum(map(len, texts)) > 50_000
    assert not any(re.match(r"(>>> )?def \w+\(", line.lstrip()) for text in texts for line in text.split("\n"))


def test_kinds_are_thirds_in_an_order_that_the_seed_decides(mixed: Stream) -> None:
    assert Counter(mixed.kind_of_each) == {0: 4, 1: 4, 2: 4}
    assert list(mixed.kind_of_each) != sorted(mixed.kind_of_each)
    assert len(set(mixed.prompts)) == 12
    assert mixed == mixed_difficulty(SMALL, TOKENIZER)
    other = mixed_difficulty(replace(SMALL, seed=1), TOKENIZER)
    assert other.prompts_sha256 != mixed.prompts_sha256
    assert other.sha256 == mixed.sha256


def test_prose_may_come_from_a_folder(tmp_path: Path) -> None:
    book = "Head\n*** START OF THE BOOK ***\n" + "It was a dark night.\r\n" * 300 + "*** END OF THE BOOK ***\nFoot"
    (tmp_path / "book.txt").write_bytes(book.encode())
    source = prose((), str(tmp_path))
    assert source.texts == (("It was a dark night.\n" * 300).strip(),)
    config = StreamConfig(count=6, max_tokens=24, longest=160, data=str(tmp_path))
    stream = mixed_difficulty(replace(config, count=3), TOKENIZER)
    assert all("dark night" in text_of(stream.prompts[place]) for place in stream.places(PROSE))
    with pytest.raises(StorageError, match=r"holds no \.txt"):
        prose((), str(tmp_path / "none"))


def test_too_little_text_is_said() -> None:
    with pytest.raises(ConfigError, match="1 functions to repeat are needed"):
        mixed_difficulty(StreamConfig(count=3, max_tokens=40000, longest=160), TOKENIZER)
    with pytest.raises(ConfigError, match="count = 2, but"):
        mixed_difficulty(StreamConfig(count=2), TOKENIZER)


def test_code_that_does_not_repeat_repeats_less_than_other_windows(mixed: Stream, files: tuple[str, ...]) -> None:
    assert repetition([1, 2, 3, 4, 5, 6, 7]) == 0
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    chosen = {mixed.prompts[place] for place in mixed.places(CODE)}
    windows = [tuple(prompt) for prompt in PromptCutter(Source("files", files), TOKENIZER, 0).cut(SMALL.longest, 8)]
    assert chosen < set(windows)
    assert max(map(repetition, chosen)) <= min(repetition(window) for window in windows if window not in chosen)


@pytest.mark.parametrize("trace", ["code", "conversation"])
def test_prompts_are_as_long_as_those_of_the_trace(trace: str) -> None:
    config = StreamConfig(count=40, longest=400, max_tokens=8)
    stream = load_stream(f"azure_{trace}", config, TOKENIZER)
    lengths = sorted(map(len, stream.prompts))
    assert lengths[0] >= 16
    assert lengths[-1] == 400
    middle = {"code": 1469 / 7436, "conversation": 1020 / 4142}[trace]
    assert np.median(lengths) == pytest.approx(middle * 400, rel=0.15)
    assert stream.kinds == (trace,)


def test_requests_are_the_same_every_time_and_write_to_their_end(mixed: Stream) -> None:
    stream = mixed
    first, second = stream.requests(0.5), stream.requests(0.5)
    assert [r.seed for r in first] == [r.seed for r in second]
    assert len({r.seed for r in first}) == len({r.id for r in first}) == 12
    assert [r.tokens.tolist() for r in first] == [list(p) for p in stream.prompts]
    assert {r.params.max_tokens for r in first} == {24}
    assert max(r.limit for r in first) == stream.longest
    record = json.loads(json.dumps(stream.as_dict()))
    assert record["kinds"] == {REPEATS: 4, CODE: 4, PROSE: 4}


def test_unknown_names_get_the_closest_known_one(mixed: Stream) -> None:
    with pytest.raises(ConfigError, match="'spec_bench'"):
        load_stream("specbench", SMALL, TOKENIZER)
    with pytest.raises(ConfigError, match="'prose'"):
        mixed.places("pros")
    assert set(STREAMS) == {"spec_bench", "mixed_difficulty", "azure_code", "azure_conversation"}
