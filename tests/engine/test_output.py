"""Text while it is written: characters over several tokens, stop strings over several tokens, what may be shown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import transformers
from tiny import tiny_tokenizer

from steeple.engine.output import TextStream


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    return tiny_tokenizer()


def feed(stream: TextStream, tokens: Sequence[int]) -> list[tuple[str, int]]:
    """Text and safe length after every token, up to the stop."""
    seen = []
    for token in tokens:
        stopped = stream.push(token)
        seen.append((stream.text, stream.safe_length()))
        if stopped:
            break
    return seen


def test_pieces_add_up_to_the_decoded_text(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    text = "for x in größe:\n    print('日本 🎉', x)\n"
    tokens = tokenizer.encode(text)
    assert sum("\ufffd" in tokenizer.decode([t]) for t in tokens) >= 8, "characters must span tokens"
    stream = TextStream(tokenizer, ())
    seen = feed(stream, tokens)
    assert stream.text == text
    for shown, safe in seen:
        assert text.startswith(shown), "half a character was shown"
        assert safe == len(shown)


@pytest.mark.parametrize("seed", range(5))
def test_any_tokens_stream_to_their_decoded_text(tokenizer: transformers.PreTrainedTokenizerBase, seed: int) -> None:
    """Random bytes are seldom valid characters; what was shown must still be how the whole text begins."""
    numbers = np.random.default_rng(seed)
    for _ in range(60):
        tokens = numbers.integers(len(tokenizer), size=12).tolist()
        stream = TextStream(tokenizer, ())
        for end, (shown, _) in enumerate(feed(stream, tokens), 1):
            assert tokenizer.decode(tokens[:end], skip_special_tokens=True).startswith(shown)


def test_special_tokens_write_nothing(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    stream = TextStream(tokenizer, ())
    assert not stream.push(tokenizer.eos_token_id)
    assert stream.text == ""


@pytest.mark.parametrize(
    ("text", "stop", "before"),
    [
        ("print(index) of", ("index",), "print("),
        ("print(index) of", ("x)", "ind"), "print("),
        ("print(index) of", ("of", "t(i"), "prin"),
        ("aaab", ("aab",), "a"),
        ("ein 🎉!", ("🎉",), "ein "),
        ("abc", ("abc",), ""),
        ("abab", ("ba", "ab"), ""),
    ],
)
def test_text_ends_before_the_first_stop_string(
    tokenizer: transformers.PreTrainedTokenizerBase, text: str, stop: tuple[str, ...], before: str
) -> None:
    stream = TextStream(tokenizer, stop)
    seen = feed(stream, tokenizer.encode(text))
    assert stream.stopped
    assert stream.text == before
    for shown, safe in seen:
        assert before.startswith(shown[:safe]), "part of a stop string was shown"
    assert stream.safe_length() == len(before)


def test_the_earliest_of_two_stop_strings_in_one_token_counts(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    token = next(t for t in range(len(tokenizer) - 1, 0, -1) if len(set(tokenizer.decode([t]))) >= 3)
    first, second = tokenizer.decode([token])[1:3]
    stream = TextStream(tokenizer, (second, first))
    assert stream.push(token)
    assert stream.text == tokenizer.decode([token])[0]


def test_only_what_may_become_a_stop_string_is_held_back(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    stream = TextStream(tokenizer, ("xyz",))
    seen = feed(stream, [tokenizer.encode(c)[0] for c in "axyaxy"])
    assert [safe for _, safe in seen] == [1, 1, 1, 4, 4, 4]
    assert not stream.stopped
