"""A SPIRe draft to be trained: cut out of its target, with the projections that must stay the target's held still."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steeple.config import ModelConfig
from steeple.draft.carry import Carry
from steeple.draft.spire_model import FeedbackMemory, SpireShape, prune
from steeple.errors import ConfigError
from steeple.model.decoder import Decoder
from steeple.model.layers import Attention, Linear
from steeple.model.load import load_decoder
from steeple.train.shape import init_weights
from steeple.train.spire_forward import Student


class HeldKeys(nn.Module):
    """In place of a fused projection: its query rows are trained, its key and value rows stay what they are.

    Masking a gradient would not do: weight decay moves what has none, and Muon scales its step by the whole shape.
    """

    packed = None

    def __init__(self, whole: Linear, rows: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(whole.weight[:rows].detach().clone())
        self.keys_values = nn.Parameter(whole.weight[rows:].detach().clone(), requires_grad=False)
        self.queries_bias = self.keys_values_bias = None
        if whole.bias is not None:
            self.queries_bias = nn.Parameter(whole.bias[:rows].detach().clone())
            self.keys_values_bias = nn.Parameter(whole.bias[rows:].detach().clone(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        return torch.cat((self.queries, self.keys_values))

    @property
    def bias(self) -> Tensor | None:
        if self.queries_bias is None or self.keys_values_bias is None:
            return None
        return torch.cat((self.queries_bias, self.keys_values_bias))

    def forward(self, x_TD: Tensor) -> Tensor:
        parts = (self.queries, self.queries_bias), (self.keys_values, self.keys_values_bias)
        return torch.cat([F.linear(x_TD, weight, bias) for weight, bias in parts], dim=-1)


def new_student(target: Decoder, shape: SpireShape, *, random_init: bool, seed: int) -> Student:
    """The draft of ``shape`` in float32, begun from the last layers of ``target`` or, but for its keys, at random."""
    draft = prune(target, len(shape.target_layers)).float()
    if random_init:
        pruned = {name: value.detach().clone() for name, value in draft.named_parameters()}
        init_weights(draft, seed)
        if shape.reads_target_cache:
            _put_back_keys(draft, pruned)
    draft.requires_grad_(True)
    if shape.reads_target_cache:
        _freeze_keys(draft)
    memory = FeedbackMemory(draft.config.num_layers).to(draft.device) if shape.feedback else None
    carry = Carry(draft.config.hidden_size).to(draft.device) if shape.carry else None
    return Student(draft, shape, memory, carry)


def _query_rows(draft: Decoder) -> int:
    return draft.config.num_heads * draft.config.head_dim


@torch.no_grad()
def _put_back_keys(draft: Decoder, pruned: dict[str, Tensor]) -> None:
    rows = _query_rows(draft)
    for name, value in draft.named_parameters():
        if name.endswith(("attention.qkv.weight", "attention.qkv.bias")):
            value[rows:] = pruned[name][rows:]
        elif name.endswith(("attention_norm.weight", "attention.k_norm.weight")):
            value.copy_(pruned[name])


def _freeze_keys(draft: Decoder) -> None:
    rows = _query_rows(draft)
    for name, value in draft.named_parameters():
        if name.endswith(("attention_norm.weight", "attention.k_norm.weight")):
            value.requires_grad_(False)
    for attention in [module for module in draft.modules() if isinstance(module, Attention)]:
        setattr(attention, "qkv", HeldKeys(attention.qkv, rows))  # noqa: B010 - of another class than it is declared


@torch.no_grad()
def begin_from(student: Student, folder: Path) -> None:
    """Give the student the weights of the trained draft in ``folder``; what that draft lacks stays as it is.

    Raises:
        ConfigError: it has other layers, or keys from elsewhere.
    """
    shape = SpireShape.load(folder)
    for name in ("target_layers", "own_keys", "target_activations"):
        ours, theirs = getattr(student.shape, name), getattr(shape, name)
        if ours != theirs:
            raise ConfigError(
                f"SpireConfig.start = {str(folder)!r} has {name} = {theirs!r}, not {ours!r}; give equal ones."
            )
    trained = load_decoder(folder, dtype=torch.float32, device=student.draft.device)
    check_same_shape(student.draft.config, trained.config, folder)
    weights: dict[str, Tensor] = dict(trained.named_parameters())
    for name, value in student.draft.named_parameters():
        module, _, kind = name.rpartition(".")
        held = student.draft.get_submodule(module)
        if isinstance(held, HeldKeys):
            if value.requires_grad:
                fused = weights[f"{module}.{'bias' if kind.endswith('bias') else 'weight'}"]
                value.copy_(fused[: len(held.queries)])
        elif value.requires_grad:
            value.copy_(weights[name])
    if student.memory is not None and shape.feedback:
        student.memory.mix.copy_(FeedbackMemory.load(folder).mix)
    if student.carry is not None and shape.carry:
        carry = Carry.load(folder, trained.config.hidden_size, torch.float32, student.draft.device)
        student.carry.projection.weight.copy_(carry.projection.weight)


def check_same_shape(ours: ModelConfig, theirs: ModelConfig, folder: Path) -> None:
    """Raise ``ConfigError`` if a draft of the shape ``theirs`` cannot serve as one of ``ours``."""
    for name in (
        "hidden_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
    ):
        if getattr(ours, name) != getattr(theirs, name):
            raise ConfigError(
                f"SpireConfig.start = {str(folder)!r} has {name} = {getattr(theirs, name)}, the draft to be trained "
                f"{getattr(ours, name)}; give a draft of the same target."
            )


@torch.no_grad()
def finished(student: Student, stored: torch.dtype) -> Student:
    """A copy for inference in float32, its weights rounded to the type that they will be stored in."""
    source = student.draft
    with torch.device("meta"):
        draft = Decoder(source.config)
    state = {}
    for name, _ in draft.named_parameters():
        module, kind = name.rsplit(".", 1)
        state[name] = getattr(source.get_submodule(module), kind).detach().to(stored).float()
    draft.load_state_dict(state, assign=True, strict=not source.config.tie_embeddings)
    if source.config.tie_embeddings:
        draft.head.weight = draft.embed.weight
    draft.reset_rope()
    memory = None if student.memory is None else copy.deepcopy(student.memory).requires_grad_(False)
    carry = None
    if student.carry is not None:
        carry = copy.deepcopy(student.carry).requires_grad_(False)
        carry.projection.weight.copy_(carry.projection.weight.to(stored))
    return Student(draft.requires_grad_(False).eval(), student.shape, memory, carry)
