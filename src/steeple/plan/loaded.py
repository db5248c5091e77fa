"""The planner's shape of a model that the engine has loaded or is about to load."""

from __future__ import annotations

from steeple.config import ModelConfig
from steeple.plan.shapes import ModelShape


def shape_of_config(config: ModelConfig, name: str) -> ModelShape:
    """What the planner counts of ``config``. Sliding layers of several widths count with their mean."""
    sliding = [window for window in config.windows if window]
    return ModelShape(
        name=name,
        layers=config.num_layers,
        hidden=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        tied=config.tie_embeddings,
        max_context=config.max_context,
        norms=4 if config.post_norms else 2,
        qk_norm=config.qk_norm,
        qkv_bias=config.qkv_bias,
        o_bias=config.o_bias,
        window=round(sum(sliding) / len(sliding)) if sliding else 0,
        sliding_layers=len(sliding),
    )
