"""A whole forward in one native call: the fast twin of ``Decoder.forward`` over a paged cache on the CPU.

Between two operations of the Python decoder lie some microseconds of calls; between two phases of the native one a
meeting of its threads. What it cannot do it declines, and the decoder's own forward serves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from steeple.cache.slice import LayerCache
from steeple.errors import InternalError
from steeple.model.decoder import Decoder, Hidden
from steeple.model.layers import Layer, Linear, RMSNorm
from steeple.ops.linear import Matrix
from steeple.ops.memory import zeros
from steeple.ops.native import team_size, torch_team
from steeple.ops.native_attention import OUTCOMES, NativeAttention
from steeple.types import Batch

PARTS = ("rows", "linear", "cache", "attention")
BAD_INPUT = {10: "a token lies outside the vocabulary", 11: "a position lies beyond max_context"}

_POINTER, _SIZE, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class WholeForward(Protocol):
    """A forward of all layers at once. ``batch_invariant``: a row rounds alike whatever stands beside it."""

    batch_invariant: bool

    def __call__(
        self, batch: Batch, keep: Sequence[int], scores: bool = False, added: Tensor | None = None
    ) -> Hidden | None:
        """Hidden states as from ``Runner.forward``; None: not a batch for this, run the decoder's own."""
        ...

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Float32 ``[R, V]``."""
        ...

    def best(self, hidden_RD: Tensor) -> Tensor:
        """The likeliest token of each row, the first of equals, int64 ``[R]``."""
        ...


class _Layer(ctypes.Structure):
    """``forward::Layer`` of the native library."""

    _fields_ = [
        *((name, _POINTER) for name in ("attention_norm", "q_norm", "k_norm", "attention_post_norm")),
        *((name, _POINTER) for name in ("mlp_norm", "mlp_post_norm")),
        *((name, Matrix) for name in ("qkv", "o", "gate_up", "down")),
        ("keys", _POINTER),
        ("values", _POINTER),
        ("window", _SIZE),
    ]


class _Model(ctypes.Structure):
    """``forward::Model`` of the native library."""

    _fields_ = [
        *((name, _POINTER) for name in ("layers", "embed", "norm", "cos", "sin")),
        ("head", Matrix),
        *((name, _SIZE) for name in ("num_layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate")),
        *((name, _SIZE) for name in ("rotated", "vocab", "max_context", "num_blocks", "block_size")),
        *((name, _SIZE) for name in ("activation", "bf16")),
        *((name, _REAL) for name in ("eps", "embed_scale", "scale", "softcap", "logit_softcap")),
    ]


class _Step(ctypes.Structure):
    """``forward::Step`` of the native library."""

    _fields_ = [
        *((name, _POINTER) for name in ("tokens", "positions", "slots", "cu_rows", "blocks", "cu_blocks", "prefix")),
        *((name, _POINTER) for name in ("ancestors", "text_len", "row_positions")),
        *((name, _SIZE) for name in ("rows", "requests", "entries", "layer_stride", "head_stride")),
        *((name, _POINTER) for name in ("added", "hidden", "keep", "scores", "parts", "room")),
        ("threads", _SIZE),
        ("run", _POINTER),
        ("size", _POINTER),
    ]


class NativeForward:
    """Args: a decoder that ``supported`` accepts, and the cache that holds its keys.

    ``parts`` sums up the seconds of each of ``PARTS`` while ``timing`` is set.
    """

    batch_invariant = True

    def __init__(self, decoder: Decoder, cache: LayerCache) -> None:
        if decoder.kernels.library is None:
            raise InternalError("a native forward without a native library")
        library = ctypes.CDLL(str(decoder.kernels.library))
        self._forward, self._head = library.steeple_forward, library.steeple_head
        self._room_of = library.steeple_room
        self._room_of.argtypes, self._room_of.restype = [_POINTER, _SIZE], _SIZE
        self._forward.argtypes = [_POINTER, _POINTER]
        self._head.argtypes = [_POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER]
        self.decoder, self._cache = decoder, cache  # the pointers below are into their memory
        self._team = (torch_team(), team_size())
        self._layers = (_Layer * decoder.config.num_layers)(
            *(_layer(decoder, cache, index) for index in range(decoder.config.num_layers))
        )
        self._model = _model(decoder, cache, self._layers)
        self._model_at = ctypes.addressof(self._model)
        self._seconds = (_REAL * len(PARTS))()
        self._batch: Batch | None = None
        self._step = _Step()
        self._room = zeros((0,), torch.uint8, decoder.device)
        self.timing = False

    def at(self, batch: Batch) -> tuple[int, int]:
        """Addresses of the model and of the step of ``batch``, for other native calls; valid until the next one."""
        step = self._step_of(batch)
        step.keep = step.scores = step.added = step.hidden = None
        step.parts = ctypes.addressof(self._seconds) if self.timing else None
        step.threads = torch.get_num_threads()
        return self._model_at, ctypes.addressof(step)

    @staticmethod
    def supported(decoder: Decoder, cache: LayerCache) -> bool:
        """Whether all weights are packed, and the cache is one that the library reads and writes."""
        packed = all(m.packed is not None for m in decoder.modules() if isinstance(m, Linear))
        readable = isinstance(cache.attention, NativeAttention) and decoder.config.head_dim % 2 == 0
        return packed and readable and decoder.kernels.library is not None

    @property
    def parts(self) -> dict[str, float]:
        return dict(zip(PARTS, self._seconds, strict=True))

    def __call__(
        self, batch: Batch, keep: Sequence[int], scores: bool = False, added: Tensor | None = None
    ) -> Hidden | None:
        """See ``WholeForward``."""
        config = self.decoder.config
        final_TD = torch.empty((batch.tokens.shape[0], config.hidden_size), dtype=self.decoder.dtype)
        kept = {layer: torch.empty_like(final_TD) for layer in keep}
        step = self._step_of(batch)
        step.hidden = final_TD.data_ptr()
        added = None if added is None else added.to(final_TD.dtype).contiguous()
        step.added = None if added is None else added.data_ptr()
        pointers = (_POINTER * (config.num_layers if kept else 0))()
        for layer, x_TD in kept.items():
            pointers[layer] = x_TD.data_ptr()
        step.keep = ctypes.addressof(pointers) if kept else None
        scores_LKE = page_scores(self.decoder, batch) if scores else None
        step.scores = None if scores_LKE is None else scores_LKE.data_ptr()
        step.parts = ctypes.addressof(self._seconds) if self.timing else None
        step.threads = torch.get_num_threads()
        self.require(self._forward(self._model_at, ctypes.addressof(step)))
        return Hidden(final_TD, kept, scores_LKE)

    def _step_of(self, batch: Batch) -> _Step:
        """What points to the batch. A batch maker fills the same batch again, so this is rarely made anew."""
        if batch is not self._batch:
            layout = batch.layout
            of_batch = (batch.tokens, batch.positions, batch.slots)
            of_layout = (layout.cu_rows, layout.blocks, layout.cu_blocks, layout.prefix, layout.ancestors)
            fields = (*of_batch, *of_layout, layout.text_len, layout.positions)
            step = self._step = _Step(*(field.data_ptr() for field in fields))
            step.rows, step.requests = batch.tokens.shape[0], layout.text_len.shape[0]
            step.entries = layout.blocks.shape[0]
            step.layer_stride, step.head_stride = layout.layer_stride, layout.head_stride
            step.run, step.size = self._team
            self.reserve(step.rows)
            step.room = self._room.data_ptr()
            self._batch = batch
        return self._step

    def reserve(self, rows: int) -> None:
        """Room for ``rows`` rows, kept from step to step: fresh memory costs a page fault every 4 KiB."""
        needed: int = self._room_of(ctypes.byref(self._model), rows)
        if needed > self._room.numel():
            self._room = zeros((needed,), torch.uint8, self.decoder.device)
            self._batch = None  # the step in use points to what was

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """See ``WholeForward``. Not rounded to the dtype of the model."""
        out = torch.empty((hidden_RD.shape[0], self.decoder.config.vocab_size), dtype=torch.float32)
        self._multiply(hidden_RD, out.data_ptr(), None)
        return out

    def best(self, hidden_RD: Tensor) -> Tensor:
        """See ``WholeForward``. No logits are written."""
        out = torch.empty(hidden_RD.shape[0], dtype=torch.int64)
        self._multiply(hidden_RD, None, out.data_ptr())
        return out

    def _multiply(self, hidden_RD: Tensor, logits: int | None, best: int | None) -> None:
        rows = hidden_RD.contiguous()
        self.require(
            self._head(
                ctypes.byref(self._model),
                rows.data_ptr(),
                rows.shape[0],
                logits,
                best,
                torch.get_num_threads(),
                *self._team,
            )
        )

    @staticmethod
    def require(outcome: int) -> None:
        """Raise ``InternalError`` for what a native call reports."""
        if outcome:
            raise InternalError(f"Native forward: {OUTCOMES.get(outcome) or BAD_INPUT.get(outcome, outcome)}.")


def page_scores(decoder: Decoder, batch: Batch) -> Tensor:
    """Where the scores of a forward go, ``[L, K, E]`` as in ``Hidden``: -inf so far."""
    shape = (decoder.config.num_layers, decoder.config.num_kv_heads, int(batch.layout.cu_blocks[-1]))
    return torch.full(shape, float("-inf"), device=decoder.device)


def _norm(norm: RMSNorm | None) -> int | None:
    return None if norm is None else norm.weight.data_ptr()


def _matrix(linear: Linear) -> Matrix:
    if linear.packed is None:
        raise InternalError("a native forward over a weight that is not packed")
    return linear.packed.matrix(linear.bias)


def _layer(decoder: Decoder, cache: LayerCache, index: int) -> _Layer:
    layer = decoder.layers[index]
    assert isinstance(layer, Layer)
    attention, mlp = layer.attention, layer.mlp
    keys, values = cache.layer(index)
    return _Layer(
        _norm(layer.attention_norm),
        _norm(attention.q_norm),
        _norm(attention.k_norm),
        _norm(layer.attention_post_norm),
        _norm(layer.mlp_norm),
        _norm(layer.mlp_post_norm),
        *(_matrix(linear) for linear in (attention.qkv, attention.o, mlp.gate_up, mlp.down)),
        keys.data_ptr(),
        values.data_ptr(),
        decoder.config.window(index),
    )


def _model(decoder: Decoder, cache: LayerCache, layers: ctypes.Array[_Layer]) -> _Model:
    config = decoder.config
    return _Model(
        ctypes.addressof(layers),
        decoder.embed.weight.data_ptr(),
        _norm(decoder.norm),
        decoder.cos.data_ptr(),
        decoder.sin.data_ptr(),
        _matrix(decoder.head),
        config.num_layers,
        config.hidden_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.intermediate_size,
        decoder.cos.shape[1],
        config.vocab_size,
        config.max_context,
        cache.pool.count,
        cache.block_size,
        config.gelu,
        decoder.dtype == torch.bfloat16,
        config.norm_eps,
        config.embed_scale,
        config.scale,
        config.attention_softcap,
        config.logit_softcap,
    )
