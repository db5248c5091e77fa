"""The two forwards of SPIRe's training: the target's, once and without gradients, and the draft's over blocks.

With feedback memory or carried states the draft makes k passes over every k-th position; all together they process each
position once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from steeple.draft.carry import Carry
from steeple.draft.spire_model import FeedbackMemory, SpireShape, embedding, keys_values
from steeple.errors import UnsupportedModel
from steeple.model.decoder import Decoder
from steeple.train.spire_attention import KV, BlockPass, Blocks, Mask, OnePass


@dataclass(frozen=True, slots=True)
class Seen:
    """What the target leaves of B windows: its hidden states after the last norm ``[B * S, D]``, and for each layer
    of the draft its keys and values ``[B * S, K, H]``, or what entered that layer, ``[B * S, D]``, or neither.
    """

    final_TD: Tensor
    keys_values: tuple[KV, ...] = ()
    inputs: tuple[Tensor, ...] = ()


TargetPass = Callable[[Decoder, Tensor, tuple[int, ...], tuple[int, ...]], tuple[Tensor, list[KV], list[Tensor]]]


class TargetRows:
    """Causal attention of the target's windows of ``length`` positions; keeps the keys and values of ``wanted``."""

    def __init__(self, target: Decoder, length: int, wanted: Sequence[int]) -> None:
        if target.config.attention_softcap:
            raise UnsupportedModel(
                f"attention_softcap = {target.config.attention_softcap} of the target is not supported in training; "
                "give a target without it."
            )
        self.config, self.length = target.config, length
        self.kept: dict[int, KV] = {}
        self.wanted = frozenset(wanted)

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        k_TKH = k_TKH.to(v_TKH.dtype)
        if layer in self.wanted:
            self.kept[layer] = (k_TKH, v_TKH)
        q, k, v = (x.unflatten(0, (-1, self.length)).transpose(1, 2) for x in (q_TNH.to(v_TKH.dtype), k_TKH, v_TKH))
        window = self.config.window(layer)
        mask = self._mask(window, q.device) if 0 < window < self.length else None
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.config.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.transpose(1, 2).flatten(0, 1)

    def _mask(self, window: int, device: torch.device) -> Tensor:
        place = torch.arange(self.length, device=device)
        age = place.unsqueeze(1) - place
        return (age >= 0) & (age < window)


def target_pass(
    target: Decoder, tokens_BS: Tensor, wanted: tuple[int, ...], keep: tuple[int, ...]
) -> tuple[Tensor, list[KV], list[Tensor]]:
    """Hidden states after the last norm, keys and values of the layers ``wanted``, outputs of the layers ``keep``."""
    rows, length = tokens_BS.shape
    positions = torch.arange(length, device=tokens_BS.device).repeat(rows)
    attend = TargetRows(target, length, wanted)
    hidden = target(tokens_BS.reshape(-1), positions, attend, keep=keep)
    return hidden.final_TD, [attend.kept[i] for i in wanted], [hidden.kept[i] for i in keep if i >= 0]


@torch.no_grad()
def target_forward(target: Decoder, tokens_BS: Tensor, shape: SpireShape, run: TargetPass = target_pass) -> Seen:
    """Run the target over whole windows and keep what the draft of ``shape`` reads. ``run``: may be a compiled one."""
    layers, below = shape.target_layers, tuple(layer - 1 for layer in shape.target_layers)
    keep = below if shape.target_activations and shape.own_keys else ()
    final_TD, pairs, inputs = run(target, tokens_BS, layers if shape.reads_target_cache else (), keep)
    if keep and keep[0] < 0:
        inputs = [embedding(target, tokens_BS.reshape(-1)), *inputs]
    return Seen(final_TD, tuple(pairs), tuple(inputs))


OnePassForward = Callable[[Decoder, Tensor, Tensor, OnePass], Tensor]


def one_pass(draft: Decoder, tokens_T: Tensor, positions_T: Tensor, attend: OnePass) -> Tensor:
    """The draft over all positions at once."""
    final_TD: Tensor = draft(tokens_T, positions_T, attend).final_TD
    return final_TD


@dataclass(frozen=True, slots=True)
class Student:
    """The draft in training. ``memory``: its feedback memory, if it has one; ``carry``: its projection of states.
    ``one_pass``: may be a compiled one.
    """

    draft: Decoder
    shape: SpireShape
    memory: FeedbackMemory | None = None
    carry: Carry | None = None
    one_pass: OnePassForward = one_pass

    def forward(self, tokens_BS: Tensor, seen: Seen, offset: int) -> Tensor:
        """Hidden states after the last norm, ``[B * S, D]``, blocks beginning at ``-offset`` and every k positions."""
        B, S = tokens_BS.shape
        blocks = Blocks(self.shape, S, offset, tokens_BS.device)
        committed = self._committed(seen, torch.arange(S, device=tokens_BS.device).repeat(B))
        if self.memory is None and self.carry is None:
            hidden_BXD = self._one_pass(tokens_BS, committed, blocks)
        else:
            hidden_BXD = self._passes(tokens_BS, seen.final_TD, committed, blocks)
        return hidden_BXD.index_select(1, blocks.whole).flatten(0, 1)

    def _committed(self, seen: Seen, positions_T: Tensor) -> list[KV]:
        """The keys and values of the text for each layer, ``[B * S, K, H]``; none where the draft computes its own."""
        dtype = self.draft.dtype
        own = [keys_values(self.draft, i, x.to(dtype), positions_T) for i, x in enumerate(seen.inputs)]
        return own or list(seen.keys_values)

    def _masks(self, blocks: Blocks, rows: slice, own: slice) -> list[Mask]:
        config = self.draft.config
        windows = [config.window(layer) for layer in range(config.num_layers)]
        by_window = {window: blocks.mask(rows, own, window) for window in set(windows)}
        return [by_window[window] for window in windows]

    def _one_pass(self, tokens_BS: Tensor, committed: list[KV], blocks: Blocks) -> Tensor:
        everyone, places = slice(None), blocks.places.flatten()
        attend = OnePass(
            groups=blocks.groups,
            config=self.draft.config,
            masks=self._masks(blocks, everyone, everyone),
            committed=committed,
            gather=blocks.gather if committed else blocks.gather_own,
            length=blocks.length,
            rows=len(tokens_BS),
        )
        final_TD = self.one_pass(self.draft, tokens_BS[:, places].flatten(), places.repeat(len(tokens_BS)), attend)
        return final_TD.unflatten(0, (len(tokens_BS), -1))

    def _passes(self, tokens_BS: Tensor, target_TD: Tensor, committed: list[KV], blocks: Blocks) -> Tensor:
        config, rows, dtype = self.draft.config, len(tokens_BS), self._compute_dtype()
        gathered = [(blocks.collect(k.to(dtype)), blocks.collect(v.to(dtype))) for k, v in committed]
        own: list[list[KV]] = [[] for _ in range(config.num_layers)]
        sees_itself = self.memory is None
        keep = range(0 if sees_itself else config.num_layers)
        state_TD = self._before(target_TD, rows, blocks)
        finals = []
        for j in range(self.shape.k):
            places = blocks.places[:, :, j].flatten()
            tokens, positions = tokens_BS[:, places].flatten(), places.repeat(rows)
            masks = self._masks(blocks, slice(j, j + 1), slice(0, j + 1 if sees_itself else j))
            attend = BlockPass(blocks, config, masks, gathered, own, sees_itself)
            after = (blocks.positions[:, :, j] > 0).flatten().repeat(rows).unsqueeze(1)  # nothing precedes a text
            added = None if self.carry is None else self.carry(state_TD * after)
            hidden = self.draft(tokens, positions, attend, keep=keep, added_TD=added)
            finals.append(hidden.final_TD)
            state_TD = hidden.final_TD
            if self.memory is not None and j + 1 < self.shape.k:
                states = [embedding(self.draft, tokens), *(hidden.kept[i] for i in range(config.num_layers))]
                for i, m_TD in enumerate(self.memory(states)):
                    own[i].append(keys_values(self.draft, i, m_TD, positions))
        return torch.stack(finals, dim=1).view(rows, -1, finals[0].shape[-1])  # offsets within blocks

    def _before(self, target_TD: Tensor, rows: int, blocks: Blocks) -> Tensor:
        """The target's states before the first position of every block, ``[B * G * g, D]``."""
        before = (blocks.places[:, :, 0].flatten() - 1).clamp(min=0)
        return target_TD.unflatten(0, (rows, -1)).index_select(1, before).flatten(0, 1)

    def _compute_dtype(self) -> torch.dtype:
        device = self.draft.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.draft.dtype
