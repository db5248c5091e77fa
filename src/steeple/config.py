"""Frozen settings that several rooms share. A method's own settings live beside the method."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from steeple.errors import ConfigError, did_you_mean

C = TypeVar("C")


def from_dict(cls: type[C], values: dict[str, Any]) -> C:
    """Build the dataclass ``cls`` from ``values``; an unknown key raises ``ConfigError`` with the closest known one."""
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ConfigError(f"{cls.__name__} has no field {key!r}. {did_you_mean(key, known)}")
    return cls(**values)


def check_range(owner: str, name: str, value: float, low: float, high: float) -> None:
    """Raise ``ConfigError`` unless ``low <= value <= high`` (a NaN never is). Integer bounds ask for an integer."""
    whole = isinstance(low, int) and isinstance(high, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ConfigError(f"{owner}.{name} = {value!r} is not {'an integer' if whole else 'a number'}.")
    if not low <= value <= high:
        raise ConfigError(f"{owner}.{name} = {value!r} is out of range; give a value from {low} to {high}.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only transformer, as data. Every family is a set of these values.

    ``rope_inv_freq`` (radians per position, one per rotated pair) and ``rope_scale`` already hold the rope scaling,
    so the decoder knows no kinds of it. ``windows[l]`` is the number of positions layer ``l`` sees, 0 = all.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_context: int
    norm_eps: float = 1e-5
    rope_inv_freq: tuple[float, ...] = field(repr=False)
    rope_scale: float = 1.0
    windows: tuple[int, ...] = ()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    gelu: bool = False
    embed_scale: float = 1.0
    attention_scale: float = 0.0  # 0 = head_dim ** -0.5
    attention_softcap: float = 0.0  # 0 = none
    logit_softcap: float = 0.0  # 0 = none
    eos_token_ids: tuple[int, ...] = ()

    @property
    def scale(self) -> float:
        """What queries times keys are multiplied with."""
        return self.attention_scale or self.head_dim**-0.5

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of keys and values that one token keeps in all layers together."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def window(self, layer: int) -> int:
        """Positions that ``layer`` sees, itself included; 0 = all of them."""
        return self.windows[layer] if self.windows else 0

    def body_parameters(self) -> int:
        """Weights of the linear layers, without embedding, head, norms and biases."""
        qkv = self.hidden_size * self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        out = self.hidden_size * self.head_dim * self.num_heads
        return self.num_layers * (qkv + out + 3 * self.hidden_size * self.intermediate_size)
