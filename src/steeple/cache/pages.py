"""Which pages of a text a draft reads beside sink and window: those that the target itself attended to most.

The target's forward tells, for every page, layer and kv head, the largest score that its last rows gave to a key of it.
Choosing once, after the prompt, is SnapKV (Li et al. 2024, arXiv 2404.14469); choosing again after every verification
is PillarAttn (SparseSpec, Zhao et al. 2025, arXiv 2512.01278). Both choose single keys; here the unit is a page,
for the cache is read in pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steeple.cache.window import Chosen, Window

Pages = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ChoiceRule:
    """How many, and how often. ``budget``: positions, or up to 1 a share of the text; rounded up to pages.

    refresh: choose again whenever scores come; otherwise the first choice stays.
    """

    budget: float
    refresh: bool

    def pages(self, length: int, page: int) -> int:
        """Pages to choose for a text of ``length``."""
        wanted = self.budget * length if self.budget <= 1 else self.budget
        return math.ceil(wanted / page)


class PageChoice:
    """The chosen pages of the requests that are running.

    Args: rule; window: whose pages are visible anyway; page: positions of one; layers: of the scores, those to choose
        for.
    """

    def __init__(self, rule: ChoiceRule, window: Window, page: int, layers: slice) -> None:
        self._rule, self._window, self._page, self._layers = rule, window, page, layers
        self._known: dict[str, Pages] = {}  # [L, K, n]
        self._ids: list[str] = []
        self._whole: Chosen | None = None  # of ``_ids``, if all were chosen together

    def wants(self, id: str) -> bool:
        """Whether scores of this request would change anything."""
        return self._rule.refresh or id not in self._known

    def note(self, ids: list[str], lengths: Sequence[int], scores_LKBE: Tensor) -> None:
        """Choose for requests whose next root stands at ``lengths[b] - 1``, from the scores of their pages."""
        apart, first = self._window.pages(np.array(lengths) - 1, self._page)
        counts = np.array([self._rule.pages(length, self._page) for length in lengths])
        counts = np.clip(np.minimum(counts, first - apart), 0, None)
        most = int(counts.max())
        scores = scores_LKBE[self._layers]
        number = torch.arange(scores.shape[-1], device=scores.device)
        between = [torch.from_numpy(x[:, None]).to(scores.device) for x in (apart, first)]
        scores = scores.masked_fill((number < between[0]) | (number >= between[1]), -torch.inf)
        pages = scores.topk(most, dim=-1).indices.cpu().numpy() if most else np.zeros((*scores.shape[:3], 0), np.int64)
        for b, id in enumerate(ids):
            self._known[id] = pages[:, :, b, : counts[b]]
        self._ids, self._whole = ids, Chosen(pages, counts)

    def of(self, ids: list[str], like: tuple[int, int]) -> Chosen:
        """What was chosen for these requests; nothing for those without scores. Args: like: layers and kv heads."""
        if ids == self._ids and self._whole is not None:
            return self._whole
        none = np.zeros((*like, 0), dtype=np.int64)
        each = [self._known.get(id, none) for id in ids]
        counts = np.array([x.shape[2] for x in each])
        pages = np.zeros((*like, len(ids), int(counts.max())), dtype=np.int64)
        for b, own in enumerate(each):
            pages[:, :, b, : own.shape[2]] = own
        return Chosen(pages, counts)

    def forget(self, id: str) -> None:
        """The request ended or lost its place in the cache."""
        self._known.pop(id, None)
        self._whole = None

    @property
    def remembered(self) -> list[str]:
        """Requests that something was chosen for."""
        return list(self._known)
