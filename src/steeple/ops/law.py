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

from steeple.ops.rng import Generators
from steeple.request import Request
from steeple.types import SamplingParams

RUN = 64  # entries whose sum stands for them in the first look at a cumulative law


@dataclass(frozen=True, slots=True)
class Laws:
    """Sampling parameters of B requests as tensors ``[B]``, on the device of the logits.

    ``alike``: all sample, at one temperature and one truncation; then their first value serves every row.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    all_greedy: bool
    any_greedy: bool
    truncated: bool
    any_top_k: bool
    any_min_p: bool
    penalised: bool
    alike: bool
    plain: bool  # alike at temperature 1 and not truncated: the softmax of the logits is the law

    @staticmethod
    def of(params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> Laws:
        """Gather the parameters of a batch."""

        def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor([getattr(p, name) for p in params], dtype=dtype, device=device)

        kinds = {(p.temperature, p.top_k, p.top_p, p.min_p) for p in params}
        temperature = column("temperature")
        # What is so near 0 that float32 cannot tell it from 0 is drawn from a one-hot law.
        any_greedy = bool((temperature == 0).any())
        alike = len(kinds) == 1 and not any_greedy
        return Laws(
            temperature,
            column("top_k", torch.int64),
            column("top_p"),
            column("min_p"),
            column("repetition_penalty"),
            column("presence_penalty"),
            column("frequency_penalty"),
            all(p.greedy for p in params),
            any_greedy,
            any(not p.greedy and (p.top_k or p.top_p < 1.0 or p.min_p > 0.0) for p in params),
            any(p.top_k for p in params),
            any(p.min_p > 0.0 for p in params),
            any(p.penalised for p in params),
            alike,
            alike and kinds == {(1.0, 0, 1.0, 0.0)},
        )

    def rows(self, values: Tensor, owner_R: Tensor) -> Tensor:
        """``values [B]`` for each row, ``[R, 1]``, or ``[1, 1]`` where it is the same for all."""
        return (values[:1] if self.alike else values[owner_R]).unsqueeze(1)


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How the requests of a step sample. It depends on nothing else, so it is made once for a set of requests."""

    requests: list[Request]
    laws: Laws
    generators: Generators
    logprobs: bool
    constrained: bool = False

    @staticmethod
    def of(requests: Sequence[Request], device: torch.device | str = "cpu") -> SamplingBatch:
        """Gather what the requests asked for."""
        return SamplingBatch(
            list(requests),
            Laws.of([r.params for r in requests], device),
            Generators([r.seed for r in requests]),
            any(r.params.logprobs is not None for r in requests),
            any(r.constraint is not None for r in requests),
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


def probabilities(logits_RV: Tensor, laws: Laws, owner_R: Tensor, out: Tensor | None = None) -> Tensor:
    """The processed law of each row, float32 ``[R, V]``; greedy rows become one-hot.

    Args:
        logits_RV: float32, already penalised where penalties apply.
        owner_R: which request of ``laws`` a row belongs to.
        out: where to write it.
    """
    if laws.plain:
        # To the last bit what comes out below at temperature 1: softmax takes the largest logit off by itself.
        return torch.softmax(logits_RV, dim=-1, out=out)
    temperature = laws.rows(laws.temperature, owner_R)
    if laws.any_greedy:
        greedy = temperature.squeeze(1) == 0
        temperature = torch.where(greedy.unsqueeze(1), 1.0, temperature)
    # The largest logit becomes 0 first: so no temperature, however low, makes an infinity of it.
    scaled = logits_RV - logits_RV.amax(dim=-1, keepdim=True)
    scaled /= temperature
    if laws.truncated:
        _truncate(scaled, laws, owner_R)
    probs = torch.softmax(scaled, dim=-1, out=out)
    if laws.any_greedy:
        probs[greedy] = 0.0
        probs[greedy, argmax(logits_RV[greedy])] = 1.0
    return probs


def _truncate(logits_RV: Tensor, laws: Laws, owner_R: Tensor) -> None:
    """Top-k, then top-p over what is left, then min-p: dropped tokens get -inf. Equal logits at an edge all stay."""
    V = logits_RV.shape[-1]
    ordered = _descending(logits_RV)
    allowed = ordered
    if laws.any_top_k:
        top_k = laws.rows(laws.top_k, owner_R)
        last = torch.where(top_k == 0, V, top_k).clamp(max=V) - 1
        floor = ordered.gather(1, last.expand(ordered.shape[0], 1))
        allowed = ordered.masked_fill(ordered < floor, -torch.inf)
    kept = torch.softmax(allowed, dim=-1)
    top_p = laws.rows(laws.top_p, owner_R)
    size = inverse(kept, top_p.to(torch.float64).expand(kept.shape[0], 1), right=False).unsqueeze(1) + 1
    # Rounded sums reach 1 before the end: top_p = 1 must keep all the same.
    size = torch.where(top_p >= 1.0, V, size)
    if laws.any_min_p:
        share = kept >= laws.rows(laws.min_p, owner_R) * kept[:, :1]
        size = torch.minimum(size, share.sum(dim=-1, keepdim=True))
    edge = ordered.gather(1, size - 1)
    if laws.any_top_k:
        edge = torch.maximum(edge, floor)
    logits_RV.masked_fill_(logits_RV < edge, -torch.inf)


def _descending(values_RV: Tensor) -> Tensor:
    """Rows sorted, largest first. On a CPU by numpy, which takes a tenth of torch's time."""
    if values_RV.device.type == "cpu":
        return torch.from_numpy(np.sort(values_RV.numpy(), axis=-1)).flip(-1)
    return values_RV.sort(dim=-1, descending=True).values


def argmax(values_RV: Tensor) -> Tensor:
    """The first of the largest of each row, int64 ``[R]``. On a CPU by numpy, which takes a tenth of torch's time."""
    if values_RV.device.type == "cpu":
        return torch.from_numpy(values_RV.numpy().argmax(axis=-1))
    return values_RV.argmax(dim=-1)


def draw(probs_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """One token per row by inversion of the cumulative law, int64 ``[R]``. A token of probability 0 is never drawn."""
    return inverse(probs_RV, uniform_R.unsqueeze(1), right=True)


def inverse(weights_RV: Tensor, share_R1: Tensor, *, right: bool) -> Tensor:
    """First entry of each row where the sum up to it passes (``right``) or reaches a share of the row's whole sum.

    A share below 1 in float64, which no rounding makes the whole; with 1 nothing would pass.

    float64, because float32 sums over a large vocabulary are off by more than the smallest probabilities. A running
    sum over a whole row is slow: the sums of runs of entries tell the run, and a running sum over that the entry.
    """
    R, V = weights_RV.shape
    if V % RUN:
        weights_RV = torch.nn.functional.pad(weights_RV, (0, -V % RUN))
    runs_RMS = weights_RV.view(R, -1, RUN)
    sums_RM = runs_RMS.sum(dim=-1, dtype=torch.float64)
    if sums_RM.device.type == "cpu":
        found = torch.from_numpy(_inverse_host(runs_RMS.numpy(), sums_RM.numpy(), share_R1.numpy(), right))
    else:
        found = _inverse(runs_RMS, sums_RM, share_R1, right)
    return found.clamp_(max=V - 1)


def _inverse(runs_RMS: Tensor, sums_RM: Tensor, share_R1: Tensor, right: bool) -> Tensor:
    """``inverse`` over runs with known sums, on any device."""
    before = sums_RM.cumsum(dim=-1)
    wanted = share_R1 * before[:, -1:]
    run = torch.searchsorted(before, wanted, right=right).clamp_(max=before.shape[1] - 1)
    entries = runs_RMS.gather(1, run.unsqueeze(2).expand(-1, 1, RUN)).squeeze(1)
    own = entries.cumsum(dim=-1, dtype=torch.float64)
    rest = torch.where(run > 0, wanted - before.gather(1, (run - 1).clamp_(min=0)), wanted)
    # Two ways of adding up one run may differ in the last bit; its last entry of weight is the last that is found.
    rest = torch.minimum(rest, torch.nextafter(own[:, -1:], torch.zeros_like(rest)))
    return (run * RUN + torch.searchsorted(own, rest, right=right)).squeeze(1)


def _inverse_host(
    runs_RMS: NDArray[np.float32], sums_RM: NDArray[np.float64], share_R1: NDArray[np.float64], right: bool
) -> NDArray[np.int64]:
    """The twin of ``_inverse`` for the host, where a numpy call on something small costs a third of a torch call."""
    stays = np.less_equal if right else np.less
    before = np.add.accumulate(sums_RM, axis=1)
    wanted = share_R1 * before[:, -1:]
    run = np.minimum(np.add.reduce(stays(before, wanted), axis=1), before.shape[1] - 1)
    rows = np.arange(run.shape[0])
    own = np.add.accumulate(runs_RMS[rows, run], axis=1, dtype=np.float64)
    rest = wanted - np.where(run > 0, before[rows, run - 1], 0.0)[:, None]
    rest = np.minimum(rest, np.nextafter(own[:, -1:], 0.0))
    return run * RUN + np.add.reduce(stays(own, rest), axis=1)


def count_text(
    prompts: Sequence[NDArray[np.int64]], outputs: Sequence[NDArray[np.int64]], vocab: int, device: torch.device | str
) -> Counts:
    """Counts ``[B, V]`` of B texts, for the penalties."""

    def table(texts: Sequence[NDArray[np.int64]]) -> Tensor:
        rows = [np.bincount(text, minlength=vocab) for text in texts]
        return torch.from_numpy(np.stack(rows).astype(np.float32)).to(device)

    return Counts(table(prompts), table(outputs))
