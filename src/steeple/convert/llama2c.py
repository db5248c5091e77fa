"""The checkpoint formats of llama2.c (``export.py``): v0 and v1 in float32, v2 in 8-bit groups ("q80").

    v0   7 x int32 (vocabulary negative = untied head), then the weights in float32; two rotary tables that nobody
         needs stand between the last norm and the head
    v1   256 bytes: "ak42", version, the 7 x int32, uint8 tied; then norms, then matrices in float32
    v2   as v1, with int32 group size after the uint8; matrices as int8, each followed by one float32 per group

Source: https://github.com/karpathy/llama2.c, ``export.py`` and ``run.c``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from struct import unpack_from

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaConfig

from steeple.convert.source import Checkpoint, Format, file_size
from steeple.errors import StorageError

HEADER_BYTES = {Format.LLAMA2C_V0: 28, Format.LLAMA2C_V1: 256, Format.LLAMA2C_V2: 256}
ROPE_THETA = 10000.0  # fixed in run.c, like NORM_EPS: the files hold neither
NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Header:
    """The numbers at the head of a file. ``group``: weights per scale, 0 = float32."""

    format: Format
    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    tied: bool
    group: int = 0

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclass(frozen=True, slots=True)
class Block:
    """A run of equal tensors in the file: ``count`` of ``shape``. ``name`` takes the layer; empty = skipped."""

    name: str
    shape: tuple[int, ...]
    count: int = 1
    rotary_heads: int = 0  # heads whose rows are stored as interleaved pairs

    @property
    def elements(self) -> int:
        """Elements of one tensor."""
        return int(np.prod(self.shape))


def read_llama2c(path: Path, form: Format) -> Checkpoint:
    """Read the checkpoint ``path`` of format ``form``; weights come out in float32.

    Raises:
        StorageError: the header contradicts itself, or the size of the file is not what the header asks for.
    """
    header = read_header(path, form)
    blocks = layout(header)
    start = HEADER_BYTES[form]
    expected = start + sum(block.count * stored_bytes(header, block) for block in blocks)
    found = file_size(path, "checkpoint")
    if found != expected:
        fault = "is truncated" if found < expected else "has bytes left over"
        raise StorageError(
            f"checkpoint {str(path)!r} ({form.value}) {fault}: its header asks for {expected} bytes, found {found}. "
            "Fetch or export it again."
        )
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=start)
    weights: dict[str, Tensor] = {}
    at = 0
    for block in blocks:
        size = stored_bytes(header, block)
        for layer in range(block.count):
            if block.name:
                weights[block.name.format(layer)] = read_tensor(header, block, data[at : at + size])
            at += size
    if header.tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return Checkpoint(hf_config(header), weights)


def read_header(path: Path, form: Format) -> Header:
    """Read and check the header of ``path``; ``StorageError`` names the first number that cannot be."""
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES[form])
    if len(head) < HEADER_BYTES[form]:
        raise StorageError(
            f"checkpoint {str(path)!r} ({form.value}) ends inside its header: expected {HEADER_BYTES[form]} bytes, "
            f"found {len(head)}."
        )
    legacy = form is Format.LLAMA2C_V0
    dim, hidden, layers, heads, kv_heads, vocab, context = unpack_from("<7i", head, 0 if legacy else 8)
    tied = vocab > 0 if legacy else head[36] != 0
    (group,) = unpack_from("<i", head, 37) if form is Format.LLAMA2C_V2 else (0,)
    vocab = abs(vocab) if legacy else vocab
    header = Header(form, dim, hidden, layers, heads, kv_heads, vocab, context, tied, group)
    fault = _fault(header)
    if fault:
        raise StorageError(f"checkpoint {str(path)!r} ({form.value}) has a broken header: {fault}.")
    return header


def _fault(header: Header) -> str:
    """What is wrong with the header, in words; empty = nothing."""
    for name in ("dim", "hidden", "layers", "heads", "kv_heads", "vocab", "context"):
        if getattr(header, name) <= 0:
            return f"{name} = {getattr(header, name)} is not positive"
    if header.dim % header.heads or header.head_dim % 2:
        return f"dim = {header.dim} does not split into heads = {header.heads} of even size"
    if header.heads % header.kv_heads:
        return f"heads = {header.heads} is no multiple of kv_heads = {header.kv_heads}"
    if header.format is Format.LLAMA2C_V2:
        if header.group <= 0:
            return f"group size = {header.group} is not positive"
        for block in layout(header):
            if quantized(header, block) and block.elements % header.group:
                return f"group size = {header.group} does not divide a matrix of {block.shape}"
    return ""


def layout(header: Header) -> list[Block]:
    """The blocks of the file, in the order in which they are stored."""
    D, F, L, H = header.dim, header.hidden, header.layers, header.head_dim
    N, K = header.heads, header.kv_heads
    stem = "model.layers.{}."
    embed = Block("model.embed_tokens.weight", (header.vocab, D))
    attention_norm = Block(stem + "input_layernorm.weight", (D,), L)
    attention = [
        Block(stem + "self_attn.q_proj.weight", (N * H, D), L, rotary_heads=N),
        Block(stem + "self_attn.k_proj.weight", (K * H, D), L, rotary_heads=K),
        Block(stem + "self_attn.v_proj.weight", (K * H, D), L),
        Block(stem + "self_attn.o_proj.weight", (D, N * H), L),
    ]
    mlp_norm = Block(stem + "post_attention_layernorm.weight", (D,), L)
    mlp = [
        Block(stem + "mlp.gate_proj.weight", (F, D), L),
        Block(stem + "mlp.down_proj.weight", (D, F), L),
        Block(stem + "mlp.up_proj.weight", (F, D), L),
    ]
    norm = Block("model.norm.weight", (D,))
    head = [] if header.tied else [Block("lm_head.weight", (header.vocab, D))]
    if header.format is Format.LLAMA2C_V0:
        tables = Block("", (header.context, H // 2), 2)
        return [embed, attention_norm, *attention, mlp_norm, *mlp, norm, tables, *head]
    return [attention_norm, mlp_norm, norm, embed, *attention, *mlp, *head]


def quantized(header: Header, block: Block) -> bool:
    """Whether the block is stored in 8 bits: the matrices of a v2 file are, its norms are not."""
    return header.group > 0 and len(block.shape) > 1


def stored_bytes(header: Header, block: Block) -> int:
    """Bytes that one tensor of the block takes in the file."""
    if quantized(header, block):
        return block.elements + 4 * (block.elements // header.group)
    return 4 * block.elements


def read_tensor(header: Header, block: Block, data: NDArray[np.uint8]) -> Tensor:
    """One tensor of the block, float32, out of its bytes ``data``; rotary rows in Hugging Face's order."""
    values: NDArray[np.float32]
    if quantized(header, block):
        levels = data[: block.elements].view(np.int8).reshape(-1, header.group)
        scales = np.frombuffer(data[block.elements :].tobytes(), dtype="<f4")
        values = levels.astype(np.float32) * scales[:, None]
    else:
        values = np.frombuffer(data.tobytes(), dtype="<f4").astype(np.float32)
    tensor = torch.from_numpy(values.reshape(block.shape))
    return split_halves(tensor, block.rotary_heads) if block.rotary_heads else tensor


def split_halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a query or key matrix ``[heads * H, D]`` from pairs (2i, 2i + 1) to pairs (i, i + H / 2).

    llama2.c rotates neighbours, Hugging Face rotates the two halves of a head; scores are the same after both.
    """
    rows, dim = weight.shape
    return weight.view(heads, rows // heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim).contiguous()


def hf_config(header: Header) -> LlamaConfig:
    """The header as a Hugging Face configuration."""
    return LlamaConfig(
        vocab_size=header.vocab,
        hidden_size=header.dim,
        intermediate_size=header.hidden,
        num_hidden_layers=header.layers,
        num_attention_heads=header.heads,
        num_key_value_heads=header.kv_heads,
        head_dim=header.head_dim,
        max_position_embeddings=header.context,
        rms_norm_eps=NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=header.tied,
    )
