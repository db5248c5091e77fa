"""Optimisers and schedule: Muon for the matrices inside the layers, AdamW for embedding, head and norms.

Muon: Jordan et al. 2024, learning rate matched to AdamW's update size as in Liu et al. 2025 (arXiv:2502.16982).
Schedule: warm up, stay, decay linearly to zero (WSD, Hu et al. 2024, arXiv:2404.06395).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from steeple.config import check_range
from steeple.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Peak learning rates and decay of the groups.

    Attributes:
        matrix: Muon's, for the matrices of the layers.
        embed: AdamW's, for the embedding.
        head: AdamW's, for the output head.
        norm: AdamW's, for the norm weights.
        weight_decay: of the matrices, per step and unit of learning rate.
    """

    matrix: float = 3e-3
    embed: float = 2e-2
    head: float = 3e-3
    norm: float = 3e-3
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        for name in ("matrix", "embed", "head", "norm", "weight_decay"):
            check_range("Rates", name, getattr(self, name), 0.0, 1.0)


class Optimizers:
    """The optimisers of one model, stepped and saved together.

    ``others``: parameters beside it, stepped as norms; ``more_matrices``: stepped as the matrices of the layers.
    """

    def __init__(
        self,
        model: nn.Module,
        rates: Rates,
        others: Sequence[nn.Parameter] = (),
        more_matrices: Sequence[nn.Parameter] = (),
    ) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = [p for name, p in named.items() if name.startswith("layers.") and p.ndim == 2]
        matrices.extend(more_matrices)
        vectors = [p for p in named.values() if p.ndim < 2]
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in named.items() if name.startswith("embed.")], "lr": rates.embed},
            {"params": [p for name, p in named.items() if name.startswith("head.")], "lr": rates.head},
            {"params": [*vectors, *others], "lr": rates.norm},
        ]
        adam = AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
        muon = Muon(
            matrices,
            lr=rates.matrix,
            weight_decay=rates.weight_decay,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        )
        self.each: tuple[Optimizer, ...] = (muon, adam)
        self.peaks = [[float(g["lr"]) for g in o.param_groups] for o in self.each]

    def step(self, scale: float) -> None:
        """One update with every peak rate multiplied by ``scale``; gradients are dropped afterwards."""
        for optimizer, peaks in zip(self.each, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """The states, in a fixed order."""
        return [o.state_dict() for o in self.each]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restore what ``state_dict`` gave."""
        for optimizer, state in zip(self.each, states, strict=True):
            optimizer.load_state_dict(state)


def wsd(step: int, total: int, warmup: int, decay_share: float) -> float:
    """The factor on the peak learning rate at ``step`` of ``total`` (warm up, stay, linear decay to zero).

    It depends on the step and the planned total alone, so resuming with a smaller total only starts the decay earlier.
    """
    decay = max(1.0, decay_share * total)
    return min(1.0, (step + 1) / max(1, warmup), max(0.0, (total - step) / decay))


def check_phases(owner: str, seq_lens: Sequence[int], shares: Sequence[float], batch_tokens: int) -> None:
    """Raise ``ConfigError`` unless there is a share for each window length, and a batch holds whole windows."""
    if len(seq_lens) != len(shares) or not seq_lens:
        raise ConfigError(f"{owner}.shares = {shares!r} needs one share for each of {seq_lens!r}.")
    if not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise ConfigError(f"{owner}.shares = {shares!r} sum to {sum(shares)}; they must sum to 1.")
    for length in seq_lens:
        check_range(owner, "seq_lens", length, 2, 2**31 - 1)
        if batch_tokens % length:
            raise ConfigError(f"{owner}.batch_tokens = {batch_tokens} is no multiple of {length}.")


def phase_of(step: int, steps: int, shares: Sequence[float]) -> tuple[int, int]:
    """``(phase, index of the step within it)`` where each phase has its share of ``steps``."""
    begin, share = 0, 0.0
    for number, part in enumerate(shares):
        share += part
        end = steps if number == len(shares) - 1 else round(share * steps)
        if step < end:
            return number, step - begin
        begin = end
    raise ConfigError(f"Step {step} is beyond the {steps} steps of the run; raise tokens.")
