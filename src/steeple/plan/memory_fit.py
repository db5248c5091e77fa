"""Bytes of a whole configuration and the inverse: what fits a budget, what is given up for it, and in which order.

SpecMemo (arXiv 2506.01986) decides before generation; its order is tree, heads, precision. Ours: pieces of work, tree
width, depth k, the drafter, then the batch. The budget is for the costliest step, so it holds whatever is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from steeple.config import ModelConfig
from steeple.errors import CapacityError, ConfigError
from steeple.plan.memory_parts import (
    DraftMemory,
    Lay,
    batch_bytes,
    draft_room_bytes,
    key_bytes,
    law_bytes,
    loading_bytes,
    room_bytes,
    score_bytes,
    state_bytes,
    weight_bytes,
    working_bytes,
)
from steeple.plan.memory_units import show_bytes

LEAST_CHUNK, LEAST_PORTION = 256, 64  # smaller pieces cost time: those come after everything else
LAST_CHUNK = 16  # below, a row less is hardly a byte less
HELD = ("target weights", "target keys", "target room", "draft weights", "draft keys", "draft room")
"""Parts that are there from the start; the others come and go with requests and steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What is not chosen: the target and how it lies, what the drafter declares, block size, longest text."""

    target: ModelConfig
    lay: Lay
    draft: DraftMemory | None = None
    block_size: int = 16
    max_context: int = 0

    @property
    def context(self) -> int:
        """Most positions of a request."""
        return self.max_context or self.target.max_context

    @property
    def full(self) -> int:
        """Blocks of a request of full length."""
        return -(-self.context // self.block_size)

    @property
    def key_bytes_per_token(self) -> int:
        """Bytes of the target's keys and values of one position."""
        return self.target.kv_elements_per_token * self.lay.element


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What can be chosen.

    Args:
        requests: most at once.
        blocks: of the caches.
        chunk: most prompt rows of a step.
        portion: most rows judged at once; at least those of one request are. 0 = all.
        k: depth of the drafts; 0 = no drafter.
        width: nodes at each depth.
    """

    requests: int
    blocks: int
    chunk: int = 2048
    portion: int = 0
    k: int = 0
    width: int = 1

    @property
    def nodes(self) -> int:
        """Nodes of a request's draft."""
        return self.k * self.width

    @property
    def rows(self) -> int:
        """Most rows of a forward: all requests with their drafts, or a prompt beside all but one of them."""
        return max(self.requests * (1 + self.nodes), self.chunk + (self.requests - 1) * self.nodes)


def memory(setting: Setting, load: Load) -> dict[str, int]:
    """Bytes of every part; those of ``HELD`` are allocated at the start."""
    target, lay, size = setting.target, setting.lay, setting.block_size
    draft = setting.draft if load.k else None
    blocks, rows, context = load.blocks, load.rows, setting.context
    judged = load.requests * (1 + load.nodes)
    portion = max(load.portion, 1 + load.nodes) if load.portion else judged
    parts = {
        "target weights": weight_bytes(target, lay),
        "target keys": key_bytes(setting.key_bytes_per_token, blocks, size, lay),
        "target room": room_bytes(target, rows, lay),
        "draft weights": draft.held if draft else 0,
        "draft keys": key_bytes(draft.keys, blocks, size, lay) if draft and draft.keys else 0,
        "forward": working_bytes(target, rows, context, lay),
        "laws": law_bytes(target, load.requests, judged, portion, draft, load.k),
        "batches": batch_bytes(load.requests, rows, blocks, size, context),
        "requests": state_bytes(load.requests, blocks, size, draft.position_state if draft else 0),
    }
    if draft is not None:
        parts["draft room"] = draft_room_bytes(draft.runs, target, lay) if draft.runs is not None else 0
        parts["draft forward"] = _draft_forward(setting, draft, load)
    return parts


def _draft_forward(setting: Setting, draft: DraftMemory, load: Load) -> int:
    """Room and working memory of a drafter's own forwards, and what it is shown of the target's."""
    target, lay = setting.target, setting.lay
    shown = draft.layers * load.rows * target.hidden_size * lay.element
    if draft.scores:
        shown += score_bytes(target, load.requests, load.blocks, setting.block_size, setting.context)
    if draft.runs is None:
        return shown
    rows = max(load.chunk, load.requests) if draft.reads_text else load.requests
    own = 0 if lay.recorded else room_bytes(draft.runs, rows, lay)
    own += working_bytes(draft.runs, rows, setting.context, lay)
    return shown + own + batch_bytes(load.requests, rows, load.blocks, setting.block_size, setting.context)


def total(setting: Setting, load: Load) -> int:
    """Bytes of the whole: running, or loading if that takes more."""
    return max(sum(memory(setting, load).values()), loading_bytes(setting.target, setting.lay))


def largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number from ``low`` to ``high`` that fits, where what fits is not larger than what does not;
    ``low - 1`` if none does."""
    low -= 1
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def capacity(setting: Setting, load: Load, budget: int, most: int = 1 << 40) -> int:
    """The most blocks that ``load`` may have within ``budget`` bytes, at most ``most``; 0: not one.

    The inverse of ``total`` over ``load.blocks``, wherever running takes more than loading.
    """
    return max(0, largest(lambda blocks: total(setting, replace(load, blocks=blocks)) <= budget, 1, most))


def capacity_requests(setting: Setting, load: Load, budget: int, most: int = 1 << 20) -> int:
    """The most requests of full length within ``budget`` bytes; 0: not one."""

    def fits(requests: int) -> bool:
        return total(setting, replace(load, requests=requests, blocks=requests * setting.full)) <= budget

    return max(0, largest(fits, 1, most))


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What is wanted if memory allows.

    Args:
        load: the wish; ``blocks`` are those that the batch needs and that drafting gives way to.
        most_blocks: what pays at most; memory that is left over goes there.
        free_requests: the number of requests is not the user's; it is what fits at full length, up to the wish.
    """

    load: Load
    most_blocks: int
    free_requests: bool = False


@dataclass(frozen=True, slots=True)
class Fit:
    """What was chosen, the bytes that it takes, and in words what was given up for them, in order."""

    load: Load
    bytes: int
    sacrificed: tuple[str, ...] = ()


class Stage(Sequence[Load]):
    """Configurations from rich to poor, made when they are looked at."""

    def __init__(self, count: int, at: Callable[[int], Load]) -> None:
        self._count, self._at = count, at

    @staticmethod
    def of(found: Sequence[Load]) -> Stage:
        """Of configurations that are there already."""
        return Stage(len(found), found.__getitem__)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Load:  # type: ignore[override]
        return self._at(index if index >= 0 else self._count + index)

    def richest(self, setting: Setting, budget: int) -> Load | None:
        """The first that takes no more than ``budget`` bytes."""
        fitting = largest(lambda i: total(setting, self[-i]) <= budget, 1, len(self))
        return self[-fitting] if fitting else None


def fit(setting: Setting, wish: Wish, budget: int) -> Fit:
    """The richest configuration within ``budget`` bytes.

    First work is cut into smaller pieces, which costs little. Then go, one after the other: tree width, k, the
    drafter, requests (with their blocks), and at last, with one request left, prompt chunks and blocks.

    Raises ``CapacityError``, which names the least budget that would do.
    """
    wanted = _wanted(setting, wish, budget)
    for stage in _stages(setting, wanted):
        found = stage.richest(setting, budget)
        if found is not None:
            found = _larger_pieces(setting, found, wanted, budget)
            blocks = capacity(setting, found, budget, max(wish.most_blocks, found.blocks))
            found = replace(found, blocks=max(blocks, found.blocks))
            return Fit(found, total(setting, found), _sacrificed(wanted, found, setting.block_size))
    least = least_budget(setting)
    raise CapacityError(
        f"memory_budget = {show_bytes(budget)} does not hold the model with one block of cache and one row a step; "
        f"the least that would work is {least} bytes ({show_bytes(least)}). Give that, another dtype, weights = int8, "
        "or a smaller model."
    )


def least_budget(setting: Setting) -> int:
    """Bytes of the poorest configuration: one request without a drafter, one block, a row at a time."""
    return total(setting, Load(requests=1, blocks=1, chunk=1, portion=1))


def _wanted(setting: Setting, wish: Wish, budget: int) -> Load:
    """The wish, with the number of requests that fit at full length where the user left it open."""
    if not wish.free_requests:
        return wish.load
    small = list(_pieces(wish.load))[-1]

    def fits(requests: int) -> bool:
        blocks = min(requests * setting.full, wish.most_blocks)
        return total(setting, replace(small, requests=requests, blocks=blocks)) <= budget

    return replace(wish.load, requests=max(1, largest(fits, 1, wish.load.requests)))


def _stages(setting: Setting, wanted: Load) -> Iterator[Stage]:
    """Configurations from the richest to the poorest, each with less of one thing than the one before it."""
    pieces = list(_pieces(wanted))
    yield Stage.of(pieces)
    load = pieces[-1]
    if load.k:
        yield Stage.of([replace(load, width=width) for width in range(load.width, 0, -1)])
        yield Stage.of([replace(load, width=1, k=k) for k in range(load.k, 0, -1)])
        load = replace(load, width=1, k=0)
        yield Stage.of([load])
    requests = Stage(load.requests, partial(_fewer, load, setting.full))
    yield requests
    load = requests[-1]
    chunks = [2**i for i in range(load.chunk.bit_length() - 1, -1, -1)]
    few = min(load.chunk, LAST_CHUNK)
    yield Stage.of([replace(load, chunk=chunk, portion=1) for chunk in chunks if chunk >= few])
    last = replace(load, chunk=few, portion=1)
    yield Stage(load.blocks, lambda gone: replace(last, blocks=last.blocks - gone))
    yield Stage.of([replace(last, chunk=chunk, blocks=1) for chunk in chunks if chunk <= few])


def _fewer(load: Load, full: int, gone: int) -> Load:
    """``gone`` requests less; blocks follow, as long as a request of full length has room."""
    left = load.requests - gone
    blocks = max(-(-load.blocks * left // load.requests), min(load.blocks, full))
    return replace(load, requests=left, blocks=blocks)


def _pieces(load: Load) -> Iterator[Load]:
    """The same work in smaller and smaller pieces: rows judged at once, prompt rows of a step."""
    portion, chunk = load.portion or load.requests * (1 + load.nodes), load.chunk
    yield replace(load, portion=0)
    while portion > LEAST_PORTION or chunk > LEAST_CHUNK:
        portion = portion if portion <= LEAST_PORTION else max(LEAST_PORTION, portion // 2)
        chunk = chunk if chunk <= LEAST_CHUNK else max(LEAST_CHUNK, chunk // 2)
        yield replace(load, portion=portion, chunk=chunk)


def _larger_pieces(setting: Setting, load: Load, wanted: Load, budget: int) -> Load:
    """What was given up leaves room for larger pieces again, maybe."""
    if load.chunk < min(wanted.chunk, LEAST_CHUNK):
        return load
    for piece in _pieces(replace(load, chunk=wanted.chunk, portion=0)):
        if total(setting, piece) <= budget:
            return piece
    return load


def _sacrificed(wanted: Load, chosen: Load, block_size: int) -> tuple[str, ...]:
    """What was given up, in words, in the order in which it was."""
    said = []
    if chosen.k and chosen.width < wanted.width:
        said.append(f"tree width {wanted.width} -> {chosen.width}")
    if 0 < chosen.k < wanted.k:
        said.append(f"k {wanted.k} -> {chosen.k}")
    if wanted.k and not chosen.k:
        said.append("drafter dropped: plain decoding")
    if chosen.requests < wanted.requests:
        said.append(f"batch {wanted.requests} -> {chosen.requests}")
    if chosen.blocks < wanted.blocks:
        said.append(f"cache {wanted.blocks * block_size} -> {chosen.blocks * block_size} positions")
    if chosen.chunk < wanted.chunk:
        said.append(f"prompt chunk {wanted.chunk} -> {chosen.chunk} rows")
    return tuple(said)


@dataclass(frozen=True, slots=True)
class Least:
    """The configuration of least memory that reaches a speed-up."""

    load: Load
    bytes: int
    speedup: float


def least_memory(setting: Setting, options: Iterable[Load], speedup: Callable[[Load], float], wanted: float) -> Least:
    """Of ``options``, the one of fewest bytes whose ``speedup`` is at least ``wanted``; of equals the fastest.

    Raises ``ConfigError`` if none is, naming the best that there is.
    """
    found: Least | None = None
    best = float("-inf")
    for load in options:
        reached = speedup(load)
        best = max(best, reached)
        if not reached >= wanted:
            continue
        least = Least(load, total(setting, load), reached)
        if found is None or (least.bytes, -least.speedup) < (found.bytes, -found.speedup):
            found = least
    if found is None:
        raise ConfigError(
            f"speed-up = {wanted:g} is reached by no configuration; the best reaches {best:.2f}. Ask for that "
            "or less, or allow more batch, k or drafters."
        )
    return found


def loads(base: Load, choices: Mapping[str, Iterable[int]]) -> Iterator[Load]:
    """``base`` with every combination of ``choices`` (field -> values)."""
    names = list(choices)
    if not names:
        yield base
        return
    rest = {name: choices[name] for name in names[1:]}
    for value in choices[names[0]]:
        yield from loads(replace(base, **{names[0]: value}), rest)
