"""One forward of a decoder over a flat batch through a cache: stage, view, attend, for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from steeple.cache.slice import LayerCache
from steeple.model.decoder import Decoder, Hidden
from steeple.model.whole import NativeForward, WholeForward, page_scores
from steeple.ops.attention import PagedAttention
from steeple.types import Batch


class Runner:
    """Args: decoder and the cache that holds its keys; attention: the paged attention to read them with.

    ``whole``, if there is one, runs all layers in one call; batches that it declines go layer by layer.
    """

    def __init__(self, decoder: Decoder, cache: LayerCache, attention: PagedAttention) -> None:
        self.decoder, self.cache, self._attention = decoder, cache, attention
        config = decoder.config
        self._windows = [config.window(layer) for layer in range(config.num_layers)]
        self.whole: WholeForward | None = None
        if NativeForward.supported(decoder, cache):
            self.whole = NativeForward(decoder, cache)

    @property
    def batch_invariant(self) -> bool:
        """Whether a row rounds alike in any batch: torch's own operations choose another order for every size."""
        return self.whole is not None and self.whole.batch_invariant

    def reserve(self, rows: int) -> None:
        """Take the room of a forward of ``rows`` rows now, where forwards keep one."""
        if isinstance(self.whole, NativeForward):
            self.whole.reserve(rows)

    @torch.inference_mode()
    def forward(
        self, batch: Batch, *, keep: Sequence[int] = (), scores: bool = False, added: Tensor | None = None
    ) -> Hidden:
        """Hidden states of all rows; their keys and values are staged in the cache as pending.

        ``scores``: the scores of the pages of the block tables too, of all layers; see ``Hidden``. ``added``: to the
        embeddings, ``[T, D]``.
        """
        hidden = self.whole(batch, keep, scores, added) if self.whole is not None else None
        return self._by_layers(batch, keep, scores, added) if hidden is None else hidden

    def _by_layers(self, batch: Batch, keep: Sequence[int], scores: bool, added: Tensor | None) -> Hidden:
        config = self.decoder.config
        scores_LKE = page_scores(self.decoder, batch) if scores else None

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
                page_scores=None if scores_LKE is None else scores_LKE[layer],
            )

        hidden: Hidden = self.decoder(batch.tokens, batch.positions, attend, keep=keep, added_TD=added)
        return hidden if scores_LKE is None else replace(hidden, scores=scores_LKE)

    @torch.inference_mode()
    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Float32 logits ``[R, V]`` of the given rows."""
        return self.whole.logits(hidden_RD) if self.whole is not None else self.decoder.logits(hidden_RD).float()

    @torch.inference_mode()
    def best(self, hidden_RD: Tensor) -> Tensor:
        """The likeliest token of each row, the first of equals, int64 ``[R]``."""
        return self.whole.best(hidden_RD) if self.whole is not None else self.logits(hidden_RD).argmax(dim=-1)
