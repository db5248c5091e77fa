"""THE forward: one decoder for every family, every drafter that is a transformer, training and inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steeple.config import ModelConfig
from steeple.model.layers import Attend, Layer, Linear, RMSNorm
from steeple.ops.kernels import Kernels


@dataclass(frozen=True, slots=True)
class Hidden:
    """``final_TD``: after the last norm. ``kept[l]``: output of layer ``l`` (residual stream), for each layer asked.

    ``scores``, if asked: of every page of the block tables, float32 ``[L, K, E]``; see ``PagedAttention``. Page j of
    request b is entry ``layout.cu_blocks[b] + j``, and ``E = layout.cu_blocks[B]``.
    """

    final_TD: Tensor
    kept: dict[int, Tensor] = field(default_factory=dict)
    scores: Tensor | None = None


class Decoder(nn.Module):
    """A pre-norm decoder over flat tokens.

    Args:
        config: the shape.

    ``forward(tokens [T] int, positions [T] int, attend)`` returns ``Hidden``; ``logits(hidden [R, D])`` returns
    ``[R, V]``, so that logits are computed only for the rows that need them.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.kernels = Kernels()
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.reset_rope()

    def reset_rope(self) -> None:
        """(Re)compute the rotary tables: float32 ``[max_context, R]``. Needed after ``to_empty`` or loading."""
        angle = torch.outer(
            torch.arange(self.config.max_context, dtype=torch.float32),
            torch.tensor(self.config.rope_inv_freq, dtype=torch.float32),
        )
        scale, device = self.config.rope_scale, self.device
        self.register_buffer("cos", (angle.cos() * scale).to(device), persistent=False)
        self.register_buffer("sin", (angle.sin() * scale).to(device), persistent=False)

    def use(self, kernels: Kernels) -> None:
        """Compute by these operations from now on. Packed weights take the place of the parameters."""
        self.kernels = kernels
        for module in self.modules():
            if isinstance(module, Linear):
                module.use(kernels.pack)
            elif isinstance(module, RMSNorm):
                module.operation = kernels.norm
        if self.config.tie_embeddings and self.head.packed is None:
            self.head.weight = self.embed.weight

    @property
    def multiplied_parameters(self) -> int:
        """Weights that every step multiplies: all but the embedding, or all where the head is the embedding."""
        packed = (m.packed.outputs * m.packed.inputs for m in self.modules() if isinstance(m, Linear) and m.packed)
        plain = sum(p.numel() for p in self.parameters()) - self.embed.weight.numel()
        shared = self.embed.weight.numel() if self.config.tie_embeddings and self.head.packed is None else 0
        return plain + shared + sum(packed)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attend: Attend,
        *,
        layers: Sequence[int] | None = None,
        keep: Sequence[int] = (),
        added_TD: Tensor | None = None,
    ) -> Hidden:
        """Run ``layers`` (default: all) over the flat tokens and keep the outputs of the layers in ``keep``.

        ``added_TD``: to the (scaled) embeddings.
        """
        x_TD = self.embed(tokens_T)
        if self.config.embed_scale != 1.0:
            x_TD = x_TD * torch.tensor(self.config.embed_scale, dtype=x_TD.dtype)
        if added_TD is not None:
            x_TD = x_TD + added_TD.to(x_TD.dtype)
        cos_TR, sin_TR = self.cos[positions_T].to(x_TD.dtype), self.sin[positions_T].to(x_TD.dtype)
        kept: dict[int, Tensor] = {}
        for index in range(self.config.num_layers) if layers is None else layers:
            x_TD = self.layers[index](x_TD, cos_TR, sin_TR, attend, index)
            if index in keep:
                kept[index] = x_TD
        return Hidden(self.norm(x_TD), kept)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """The unnormalised log law of the next token, ``[R, V]``, in the dtype of the model."""
        out = self.head(hidden_RD)
        cap = self.config.logit_softcap
        return cap * F.tanh(out / cap) if cap else out
