"""Vocabularies of sentencepiece, llama2.c and GGUF -> one tokenizer that ``AutoTokenizer`` loads.

The three carry the same pieces and scores but not the same flags. A ``.model`` says whether runs of spaces collapse;
the other two do not, and llama2.c and llama.cpp then keep them, whatever the vocabulary was trained on. Here the
vocabulary itself decides: sentencepiece learns pieces of several spaces unless it collapsed them before.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from struct import error as StructError
from struct import unpack_from
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from steeple.convert.gguf_file import BROKEN, metadata, open_gguf, token_id
from steeple.convert.source import MAGIC_GGUF, file_size
from steeple.errors import ModelError, StorageError, UnsupportedModel
from steeple.hf import load_tokenizer

SPACE = "\u2581"  # what sentencepiece writes for a space
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
SENTENCEPIECE_BPE = 2  # TrainerSpec.ModelType


class Kind(IntEnum):
    """What a piece is; the numbers are those of sentencepiece and of GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Pieces with their scores and kinds, in the order of their ids, and how text is prepared for them.

    ``collapse``: runs of spaces become one and those at the ends go; None = the source does not say.
    """

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    unknown: int | None = 0
    bos: int | None = 1
    eos: int | None = 2
    add_bos: bool = True
    add_prefix: bool = True
    collapse: bool | None = None
    charsmap: bytes = b""
    chat_template: str | None = None


def read_tokenizer(path: Path, spaces: str) -> tuple[Any, str]:
    """The tokenizer in ``path`` and the name of its format.

    Args:
        path: a sentencepiece ``.model``, a llama2.c ``tokenizer.bin``, a ``.gguf``, or a Hugging Face folder.
        spaces: "keep", "collapse" or "auto" = what the source says, or else what its pieces suggest.

    Raises:
        StorageError: there is no such file, or it is broken or of no known format.
        UnsupportedModel: a sentencepiece model other than byte-pair encoding, a GGUF tokenizer of unknown type.
        ModelError: a folder without a readable tokenizer, or a vocabulary that holds a piece twice.
    """
    if path.is_dir():
        return load_tokenizer(path), "hugging face"
    size = file_size(path, "tokenizer")
    with path.open("rb") as file:
        head = file.read(4)
    if size < 4:
        raise StorageError(f"tokenizer {str(path)!r} is empty or truncated: {size} bytes found.")
    if head == MAGIC_GGUF:
        return _read_gguf(path, spaces), "gguf"
    if head[0] == 0x0A and head[1] != 0:  # a protobuf whose first field is the first piece
        return build(read_sentencepiece(path), spaces), "sentencepiece"
    if head[2:] == b"\0\0":  # the length of the longest piece, as int32
        return build(read_tokenizer_bin(path), spaces), "llama2.c"
    raise StorageError(
        f"tokenizer {str(path)!r} is of no known format (it begins with {head!r}). Known: sentencepiece .model, "
        "llama2.c tokenizer.bin, .gguf, a Hugging Face folder."
    )


def read_sentencepiece(path: Path) -> Vocabulary:
    """Read a sentencepiece ``.model``."""
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except (DecodeError, UnicodeDecodeError) as error:
        raise StorageError(f"tokenizer {str(path)!r} is no sentencepiece model or is truncated: {error}.") from error
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != SENTENCEPIECE_BPE or trainer.treat_whitespace_as_suffix:
        raise UnsupportedModel(
            f"tokenizer {str(path)!r} is a sentencepiece model of type {trainer.model_type}, not the byte-pair "
            f"encoding of Llama (type {SENTENCEPIECE_BPE}, spaces before words); give its Hugging Face folder instead."
        )
    return Vocabulary(
        pieces=tuple(piece.piece for piece in proto.pieces),
        scores=tuple(piece.score for piece in proto.pieces),
        kinds=tuple(piece.type for piece in proto.pieces),
        unknown=_id_or_none(trainer.unk_id),
        bos=_id_or_none(trainer.bos_id),
        eos=_id_or_none(trainer.eos_id),
        add_prefix=normalizer.add_dummy_prefix,
        collapse=normalizer.remove_extra_whitespaces,
        charsmap=normalizer.precompiled_charsmap,
    )


def _id_or_none(number: int) -> int | None:
    return number if number >= 0 else None


def read_tokenizer_bin(path: Path) -> Vocabulary:
    """Read a llama2.c ``tokenizer.bin``: int32 longest piece, then per piece float32 score, int32 length, bytes."""
    data = path.read_bytes()
    pieces: list[str] = []
    scores: list[float] = []
    at = 4
    while at < len(data):
        try:
            score, length = unpack_from("<fi", data, at)
        except StructError:
            length, score = -1, 0.0
        at += 8
        if length < 0 or at + length > len(data):
            raise StorageError(
                f"tokenizer {str(path)!r} is no llama2.c tokenizer.bin or is truncated: piece {len(pieces)} reaches "
                f"beyond the {len(data)} bytes found."
            )
        pieces.append(_piece(path, len(pieces), data[at : at + length]))
        scores.append(score)
        at += length
    if len(pieces) < 3:
        raise StorageError(f"tokenizer {str(path)!r} holds {len(pieces)} pieces, less than <unk>, <s> and </s>.")
    kinds = [Kind.BYTE if BYTE_PIECE.fullmatch(piece) else Kind.NORMAL for piece in pieces]
    kinds[:3] = [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL]
    return Vocabulary(tuple(pieces), tuple(scores), tuple(kinds))


def _piece(path: Path, index: int, data: bytes) -> str:
    """The piece as sentencepiece spells it: llama2.c writes spaces as such and newlines around its two controls."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StorageError(f"tokenizer {str(path)!r} holds a piece {index} that is no UTF-8: {data!r}.") from error
    return text.strip("\n") if index in (1, 2) else text.replace(" ", SPACE)


def read_gguf_vocabulary(values: dict[str, Any]) -> Vocabulary:
    """The vocabulary among the metadata ``values`` of a GGUF file whose tokenizer is of type "llama"."""
    pieces = tuple(values["tokenizer.ggml.tokens"])
    return Vocabulary(
        pieces=pieces,
        scores=tuple(values["tokenizer.ggml.scores"]),
        kinds=tuple(values.get("tokenizer.ggml.token_type") or (Kind.NORMAL,) * len(pieces)),
        unknown=token_id(values, "unknown", len(pieces)),
        bos=token_id(values, "bos", len(pieces)),
        eos=token_id(values, "eos", len(pieces)),
        add_bos=values.get("tokenizer.ggml.add_bos_token", True),
        add_prefix=values.get("tokenizer.ggml.add_space_prefix", True),
        collapse=values.get("tokenizer.ggml.remove_extra_whitespaces"),
        chat_template=values.get("tokenizer.chat_template"),
    )


def _read_gguf(path: Path, spaces: str) -> Any:
    """The tokenizer of a GGUF file: sentencepiece here, every other type by transformers."""
    values = metadata(open_gguf(path))
    kind = values.get("tokenizer.ggml.model")
    if kind is None:
        raise StorageError(f"GGUF file {str(path)!r} holds no tokenizer; give one as tokenizer.")
    try:
        if kind == "llama":
            return build(read_gguf_vocabulary(values), spaces)
        return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    except (*BROKEN, OSError) as error:
        raise UnsupportedModel(
            f"GGUF file {str(path)!r} holds a tokenizer of type {kind!r} that cannot be read ({error}); "
            "give one as tokenizer."
        ) from error


def build(vocabulary: Vocabulary, spaces: str = "auto") -> PreTrainedTokenizerFast:
    """One tokenizer out of a vocabulary: byte-pair encoding with byte fallback, merges ordered by score."""
    counts = Counter(vocabulary.pieces)
    twice = [piece for piece, count in counts.items() if count > 1]
    if twice or not counts:
        raise ModelError(f"the vocabulary is empty or holds a piece twice: {twice[:3]!r}; it cannot be told apart.")
    ids = {piece: index for index, piece in enumerate(vocabulary.pieces)}
    control, user = _of_kind(vocabulary, Kind.CONTROL), _of_kind(vocabulary, Kind.USER_DEFINED)
    # Added tokens are looked for before spaces are rewritten, so a user's piece with spaces must grow by merges.
    user = [piece for piece in user if SPACE not in piece]
    inert = {*control, *user, *_of_kind(vocabulary, Kind.UNKNOWN), *_of_kind(vocabulary, Kind.BYTE)}
    merges = generate_merges(ids, dict(zip(vocabulary.pieces, vocabulary.scores, strict=True)), skip_tokens=inert)
    unknown, bos, eos = (
        None if index is None else vocabulary.pieces[index]
        for index in (vocabulary.unknown, vocabulary.bos, vocabulary.eos)
    )
    tokenizer = Tokenizer(BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = _normalizer(vocabulary, spaces)
    tokenizer.decoder = _decoder(vocabulary)
    if vocabulary.add_bos and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocabulary.bos)]
        )
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in control])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in user])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=bos,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
    )
    if vocabulary.chat_template:
        fast.chat_template = vocabulary.chat_template
    return fast


def _of_kind(vocabulary: Vocabulary, wanted: Kind) -> list[str]:
    return [piece for piece, kind in zip(vocabulary.pieces, vocabulary.kinds, strict=True) if kind == wanted]


def _normalizer(vocabulary: Vocabulary, spaces: str) -> Any:
    steps: list[Any] = []
    if vocabulary.charsmap:
        steps.append(normalizers.Precompiled(vocabulary.charsmap))
    if collapses(vocabulary, spaces):
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if vocabulary.add_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def collapses(vocabulary: Vocabulary, spaces: str) -> bool:
    """Whether runs of spaces become one: what ``spaces`` orders, the source says, or the pieces suggest."""
    if spaces != "auto":
        return spaces == "collapse"
    if vocabulary.collapse is not None:
        return vocabulary.collapse
    return not any(SPACE * 2 in piece for piece in vocabulary.pieces)


def _decoder(vocabulary: Vocabulary) -> Any:
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.add_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(steps)
