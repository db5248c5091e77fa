"""Request decomposition for models of ``transformers``: keys and values of a ragged batch in pieces of one width.

A rectangular cache pads every row to the longest. Here the text of a request lies in as many pieces of ``width``
positions as it needs, ``[P, K, W, D]``, and a map tells whose each piece is. Queries are repeated for every piece of
their request, attention is computed over each piece by itself and merged (``ops/merge.py``). Hidden states stay
``[B, q, D]``: nothing but attention knows of pieces, and the model's code stays as it is.

Source: SPIN (arXiv 2503.15921), its fast batch verification; the width is ours: c_kv x unused positions + c_q x extra
queries, least. Where attention reads a block table, as in Steeple's own engine, none of this is needed.

Shape letters: B requests, b rows of a forward, q queries of a row, N query heads, K key heads, D head dim, P pieces,
W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from steeple.errors import InternalError, UnsupportedModel
from steeple.ops.merge import merge, partial_attention

NAME = "steeple_pieces"  # of the attention, among those of transformers
SPARE = 8  # a cache that must grow grows by one part in so many
REFUSED = ("sliding_window", "softcap", "s_aux", "head_mask", "position_bias")  # what the attention would have to know


def pieces_of(lengths: Sequence[int], width: int) -> int:
    """Pieces of ``width`` positions that hold texts of ``lengths``."""
    return sum(-(-length // width) for length in lengths)


def best_width(lengths: Sequence[int], queries: int, *, c_kv: float = 1.0, c_q: float = 1.0, least: int = 16) -> int:
    """The width with the least ``c_kv`` x unused positions + ``c_q`` x extra queries; of equals the largest.

    Args:
        lengths: positions of each request, at least one request with one position. queries: of a request in a forward.
        c_kv: cost of an unused position. c_q: of a query more, its scores and its part in the merge included.
        least: no width below, unless the longest text is.
    """
    length_B = np.asarray(lengths, dtype=np.int64)
    longest = int(length_B.max())
    width_W = np.arange(longest, min(least, longest) - 1, -1, dtype=np.int64)
    pieces_W = np.zeros_like(width_W)
    for length, count in zip(*np.unique(length_B, return_counts=True), strict=True):
        pieces_W += count * -(-length // width_W)
    unused_W = pieces_W * width_W - length_B.sum()
    extra_W = (pieces_W - length_B.shape[0]) * queries
    return int(width_W[np.argmin(c_kv * unused_W + c_q * extra_W)])


def saved_share(lengths: Sequence[int], width: int) -> float:
    """The share of a rectangular cache's bytes that pieces of ``width`` save; negative if they take more."""
    return 1.0 - pieces_of(lengths, width) * width / (len(lengths) * max(lengths))


@dataclass(frozen=True, slots=True)
class PieceMap:
    """What a forward of b rows needs to know of the pieces that its rows have.

    pieces [P] int64   their numbers in the cache
    owner [P] int64    the row of the forward that each belongs to
    start [P] int64    the position of its request that its first slot holds
    position [b, q] int64  of the queries; -1 = the query is none and sees nothing
    row, column [n] int64  the queries that are written, and where: piece, slot [n]
    """

    pieces: Tensor
    owner: Tensor
    start: Tensor
    position: Tensor
    row: Tensor
    column: Tensor
    piece: Tensor
    slot: Tensor

    def seen(self, width: int) -> Tensor:
        """Bool ``[P, q, W]``: whether a query sees a slot: those at its own position and before."""
        at = self.start.unsqueeze(1) + torch.arange(width, device=self.start.device)
        return at.unsqueeze(1) <= self.position[self.owner].unsqueeze(2)


class PieceCache(Cache):
    """Keys and values of ``requests`` texts in pieces of ``width`` positions, as a cache of ``transformers``.

    Args: capacity: pieces to make room for at once, where it is known how long the texts will be.

    A forward is announced by ``begin``; what it writes counts once ``keep`` says how much of it stays. Positions behind
    what counts are written over.
    """

    def __init__(self, requests: int, width: int, capacity: int = 0) -> None:
        super().__init__(layers=[])
        self.width, self._capacity = width, capacity
        self.lengths: NDArray[np.int64] = np.zeros(requests, dtype=np.int64)
        self._tables: list[list[int]] = [[] for _ in range(requests)]
        self._used = 0
        self._stored: dict[int, list[Tensor]] = {}  # layer -> keys, values: [capacity, K, W, D]
        self._map: PieceMap | None = None

    def begin(self, rows: Sequence[int], counts: Sequence[int], device: torch.device | str = "cpu") -> PieceMap:
        """The map of a forward: ``counts[i]`` new tokens of request ``rows[i]``, the first ones of its row of the
        input; what is behind them is padding."""
        most = max(counts)
        position = np.full((len(rows), most), -1, dtype=np.int64)
        owner: list[int] = []
        pieces: list[int] = []
        start: list[int] = []
        for place, (request, count) in enumerate(zip(rows, counts, strict=True)):
            length = int(self.lengths[request])
            table = self._tables[request]
            missing = -(-(length + count) // self.width) - len(table)
            table.extend(range(self._used, self._used + missing))
            self._used += max(missing, 0)
            position[place, :count] = np.arange(length, length + count)
            pieces += table
            owner += [place] * len(table)
            start += range(0, len(table) * self.width, self.width)
        row, column = np.nonzero(position >= 0)
        at = position[row, column]
        first = np.cumsum([0, *(len(self._tables[request]) for request in rows)])  # each row's in ``pieces``
        piece = np.array(pieces)[first[row] + at // self.width]
        parts = (np.array(pieces), np.array(owner), np.array(start), position, row, column, piece, at % self.width)
        self._map = PieceMap(*(torch.from_numpy(part.astype(np.int64)).to(device) for part in parts))
        return self._map

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values ``[b, K, q, D]``; the pieces of the forward's rows, ``[P, K, W, D]``."""
        found = self._map
        if found is None:
            raise InternalError("PieceCache.update: no forward was announced; call begin before it.")
        stored = self._room(layer_idx, (key_states, value_states))
        for part, states in zip(stored, (key_states, value_states), strict=True):
            part[found.piece, :, found.slot] = states[found.row, :, found.column]
        everything = found.pieces.shape[0] == self._used
        if everything and bool((found.pieces == torch.arange(self._used, device=found.pieces.device)).all()):
            return stored[0][: self._used], stored[1][: self._used]
        return stored[0][found.pieces], stored[1][found.pieces]

    def _room(self, layer: int, states: Sequence[Tensor]) -> list[Tensor]:
        stored = self._stored.get(layer)
        held = stored[0].shape[0] if stored is not None else 0
        if held < self._used:
            grown = []
            for index, own in enumerate(states):
                # Zeros, because what nobody sees is multiplied with a weight of zero.
                size = max(self._used, self._capacity, held + held // SPARE)
                part = own.new_zeros(size, own.shape[1], self.width, own.shape[3])
                if stored is not None:
                    part[:held] = stored[index]
                grown.append(part)
            stored = self._stored[layer] = grown
        if stored is None:
            raise InternalError("PieceCache: a forward without a token; announce at least one.")
        return stored

    def keep(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Of the last forward, the first ``counts[i]`` tokens of request ``rows[i]`` stay."""
        np.add.at(self.lengths, np.asarray(rows), np.asarray(counts))

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Positions of the longest text; positions of queries are given with each forward, not derived from this."""
        return int(self.lengths.max())

    @property
    def held_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(part.numel() * part.element_size() for parts in self._stored.values() for part in parts)


def attend_pieces(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    pieces: PieceMap | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function of ``transformers``: queries ``[b, N, q, D]`` against pieces ``[P, K, W, D]``.

    ``pieces`` is a keyword of the model's forward, which hands it down. Returns ``[b, q, N, D]`` and no weights.

    Raises ``UnsupportedModel`` where the model wants of its attention what this one does not have.
    """
    if pieces is None or attention_mask is not None:
        raise UnsupportedModel(f"{type(module).__name__} hands its attention no map of pieces, or a mask of its own.")
    wanted = [name for name in REFUSED if options.get(name) is not None]
    if wanted:
        raise UnsupportedModel(f"{type(module).__name__}: attention over pieces has no {', '.join(wanted)}.")
    (b, N, q, D), (_, K, W, _) = query.shape, key.shape
    group = N // K
    query_PKRD = query.reshape(b, K, group * q, D)[pieces.owner]
    seen_P1RW = pieces.seen(W).repeat(1, group, 1).unsqueeze(1)
    scale = D**-0.5 if scaling is None else scaling
    partial = partial_attention(query_PKRD, key, value, seen_P1RW, scale=scale)
    whole_bKRD = merge(partial, pieces.owner, b)
    return whole_bKRD.reshape(b, N, q, -1).transpose(1, 2).to(query.dtype).contiguous(), None


AttentionInterface.register(NAME, attend_pieces)


@contextmanager
def decomposed(model: Any) -> Iterator[None]:
    """Let ``model`` attend over pieces, for the duration."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def forward_pieces(model: Any, cache: PieceCache, rows: Sequence[int], texts: Sequence[Sequence[int]]) -> Tensor:
    """Logits ``[b, q, V]`` of new tokens, inside ``decomposed``; those behind the end of a row mean nothing.

    Args: texts: new tokens of the requests ``rows``, at least one each. ``cache.keep`` says afterwards which stay.
    """
    counts = [len(text) for text in texts]
    device = model.device
    found = cache.begin(rows, counts, device)
    tokens = torch.zeros(len(rows), max(counts), dtype=torch.int64)
    for place, text in enumerate(texts):
        tokens[place, : counts[place]] = torch.as_tensor(text)
    logits: Tensor = model(
        input_ids=tokens.to(device),
        position_ids=found.position.clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        pieces=found,
    ).logits
    return logits


def read_prompts(model: Any, cache: PieceCache, prompts: Sequence[Sequence[int]], chunk: int) -> Tensor:
    """Read all prompts, at most ``chunk`` tokens of each in a forward; rows that are through take no part.

    Returns the logits ``[B, V]`` behind each prompt's last token.
    """
    last: dict[int, Tensor] = {}
    while len(last) < len(prompts):
        rows = [b for b in range(len(prompts)) if b not in last]
        texts = [prompts[b][int(cache.lengths[b]) : int(cache.lengths[b]) + chunk] for b in rows]
        logits = forward_pieces(model, cache, rows, texts)
        cache.keep(rows, [len(text) for text in texts])
        for place, (b, text) in enumerate(zip(rows, texts, strict=True)):
            if cache.lengths[b] == len(prompts[b]):
                last[b] = logits[place, len(text) - 1]
    return torch.stack([last[b] for b in range(len(prompts))])


def generate_pieces(
    model: Any, prompts: Sequence[Sequence[int]], max_tokens: int, *, width: int = 0, chunk: int = 512
) -> tuple[list[list[int]], PieceCache]:
    """Greedy decoding of a ragged batch, ``max_tokens`` each, and the cache. ``width``: 0 = ``best_width``."""
    lengths = [len(prompt) + max_tokens for prompt in prompts]
    width = width or best_width(lengths, 1)
    cache = PieceCache(len(prompts), width, pieces_of(lengths, width))
    everyone = range(len(prompts))
    with decomposed(model):
        newest = read_prompts(model, cache, prompts, chunk).argmax(dim=-1).tolist()
        written = [[token] for token in newest]
        for _ in range(max_tokens - 1):
            newest = forward_pieces(model, cache, everyone, [[token] for token in newest])[:, 0].argmax(dim=-1).tolist()
            cache.keep(everyone, [1] * len(prompts))
            for own, token in zip(written, newest, strict=True):
                own.append(token)
    return written, cache
