"""One forward of a decoder over a flat batch through a cache: stage, view, attend, for every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steeple.cache.base import Cache
from steeple.model.decoder import Decoder, Hidden
from steeple.ops.attention import PagedAttention
from steeple.types import Batch


class Runner:
    """Args: decoder and the cache that holds its keys; attention: the paged attention to read them with."""

    def __init__(self, decoder: Decoder, cache: Cache, attention: PagedAttention) -> None:
        self.decoder, self.cache, self._attention = decoder, cache, attention
        config = decoder.config
        self._windows = [config.window(layer) for layer in range(config.num_layers)]

    @torch.inference_mode()
    def forward(self, batch: Batch, *, keep: Sequence[int] = ()) -> Hidden:
        """Hidden states of all rows; their keys and values are staged in the cache as pending."""
        config = self.decoder.config

        def attend(layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
            self.cache.stage(layer, batch, k_TKH, v_TKH)
            view = self.cache.view(layer, batch)
            return self._attention(
                q_TNH,
                view.keys,
                view.values,
                view.layout,
                scale=config.scale,
                window=self._windows[layer],
                softcap=config.attention_softcap,
            )

        return self.decoder(batch.tokens, batch.positions, attend, keep=keep)

    @torch.inference_mode()
    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Float32 logits ``[R, V]`` of the given rows."""
        return self.decoder.logits(hidden_RD).float()
