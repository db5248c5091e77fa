"""Logits to the law that tokens are drawn from: penalties, temperature, top-k, top-p, min-p, and drawing itself.

The processed law is the law of the product: the drafter draws from the one made of its own logits, the verifier
judges by the one made of the target's. R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steeple.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Laws:
    """Sampling parameters of B requests as tensors ``[B]``, on the device of the logits."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    all_greedy: bool
    truncated: bool
    penalised: bool

    @staticmethod
    def of(params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> Laws:
        """Gather the parameters of a batch."""

        def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor([getattr(p, name) for p in params], dtype=dtype, device=device)

        return Laws(
            column("temperature"),
            column("top_k", torch.int64),
            column("top_p"),
            column("min_p"),
            column("repetition_penalty"),
            column("presence_penalty"),
            column("frequency_penalty"),
            all(p.greedy for p in params),
            any(not p.greedy and (p.top_k or p.top_p < 1.0 or p.min_p > 0.0) for p in params),
            any(p.penalised for p in params),
        )


@dataclass(frozen=True, slots=True)
class Counts:
    """How often each token stands in the text of each row: ``prompt [R, V]`` and ``output [R, V]``, float32."""

    prompt: Tensor
    output: Tensor

    def add(self, rows: Tensor, tokens: Tensor) -> None:
        """Count ``tokens [P]`` as written in ``rows [P]`` (the path above a draft node)."""
        self.output.index_put_((rows, tokens), torch.ones(rows.shape[0], device=rows.device), accumulate=True)


def penalise(logits_RV: Tensor, laws: Laws, owner_R: Tensor, counts: Counts) -> Tensor:
    """Repetition (Keskar et al. 2019, arXiv 1909.05858), presence and frequency penalties; returns new logits."""
    repetition = laws.repetition[owner_R].unsqueeze(1)
    seen = (counts.prompt + counts.output) > 0
    scaled = torch.where(logits_RV > 0, logits_RV / repetition, logits_RV * repetition)
    out = torch.where(seen, scaled, logits_RV)
    out = out - laws.frequency[owner_R].unsqueeze(1) * counts.output
    return out - laws.presence[owner_R].unsqueeze(1) * (counts.output > 0)


def probabilities(logits_RV: Tensor, laws: Laws, owner_R: Tensor) -> Tensor:
    """The processed law of each row, float32 ``[R, V]``; greedy rows become one-hot.

    Args:
        logits_RV: float32, already penalised where penalties apply.
        owner_R: which request of ``laws`` a row belongs to.
    """
    temperature = laws.temperature[owner_R]
    greedy = temperature == 0
    # The largest logit becomes 0 first: so no temperature, however low, makes an infinity of it.
    best = logits_RV.max(dim=-1, keepdim=True).values
    scaled = (logits_RV - best) / torch.where(greedy, 1.0, temperature).unsqueeze(1)
    if laws.truncated:
        scaled = _truncate(scaled, laws, owner_R)
    probs = torch.softmax(scaled, dim=-1)
    if bool(greedy.any()):
        probs[greedy] = 0.0
        probs[greedy, logits_RV[greedy].argmax(dim=-1)] = 1.0
    return probs


def _truncate(logits_RV: Tensor, laws: Laws, owner_R: Tensor) -> Tensor:
    """Top-k, then top-p over what is left, then min-p: dropped tokens get -inf. Equal logits at an edge all stay."""
    V = logits_RV.shape[-1]
    ordered = logits_RV.sort(dim=-1, descending=True).values
    top_k = laws.top_k[owner_R]
    last = torch.where(top_k == 0, V, top_k).clamp(max=V) - 1
    floor = ordered.gather(1, last.unsqueeze(1))
    kept = torch.softmax(ordered.masked_fill(ordered < floor, -torch.inf), dim=-1)
    before = kept.cumsum(dim=-1) - kept
    top_p = laws.top_p[owner_R].unsqueeze(1)
    # Rounded sums reach 1 before the end: top_p = 1 must keep all the same.
    nucleus = ((before < top_p) | (top_p >= 1.0)) & (kept > 0)
    share = kept >= laws.min_p[owner_R].unsqueeze(1) * kept[:, :1]
    size = (nucleus & share).sum(dim=-1, keepdim=True).clamp(min=1)
    edge = ordered.gather(1, size - 1)
    return logits_RV.masked_fill(logits_RV < edge, -torch.inf)


def draw(probs_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """One token per row by inversion of the cumulative law, int64 ``[R]``. A token of probability 0 is never drawn.

    float64, because float32 sums over a large vocabulary are off by more than the smallest probabilities.
    """
    cumulative = probs_RV.to(torch.float64).cumsum(dim=-1)
    threshold = uniform_R.to(torch.float64).unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=probs_RV.shape[-1] - 1)


def count_text(
    prompts: Sequence[NDArray[np.int64]], outputs: Sequence[NDArray[np.int64]], vocab: int, device: torch.device | str
) -> Counts:
    """Counts ``[B, V]`` of B texts, for the penalties."""

    def table(texts: Sequence[NDArray[np.int64]]) -> Tensor:
        rows = [np.bincount(text, minlength=vocab) for text in texts]
        return torch.from_numpy(np.stack(rows).astype(np.float32)).to(device)

    return Counts(table(prompts), table(outputs))
