"""Whatever is wrong with a file is said in words, with the bytes expected and found, and nothing is written."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from tinystore import (
    PIECES,
    Shape,
    make_weights,
    write_gguf,
    write_sentencepiece,
    write_tokenizer_bin,
    write_v0,
    write_v1,
    write_v2,
)

from steeple.convert import ConvertConfig, convert
from steeple.errors import (
    ConfigError,
    ModelError,
    SteepleError,
    StorageError,
    TokenizerMismatch,
    UnsupportedModel,
    WeightError,
)

WRITERS = {"v0": write_v0, "v1": write_v1, "v2": write_v2, "gguf": write_gguf}


def attempt(source: Path, tokenizer: Path | None = None, **changes: object) -> None:
    out = source.parent / "out"
    before = sorted(source.parent.iterdir())
    try:
        convert(ConvertConfig(source=str(source), out=str(out), tokenizer=tokenizer and str(tokenizer), **changes))
    except SteepleError:
        assert sorted(source.parent.iterdir()) == before, "a failed conversion leaves something behind"
        raise


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer_bin(tmp_path / "tok.bin")


@pytest.mark.parametrize("form", WRITERS)
def test_truncated_files_say_what_is_expected_and_found(tmp_path: Path, tokenizer: Path, form: str) -> None:
    path = WRITERS[form](tmp_path / "model", Shape(), make_weights(Shape()))
    data = path.read_bytes()
    path.write_bytes(data[:-40])
    with pytest.raises(
        StorageError, match=rf"truncated: its header asks for {len(data)} bytes, found {len(data) - 40}"
    ):
        attempt(path, tokenizer)


@pytest.mark.parametrize("form", ["v0", "v1", "v2"])
def test_bytes_left_over_are_refused(tmp_path: Path, tokenizer: Path, form: str) -> None:
    path = WRITERS[form](tmp_path / "model", Shape(), make_weights(Shape()))
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"\0" * 4)
    with pytest.raises(StorageError, match=rf"left over: its header asks for {size} bytes, found {size + 4}"):
        attempt(path, tokenizer)


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("length", [0, 3, 20, 100])
def test_files_that_end_in_their_header(tmp_path: Path, tokenizer: Path, form: str, length: int) -> None:
    path = WRITERS[form](tmp_path / "model", Shape(), make_weights(Shape()))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(StorageError, match=rf"(found {length}\b|\({length} bytes found)"):
        attempt(path, tokenizer)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"Once upon a time there was a model.", "no known format.*b'Once'.*gguf"),
        (b"\0" * 64, "no known format"),
        (b"PK\x03\x04" + b"\0" * 60, "PyTorch checkpoint; export"),
        (pickle.dumps([1], protocol=2), "pickle; export"),
    ],
)
def test_unknown_formats_are_named(tmp_path: Path, tokenizer: Path, data: bytes, message: str) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    with pytest.raises(StorageError, match=message):
        attempt(path, tokenizer)


def test_an_unknown_export_version_is_named(tmp_path: Path, tokenizer: Path) -> None:
    path = write_v1(tmp_path / "model.bin", Shape(), make_weights(Shape()))
    data = bytearray(path.read_bytes())
    data[4] = 3
    path.write_bytes(data)
    with pytest.raises(UnsupportedModel, match="version 3; export it as version 0, 1 or 2"):
        attempt(path, tokenizer)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (8, 0, "dim = 0 is not positive"),
        (20, 5, "dim = 32 does not split into heads = 5"),
        (24, 3, "heads = 4 is no multiple of kv_heads = 3"),
        (37, 0, "group size = 0 is not positive"),
        (37, 7, "group size = 7 does not divide"),
    ],
)
def test_broken_headers_name_the_number(tmp_path: Path, tokenizer: Path, offset: int, value: int, message: str) -> None:
    path = write_v2(tmp_path / "model.bin", Shape(), make_weights(Shape()))
    data = bytearray(path.read_bytes())
    data[offset : offset + 4] = value.to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(StorageError, match=message):
        attempt(path, tokenizer)


def test_a_missing_checkpoint_and_a_folder(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(StorageError, match=r"absent\.bin' does not exist"):
        attempt(tmp_path / "absent.bin", tokenizer)
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="is a folder; give one file"):
        attempt(tmp_path / "folder", tokenizer)


def test_a_missing_tokenizer_lists_what_lies_beside(tmp_path: Path, tokenizer: Path) -> None:
    path = write_v0(tmp_path / "model.bin", Shape(), make_weights(Shape()))
    with pytest.raises(StorageError, match=r"holds no tokenizer; give the .* Beside the checkpoint: tok\.bin\."):
        attempt(path)
    with pytest.raises(StorageError, match="nowhere' does not exist"):
        attempt(path, tmp_path / "nowhere")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    path = write_v0(tmp_path / "model.bin", Shape(), make_weights(Shape()))
    other = write_tokenizer_bin(tmp_path / "tok.bin", (*PIECES, "extra"))
    with pytest.raises(TokenizerMismatch, match=rf"{len(PIECES) + 1} tokens, the model in .* has {len(PIECES)}"):
        attempt(path, other)


def broken_tokenizers() -> dict[str, tuple[Callable[[Path], object], type[SteepleError], str]]:
    def cut(write: Callable[[Path], Path], length: int) -> Callable[[Path], object]:
        return lambda path: path.write_bytes(write(path).read_bytes()[:length])

    return {
        "bin cut": (cut(write_tokenizer_bin, 3000), StorageError, "truncated: piece .* beyond the 3000 bytes"),
        "bin of one piece": (cut(write_tokenizer_bin, 17), StorageError, "holds 1 pieces"),
        "model cut": (cut(write_sentencepiece, 1001), StorageError, "is truncated"),
        "gguf without": (lambda path: write_bare_gguf(path), StorageError, "holds no tokenizer; give one"),
        "empty": (lambda path: path.write_bytes(b""), StorageError, "0 bytes found"),
        "text": (lambda path: path.write_text("hello"), StorageError, "no known format"),
        "folder": (lambda path: path.mkdir(), ModelError, "cannot be read"),
        "unigram": (lambda path: write_sentencepiece(path, model_type=1), UnsupportedModel, "type 1"),
        "twice": (lambda path: write_tokenizer_bin(path, (*PIECES, "the")), ModelError, "twice: \\['the'\\]"),
    }


def write_bare_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("case", broken_tokenizers())
def test_broken_tokenizers(tmp_path: Path, case: str) -> None:
    write, kind, message = broken_tokenizers()[case]
    path = write_v0(tmp_path / "model.bin", Shape(), make_weights(Shape()))
    write(tmp_path / "tok")
    with pytest.raises(kind, match=message):
        attempt(path, tmp_path / "tok")


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [("float32", np.nan, "damaged"), ("float16", 1e6, "convert to bfloat16"), ("float32", np.inf, "damaged")],
)
def test_values_that_are_no_numbers(tmp_path: Path, tokenizer: Path, dtype: str, value: float, message: str) -> None:
    weights = make_weights(Shape())
    weights["wo"][1, 3, 4] = value
    path = write_v1(tmp_path / "model.bin", Shape(), weights)
    with pytest.raises(WeightError, match=f"layers.1.self_attn.o_proj.*{message}"):
        attempt(path, tokenizer, dtype=dtype)


def test_a_gguf_with_scaled_rotary_is_refused(tmp_path: Path) -> None:
    shape = Shape()
    path = write_gguf(tmp_path / "a.gguf", shape, make_weights(shape), scaling="yarn")
    with pytest.raises(UnsupportedModel, match="rotary embedding \\('yarn'\\)"):
        attempt(path)


def test_a_gguf_that_loads_in_part_is_refused(tmp_path: Path) -> None:
    weights = make_weights(Shape())
    path = write_gguf(tmp_path / "a.gguf", Shape(), weights, odd=weights["norm"])
    with pytest.raises(UnsupportedModel, match=r"holds 21 tensors, 20 of which .*look at rope_freqs\.weight"):
        attempt(path)


def test_a_gguf_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    shape = Shape(layers=2)
    weights = make_weights(shape)
    path = write_gguf(tmp_path / "a.gguf", shape, weights, skip="blk.1.ffn_up")
    with pytest.raises(WeightError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        attempt(path)


def test_a_gguf_of_an_unknown_architecture(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", Shape(), make_weights(Shape()), architecture="mamba9")
    with pytest.raises(UnsupportedModel, match="architecture 'mamba9'"):
        attempt(path)


def test_out_is_never_overwritten_unasked(tmp_path: Path, tokenizer: Path) -> None:
    path = write_v0(tmp_path / "model.bin", Shape(), make_weights(Shape()))
    out = tmp_path / "out"
    out.mkdir()
    attempt(path, tokenizer)  # an empty folder is free
    stale = out / "stale.txt"
    stale.write_text("old")
    with pytest.raises(StorageError, match="not empty; name another folder or set overwrite"):
        attempt(path, tokenizer)
    attempt(path, tokenizer, overwrite=True)
    assert not stale.exists()
    (out / "config.json").unlink()
    with pytest.raises(StorageError, match="other things than a model"):
        attempt(path, tokenizer, overwrite=True)


def test_out_that_holds_the_source_or_is_a_file(tmp_path: Path, tokenizer: Path) -> None:
    path = write_v0(tmp_path / "model.bin", Shape(), make_weights(Shape()))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StorageError, match="holds the source itself"):
        convert(ConvertConfig(source=str(path), out=str(tmp_path), tokenizer=str(tokenizer), overwrite=True))
    assert path.exists()
    with pytest.raises(StorageError, match="is a file; name a folder"):
        convert(ConvertConfig(source=str(path), out=str(tokenizer), tokenizer=str(tokenizer)))
    with pytest.raises(StorageError, match="cannot be written"):
        convert(ConvertConfig(source=str(path), out=str(tokenizer / "sub"), tokenizer=str(tokenizer)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "floaat32"}, "dtype = 'floaat32' is unknown. Did you mean 'float32'"),
        ({"spaces": "keeps"}, "spaces = 'keeps' is unknown. Did you mean 'keep'"),
        ({"context": -1}, "context = -1 is out of range"),
        ({"source": ""}, "source is empty"),
    ],
)
def test_settings_are_checked(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConvertConfig(**{"source": "a", "out": "b", **changes})
