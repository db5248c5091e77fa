"""Rotary frequencies of a published configuration, with the scaling already in them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from steeple.errors import ConfigError, ModelError, UnsupportedModel

SCALINGS = ("linear", "dynamic", "llama3", "yarn")


def rope(config: PretrainedConfig, head_dim: int, max_context: int | None) -> tuple[tuple[float, ...], float, int]:
    """Inverse frequencies (radians per position), the factor on cos and sin, and the largest context.

    Dynamic NTK scaling (the frequencies depend on the length) is fixed once for ``max_context``: cached keys are
    rotated already, and must not change when a request grows. So a request of every length gets what transformers
    computes at length ``max_context``.

    Args:
        max_context: positions to serve; default: what the configuration was trained for (``max_position_embeddings``).

    Raises:
        UnsupportedModel: a kind of scaling that the decoder does not have.
        ModelError: a parameter of the scaling is absent.
        ConfigError: ``max_context`` is beyond what the model was made for.
    """
    values = getattr(config, "rope_parameters", None)
    if not values or ("rope_theta" not in values and "rope_type" not in values):
        nested = f"per layer type ({', '.join(values)})" if values else "absent"
        raise UnsupportedModel(
            f"rope_parameters of {config.model_type!r} are {nested}; the decoder needs one set, with 'rope_theta'."
        )
    kind = str(values.get("rope_type", "default"))
    if kind != "default" and kind not in SCALINGS:
        raise UnsupportedModel(f"rope_type {kind!r} is not supported. Supported: default, {', '.join(SCALINGS)}.")
    trained = int(config.max_position_embeddings)
    limit = _limit(values, kind, trained)
    context = trained if max_context is None else max_context
    if not 1 <= context <= limit:
        raise ConfigError(f"max_context = {context!r} is out of range; this model allows 1 to {limit}.")
    try:
        if kind == "default":
            inverse, factor = _plain(float(values["rope_theta"]), head_dim, values), 1.0
        else:
            inverse, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=context)
    except (KeyError, TypeError) as error:
        raise ModelError(f"rope_parameters of type {kind!r} lack or mistype a field: {error}.") from error
    return tuple(inverse.tolist()), float(factor), context


def _plain(theta: float, head_dim: int, values: dict[str, Any]) -> torch.Tensor:
    dim = int(head_dim * values.get("partial_rotary_factor", 1.0))
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))


def _limit(values: dict[str, Any], kind: str, trained: int) -> int:
    """Positions that the scaling was made for: ``trained``, or the original context times the factor."""
    if kind == "default":
        return trained
    original = values.get("original_max_position_embeddings") or trained
    return max(trained, int(original * (values.get("factor") or 1.0)))
