"""Tiny checkpoints and vocabularies, written here byte by byte as llama2.c writes them, and its forward in numpy."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from sentencepiece import sentencepiece_model_pb2

Array = NDArray[np.float32]
SPACE = "\u2581"
WORDS = ("a b n d t h e . l o" + f" {SPACE} {SPACE}a {SPACE}t nd and th he the {SPACE}the {SPACE}and ll").split(" ")
PIECES = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS)
GROUP = 16
MATRICES = ("embed", "wq", "wk", "wv", "wo", "w1", "w2", "w3", "head")


@dataclass(frozen=True, kw_only=True)
class Shape:
    dim: int = 32
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    vocab: int = len(PIECES)
    context: int = 24
    tied: bool = True

    def numbers(self) -> tuple[int, ...]:
        return (self.dim, self.hidden, self.layers, self.heads, self.kv_heads, self.vocab, self.context)


def make_weights(shape: Shape, seed: int = 0) -> dict[str, Array]:
    """Every weight under its llama2.c name, layers stacked; queries and keys in interleaved pairs."""
    draw = np.random.default_rng(seed)
    D, F, L, KV = shape.dim, shape.hidden, shape.layers, shape.dim * shape.kv_heads // shape.heads
    sizes = {
        "embed": (shape.vocab, D),
        "attention_norm": (L, D),
        "wq": (L, D, D),
        "wk": (L, KV, D),
        "wv": (L, KV, D),
        "wo": (L, D, D),
        "mlp_norm": (L, D),
        "w1": (L, F, D),
        "w2": (L, D, F),
        "w3": (L, F, D),
        "norm": (D,),
    }
    if not shape.tied:
        sizes["head"] = (shape.vocab, D)
    return {name: (draw.normal(size=size) * 0.25 + ("norm" in name)).astype(np.float32) for name, size in sizes.items()}


def quantise(matrix: Array) -> tuple[NDArray[np.int8], Array]:
    """``quantize_q80`` of llama2.c's export.py."""
    groups = matrix.reshape(-1, GROUP)
    scales = (np.abs(groups).max(axis=1) / np.float32(127)).astype(np.float32)
    return np.round(groups / scales[:, None]).astype(np.int8), scales


def rounded(weights: dict[str, Array]) -> dict[str, Array]:
    """The weights as they come back from 8 bits."""
    out = dict(weights)
    for name in MATRICES:
        if name in weights:
            levels, scales = quantise(weights[name])
            out[name] = (levels.astype(np.float32) * scales[:, None]).reshape(weights[name].shape)
    return out


def write_v0(path: Path, shape: Shape, weights: dict[str, Array]) -> Path:
    vocab = shape.vocab if shape.tied else -shape.vocab
    order = ("embed", "attention_norm", "wq", "wk", "wv", "wo", "mlp_norm", "w1", "w2", "w3", "norm")
    tables = np.zeros(shape.context * shape.dim // shape.heads, dtype=np.float32)
    parts = [weights[name] for name in order] + [tables] + ([] if shape.tied else [weights["head"]])
    head = struct.pack("<7i", *replace(shape, vocab=vocab).numbers())
    path.write_bytes(head + b"".join(part.tobytes() for part in parts))
    return path


def _head(shape: Shape, version: int, extra: bytes = b"") -> bytes:
    head = struct.pack("<Ii7iB", 0x616B3432, version, *shape.numbers(), shape.tied) + extra
    return head.ljust(256, b"\0")


ORDER = ("attention_norm", "mlp_norm", "norm", "embed", "wq", "wk", "wv", "wo", "w1", "w2", "w3", "head")


def write_v1(path: Path, shape: Shape, weights: dict[str, Array]) -> Path:
    path.write_bytes(_head(shape, 1) + b"".join(weights[name].tobytes() for name in ORDER if name in weights))
    return path


def write_v2(path: Path, shape: Shape, weights: dict[str, Array]) -> Path:
    parts = [_head(shape, 2, struct.pack("<i", GROUP))]
    for name in ORDER:
        if name in weights and name not in MATRICES:
            parts.append(weights[name].tobytes())
        elif name in weights:
            stack = weights[name] if weights[name].ndim == 3 else weights[name][None]
            for matrix in stack:
                levels, scales = quantise(matrix)
                parts += [levels.tobytes(), scales.tobytes()]
    path.write_bytes(b"".join(parts))
    return path


def write_gguf(
    path: Path,
    shape: Shape,
    weights: dict[str, Array],
    *,
    architecture: str = "llama",
    scaling: str = "",
    odd: Array | None = None,
    skip: str = "none",
) -> Path:
    """A llama GGUF: its queries and keys are interleaved pairs too. The options make files that must be refused."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.dim)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.dim // shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(PIECES))
    writer.add_token_scores([float(score) for score in scores()])
    writer.add_token_types(kinds())
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2**32 - 1)
    if scaling:
        writer.add_string(f"{architecture}.rope.scaling.type", scaling)
    if odd is not None:
        writer.add_tensor("rope_freqs.weight", odd)
    whole = {"token_embd": "embed", "output_norm": "norm"} | ({} if shape.tied else {"output": "head"})
    stacked = {
        "attn_norm": "attention_norm",
        "attn_q": "wq",
        "attn_k": "wk",
        "attn_v": "wv",
        "attn_output": "wo",
        "ffn_norm": "mlp_norm",
        "ffn_gate": "w1",
        "ffn_down": "w2",
        "ffn_up": "w3",
    }
    for name, ours in whole.items():
        writer.add_tensor(f"{name}.weight", weights[ours])
    for layer in range(shape.layers):
        for name, ours in stacked.items():
            if skip == f"blk.{layer}.{name}":
                continue
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ascontiguousarray(weights[ours][layer]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def scores() -> list[float]:
    return [0.0] * 259 + [float(-index) for index in range(len(PIECES) - 259)]


def kinds() -> list[int]:
    return [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 259)


def write_tokenizer_bin(path: Path, pieces: tuple[str, ...] = PIECES) -> Path:
    texts = [piece.replace(SPACE, " ") for piece in pieces]
    texts[1:3] = ["\n<s>\n", "\n</s>\n"]
    blobs = [text.encode() for text in texts]
    values = scores() + [-99.0] * (len(pieces) - len(PIECES))
    entries = [struct.pack("<fi", score, len(blob)) + blob for score, blob in zip(values, blobs, strict=True)]
    path.write_bytes(struct.pack("<i", max(map(len, blobs))) + b"".join(entries))
    return path


def write_sentencepiece(
    path: Path,
    *,
    collapse: bool = True,
    prefix: bool = True,
    model_type: int = 2,
    extra: tuple[tuple[str, int], ...] = (),
) -> Path:
    """``extra``: further pieces with their kinds, each scored below the one before."""
    proto = sentencepiece_model_pb2.ModelProto()
    for piece, score, kind in zip(PIECES, scores(), kinds(), strict=True):
        proto.pieces.add(piece=piece, score=score, type=kind)
    for index, (piece, kind) in enumerate(extra):
        proto.pieces.add(piece=piece, score=-100.0 - index, type=kind)
    proto.trainer_spec.model_type = model_type
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = prefix
    proto.normalizer_spec.remove_extra_whitespaces = collapse
    path.write_bytes(proto.SerializeToString())
    return path


def llama2c_logits(shape: Shape, weights: dict[str, Array], tokens: list[int]) -> Array:
    """The forward of run.c, all positions at once: ``[T, V]``. It rotates neighbours, (2i, 2i + 1)."""
    T, N, K, H = len(tokens), shape.heads, shape.kv_heads, shape.dim // shape.heads
    angle = np.arange(T)[:, None] * 10000.0 ** (-np.arange(0, H, 2) / H)
    turn = np.exp(1j * angle)[:, None, :]

    def norm(x: Array, weight: Array) -> Array:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight

    def rotate(x: Array) -> Array:
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    x = weights["embed"][tokens].astype(np.float64)
    for layer in range(shape.layers):
        w = {name: value[layer] for name, value in weights.items() if name not in ("embed", "norm", "head")}
        y = norm(x, w["attention_norm"])
        q = rotate((y @ w["wq"].T).reshape(T, N, H))
        k = rotate((y @ w["wk"].T).reshape(T, K, H)).repeat(N // K, axis=1)
        v = (y @ w["wv"].T).reshape(T, K, H).repeat(N // K, axis=1)
        score = np.einsum("tnh,snh->nts", q, k) / np.sqrt(H)
        score = np.where(np.tri(T, dtype=bool), score, -np.inf)
        law = np.exp(score - score.max(-1, keepdims=True))
        law /= law.sum(-1, keepdims=True)
        x = x + np.einsum("nts,snh->tnh", law, v).reshape(T, -1) @ w["wo"].T
        y = norm(x, w["mlp_norm"])
        gate = y @ w["w1"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["w3"].T)) @ w["w2"].T
    return norm(x, weights["norm"]) @ weights.get("head", weights["embed"]).T
