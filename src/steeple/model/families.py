"""The model families as data: how each writes its weights down and how its configuration reads.

Everything that differs between families is a field of ``Family``. A new family is one entry of ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from steeple.config import ModelConfig
from steeple.errors import ConfigError, ModelError, UnsupportedModel
from steeple.model.rope import rope

TOP = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
"""Modules outside the layers, which every family names alike."""

SPLIT: Mapping[str, tuple[str, ...]] = {
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "attention.o": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
"""Modules of a layer: our name -> the names in a checkpoint whose rows, one below the other, are ours."""

FUSED_MLP: Mapping[str, tuple[str, ...]] = {**SPLIT, "mlp.gate_up": ("mlp.gate_up_proj",)}

ACTIVATIONS = {"silu": False, "swish": False, "gelu_pytorch_tanh": True, "gelu_new": True}
"""Published name -> ``ModelConfig.gelu``."""

HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "n_routed_experts": (None, 0),
    "use_bidirectional_attention": (None, False),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
}
"""Options that change the computation and that the decoder lacks -> the values with which they change nothing."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One way to publish a decoder.

    A field of type ``bool | str`` is a constant, or the name of the configuration field that decides. ``windows``:
    ``none``, ``all`` (``sliding_window`` holds in every layer) or ``layers`` (where ``layer_types`` says so).
    ``norm_offset`` is added to every norm's weight. ``interleaved_rope``: rotated pairs are (2i, 2i + 1), not
    (i, i + R), so query and key rows are reordered when loaded.
    """

    label: str
    architecture: str
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: SPLIT)
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    interleaved_rope: bool = False
    partial_rotary: bool = False
    windows: str = "none"
    activation: str = "hidden_act"
    scale_embedding: bool = False
    attention_scalar: str = ""
    attention_softcap: str = ""
    logit_softcap: str = ""

    def __post_init__(self) -> None:
        if self.windows not in ("none", "all", "layers"):
            raise ConfigError(f"Family.windows = {self.windows!r} is unknown; give none, all or layers.")
        if self.interleaved_rope and self.qk_norm:
            raise ConfigError("Family.interleaved_rope with qk_norm is not possible: the norms' weights stay in place.")


LLAMA = Family(
    label="Llama 2 and 3",
    architecture="LlamaForCausalLM",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
)
GLM = Family(
    label="GLM-4 (2024)",
    architecture="GlmForCausalLM",
    modules=FUSED_MLP,
    qkv_bias="attention_bias",
    interleaved_rope=True,
    partial_rotary=True,
)

FAMILIES: Mapping[str, Family] = {
    "llama": LLAMA,
    "mistral": Family(label="Mistral", architecture="MistralForCausalLM", windows="all"),
    "qwen2": Family(label="Qwen 2 and 2.5", architecture="Qwen2ForCausalLM", qkv_bias=True, windows="layers"),
    "qwen3": replace(
        LLAMA, label="Qwen 3", architecture="Qwen3ForCausalLM", mlp_bias=False, qk_norm=True, windows="layers"
    ),
    "phi3": Family(
        label="Phi 3 and 4",
        architecture="Phi3ForCausalLM",
        modules={**FUSED_MLP, "attention.qkv": ("self_attn.qkv_proj",)},
        partial_rotary=True,
        windows="all",
    ),
    "gemma2": Family(
        label="Gemma 2",
        architecture="Gemma2ForCausalLM",
        modules={
            **SPLIT,
            "attention_post_norm": ("post_attention_layernorm",),
            "mlp_norm": ("pre_feedforward_layernorm",),
            "mlp_post_norm": ("post_feedforward_layernorm",),
        },
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        post_norms=True,
        norm_offset=1.0,
        windows="layers",
        activation="hidden_activation",
        scale_embedding=True,
        attention_scalar="query_pre_attn_scalar",
        attention_softcap="attn_logit_softcapping",
        logit_softcap="final_logit_softcapping",
    ),
    "glm": GLM,
    "glm4": replace(
        GLM,
        label="GLM-4 (0414)",
        architecture="Glm4ForCausalLM",
        modules={
            **FUSED_MLP,
            "attention_post_norm": ("post_self_attn_layernorm",),
            "mlp_post_norm": ("post_mlp_layernorm",),
        },
        post_norms=True,
    ),
}
"""``model_type`` of a published configuration -> how to read it."""


def family_of(hf_config: PretrainedConfig) -> Family:
    """The family of ``hf_config``; raises ``UnsupportedModel`` with what is supported."""
    if hf_config.model_type not in FAMILIES:
        known = ", ".join(f"{name} ({family.label})" for name, family in sorted(FAMILIES.items()))
        raise UnsupportedModel(f"model_type {hf_config.model_type!r} is not supported. Supported: {known}.")
    return FAMILIES[hf_config.model_type]


def model_config(hf_config: PretrainedConfig, max_context: int | None = None) -> ModelConfig:
    """The decoder's shape that ``hf_config`` describes.

    Args:
        max_context: positions to serve; default: ``max_position_embeddings``. Dynamic NTK frequencies are fixed for
            it (see ``steeple.model.rope``).

    Raises:
        UnsupportedModel: the architecture, or an option of it, that the decoder does not have.
        ModelError: a field is absent or contradicts another.
        ConfigError: ``max_context`` is out of range.
    """
    family = family_of(hf_config)
    _refuse_options(family, hf_config)
    heads, hidden = _whole(hf_config, "num_attention_heads"), _whole(hf_config, "hidden_size")
    kv_heads = _whole(hf_config, "num_key_value_heads", heads)
    head_dim = _whole(hf_config, "head_dim", hidden // heads)
    if heads % kv_heads:
        raise ModelError(f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}.")
    inverse, factor, context = rope(hf_config, head_dim, max_context)
    layers, vocab = _whole(hf_config, "num_hidden_layers"), _whole(hf_config, "vocab_size")
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=_whole(hf_config, "intermediate_size"),
        max_context=context,
        norm_eps=float(_value(hf_config, "rms_norm_eps")),
        rope_inv_freq=inverse,
        rope_scale=factor,
        windows=_windows(family, hf_config, layers),
        tie_embeddings=bool(_value(hf_config, "tie_word_embeddings")),
        qkv_bias=_flag(hf_config, family.qkv_bias),
        o_bias=_flag(hf_config, family.o_bias),
        mlp_bias=_flag(hf_config, family.mlp_bias),
        qk_norm=family.qk_norm,
        post_norms=family.post_norms,
        gelu=ACTIVATIONS[_value(hf_config, family.activation)],
        embed_scale=hidden**0.5 if family.scale_embedding else 1.0,
        attention_scale=_number(hf_config, family.attention_scalar, float(head_dim)) ** -0.5,
        attention_softcap=_number(hf_config, family.attention_softcap, 0.0),
        logit_softcap=_number(hf_config, family.logit_softcap, 0.0),
        eos_token_ids=_eos(hf_config, vocab),
    )


@dataclass(frozen=True, slots=True)
class Piece:
    """``rows`` rows of one of our parameters, from ``start`` on: all of the checkpoint's tensor ``name``."""

    name: str
    start: int
    rows: int


def pieces(family: Family, config: ModelConfig, parameter: str, rows: int) -> tuple[Piece, ...]:
    """Where a checkpoint keeps the ``rows`` rows of the decoder's ``parameter`` (its name in ``named_parameters``)."""
    module, kind = parameter.rsplit(".", 1)
    if module in TOP:
        return (Piece(f"{TOP[module]}.{kind}", 0, rows),)
    _, layer, local = module.split(".", 2)
    names = family.modules[local]
    kv_rows = config.num_kv_heads * config.head_dim
    fused = {
        "attention.qkv": (config.num_heads * config.head_dim, kv_rows, kv_rows),
        "mlp.gate_up": (config.intermediate_size, config.intermediate_size),
    }
    sizes = (rows,) if len(names) == 1 else fused[local]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return tuple(
        Piece(f"model.layers.{layer}.{name}.{kind}", start, size)
        for name, start, size in zip(names, starts, sizes, strict=True)
    )


def norm_offset(family: Family, parameter: str) -> float:
    """What to add to the checkpoint's values of ``parameter``."""
    return family.norm_offset if parameter.rsplit(".", 1)[0].endswith("norm") else 0.0


def row_order(family: Family, config: ModelConfig, parameter: str) -> Tensor | None:
    """``[rows]``: row ``i`` of our ``parameter`` is row ``order[i]`` of the checkpoint's; None = as it is.

    Rotary embedding turns pairs of dimensions. Which two form a pair is a convention, so a family with interleaved
    pairs (0, 1), (2, 3), ... becomes one with halves (0, R), (1, R + 1), ... by reordering the rows that produce
    queries and keys. Their products do not change.
    """
    if not family.interleaved_rope or ".attention.qkv." not in parameter:
        return None
    rotated = 2 * len(config.rope_inv_freq)
    head = torch.cat((torch.arange(0, rotated, 2), torch.arange(1, rotated, 2), torch.arange(rotated, config.head_dim)))
    turned = config.num_heads + config.num_kv_heads
    heads = torch.arange(turned).unsqueeze(1) * config.head_dim + head
    values = torch.arange(turned * config.head_dim, (turned + config.num_kv_heads) * config.head_dim)
    return torch.cat((heads.flatten(), values))


def _refuse_options(family: Family, hf_config: PretrainedConfig) -> None:
    for name, harmless in HARMLESS.items():
        value = getattr(hf_config, name, None)
        if value not in harmless:
            raise UnsupportedModel(f"{name} = {value!r} of {hf_config.model_type!r} is not supported by the decoder.")
    activation = _value(hf_config, family.activation)
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UnsupportedModel(f"{family.activation} = {activation!r} is not supported. Supported: {known}.")
    partial = (getattr(hf_config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    if partial != 1.0 and not family.partial_rotary:
        raise UnsupportedModel(f"partial_rotary_factor = {partial!r} is not supported for {hf_config.model_type!r}.")


def _windows(family: Family, hf_config: PretrainedConfig, layers: int) -> tuple[int, ...]:
    """Positions that each layer sees, 0 = all; empty if every layer sees all."""
    off = getattr(hf_config, "use_sliding_window", True) is False
    width = 0 if off else int(getattr(hf_config, "sliding_window", None) or 0)
    types = getattr(hf_config, "layer_types", None)
    if family.windows == "none":
        if width:
            raise UnsupportedModel(f"sliding_window = {width} is not supported for {hf_config.model_type!r}.")
        return ()
    if family.windows == "all":
        return (width,) * layers if width else ()
    if types is None or len(types) != layers:
        raise ModelError(f"layer_types must have one entry for each of the {layers} layers; found {types!r}.")
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedModel(f"layer_types has {unknown}; supported are full_attention and sliding_attention.")
    slides = tuple(kind == "sliding_attention" for kind in types)
    if any(slides) and not width:
        raise ModelError("layer_types has sliding_attention but sliding_window is not set; set it in config.json.")
    return tuple(width if slide else 0 for slide in slides) if any(slides) else ()


def _eos(hf_config: PretrainedConfig, vocab: int) -> tuple[int, ...]:
    value = getattr(hf_config, "eos_token_id", None)
    ids = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for index in ids:
        if not isinstance(index, int) or not 0 <= index < vocab:
            raise ModelError(f"eos_token_id = {index!r} is out of range; this vocabulary has ids 0 to {vocab - 1}.")
    return ids


def _value(hf_config: PretrainedConfig, name: str, default: Any = None) -> Any:
    value = getattr(hf_config, name, None)
    value = default if value is None else value
    if value is None:
        raise ModelError(f"The configuration of {hf_config.model_type!r} lacks the field {name!r}; add it.")
    return value


def _whole(hf_config: PretrainedConfig, name: str, default: int | None = None) -> int:
    value = _value(hf_config, name, default)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{name} = {value!r} of {hf_config.model_type!r} must be a whole number of at least 1.")
    return value


def _number(hf_config: PretrainedConfig, name: str, default: float) -> float:
    """The field ``name`` where the family has one and it is set, else ``default``."""
    value = getattr(hf_config, name, None) if name else None
    return default if value is None else float(value)


def _flag(hf_config: PretrainedConfig, source: bool | str) -> bool:
    return bool(getattr(hf_config, source, False)) if isinstance(source, str) else source
