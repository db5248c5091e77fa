"""SPIRe as a model: a few of the target's last layers that read the target's own keys, and the memory of its own.

Source: SPIRe (MatX 2025). A draft is an ordinary decoder whose key and value projections (and the norm before them)
are frozen copies of the target's, so that the target's cache serves as its cache. What differs from an ordinary model
stands in ``spire.json``. Feedback memory: Fan et al. 2020 (arXiv 2002.09402), one mix per layer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from steeple.config import ModelConfig, check_range, from_dict
from steeple.errors import ConfigError, StorageError, WeightError
from steeple.model.decoder import Decoder
from steeple.model.layers import Layer, rotate

SHAPE_FILE, MEMORY_FILE = "spire.json", "spire.safetensors"
FORMAT = 1
OWNER = "spire.json"


@dataclass(frozen=True, kw_only=True)
class SpireShape:
    """How a SPIRe draft attends; the content of ``spire.json``.

    Attributes:
        target_layers: of the target, whose keys and values draft layer i reads in place i.
        sink: positions at the start of the text that stay visible, rounded up to pages.
        window: positions before the newest token that stay visible, rounded to pages.
        page: positions of a page (the block size of the target's cache).
        k: block length in training: in-flight positions that the draft has learned to live with.
        feedback: in-flight keys come from the memory of earlier positions, not from the layer's own input.
        own_keys: keys and values have projections of their own, so the target's cache cannot be read.
        dense: every cached key is visible.
        target_activations: cached keys come from the target; false: the draft computes them all itself.
        carry: the state that a token was predicted from is projected into its input; the target's for the root.
        format: of this file.
    """

    target_layers: tuple[int, ...]
    sink: int = 16
    window: int = 64
    page: int = 16
    k: int = 6
    feedback: bool = False
    own_keys: bool = False
    dense: bool = False
    target_activations: bool = True
    carry: bool = False
    format: int = FORMAT

    def __post_init__(self) -> None:
        check_range(OWNER, "format", self.format, FORMAT, FORMAT)
        for name, low in (("sink", 0), ("window", 0), ("page", 1)):
            check_range(OWNER, name, getattr(self, name), low, 2**31 - 1)
        check_range(OWNER, "k", self.k, 1, 63)
        for name in ("feedback", "own_keys", "dense", "target_activations", "carry"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{OWNER}.{name} = {getattr(self, name)!r} is not true or false.")
        layers = self.target_layers
        if not isinstance(layers, Sequence) or isinstance(layers, str) or not layers:
            raise ConfigError(f"{OWNER}.target_layers = {layers!r} is no list of layers; name at least one.")
        object.__setattr__(self, "target_layers", tuple(layers))
        for layer in layers:
            check_range(OWNER, "target_layers", layer, 0, 2**31 - 1)
        if list(layers) != sorted(set(layers)):
            raise ConfigError(f"{OWNER}.target_layers = {layers!r} must rise from layer to layer.")
        if self.feedback and not self.target_activations:
            raise ConfigError(
                f"{OWNER}.feedback = True needs target_activations: without them every memory hangs on the one before "
                "it, through the whole text. Switch feedback off."
            )

        if self.carry and not self.target_activations:
            raise ConfigError(
                f"{OWNER}.carry = True needs target_activations: the state of the text is the target's. Switch it off."
            )

    @property
    def reads_target_cache(self) -> bool:
        """Whether cached keys are the target's own, so that the draft needs no cache."""
        return self.target_activations and not self.own_keys

    @property
    def has_drafter(self) -> bool:
        """Whether the engine runs such drafts; the others are for comparisons in training."""
        return self.target_activations and not (self.dense and self.own_keys)

    @property
    def sink_pages(self) -> int:
        """Pages at the start of the text that stay visible."""
        return -(-self.sink // self.page)

    def first_recent_page(self, base: int) -> int:
        """The first page of the window of a draft whose in-flight positions begin at ``base``."""
        return 0 if self.dense else max(0, base - self.window) // self.page

    def check_target(self, target: ModelConfig, draft: ModelConfig) -> None:
        """Raise ``ConfigError`` unless a draft of shape ``draft`` can read the cache of ``target``."""
        if len(self.target_layers) != draft.num_layers:
            raise ConfigError(
                f"{OWNER}.target_layers = {self.target_layers!r} names {len(self.target_layers)} layers, but the draft "
                f"has {draft.num_layers}; give one for each."
            )
        if self.target_layers[-1] >= target.num_layers:
            raise ConfigError(
                f"{OWNER}.target_layers = {self.target_layers!r}, but the target has {target.num_layers} layers; "
                "give the target that the draft was trained for."
            )
        for name in ("hidden_size", "num_kv_heads", "head_dim", "rope_inv_freq", "rope_scale", "vocab_size"):
            ours, theirs = getattr(draft, name), getattr(target, name)
            if ours != theirs:
                shown = ("its own", "other ones") if name == "rope_inv_freq" else (repr(ours), repr(theirs))
                raise ConfigError(
                    f"The draft's {name} is {shown[0]}, the target's {shown[1]}; give the target it was trained for."
                )

    def save(self, folder: Path) -> None:
        """Write ``spire.json`` to ``folder``."""
        values = {"format": self.format, **asdict(self), "target_layers": list(self.target_layers)}
        (folder / SHAPE_FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> SpireShape:
        """Read ``spire.json`` of ``folder``; ``StorageError`` if there is none, ``ConfigError`` for a wrong field."""
        path = folder / SHAPE_FILE
        try:
            values: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StorageError(
                f"{path} cannot be read ({error}); give the folder of a draft that `steeple train spire` made."
            ) from error
        if not isinstance(values, dict) or "target_layers" not in values:
            raise ConfigError(f"{path} lacks the field 'target_layers'; train the draft again.")
        return from_dict(SpireShape, values)


def prune(target: Decoder, layers: int) -> Decoder:
    """The last ``layers`` layers of ``target`` with its embedding, final norm and head: copies, in the same dtype."""
    total = target.config.num_layers
    check_range("prune", "layers", layers, 1, total)
    windows = target.config.windows[total - layers :]
    config = replace(target.config, num_layers=layers, windows=windows if any(windows) else ())
    with torch.device("meta"):
        draft = Decoder(config)
    state = {}
    for name, value in target.state_dict().items():
        head, _, rest = name.partition(".")
        if head == "layers":
            number, _, rest = rest.partition(".")
            if int(number) < total - layers:
                continue
            name = f"layers.{int(number) - (total - layers)}.{rest}"
        state[name] = value.clone()
    draft.load_state_dict(state, assign=True)
    if config.tie_embeddings:
        draft.head.weight = draft.embed.weight
    draft.reset_rope()
    return draft.requires_grad_(False)


class FeedbackMemory(nn.Module):
    """The memory of a position, one vector per layer: a learned mix of embedding and layer outputs of that position.

    Args: layers: n of the draft. ``mix`` are logits ``[n, n + 1]`` over (embedding, output of each layer); zeros, a
    uniform mix, to begin with.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(layers, layers + 1))

    def forward(self, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """n + 1 states ``[T, D]`` -> for each layer the memory that its keys and values come from, ``[T, D]``."""
        weights = self.mix.softmax(dim=-1).to(states[0].dtype)
        found = []
        for row in weights:
            memory = row[0] * states[0]
            for weight, state in zip(row[1:], states[1:], strict=True):
                memory = memory + weight * state
            found.append(memory)
        return tuple(found)

    def save(self, folder: Path) -> None:
        """Write ``spire.safetensors``."""
        save_file({"mix": self.mix.detach().float().cpu().contiguous()}, folder / MEMORY_FILE)

    @staticmethod
    def load(folder: Path) -> FeedbackMemory:
        """Read ``spire.safetensors``, for inference; ``WeightError`` if it is absent or holds something else."""
        try:
            mix = load_file(folder / MEMORY_FILE)["mix"]
        except (OSError, KeyError, SafetensorError) as error:
            raise WeightError(f"{folder / MEMORY_FILE} cannot be read ({error}); train the draft again.") from error
        if mix.dim() != 2 or mix.shape[1] != mix.shape[0] + 1:
            raise WeightError(f"{folder / MEMORY_FILE}: mix has shape {list(mix.shape)}, expected [n, n + 1].")
        memory = FeedbackMemory(mix.shape[0])
        memory.mix = nn.Parameter(mix.float(), requires_grad=False)
        return memory


def embedding(decoder: Decoder, tokens_T: Tensor) -> Tensor:
    """What enters the first layer, ``[T, D]``."""
    x_TD = decoder.embed(tokens_T)
    scale = decoder.config.embed_scale
    return x_TD if scale == 1.0 else x_TD * torch.tensor(scale, dtype=x_TD.dtype)


def keys_values(decoder: Decoder, layer: int, m_TD: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated keys and values ``[T, K, H]`` that ``layer`` makes of ``m_TD`` in place of its own input."""
    block: Layer = decoder.layers[layer]  # type: ignore[assignment]
    attention = block.attention
    x_TD = block.attention_norm(m_TD)
    queries = attention.heads * attention.head_dim
    if attention.qkv.packed is not None:
        kv = attention.qkv(x_TD)[:, queries:]
    else:
        bias = attention.qkv.bias
        kv = F.linear(x_TD, attention.qkv.weight[queries:], None if bias is None else bias[queries:])
    k_TKH, v_TKH = kv.unflatten(-1, (2, attention.kv_heads, attention.head_dim)).unbind(1)
    if attention.k_norm is not None:
        k_TKH = attention.k_norm(k_TKH)
    cos, sin = (table[positions_T].to(m_TD.dtype) for table in (decoder.cos, decoder.sin))
    return rotate(k_TKH, cos, sin), v_TKH
