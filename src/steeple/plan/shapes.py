"""Shapes of models, exact to the parameter: from a config.json, from a table of public models, or by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from steeple.errors import ConfigError, ModelError, UnsupportedModel, did_you_mean

Floats = NDArray[np.float64]

EMBEDDED = MappingProxyType({"demo": "target", "demo/small": "small", "demo/little": "little", "demo/spire": "spire"})
"""Special names of the embedded models and their folders; all but the last are those of ``steeple.hf``."""

REQUIRED = MappingProxyType(
    {
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "intermediate": "intermediate_size",
        "vocab": "vocab_size",
    }
)
"""Field of a shape -> field of a config.json that no default may stand for."""

FAMILIES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "qwen2": {"qkv_bias": True},
        "qwen3": {"qk_norm": True},
        "gemma": {"tied": True},
        "gemma2": {"tied": True, "norms": 4},
        "gemma3": {"tied": True, "norms": 4, "qk_norm": True},
        "gemma3_text": {"tied": True, "norms": 4, "qk_norm": True},
        "starcoder2": {"gated": False},
    }
)
"""model_type -> what differs from Llama and is not said in its config.json."""

# What the counts below do not cover: experts, latent attention, state spaces.
FOREIGN = ("num_experts", "num_local_experts", "n_routed_experts", "kv_lora_rank", "ssm_cfg", "state_size")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A dense decoder-only transformer as far as bytes and operations go.

    Args:
        name: how tables call it.
        layers: transformer blocks.
        hidden: width of the residual stream.
        heads: query heads.
        kv_heads: heads of keys and values.
        head_dim: elements of one head.
        intermediate: width inside the feed-forward network.
        vocab: rows of the embedding.
        tied: the head is the embedding.
        max_context: positions that the model was made for; 0 = not said.
        gated: three matrices in the feed-forward network (SwiGLU, GeGLU), else two.
        norms: norms of width ``hidden`` per layer.
        qk_norm: one norm of width ``head_dim`` for queries and one for keys, per layer.
        qkv_bias: biases at the projections of queries, keys and values.
        o_bias: a bias at the projection behind attention.
        window: positions that the sliding layers see, itself included; 0 = no layer slides.
        sliding_layers: how many of the layers see ``window`` positions only.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int = 0
    tied: bool = False
    max_context: int = 0
    gated: bool = True
    norms: int = 2
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    window: int = 0
    sliding_layers: int = 0

    def __post_init__(self) -> None:
        for field in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"ModelShape.{field} = {value!r} of {self.name!r}; give an integer of 1 or more.")
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"ModelShape.heads = {self.heads} of {self.name!r} is no multiple of kv_heads = {self.kv_heads}; "
                "correct one of them."
            )
        if self.vocab < 0 or not 0 <= self.sliding_layers <= self.layers:
            raise ConfigError(
                f"ModelShape.vocab = {self.vocab}, sliding_layers = {self.sliding_layers} of {self.name!r}; give 0 or "
                f"more, and at most {self.layers} sliding layers."
            )

    @property
    def linear_parameters(self) -> int:
        """Weights of the matrices in the blocks: what a row is multiplied with, without the head."""
        width = self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        mlp = (3 if self.gated else 2) * self.intermediate
        return self.layers * self.hidden * (width + mlp)

    @property
    def body_parameters(self) -> int:
        """Everything in the blocks: matrices, norms, biases. The count of the SPIRe paper."""
        per_layer = self.norms * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        per_layer += self.head_dim * (self.heads + 2 * self.kv_heads) if self.qkv_bias else 0
        per_layer += self.hidden if self.o_bias else 0
        return self.linear_parameters + self.layers * per_layer

    @property
    def embedding_parameters(self) -> int:
        """Rows of the embedding."""
        return self.vocab * self.hidden

    @property
    def head_parameters(self) -> int:
        """What the last hidden state is multiplied with, whether or not it is the embedding."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Everything that is stored: body, embedding, head unless tied, final norm."""
        return self.body_parameters + (1 if self.tied else 2) * self.embedding_parameters + self.hidden

    @property
    def kv_elements_per_layer(self) -> int:
        """Elements of keys and values of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of keys and values that one token keeps in all layers together."""
        return self.layers * self.kv_elements_per_layer

    def kv_elements_read(self, context: ArrayLike) -> Floats:
        """Elements of keys and values that attention reads for one request at ``context`` positions (any shape)."""
        seen = np.asarray(context, dtype=np.float64)
        sliding = self.sliding_layers if self.window else 0
        near = np.minimum(seen, self.window) if sliding else seen
        return self.kv_elements_per_layer * ((self.layers - sliding) * seen + sliding * near)

    def last_layers(self, layers: int, name: str = "") -> ModelShape:
        """The draft made of the last ``layers`` blocks with the same embedding and head.

        Raises:
            ConfigError: there are not so many.
        """
        if not 1 <= layers <= self.layers:
            raise ConfigError(f"{layers} layers of {self.name!r}; give from 1 to {self.layers}.")
        sliding = round(self.sliding_layers * layers / self.layers)
        return replace(self, name=name or f"{self.name}, {layers} layers", layers=layers, sliding_layers=sliding)


def from_config(config: Mapping[str, Any] | str | Path, name: str = "") -> ModelShape:
    """The shape in a ``config.json``: its content, the file, or the folder that holds it.

    Keys of the Llama, Qwen, Mistral and Gemma families; an explicit ``head_dim`` counts, else hidden / heads.

    Raises:
        ModelError: the file cannot be read, or a field is missing or is no whole number.
        UnsupportedModel: experts, latent attention or a state space, which the counts do not cover.
    """
    values = dict(config) if isinstance(config, Mapping) else _read(Path(config))
    where = name or ("the config" if isinstance(config, Mapping) else str(config))
    if isinstance(values.get("text_config"), Mapping):
        values = {**values, **values["text_config"]}
    foreign = [key for key in FOREIGN if values.get(key)]
    if foreign:
        raise UnsupportedModel(f"{where}: {foreign[0]} = {values[foreign[0]]!r}. The planner knows dense models only.")
    missing = [key for key in REQUIRED.values() if key not in values]
    if missing:
        raise ModelError(
            f"{where} lacks {', '.join(map(repr, missing))}; add the fields, or download config.json again."
        )
    family = FAMILIES.get(str(values.get("model_type", "")), {})
    sizes = {field: _whole(values, key, where) for field, key in REQUIRED.items()}
    heads = sizes["heads"]
    head_dim = _whole(values, "head_dim", where) if values.get("head_dim") else _quotient(sizes, where)
    bias = bool(values.get("attention_bias", family.get("qkv_bias", False)))
    window, sliding = _sliding(values, sizes["layers"])
    return ModelShape(
        name=name or str(values.get("_name_or_path") or values.get("model_type") or "model"),
        **sizes,
        kv_heads=_whole(values, "num_key_value_heads", where) if values.get("num_key_value_heads") else heads,
        head_dim=head_dim,
        tied=bool(values.get("tie_word_embeddings", family.get("tied", False))),
        max_context=_whole(values, "max_position_embeddings", where) if values.get("max_position_embeddings") else 0,
        gated=bool(family.get("gated", True)),
        norms=int(family.get("norms", 2)),
        qk_norm=bool(family.get("qk_norm", False)),
        qkv_bias=bias,
        o_bias=bool(values.get("attention_bias", False)),
        window=window,
        sliding_layers=sliding,
    )


def find_shape(model: str | Path) -> ModelShape:
    """The shape of ``model``: an embedded name, a folder or config.json, or a name of the table. No network.

    Raises:
        ModelError: none of these; says which name is nearest.
    """
    text = str(model)
    if isinstance(model, str) and text in EMBEDDED:
        return from_config(_embedded(text), text)
    path = Path(model).expanduser()
    if path.exists():
        return from_config(path, path.parent.name if path.is_file() else path.name)
    key = text.lower().rpartition("/")[2]
    key = HUB_NAMES.get(key, key)
    if key in SHAPES:
        return SHAPES[key]
    raise ModelError(
        f"Model {text!r} is no folder with a config.json and not in the table. "
        f"{did_you_mean(key, [*EMBEDDED, *SHAPES])} For any other model give the folder of its config.json."
    )


def _read(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror}); give a folder with a config.json.") from error
    except ValueError as error:
        raise ModelError(f"{file} is no valid JSON ({error}); download it again.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} holds no JSON object; download it again.")
    return values


def _embedded(name: str) -> Path:
    package = Path(__file__).resolve().parents[1]
    places = [root / "models" / EMBEDDED[name] for root in (package, package.parents[1])]
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise ModelError(f"The embedded model {name!r} is not installed; install Steeple again, or give another model.")


def _whole(values: Mapping[str, Any], key: str, where: str) -> int:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{where}: {key} = {value!r} is no whole number of 1 or more; correct it.")
    return value


def _quotient(sizes: Mapping[str, int], where: str) -> int:
    hidden, heads = sizes["hidden"], sizes["heads"]
    if hidden % heads:
        raise ModelError(
            f"{where} lacks 'head_dim', and hidden_size = {hidden} is no multiple of num_attention_heads = {heads}; "
            "add head_dim."
        )
    return hidden // heads


def _sliding(values: Mapping[str, Any], layers: int) -> tuple[int, int]:
    """The sliding window and how many layers have it. Qwen writes a window that ``use_sliding_window`` turns off."""
    window = values.get("sliding_window")
    if not isinstance(window, int) or isinstance(window, bool) or not values.get("use_sliding_window", True):
        return 0, 0
    kinds = values.get("layer_types")
    if isinstance(kinds, list):
        sliding = sum(kind == "sliding_attention" for kind in kinds)
        return (window, sliding) if sliding else (0, 0)
    pattern = values.get("sliding_window_pattern")
    if isinstance(pattern, int) and pattern > 1:
        return window, layers - layers // pattern
    # Gemma 2 alternates and says so only in its code
    return window, (layers + 1) // 2 if values.get("model_type") == "gemma2" else layers


def _llama(
    name: str, layers: int, hidden: int, heads: int, intermediate: int, context: int, **other: Any
) -> ModelShape:
    """A shape of the Llama 3 family: 8 kv heads, a vocabulary of 128,256."""
    head_dim = hidden // heads
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=8,
        head_dim=head_dim,
        intermediate=intermediate,
        vocab=128256,
        max_context=context,
        **other,
    )


def _qwen3(name: str, layers: int, hidden: int, heads: int, intermediate: int, tied: bool) -> ModelShape:
    """A shape of the dense Qwen3 family: 8 kv heads of 128, norms at queries and keys."""
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        intermediate=intermediate,
        vocab=151936,
        tied=tied,
        max_context=40960,
        qk_norm=True,
    )


def _toy(name: str, layers: int, hidden: int, head_dim: int, intermediate: int) -> ModelShape:
    """A model of the SPIRe paper: 8 heads, each with keys of its own. Its vocabulary is not stated, so it is 0."""
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=8,
        kv_heads=8,
        head_dim=head_dim,
        intermediate=intermediate,
        max_context=1024,
    )


_TABLE = (
    _llama("llama-3-8b", 32, 4096, 32, 14336, 8192),
    _llama("llama-3-70b", 80, 8192, 64, 28672, 8192),
    _llama("llama-3.1-8b", 32, 4096, 32, 14336, 131072),
    _llama("llama-3.1-70b", 80, 8192, 64, 28672, 131072),
    _llama("llama-3.2-1b", 16, 2048, 32, 8192, 131072, tied=True),
    _llama("llama-3.2-3b", 28, 3072, 24, 8192, 131072, tied=True),
    _llama("llama-3.3-70b", 80, 8192, 64, 28672, 131072),
    ModelShape(
        name="llama-2-7b",
        layers=32,
        hidden=4096,
        heads=32,
        kv_heads=32,
        head_dim=128,
        intermediate=11008,
        vocab=32000,
        max_context=4096,
    ),
    _qwen3("qwen3-0.6b", 28, 1024, 16, 3072, True),
    _qwen3("qwen3-1.7b", 28, 2048, 16, 6144, True),
    _qwen3("qwen3-4b", 36, 2560, 32, 9728, True),
    _qwen3("qwen3-8b", 36, 4096, 32, 12288, False),
    _qwen3("qwen3-14b", 40, 5120, 40, 17408, False),
    _qwen3("qwen3-32b", 64, 5120, 64, 25600, False),
    ModelShape(
        name="mistral-7b",
        layers=32,
        hidden=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        intermediate=14336,
        vocab=32768,
        max_context=32768,
    ),
    _toy("spire-target", 8, 512, 128, 4096),
    _toy("spire-vanilla-draft", 4, 256, 64, 2048),
    _toy("spire-draft", 2, 512, 128, 4096),
)
SHAPES: Mapping[str, ModelShape] = MappingProxyType({shape.name: shape for shape in _TABLE})
"""Public models by name. ``mistral-7b`` is v0.3."""

HUB_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "meta-llama-3-8b": "llama-3-8b",
        "meta-llama-3-8b-instruct": "llama-3-8b",
        "meta-llama-3-70b": "llama-3-70b",
        "meta-llama-3-70b-instruct": "llama-3-70b",
        "llama-3.1-8b-instruct": "llama-3.1-8b",
        "llama-3.1-70b-instruct": "llama-3.1-70b",
        "llama-3.2-1b-instruct": "llama-3.2-1b",
        "llama-3.2-3b-instruct": "llama-3.2-3b",
        "llama-3.3-70b-instruct": "llama-3.3-70b",
        "llama-2-7b-hf": "llama-2-7b",
        "llama-2-7b-chat-hf": "llama-2-7b",
        "mistral-7b-v0.3": "mistral-7b",
        "mistral-7b-instruct-v0.3": "mistral-7b",
    }
)
"""Names on the hub, without the owner and in lower case -> names of the table."""
