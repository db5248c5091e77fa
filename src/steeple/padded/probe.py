"""What a model bears, found by trying: padding in front of a row, holes in it, a cache that can be taken back.

A list of names would miss the models that nobody thought of. Each test compares the logits of a row in a batch with
those of the same tokens alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from steeple.errors import ConfigError, UnsupportedModel
from steeple.padded.holes import Holes
from steeple.padded.kv import KV
from steeple.padded.net import Net
from steeple.padded.rows import LeftPadded, Rows

# Largest difference of two logits, in units of their spread, that rounding may cause.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
COARSE = 0.1
TEXT, PAD, LOST = 9, 7, 5  # tokens of the text that is tried, padding in front of it, slots that are lost
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")
FAILS = (TypeError, ValueError, RuntimeError, IndexError, AttributeError, NotImplementedError, KeyError)


def check(net: Net, config_holes: bool, batch_size: int) -> None:
    """Raise unless ``net`` can be generated with in a padded batch.

    Raises:
        UnsupportedModel: an encoder and decoder, or a model with a recurrent state.
        ConfigError: the model exists for other schedules, which are named.
    """
    refuse_states(net)
    text = _text(net)
    alone = _alone(net, text)
    if batch_size > 1 and not _same(net, alone, lambda: _padded(net, text)):
        raise ConfigError(
            f"{net.name} gives other logits for a row that is padded in front, so no batch of rows of different "
            "length can be right; use batch_size = 1."
        )
    if config_holes:
        refuse_windows(net)
        if not _same(net, alone, lambda: _holed(net, text)):
            raise ConfigError(
                f"{net.name} gives other logits for a row with masked holes: it takes no position_ids or no 4-D mask, "
                "or tells positions by the slots of its cache (ALiBi does). schedule = 'holes' would be wrong; use "
                "schedule = 'align' or 'pool'."
            )


def refuse_states(net: Net) -> None:
    """Raise ``UnsupportedModel`` for models whose cache cannot be taken back token by token."""
    config = net.model.config
    states = getattr(net.model, "_is_stateful", False)
    try:
        kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    except FAILS:
        kinds = set()
    if states or any("Linear" in kind for kind in kinds):
        raise UnsupportedModel(
            f"{net.name} keeps a recurrent state, which a rejected draft would spoil; no padded schedule serves it."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{net.name} has an encoder; give a decoder-only model.")


def refuse_windows(net: Net) -> None:
    """Raise ``ConfigError`` for models with layers that see a window, which is counted in slots of the cache."""
    text = net.model.config.get_text_config(decoder=True)
    sliding = any(getattr(layer, "is_sliding", False) for layer in DynamicCache(config=text).layers)
    # A window longer than the text that is tried would not be noticed.
    if sliding or any(getattr(text, name, None) for name in WINDOWS):
        raise ConfigError(
            f"{net.name} has layers that see a window of slots, which holes would shorten; "
            "use schedule = 'align' or 'pool' instead of 'holes'."
        )


def _text(net: Net) -> Tensor:
    return (torch.arange(TEXT + LOST, device=net.device) * 7919 + 1) % net.known


def _alone(net: Net, text: Tensor) -> Tensor:
    """Logits after the last token of the text, read without cache and padding."""
    tokens = text[:TEXT].unsqueeze(0)
    positions = torch.arange(TEXT, device=net.device).unsqueeze(0)
    try:
        kv = KV()
        logits = net.forward(tokens, kv, None, positions, last=1)[0, 0]
    except FAILS as error:
        raise UnsupportedModel(f"{net.name} cannot be called with a cache of transformers: {error}") from error
    if kv.width != TEXT or any(layer.keys is None or layer.keys.dim() != 4 for layer in kv.layers):
        raise UnsupportedModel(f"{net.name} does not keep keys and values in the cache it is given.")
    return logits


def _read_in_parts(rows: Rows, text: Tensor) -> Tensor:
    """Feed a wrong continuation, take it back, and feed the right one."""
    everyone = np.arange(2)
    both = text.expand(2, -1)
    rows.feed(both[:, TEXT:], last=1)
    rows.keep(np.array([0, LOST]), everyone)  # the neighbour keeps it, so that there is a hole or a shift
    rows.feed(both[:, 5 : TEXT - 1])
    return rows.feed(both[:, TEXT - 1 : TEXT], last=1)[0, 0]


def _start(net: Net, text: Tensor) -> LeftPadded:
    """A short row with padding in front, and a long one."""
    rows = LeftPadded(net, np.array([PAD, 0]))
    table = torch.stack((text[:5], text[-5:]))
    front = torch.stack((torch.zeros_like(text[:PAD]), text[:PAD]))
    rows.feed(torch.cat((front, table), dim=1), last=1)
    rows.keep(np.full(2, PAD + 5), np.arange(2))
    return rows


def _padded(net: Net, text: Tensor) -> Tensor:
    return _read_in_parts(_start(net, text), text)


def _holed(net: Net, text: Tensor) -> Tensor:
    rows = Holes(net, waste=0.99)
    rows.join(_start(net, text))
    return _read_in_parts(rows, text)


def _same(net: Net, alone: Tensor, attempt: Any) -> bool:
    try:
        found: Tensor = attempt()
    except FAILS:
        return False
    tolerance = TOLERANCE.get(net.model.dtype, COARSE)
    spread = alone.std().clamp(min=1e-6)
    return bool((found - alone).abs().max() <= tolerance * spread)
