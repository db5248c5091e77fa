"""The nouns that every room shares: sampling parameters, draft, verdict, and the flat batch with its view of the cache.

Shape letters: B requests, T flat input rows, N draft nodes, R rows of laws, M committed tokens, V vocabulary.
Tensors named host live on the CPU whatever the device of the model, because the engine plans with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steeple.errors import RequestError, did_you_mean

MAX_NODES = 63  # a node's ancestors are the bits of one int64, and the sign bit stays free


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request wants its tokens. Defaults mean greedy decoding.

    Penalties act on the logits first, then temperature, top_k, top_p, min_p. Repetition counts prompt and output,
    presence and frequency count the output only. ``seed`` makes the request's draws repeatable whatever runs beside it.
    ``logprobs = j`` reports for each token its log-probability under the *unprocessed* target, and the j best.
    """

    temperature: float = field(default=0.0, metadata={"help": "0 = greedy"})
    top_k: int = field(default=0, metadata={"help": "keep the k likeliest tokens, 0 = all"})
    top_p: float = field(default=1.0, metadata={"help": "keep the smallest set with this probability"})
    min_p: float = field(default=0.0, metadata={"help": "drop tokens below this share of the likeliest"})
    repetition_penalty: float = field(default=1.0, metadata={"help": "divide logits of tokens seen, 1 = off"})
    presence_penalty: float = field(default=0.0, metadata={"help": "subtract once for tokens already written"})
    frequency_penalty: float = field(default=0.0, metadata={"help": "subtract per time a token was written"})
    seed: int | None = field(default=None, metadata={"help": "makes sampling repeatable"})
    max_tokens: int = field(default=64, metadata={"help": "most tokens to generate per request"})
    stop: tuple[str, ...] = field(default=(), metadata={"help": "strings that end a request"})
    stop_token_ids: tuple[int, ...] = field(default=(), metadata={"help": "token ids that end a request"})
    ignore_eos: bool = field(default=False, metadata={"help": "go on after the end-of-text token"})
    n: int = field(default=1, metadata={"help": "outputs per prompt"})
    logprobs: int | None = field(default=None, metadata={"help": "report log-probabilities and this many best tokens"})

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise RequestError(f"{name} = {value!r} is not a list; give a list.")
            object.__setattr__(self, name, tuple(value))
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise RequestError(f"stop = {self.stop!r} holds something that is not a non-empty string; remove it.")
        if any(isinstance(t, bool) or not isinstance(t, int) for t in self.stop_token_ids):
            raise RequestError(f"stop_token_ids = {self.stop_token_ids!r} holds something that is not an integer.")
        for name, (low, high) in _FLOAT_RANGES.items():
            _check_number(name, getattr(self, name), low, high, whole=False)
        for name, (low, high) in _INT_RANGES.items():
            if getattr(self, name) is not None or name not in _MAY_BE_NONE:
                _check_number(name, getattr(self, name), low, high, whole=True)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos = {self.ignore_eos!r} is not true or false.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from a request's own fields; an unknown key raises ``RequestError`` with the closest known one."""
        known = cls.__dataclass_fields__
        for key in values:
            if key not in known:
                raise RequestError(f"{key!r} is no sampling parameter. {did_you_mean(key, known)}")
        return cls(**values)


_FLOAT_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
}
_INT_RANGES: dict[str, tuple[int, int]] = {
    "top_k": (0, 2**31 - 1),
    "seed": (-(2**63), 2**63 - 1),
    "max_tokens": (1, 2**31 - 1),
    "n": (1, 1024),
    "logprobs": (0, 100),
}
_MAY_BE_NONE = ("seed", "logprobs")


def _check_number(name: str, value: object, low: float, high: float, *, whole: bool) -> None:
    kinds: tuple[type, ...] = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not isinstance(value, int | float):
        raise RequestError(f"{name} = {value!r} is not {'an integer' if whole else 'a number'}.")
    if not math.isfinite(value) or not low <= value <= high:
        raise RequestError(f"{name} = {value!r} is out of range; give a value from {low} to {high}.")


@dataclass(frozen=True, slots=True)
class Draft:
    """A forest over the batch: what is proposed for each request, and the laws the tokens were drawn from.

    tokens  [N] int64    parents come before children, the nodes of a request stand together
    parent  [N] int64    host; flat index of the parent; -1 = the request's newest token (the root)
    cu      [B + 1] int64  host; nodes of request b are cu[b]..cu[b + 1]; may be none
    row     [N] int64    row of ``probs`` that the token was drawn from; -1 = chosen, not drawn
    probs   [R, V] float32 or None   siblings drawn i.i.d. share a row
    chain   every tree is known to be a chain, so that the short ways may be taken; False says nothing
    """

    tokens: Tensor
    parent: Tensor
    cu: Tensor
    row: Tensor
    probs: Tensor | None = None
    chain: bool = False

    @property
    def counts(self) -> Tensor:
        """Nodes per request, host ``[B]``."""
        return self.cu[1:] - self.cu[:-1]

    @staticmethod
    def empty(requests: int, device: torch.device | str = "cpu") -> Draft:
        """The forest without nodes: plain decoding."""
        none = torch.zeros(0, dtype=torch.int64)
        cu = torch.zeros(requests + 1, dtype=torch.int64)
        return Draft(none.to(device), none, cu, none.to(device), chain=True)


def concat_drafts(parts: Sequence[tuple[Sequence[int], Draft]], requests: int) -> Draft:
    """One forest over ``requests`` requests out of parts over disjoint sets of them.

    Args:
        parts: for each part the places of its requests in the whole, and its forest.
    """
    if len(parts) == 1 and list(parts[0][0]) == list(range(requests)):
        return parts[0][1]
    live = [(np.asarray(places, dtype=np.int64), draft) for places, draft in parts if draft.tokens.numel()]
    if not live:
        return Draft.empty(requests, parts[0][1].tokens.device if parts else "cpu")
    counts = np.zeros(requests, dtype=np.int64)
    for places, draft in live:
        counts[places] = draft.counts.numpy()
    cu = np.concatenate(([0], np.cumsum(counts)))
    source: list[Tensor] = []
    target_at: list[np.ndarray[Any, Any]] = []
    parent: list[np.ndarray[Any, Any]] = []
    laws: list[Tensor] = []
    rows: list[Tensor] = []
    base = 0
    for places, draft in live:
        own_counts, own_cu = draft.counts.numpy(), draft.cu.numpy()
        shift = np.repeat(cu[places] - own_cu[:-1], own_counts)
        target_at.append(np.arange(int(own_cu[-1])) + shift)
        own_parent = draft.parent.numpy()
        parent.append(np.where(own_parent < 0, -1, own_parent + shift))
        source.append(draft.tokens)
        rows.append(torch.where(draft.row < 0, draft.row, draft.row + base))
        if draft.probs is not None:
            laws.append(draft.probs)
            base += draft.probs.shape[0]
    back = torch.from_numpy(np.argsort(np.concatenate(target_at), kind="stable"))
    device = source[0].device
    return Draft(
        torch.cat(source)[back.to(device)],
        torch.from_numpy(np.concatenate(parent))[back],
        torch.from_numpy(cu),
        torch.cat(rows)[back.to(device)],
        torch.cat(laws) if laws else None,
        all(draft.chain for _, draft in live),
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the walk decided for B requests: the accepted path, then exactly one recovered or bonus token each.

    Host arrays, int64: tokens [M], cu [B + 1] their offsets; kept [K] flat node ids whose keys and values stay,
    K = M - B; row [M] the row of the target's laws that each token was judged by.
    """

    tokens: NDArray[np.int64]
    cu: NDArray[np.int64]
    kept: NDArray[np.int64]
    row: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Where the keys of a flat batch lie and which of them each row sees. Host int tensors, the same for all layers.

    The tensors may be written over for the next batch of the same shape: addresses may be kept as long as the layout
    is, contents only until the forward ends.

    cu_rows   [B + 1] int32   rows of request b are cu_rows[b]..cu_rows[b + 1]
    blocks    [sum] int32     flat block table, maybe with room behind a request's last block (which reads as block 0)
    cu_blocks [B + 1] int32   its offsets
    prefix    [T] int32       row t sees the positions 0..prefix[t] - 1 of its request
    ancestors [T] int64       and of the request's nodes those whose bit is set (bit j = node j, itself included)
    text_len  [B] int32       node j of request b is stored at sequence position text_len[b] + j
    positions [T] int32       rotary position of each row
    node_row  [B] int32       row of the request's node 0; its nodes are its last rows

    Layers and key/value heads may have block tables of their own, all of the same lengths: the table of request b for
    layer l and head h begins at ``blocks[l * layer_stride + h * head_stride + cu_blocks[b]]``. What a row sees counts
    positions of the table; a stride of 0 means one table for all. Rows are written at their slots in any case.
    """

    cu_rows: Tensor
    blocks: Tensor
    cu_blocks: Tensor
    block_size: int
    prefix: Tensor
    ancestors: Tensor
    text_len: Tensor
    positions: Tensor
    node_row: Tensor
    layer_stride: int = 0
    head_stride: int = 0

    def of_layer(self, layer: int) -> KVLayout:
        """The layout of one layer by itself: its block tables (not copied), and no ``layer_stride``."""
        if not self.layer_stride:
            return self
        return replace(self, blocks=self.blocks[layer * self.layer_stride :], layer_stride=0)


@dataclass(frozen=True, slots=True)
class Batch:
    """Flat input of one forward: text rows and draft nodes of B requests, no padding. Valid until the next is made.

    tokens [T] int64, positions [T] int64, slots [T] int64 (cache slot each row is staged at), all on the device;
    request_ids B names; node_rows [N] int64 host: flat row of each draft node.
    """

    request_ids: tuple[str, ...]
    tokens: Tensor
    positions: Tensor
    slots: Tensor
    layout: KVLayout
    node_rows: Tensor


@dataclass(frozen=True, slots=True)
class KVView:
    """Keys and values of one layer, ``[blocks, K, block_size, H]``, and the layout to read them by."""

    keys: Tensor
    values: Tensor
    layout: KVLayout


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What a cache costs: the memory planner reads only this."""

    bytes_per_token: int
    exact: bool
