"""SPIRe: the target's last layers, trained to draft, read the target's own keys through a small window.

Source: SPIRe (MatX 2025): sparse attention, pruned initialisation, feedback memory.
Cost: k passes of a quarter of the target a round and keys of constant size; no prompt is read, no second cache kept.
Loses to plain decoding where the target's verification is bound by arithmetic (large batch, short context), and to
``sparse_self`` at very long context, where only acceptance counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from steeple import hf
from steeple.cache.paged import PagedCache
from steeple.cache.slice import CacheSlice
from steeple.cache.window import EVERYTHING, Window
from steeple.draft.base import Drafter, Surroundings
from steeple.draft.carry import Carry
from steeple.draft.declared import key_bytes_per_token, stored_config
from steeple.draft.ringed import RingDrafter
from steeple.draft.sparse_self import check_draft_shape, choice_rule
from steeple.draft.spire_model import SHAPE_FILE, FeedbackMemory, SpireShape
from steeple.draft.windowed import DraftShape, Passes, SpireParts, View, WindowDrafter, draft_laws
from steeple.errors import ConfigError, did_you_mean
from steeple.model.decoder import Decoder
from steeple.model.layers import Layer
from steeple.model.load import load_decoder
from steeple.model.quantize import quantize_weights
from steeple.ops.linear import quantised
from steeple.plan.memory_parts import FLOAT, DraftMemory, Lay, linear_bytes, weight_bytes

__all__ = ["SpireDraftConfig", "SpireParts", "check_draft", "draft_laws", "spire_drafter"]

# SpireDraftConfig.weights -> what is done to the draft as loaded
LOADED: dict[str, Callable[[Decoder], None]] = {"stored": lambda _decoder: None, "int8": quantize_weights}
SAME_KEYS = 0.05  # relative difference of key and value projections; quantising a target to 8 bits makes about 0.01


@dataclass(frozen=True, kw_only=True)
class SpireDraftConfig:
    """Settings of a SPIRe draft; its window is the one it was trained with. ``choose`` and ``budget`` as for
    ``sparse_self``: pages beside the window, which it was not trained with."""

    model: str = field(default="", metadata={"help": "folder of the trained draft; empty: the target's sibling"})
    choose: str = field(default="window", metadata={"help": "window, snapkv or pillar: pages read beside the window"})
    budget: float = field(default=128.0, metadata={"help": "positions to choose, or up to 1 a share of the text"})
    k: int = field(default=4, metadata={"help": "depth of the draft"})
    width: int = field(default=1, metadata={"help": "greedy requests: tokens proposed per depth"})
    weights: str = field(default="stored", metadata={"help": "the draft's: stored, or int8 (needs torchao)"})

    def __post_init__(self) -> None:
        if self.weights not in LOADED:
            raise ConfigError(f"spire.weights = {self.weights!r}. {did_you_mean(self.weights, LOADED)}")
        choice_rule("spire", self.choose, self.budget)
        check_draft_shape("spire", self.k, self.width)

    def build(self, around: Surroundings) -> Drafter:
        """Load the draft; ``ConfigError`` if it was trained for another target."""
        folder = Path(hf.resolve(self.model)) if self.model else _sibling(around)
        shape, target = SpireShape.load(folder), around.decoder
        limit = target.config.max_context
        decoder = load_decoder(folder, dtype=around.dtype, device=around.device, max_context=limit)
        memory = FeedbackMemory.load(folder).to(around.device) if shape.feedback else None
        check_draft(shape, decoder, target, folder)
        LOADED[self.weights](decoder)
        decoder.use(around.kernels)
        carry = None
        if shape.carry:
            carry = Carry.load(folder, decoder.config.hidden_size, decoder.dtype, around.device)
            carry.projection.use(around.kernels.pack)
        return spire_drafter(self, shape, SpireParts(decoder, memory, carry), around)

    def memory(self, around: Surroundings, lay: Lay) -> DraftMemory:
        """The draft's weights, and keys only where it has projections for them."""
        folder = Path(hf.resolve(self.model)) if self.model else _sibling(around)
        shape, config = SpireShape.load(folder), stored_config(folder, around)
        width, n = config.hidden_size, config.num_layers
        rule = choice_rule("spire", self.choose, self.budget)
        held = weight_bytes(config, replace(lay, int8=LOADED[self.weights] is quantize_weights)) + (
            FLOAT * n * (n + 1) if shape.feedback else 0
        )
        return DraftMemory(
            held=held + (linear_bytes(width, width, lay) if shape.carry else 0),
            keys=key_bytes_per_token(config, lay) if shape.own_keys else 0,
            runs=config,
            draws=True,
            layers=len(shape.target_layers) if shape.own_keys else 0,
            scores=rule is not None and not shape.own_keys,
        )


def spire_drafter(
    config: SpireDraftConfig,
    shape: SpireShape,
    parts: SpireParts,
    around: Surroundings,
) -> WindowDrafter:
    """The drafter over a draft in memory."""
    window = Window(shape.sink, EVERYTHING if shape.dense else shape.window)
    view = View(window, choice_rule("spire", config.choose, config.budget), shape.target_layers[0])
    depth = DraftShape(config.k, config.width)
    if shape.own_keys:
        return RingDrafter(depth, replace(view, rule=None), around, parts)

    def passes(cache: PagedCache) -> Passes:
        return parts.passes(CacheSlice(cache, shape.target_layers[0]), around.attention)

    return WindowDrafter(depth, view, around, passes, carries=parts.carry is not None)


def check_draft(shape: SpireShape, draft: Decoder, target: Decoder, folder: Path) -> None:
    """``ConfigError`` unless the engine can run this draft on this target's cache."""
    shape.check_target(target.config, draft.config)
    first, n = shape.target_layers[0], draft.config.num_layers
    for name, wrong in (
        ("dense", shape.dense and shape.own_keys),
        ("target_activations", not shape.target_activations),
        ("target_layers", shape.target_layers != tuple(range(first, first + n))),
    ):
        if wrong:
            raise ConfigError(
                f"drafter spire, {folder}: {name} = {getattr(shape, name)!r} is for comparing in training; the "
                "engine reads the target's own keys. Train the draft without that option."
            )
    for layer in range(0 if shape.own_keys else n):
        ours, theirs = _key_rows(draft, layer), _key_rows(target, first + layer)
        if (ours - theirs).norm() > SAME_KEYS * theirs.norm():
            raise ConfigError(
                f"drafter spire, {folder}: its keys are not those of this target's layer {first + layer}; it was "
                "trained for another model. Give its own target, or train a draft for this one (steeple train spire)."
            )


def _key_rows(decoder: Decoder, layer: int) -> torch.Tensor:
    """What makes keys and values of the residual stream, float32 ``[2 K H, D]``."""
    block = decoder.layers[layer]
    assert isinstance(block, Layer)
    qkv = block.attention.qkv
    weight = qkv.weight if qkv.packed is None else qkv.packed.unpack()
    known = quantised(weight)
    whole = weight.float() if known is None else known.values.float() * known.scales[:, None]
    rows = whole[block.attention.heads * block.attention.head_dim :]
    return rows * block.attention_norm.weight.float()


def _sibling(around: Surroundings) -> Path:
    folder = around.model_folder.parent / "spire" if around.model_folder is not None else None
    if folder is None or not (folder / SHAPE_FILE).exists():
        raise ConfigError(
            f"drafter spire: the model {around.model_folder} has no trained draft beside it; train one "
            "(steeple train spire) and name its folder: spire:DIR."
        )
    return folder
