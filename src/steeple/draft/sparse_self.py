"""The target drafts for itself, reading only the first and the last pages of its own cache.

Source: MagicDec (Chen et al. 2024, arXiv 2408.11049), StreamingLLM's window (Xiao et al. 2023, arXiv 2309.17453).
Cost: k passes of the target's weights a round, and keys of constant size; no training, no second model, no cache.
Loses wherever weights rather than keys decide the time of a step: at small batch and short context.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from steeple.cache.paged import PagedCache
from steeple.cache.pages import ChoiceRule
from steeple.cache.window import EVERYTHING, Window
from steeple.config import check_range
from steeple.draft.base import Drafter, Surroundings
from steeple.draft.windowed import DraftShape, Passes, View, WindowDrafter
from steeple.errors import ConfigError, did_you_mean
from steeple.model.run import Runner
from steeple.plan.memory_parts import DraftMemory, Lay
from steeple.types import MAX_NODES


@dataclass(frozen=True, kw_only=True)
class SparseSelfConfig:
    """Settings of sparse self-speculation; positions are rounded up to whole pages of the cache.

    ``choose``: ``window`` reads sink and window only; ``snapkv`` also the pages that the end of the prompt attended to
    most, ``pillar`` those that the last verification did. ``budget``: positions to choose, or up to 1 a share of the
    text.
    """

    sink: int = field(default=16, metadata={"help": "first positions that stay visible"})
    window: int = field(default=128, metadata={"help": "latest positions that stay visible"})
    choose: str = field(default="window", metadata={"help": "window, snapkv or pillar: pages read beside the window"})
    budget: float = field(default=128.0, metadata={"help": "positions to choose, or up to 1 a share of the text"})
    compact: bool = field(default=False, metadata={"help": "count positions within the view, as StreamingLLM does"})
    k: int = field(default=4, metadata={"help": "depth of the draft"})
    width: int = field(default=1, metadata={"help": "greedy requests: tokens proposed per depth"})

    def __post_init__(self) -> None:
        check_range("sparse_self", "sink", self.sink, 0, EVERYTHING)
        check_range("sparse_self", "window", self.window, 1, EVERYTHING)
        rule = choice_rule("sparse_self", self.choose, self.budget)
        if self.compact and rule is not None:
            raise ConfigError(
                f"sparse_self.compact = True counts positions in a window; sparse_self.choose = {self.choose!r} reads "
                "pages from all over the text. Give choose = window, or leave compact off."
            )
        check_draft_shape("sparse_self", self.k, self.width)

    def build(self, around: Surroundings) -> Drafter:
        """The target's own decoder over windows on its cache."""
        view = View(
            Window(self.sink, self.window), choice_rule("sparse_self", self.choose, self.budget), compact=self.compact
        )
        return WindowDrafter(DraftShape(self.k, self.width), view, around, lambda cache: _passes(around, cache))

    def memory(self, around: Surroundings, lay: Lay) -> DraftMemory:
        """Nothing but a room for its forwards: weights and keys are the target's."""
        del lay
        rule = choice_rule("sparse_self", self.choose, self.budget)
        return DraftMemory(runs=around.decoder.config, draws=True, scores=rule is not None)


def _passes(around: Surroundings, cache: PagedCache) -> Passes:
    return Passes(Runner(around.decoder, cache, around.attention))


# ``choose`` -> whether pages are chosen, and if so, whether again after every verification
CHOICES: dict[str, bool | None] = {"window": None, "snapkv": False, "pillar": True}


def choice_rule(owner: str, choose: str, budget: float) -> ChoiceRule | None:
    """How pages are chosen; None where only the window is read. ``ConfigError`` for a bad setting."""
    if choose not in CHOICES:
        raise ConfigError(f"{owner}.choose = {choose!r} is unknown. {did_you_mean(choose, CHOICES)}")
    check_range(owner, "budget", budget, 0.0, float(EVERYTHING))
    refresh = CHOICES[choose]
    return None if refresh is None else ChoiceRule(budget, refresh)


def check_draft_shape(owner: str, k: int, width: int) -> None:
    """``ConfigError`` unless a tree of depth ``k`` with ``width`` tokens per depth fits into a round."""
    check_range(owner, "k", k, 1, MAX_NODES)
    check_range(owner, "width", width, 1, MAX_NODES)
    if k * width > MAX_NODES:
        raise ConfigError(
            f"{owner}.k = {k} times {owner}.width = {width} are more than {MAX_NODES} nodes; lower one of them."
        )
