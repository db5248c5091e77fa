"""Counter-based random numbers: every draw is a pure function of (request seed, text length, stream, lane).

So a request's draws belong to it alone, whatever runs beside it, on every device, and after a preemption; and no two
decisions ever use the same number, because the text grows by at least one token a round.
The mixing function is the finaliser of SplitMix64 (Steele, Lea, Flood 2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Stream(IntEnum):
    """What a draw decides. Different streams of one request are independent."""

    DRAFT = 1
    ACCEPT = 2
    FINAL = 3


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own keeps the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniform(seed: Tensor, counter: Tensor, stream: Stream, lane: Tensor | int = 0) -> Tensor:
    """Independent numbers in [0, 1), float64, elementwise over int64 ``seed``, ``counter`` and ``lane``.

    One SplitMix64 starts the next: the seed's numbers start the counters', and those start the lanes'.
    """
    state = _mix(seed + _signed(_GOLDEN * int(stream) % 2**64))
    state = _mix(state + counter * _GOLDEN)
    lanes = lane if isinstance(lane, Tensor) else torch.full_like(state, lane)
    state = _mix(state + lanes * _GOLDEN)
    return _shift_right(state, 11).to(torch.float64) * 2.0**-53


class Generators:
    """The generators of B requests, on the host: one small array of numbers costs less there than any tensor.

    The fast twin of ``uniform``; what depends on the seeds alone is computed once. Args: seeds, int64.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds: NDArray[np.int64] = np.array(seeds, dtype=np.int64)
        own = self.seeds.view(np.uint64)
        self._start = {stream: _mix_host(own + _HOST_GOLDEN * np.uint64(stream)) for stream in Stream}

    def uniform(
        self,
        counter: NDArray[np.int64],
        stream: Stream,
        lane: NDArray[np.int64] | None = None,
        which: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float64]:
        """Numbers in [0, 1) for ``counter [B]``, lane 0; or for ``counter [N]`` and ``lane [N]`` of requests ``which``.

        ``lane`` broadcasts: ``[k, 1]`` gives ``[k, B]``.
        """
        start = self._start[stream]
        state = _mix_host((start if which is None else start[which]) + counter.view(np.uint64) * _HOST_GOLDEN)
        if lane is not None:
            state = state + lane.view(np.uint64) * _HOST_GOLDEN
        state = _mix_host(state)
        state >>= _HOST_SHIFT
        return np.multiply(state, 2.0**-53, dtype=np.float64)


# Arrays, not scalars: numpy warns when a scalar wraps around.
_HOST_GOLDEN, _HOST_MIX_1, _HOST_MIX_2 = (
    np.array([value], dtype=np.uint64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_HOST_SHIFT, _HOST_30, _HOST_27, _HOST_31 = (np.array([bits], dtype=np.uint64) for bits in (11, 30, 27, 31))


def _mix_host(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x ^ (x >> _HOST_30)
    x *= _HOST_MIX_1
    x ^= x >> _HOST_27
    x *= _HOST_MIX_2
    x ^= x >> _HOST_31
    return x


def derive_seed(seed: int, index: int) -> int:
    """The seed of output ``index`` of a request with n outputs; index 0 keeps the seed."""
    if index == 0:
        return seed
    return int(_mix(torch.tensor([seed], dtype=torch.int64) ^ _mix(torch.tensor([index], dtype=torch.int64)))[0])
