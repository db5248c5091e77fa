"""The building blocks of the decoder: norm, rotary attention, gated MLP. Flat tokens in, flat tokens out.

Shape letters: T flat tokens, D model dim, N query heads, K key/value heads, H head dim, R rotated dims / 2.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steeple.config import ModelConfig
from steeple.ops.kernels import Pack
from steeple.ops.linear import PackedWeight
from steeple.ops.norm import NormOperation, torch_norm


class Attend(Protocol):
    """What a layer asks for: given its queries, keys and values of the flat tokens, the attended values.

    The caller of the decoder supplies it: the paged cache in the engine, plain causal attention in training.
    """

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor: ...


class Linear(nn.Linear):
    """``nn.Linear`` whose weight may be packed for the native kernel (see ``Decoder.use``); ``weight`` is then None.

    Args: sections: equal parts of the outputs that are packed apart, because they are used side by side.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool, sections: int = 1) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.sections = sections
        self.packed: PackedWeight | None = None

    def use(self, pack: Pack) -> None:
        """Pack the weight by ``pack``, or unpack it if ``pack`` leaves it alone."""
        weight = self.weight if self.packed is None else self.packed.unpack()
        self.packed = pack(weight, self.sections)
        kept = weight if self.packed is None else None
        if kept is not self.weight:
            self.register_parameter("weight", None if kept is None else nn.Parameter(kept, requires_grad=False))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias) if self.packed is None else self.packed(input, self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.operation: NormOperation = torch_norm

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x, self.weight, self.eps)


def rotate(x_TNH: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotary embedding of the first 2R of H dims, pairs (i, i + R); the rest passes through."""
    R = cos_TR.shape[-1]
    cos, sin = cos_TR.unsqueeze(1), sin_TR.unsqueeze(1)
    first, second = x_TNH[..., :R], x_TNH[..., R : 2 * R]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if x_TNH.shape[-1] > 2 * R:
        parts.append(x_TNH[..., 2 * R :])
    return torch.cat(parts, dim=-1)


class Attention(nn.Module):
    """Rotary grouped-query attention with fused projections; where keys are kept is the caller's business."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.o = Linear(self.heads * self.head_dim, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x_TD: Tensor, cos_TR: Tensor, sin_TR: Tensor, attend: Attend, layer: int) -> Tensor:
        T, N, K, H = x_TD.shape[0], self.heads, self.kv_heads, self.head_dim
        qkv = self.qkv(x_TD).view(T, N + 2 * K, H)
        qk, v = qkv[:, : N + K], qkv[:, N + K :]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :N]), self.k_norm(qk[:, N:])), dim=1)
        qk = rotate(qk, cos_TR, sin_TR)
        out = attend(layer, qk[:, :N], qk[:, N:], v)
        return self.o(out.reshape(T, N * H))


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up fused."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias, sections=2)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.gelu = config.gelu

    def forward(self, x_TD: Tensor) -> Tensor:
        gate, up = self.gate_up(x_TD).chunk(2, dim=-1)
        gate = F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate)
        return self.down(gate * up)


class Layer(nn.Module):
    """One transformer layer: attention and MLP around the residual stream, with optional norms after each."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.attention_norm = RMSNorm(size, eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(size, eps)
        self.mlp = GatedMLP(config)
        self.attention_post_norm = RMSNorm(size, eps) if config.post_norms else None
        self.mlp_post_norm = RMSNorm(size, eps) if config.post_norms else None

    def forward(self, x_TD: Tensor, cos_TR: Tensor, sin_TR: Tensor, attend: Attend, layer: int) -> Tensor:
        out = self.attention(self.attention_norm(x_TD), cos_TR, sin_TR, attend, layer)
        x_TD = x_TD + (out if self.attention_post_norm is None else self.attention_post_norm(out))
        out = self.mlp(self.mlp_norm(x_TD))
        return x_TD + (out if self.mlp_post_norm is None else self.mlp_post_norm(out))
