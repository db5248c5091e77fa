"""The one contract of caches: stage, then commit.

``stage`` writes the exact keys and values of this step's rows as pending; ``view`` shows committed and pending ones;
``commit`` keeps the accepted path. Nothing lossy happens to a token before ``commit``. What cannot be done raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from steeple.types import Batch, CacheSpec, KVView


class Cache(Protocol):
    """Keys and values of many requests, addressed by request id."""

    spec: CacheSpec

    def reserve(self, request_id: str, length: int) -> bool:
        """Make room for ``length`` positions of the request; False (and nothing changed) if there is none."""
        ...

    def stage(self, layer: int, batch: Batch, k_TKH: Tensor, v_TKH: Tensor) -> None: ...

    def view(self, layer: int, batch: Batch) -> KVView: ...

    def commit(self, batch: Batch, kept: Sequence[Sequence[int]], texts: Sequence[NDArray[np.int64]]) -> None:
        """Keep the nodes ``kept[b]`` (numbers within the request, root to leaf) behind the text rows of this step.

        ``texts[b]`` is the request's text as committed; positions beyond it are forgotten.
        """
        ...

    def free(self, request_id: str) -> None: ...
