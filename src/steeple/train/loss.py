"""The next-token loss of a decoder on whole windows, and what it costs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from steeple.config import ModelConfig
from steeple.model.decoder import Decoder


class CausalRows:
    """Plain causal attention for training: the flat tokens are ``rows`` windows of equal length."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        del layer  # every layer attends alike
        # the rotary tables are float32, so under autocast queries and keys come in float32: back to the values' dtype
        q, k, v = (x.to(v_TKH.dtype).unflatten(0, (self.rows, -1)).transpose(1, 2) for x in (q_TNH, k_TKH, v_TKH))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2).flatten(0, 1)


def next_token_loss(model: Decoder, window_BS: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of each token after the first of every row of ``window_BS`` ``[B, S + 1]``."""
    inputs, targets = window_BS[:, :-1], window_BS[:, 1:]
    rows, length = inputs.shape
    positions = torch.arange(length, device=inputs.device).repeat(rows)
    hidden = model(inputs.reshape(-1), positions, CausalRows(rows))
    return F.cross_entropy(model.logits(hidden.final_TD).float(), targets.reshape(-1))


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward floating-point operations of one token: 6 per weight, and causal attention."""
    attention = 6 * config.num_layers * config.num_heads * config.head_dim * seq_len
    return 6.0 * (config.body_parameters() + config.hidden_size * config.vocab_size) + attention
