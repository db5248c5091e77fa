"""The contract of drafters: a drafter proposes, is told what was kept, and forgets a request when it ends.

What a drafter needs from the engine it declares in ``Needs``; nobody asks it for its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steeple.cache.paged import PagedCache
from steeple.model.decoder import Decoder, Hidden
from steeple.ops.attention import PagedAttention
from steeple.ops.kernels import Kernels
from steeple.request import Request
from steeple.types import Batch, Draft


@dataclass(frozen=True, slots=True)
class Needs:
    """What the engine must supply.

    hidden: target layers whose outputs ``observe`` wants. nodes: most nodes per request and round; the scheduler
    reserves them. shares_cache: reads the target's own cache. own_cache_bytes_per_token: what the drafter
    keeps of every position of the text itself; the memory planner counts it. adaptive: the engine is to choose the
    depth of every round, up to ``nodes``. scores: ``observe`` wants the scores of the pages (``Hidden.scores``).
    every_row: every position of a text must come by as a row, so prefixes are not shared. last_row: ``observe`` must
    have seen the row before a request's newest token, so that one is computed even where its keys are in the cache.
    """

    hidden: tuple[int, ...] = ()
    nodes: int = 0
    shares_cache: bool = False
    own_cache_bytes_per_token: int = 0
    adaptive: bool = False
    scores: bool = False
    every_row: bool = False
    last_row: bool = False


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a drafter is built from: the target and how the engine around it runs. ``batch_size``: 0 = not said.

    ``chooses``: take the likeliest token of every law, also for requests that sample, instead of drawing from it.
    """

    decoder: Decoder
    tokenizer: object
    attention: PagedAttention
    device: torch.device
    dtype: torch.dtype
    block_size: int
    step_tokens: int
    model_folder: Path | None = None
    share_prefixes: bool = True
    kernels: Kernels = field(default_factory=Kernels)
    graphs: bool = False
    batch_size: int = 0
    chooses: bool = False


class Lengths(Protocol):
    """Decides how many nodes each request gets, round by round, from past rounds only."""

    def begin(self, running: Sequence[Request]) -> None:
        """A step begins; those of these requests that are ``ready`` may draft."""
        ...

    def __call__(self, request: Request) -> int:
        """Most nodes of ``request`` in this step."""
        ...

    def learn(
        self, requests: Sequence[Request], depths: Sequence[int], accepted: Sequence[int], seconds: float | None
    ) -> None:
        """A step ended: depth and acceptance of the draft of each request that had a round, and the whole step's time;
        None if it read prompts as well."""
        ...


@runtime_checkable
class DecidesLengths(Protocol):
    """A drafter that decides by itself how many nodes each request gets."""

    @property
    def lengths(self) -> Lengths: ...


class Drafter(Protocol):
    """``propose`` sees only requests whose prompt is in the target's cache. ``budget[b]`` nodes at most, maybe 0.

    In a pipeline ``propose`` runs on a thread of its own, beside a forward of the target over other requests; no other
    method runs beside it. Rounds of disjoint requests overlap: what belongs to a round is kept by request.
    """

    @property
    def needs(self) -> Needs: ...

    def prepare(self, cache: PagedCache) -> None:
        """Allocate. ``cache`` is the target's: its blocks are how much text may run at once, and a drafter that
        ``shares_cache`` reads it, and writes behind the text of a request whose round it is."""
        ...

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> Draft: ...

    def observe(self, requests: Sequence[Request], batch: Batch, kept: Sequence[Sequence[int]], hidden: Hidden) -> None:
        """After the commit of a step: ``requests``, as they stand in ``batch``, hold the committed text already.

        ``kept[b]``: the accepted nodes, numbered within the request. Prompt chunks come by here too.
        """
        ...

    def forget(self, request: Request) -> None:
        """The request ended or was preempted; asked about it again, the drafter starts from its text."""
        ...

    def check_integrity(self) -> None:
        """Raise ``InternalError`` if state is left over while no request is running."""
        ...


class DrafterConfig(Protocol):
    """The frozen dataclass of a method's settings; it builds the drafter."""

    @property
    def k(self) -> int: ...

    def build(self, around: Surroundings) -> Drafter: ...


def chains(tokens: Sequence[NDArray[np.int64]], device: torch.device | str) -> Draft:
    """A forest of chosen (not drawn) chains, one per request, maybe empty."""
    counts = np.fromiter(map(len, tokens), np.int64, len(tokens))
    cu, parent = chain_forest(counts)
    flat = np.concatenate(tokens) if len(tokens) else np.zeros(0, dtype=np.int64)
    device_tokens = torch.from_numpy(flat.astype(np.int64, copy=False)).to(device)
    return Draft(device_tokens, parent, cu, torch.full_like(device_tokens, -1), chain=True)


def chain_forest(counts: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Offsets and parents of chains of ``counts[b]`` nodes: each hangs on the one before it, the first on the root."""
    cu = np.zeros(counts.shape[0] + 1, dtype=np.int64)
    counts.cumsum(out=cu[1:])
    parent = np.arange(-1, int(cu[-1]) - 1)
    parent[cu[:-1][counts > 0]] = -1
    return torch.from_numpy(cu), torch.from_numpy(parent)
