"""A causal language model of ``transformers`` as this room sees it: tokens, a mask and positions in, logits out."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from steeple.padded.kv import KV


class Net:
    """Args: model: any ``AutoModelForCausalLM``; it is not changed.

    ``vocab``: width of its logits. ``known``: tokens that it has embeddings for. ``context``: most positions, or 0.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        names = inspect.signature(model.forward).parameters
        self.has_positions = "position_ids" in names
        self._trims = "logits_to_keep" in names
        text = model.config.get_text_config(decoder=True)
        self.context = int(getattr(text, "max_position_embeddings", 0) or 0)
        embedding = model.get_input_embeddings()
        self.known = int(embedding.weight.shape[0])
        self.device = embedding.weight.device
        head = model.get_output_embeddings()
        self.vocab = int(text.vocab_size if head is None else head.weight.shape[0])
        self._boolean = getattr(model.config, "_attn_implementation", None) == "sdpa"

    @property
    def name(self) -> str:
        """The class of the model, for messages."""
        return type(self.model).__name__

    def forward(self, tokens_Bn: Tensor, kv: KV, mask: Tensor | None, positions_Bn: Tensor, last: int = 0) -> Tensor:
        """Logits, float32 ``[B, n, V]``, or of the ``last`` tokens; appends n slots to ``kv``.

        Args:
            mask: True = seen; ``[B, S]`` over slots, or ``[B, 1, n, S]`` over queries and slots; None: all slots.
            positions_Bn: clamped to those the model has; what is beyond them is never read.
        """
        extra: dict[str, Any] = {}
        if self.has_positions:
            most = self.context - 1 if self.context else None
            extra["position_ids"] = positions_Bn.clamp(min=0, max=most)
        if self._trims and last:
            extra["logits_to_keep"] = last
        if mask is not None:
            extra["attention_mask"] = self._as_known(mask)
        out = self.model(input_ids=tokens_Bn, past_key_values=kv.cache, use_cache=True, **extra)
        logits: Tensor = out.logits
        return (logits[:, -last:] if last else logits).float()

    def _as_known(self, mask: Tensor) -> Tensor:
        """2-D masks are whole numbers; 4-D masks are boolean for sdpa, and added to the scores elsewhere."""
        if mask.dim() == 2:
            return mask.long()
        if self._boolean:
            return mask
        dtype = self.model.dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
