"""The corpus rules and the token files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from steeple.errors import ConfigError, StorageError
from steeple.train.data import (
    Document,
    TokenStream,
    corpus_files,
    documents,
    held_out_texts,
    is_held_out,
    is_validation,
    write_tokens,
)


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    for name in ("ast.py", "json/decoder.py", "encodings/cp037.py", "site-packages/x.py", "_sysconfigdata_x.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x = 1\n")
    (root / "table.py").write_text("y" * 300_001)
    (root / "pydoc_data").mkdir()
    (root / "pydoc_data/topics.py").write_text("z" * 300_001)
    (root / "latin.py").write_bytes(b"# \xe9\n")
    return root


def test_corpus_follows_the_stated_rule(stdlib: Path) -> None:
    assert [name for name, _ in corpus_files(stdlib)] == ["ast.py", "json/decoder.py", "pydoc_data/topics.py"]


def test_no_python_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="standard library"):
        corpus_files(tmp_path)


def test_held_out_is_the_documented_hash_rule() -> None:
    names = [f"folder/file{i}.py" for i in range(2000)]
    expected = [n for n in names if int(hashlib.sha256(n.encode()).hexdigest(), 16) % 20 == 0]
    assert [n for n in names if is_held_out(n)] == expected
    assert 60 < len(expected) < 140
    assert not any(is_held_out(n) for n in names if is_validation(n))


def test_held_out_texts_of_this_interpreter() -> None:
    texts = dict(held_out_texts())
    named = [name for name, _ in corpus_files() if is_held_out(name)]
    assert sorted(texts) == named
    assert len(texts) > 10
    assert all(Document(name, text).split == "held_out" for name, text in texts.items())


def test_splits_do_not_overlap() -> None:
    splits = {name: Document(name, "").split for name in (f"f{i}.py" for i in range(4000))}
    assert {name for name, split in splits.items() if split == "held_out"} == {n for n in splits if is_held_out(n)}
    assert 10 < list(splits.values()).count("validation") < 80
    assert list(splits.values()).count("train") > 3600


def test_given_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n\n{"text": "three"}\n')
    (tmp_path / "c.bin").write_text("no")
    assert documents([str(tmp_path)]) == [
        Document("a.txt", "one"),
        Document("b.jsonl:0", "two"),
        Document("b.jsonl:2", "three"),
    ]
    assert documents([str(tmp_path / "a.txt")]) == [Document("a.txt", "one")]


@pytest.mark.parametrize("line", ['{"body": "x"}', "[1]", "not json"])
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ConfigError, match=r"b\.jsonl, line 2"):
        documents([str(path)])


def test_missing_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        documents([str(tmp_path / "none")])


def encode(texts: list[str]) -> list[list[int]]:
    return [[ord(c) for c in text] for text in texts]


def test_tokens_are_documents_each_with_an_end(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    docs = [Document("a", "abc"), Document("b", "d"), Document("c", "")]
    assert write_tokens(docs, encode, 0, path) == 7
    stream = np.fromfile(path, "<u2").tolist()
    assert stream[-1] == 0
    assert sorted("".join(map(chr, stream)).split("\0")[:-1]) == ["", "abc", "d"]
    assert not list(tmp_path.glob("*.partial"))


def test_a_token_beyond_16_bits_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="16 bits"):
        write_tokens([Document("a", "\U00010000")], encode, 0, tmp_path / "train.bin")


def test_an_epoch_shows_every_window_once_and_batches_are_pure(tmp_path: Path) -> None:
    stream = TokenStream(np.arange(81, dtype="<u2"), seed=3)
    rows = [stream.batch(0, i, 2, 8) for i in range(5)]
    assert sorted(int(r) for batch in rows for r in batch[:, 0]) == list(range(0, 80, 8))
    assert all((batch[:, 1:] - batch[:, :-1] == 1).all() for batch in rows)
    assert (stream.batch(0, 3, 2, 8) == rows[3]).all()
    assert [stream.batch(0, i, 2, 8).tolist() for i in range(5, 10)] != [r.tolist() for r in rows]
    assert [TokenStream(stream.tokens, 4).batch(0, i, 2, 8).tolist() for i in range(5)] != [r.tolist() for r in rows]


def test_too_few_tokens_for_a_window(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="less than one window"):
        TokenStream(np.arange(8, dtype="<u2"), 0).batch(0, 0, 1, 8)
