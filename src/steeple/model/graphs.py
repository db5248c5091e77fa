"""CUDA graphs of whole forwards over bucketed numbers of rows: one launch for a step, whatever its requests look like.

A forward of a few rows is over before Python has launched its kernels. So it is recorded once for each bucket of rows
and replayed; what changes between steps - tokens, positions, slots, who sees whom - is copied to places that stay.
Since the attention reads its work from such a place, a graph serves every batch of at most its rows: decode rows,
drafts of any shape and short prompts. Longer batches run eagerly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from steeple.cache.slice import LayerCache
from steeple.errors import InternalError
from steeple.model.decoder import Decoder, Hidden
from steeple.model.run import Runner
from steeple.ops.attention import PagedAttention
from steeple.ops.triton_attention import HeadShape, TritonAttention
from steeple.types import Batch, KVLayout

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
WARM_UPS = 2  # forwards before the recording: kernels are compiled, libraries take their workspaces


class Place(Protocol):
    """Where a recorded forward finds the layout of the step."""

    def load(self, layout: KVLayout) -> KVLayout:
        """Bring it in; gives what to hand to the attention."""
        ...


class NoPlace:
    """For an attention that reads the layout on the host: nothing to bring in, and nothing that could be recorded."""

    def load(self, layout: KVLayout) -> KVLayout:
        return layout


class StepGraphs:
    """A ``WholeForward`` (see ``model/whole.py``) for batches of at most ``buckets[-1]`` rows.

    Args:
        scratch: a slot of the cache that no request owns; padding rows write there, and see nothing.
        place: where ``attention`` finds its layout.
        capture: False runs the same forward over the same buffers without recording it, on any device.

    Memory: the buffers, and one set of activations of the largest bucket in use, which all graphs share. The first step
    in a bucket takes ``WARM_UPS + 1`` forwards and the compilation of kernels.
    """

    batch_invariant = False  # the matrix library chooses another order of summation for every size

    def __init__(
        self,
        decoder: Decoder,
        cache: LayerCache,
        attention: PagedAttention,
        *,
        scratch: int,
        place: Place,
        table: int,
        buckets: Sequence[int] = BUCKETS,
        capture: bool = True,
    ) -> None:
        if capture and isinstance(place, NoPlace):
            raise InternalError("a forward whose attention reads the layout on the host cannot be recorded")
        self._runner = Runner(decoder, cache, attention)
        self._runner.whole = None
        self._decoder, self._scratch, self._place, self._table = decoder, scratch, place, table
        self._buckets, self._capture = tuple(buckets), capture
        most, device = self._buckets[-1], decoder.device
        self._tokens = torch.zeros(most, dtype=torch.int64, device=device)
        self._positions = torch.zeros(most, dtype=torch.int64, device=device)
        self._slots = torch.full((most,), scratch, dtype=torch.int64, device=device)
        self._graphs: dict[tuple[int, tuple[int, ...]], tuple[torch.cuda.CUDAGraph, Hidden]] = {}
        self._pool = torch.cuda.graph_pool_handle() if capture else None

    def bucket(self, batch: Batch) -> int | None:
        """Rows of the forward that serves ``batch``; None: it is none of ours."""
        rows, layout = batch.tokens.shape[0], batch.layout
        own_tables = layout.layer_stride or layout.head_stride
        if own_tables or not 0 < rows <= self._buckets[-1] or layout.blocks.shape[0] > self._table:
            return None
        return next(bucket for bucket in self._buckets if bucket >= rows)

    @torch.inference_mode()
    def __call__(
        self, batch: Batch, keep: Sequence[int], scores: bool = False, added: Tensor | None = None
    ) -> Hidden | None:
        """Hidden states as from ``Decoder.forward``, the caller's own; None: run the decoder's own forward."""
        bucket = None if scores or added is not None else self.bucket(batch)
        if bucket is None:
            return None
        static, layers = self._load(batch, bucket), tuple(sorted(set(keep)))
        if not self._capture:
            hidden = self._runner.forward(static, keep=layers)
        else:
            if (bucket, layers) not in self._graphs:
                self._graphs[bucket, layers] = self._record(static, layers)
            graph, hidden = self._graphs[bucket, layers]
            graph.replay()
        rows = batch.tokens.shape[0]
        # Copies, because the next replay writes where these lie.
        return Hidden(hidden.final_TD[:rows].clone(), {layer: x[:rows].clone() for layer, x in hidden.kept.items()})

    def _load(self, batch: Batch, bucket: int) -> Batch:
        """The batch in the static buffers, padded to the bucket."""
        rows = batch.tokens.shape[0]
        self._tokens[:rows].copy_(batch.tokens)
        self._positions[:rows].copy_(batch.positions)
        self._slots[:rows].copy_(batch.slots)
        if bucket > rows:
            # Tokens and positions of padding rows are those of an earlier step: valid, and of no effect.
            self._slots[rows:bucket].fill_(self._scratch)
        return Batch(
            batch.request_ids,
            self._tokens[:bucket],
            self._positions[:bucket],
            self._slots[:bucket],
            self._place.load(padded(batch.layout, bucket)),
            batch.node_rows,
        )

    def _record(self, static: Batch, layers: tuple[int, ...]) -> tuple[torch.cuda.CUDAGraph, Hidden]:
        """Every run writes the same keys to the same slots, so the repetition changes nothing."""
        side = torch.cuda.Stream(self._decoder.device)
        side.wait_stream(torch.cuda.current_stream(self._decoder.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._runner.forward(static, keep=layers)
        torch.cuda.current_stream(self._decoder.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden = self._runner.forward(static, keep=layers)
        return graph, hidden

    @torch.inference_mode()
    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Float32 ``[R, V]``."""
        return self._decoder.logits(hidden_RD).float()

    @torch.inference_mode()
    def best(self, hidden_RD: Tensor) -> Tensor:
        """The likeliest token of each row, the first of equals, int64 ``[R]``."""
        return self.logits(hidden_RD).argmax(dim=-1)


def padded(layout: KVLayout, rows: int) -> KVLayout:
    """``layout`` with one more request, without blocks, whose rows fill up to ``rows`` and see nothing."""
    extra = rows - layout.prefix.shape[0]
    if not extra:
        return layout

    def append(values: Tensor, *more: int) -> Tensor:
        return torch.cat((values, torch.tensor(more, dtype=values.dtype)))

    return KVLayout(
        cu_rows=append(layout.cu_rows, rows),
        blocks=layout.blocks,
        cu_blocks=append(layout.cu_blocks, layout.blocks.shape[0]),
        block_size=layout.block_size,
        prefix=torch.nn.functional.pad(layout.prefix, (0, extra)),
        ancestors=torch.nn.functional.pad(layout.ancestors, (0, extra)),
        text_len=append(layout.text_len, 0),
        positions=torch.nn.functional.pad(layout.positions, (0, extra)),
        node_row=append(layout.node_row, rows),
    )


def step_graphs(
    decoder: Decoder,
    cache: LayerCache,
    attention: PagedAttention,
    *,
    scratch: int,
    buckets: Sequence[int] = BUCKETS,
    capture: bool | None = None,
) -> StepGraphs:
    """Graphs for a decoder, its cache and the attention that reads it.

    Args:
        capture: default: where the model is on a GPU and the attention is one that can be recorded.
    """
    config = decoder.config
    longest = cache.blocks_for(config.max_context)
    table = buckets[-1] * (longest + longest // 4 + 4)  # with the room that a batch maker leaves behind each request
    place: Place = NoPlace()
    if isinstance(attention, TritonAttention):
        keys = cache.layer(0)[0]
        shape = HeadShape(config.num_heads, config.num_kv_heads, config.head_dim, decoder.dtype, keys.dtype)
        place = attention.place(shape, keys.shape[0], rows=buckets[-1], table=table)
    if capture is None:
        capture = decoder.device.type == "cuda" and not isinstance(place, NoPlace)
    return StepGraphs(
        decoder, cache, attention, scratch=scratch, place=place, table=table, buckets=buckets, capture=capture
    )
