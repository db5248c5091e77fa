"""Whatever the source, one tokenizer: the ids of sentencepiece itself for the same text."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tinystore import PIECES, SPACE, Shape, make_weights, write_gguf, write_sentencepiece, write_tokenizer_bin
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from steeple.convert.tokenizer import build, read_sentencepiece, read_tokenizer, read_tokenizer_bin

TEXTS = [
    "",
    " ",
    "the hand",
    "  the  hand ",
    "a\n\n b",
    "d\u00e9j\u00e0 \u4e16\U0001f642",
    "<0x41>",
    "hello.\tthe",
    " \n a",
]


def oracle(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vocabularies")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("collapse", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_ids_and_text_are_those_of_sentencepiece(tmp_path: Path, text: str, collapse: bool, prefix: bool) -> None:
    path = write_sentencepiece(tmp_path / "t.model", collapse=collapse, prefix=prefix)
    tokenizer, _ = read_tokenizer(path, "auto")
    expected = oracle(path).encode(text)
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    assert tokenizer.encode(text) == [1, *expected]
    if not collapse and prefix:
        assert tokenizer.decode(expected) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="abndthe.lo \n\u00e9x", max_size=30), collapse=st.booleans())
def test_any_text(folder: Path, text: str, collapse: bool) -> None:
    path = folder / f"{collapse}.model"
    if not path.exists():
        write_sentencepiece(path, collapse=collapse)
    found = build(read_sentencepiece(path)).encode(text, add_special_tokens=False)
    assert found == oracle(path).encode(text)


def test_all_sources_give_one_tokenizer(tmp_path: Path) -> None:
    paths = [
        write_sentencepiece(tmp_path / "t.model"),
        write_tokenizer_bin(tmp_path / "t.bin"),
        write_gguf(tmp_path / "t.gguf", Shape(), make_weights(Shape())),
    ]
    read = [read_tokenizer(path, "auto") for path in paths]
    assert [name for _, name in read] == ["sentencepiece", "llama2.c", "gguf"]
    assert len({tokenizer.backend_tokenizer.to_str() for tokenizer, _ in read}) == 1
    assert {(tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) for tokenizer, _ in read} == {
        (1, 2, len(PIECES))
    }


def test_a_saved_tokenizer_loads_the_same(tmp_path: Path) -> None:
    tokenizer, _ = read_tokenizer(write_tokenizer_bin(tmp_path / "t.bin"), "auto")
    tokenizer.save_pretrained(tmp_path / "saved")
    for loaded in (AutoTokenizer.from_pretrained(tmp_path / "saved"), read_tokenizer(tmp_path / "saved", "auto")[0]):
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert loaded.encode(text) == ids
            assert loaded.decode(ids) == tokenizer.decode(ids)
            assert loaded.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids[1:])


def test_a_source_that_does_not_say_collapses_only_where_its_pieces_never_hold_two_spaces(tmp_path: Path) -> None:
    without = build(read_tokenizer_bin(write_tokenizer_bin(tmp_path / "a.bin")))
    held = build(read_tokenizer_bin(write_tokenizer_bin(tmp_path / "b.bin", (*PIECES, SPACE * 2))))
    assert without.encode("a  the") == without.encode("a the")
    assert held.encode("a  the") != held.encode("a the")
    assert held.decode(held.encode("a  the"), skip_special_tokens=True) == "a  the"


def test_spaces_can_be_ordered(tmp_path: Path) -> None:
    path = write_sentencepiece(tmp_path / "t.model", collapse=True)
    keep, _ = read_tokenizer(path, "keep")
    assert keep.decode(keep.encode(" a  the "), skip_special_tokens=True) == " a  the "
    path = write_sentencepiece(tmp_path / "t.model", collapse=False)
    collapse, _ = read_tokenizer(path, "collapse")
    assert collapse.decode(collapse.encode(" a  the "), skip_special_tokens=True) == "a the"


def test_bytes_join_to_characters_and_pieces_are_never_taken_for_bytes(tmp_path: Path) -> None:
    tokenizer, _ = read_tokenizer(write_tokenizer_bin(tmp_path / "t.bin"), "auto")
    ids = tokenizer.encode("\u00e9", add_special_tokens=False)
    assert ids == [PIECES.index(SPACE), PIECES.index("<0xC3>"), PIECES.index("<0xA9>")]
    assert PIECES.index("<0x41>") not in tokenizer.encode("<0x41>")


def test_merges_never_spell_a_byte_and_user_pieces_stay_whole(tmp_path: Path) -> None:
    normal = ("<", "0", "x", "4", "1", ">", "<0", "x4", "<0x4", "1>")
    extra = (*((piece, 1) for piece in normal), ("<|turn|>", 4), (SPACE * 2, 4))
    path = write_sentencepiece(tmp_path / "t.model", collapse=False, extra=extra)
    tokenizer, _ = read_tokenizer(path, "auto")
    assert len(tokenizer) == len(PIECES) + len(extra)
    spelled = [PIECES.index(SPACE), len(PIECES) + normal.index("<0x4"), len(PIECES) + normal.index("1>")]
    assert tokenizer.encode("<0x41>", add_special_tokens=False) == oracle(path).encode("<0x41>") == spelled
    assert tokenizer.encode("the<|turn|>")[-1] == len(PIECES) + len(normal)
    assert tokenizer.decode(tokenizer.encode("a  the<|turn|>"), skip_special_tokens=True) == "a  the<|turn|>"


def test_other_tokenizers_inside_a_gguf_are_read_by_transformers(tmp_path: Path) -> None:
    letters = sorted(bytes_to_unicode().values())
    tokens = [*letters, "th", "the", "<|end|>"]
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "qwen2")
    for add, size in (
        (writer.add_context_length, 16),
        (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 64),
        (writer.add_block_count, 1),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_eos_token_id, len(tokens) - 1),
    ):
        add(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["t h", "th e"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer, name = read_tokenizer(tmp_path / "t.gguf", "auto")
    assert name == "gguf"
    assert tokenizer.encode("the<|end|>") == [257, 258]
    assert tokenizer.decode(tokenizer.encode("the d\u00e9j\u00e0")) == "the d\u00e9j\u00e0"
