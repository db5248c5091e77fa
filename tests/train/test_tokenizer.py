"""The tokenizer loses nothing and suits indented code."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from steeple.errors import ConfigError
from steeple.train.tokenizer import EOS, train_tokenizer

TEXTS = ["class A:\n    def f(self):\n        return 123\n\n    def g(self):\n        return self.f()\n"] * 20
TOKENIZER = train_tokenizer(TEXTS, 300, 64)


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=80))
def test_decode_of_encode_is_the_text(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("text", ["a .b , c ! n't", "  \n\n\t x\r\n", "é\u0301 ☃ \U0001f600", f"a{EOS}b", " "])
def test_nothing_is_cleaned_up(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_indentation_is_one_token_and_digits_stand_alone() -> None:
    pieces = [TOKENIZER.decode([i]) for i in TOKENIZER.encode("\n        return 123")]
    assert pieces[0] == "\n        "
    assert pieces[-3:] == [" 1", "2", "3"]


def test_transformers_loads_it_with_chat_template(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert loaded.encode(TEXTS[0]) == TOKENIZER.encode(TEXTS[0])
    assert loaded.decode(loaded.encode("a . b")) == "a . b"
    assert loaded.eos_token_id == loaded.bos_token_id == 0
    chat = loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert chat == "user: hi\nassistant:"


def test_a_vocabulary_smaller_than_the_bytes_is_an_error() -> None:
    with pytest.raises(ConfigError, match="257"):
        train_tokenizer(TEXTS, 256, 64)
