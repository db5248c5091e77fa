"""Choosing among the rows of a sweep: by temperature, at one k, at each drafter's best k, by place in the grid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
MIXED = "mixed"


def temperatures(rows: Iterable[Row]) -> list[float]:
    """In rising order."""
    return sorted({row["temperature"] for row in rows})


def drafters(rows: Iterable[Row]) -> list[str]:
    """Without plain decoding, in the order of the rows."""
    return list(dict.fromkeys(row["drafter"] for row in rows if row["k"]))


def batches(rows: Iterable[Row]) -> list[int]:
    """In rising order."""
    return sorted({row["batch"] for row in rows})


def contexts(rows: Iterable[Row]) -> list[Any]:
    """In rising order; ``mixed`` is last."""
    return sorted({context_of(row) for row in rows}, key=lambda value: (value == MIXED, str(value).zfill(9)))


def context_of(row: Row) -> Any:
    """The context as a place of the grid: mixed ones are one place, whatever their mean."""
    return MIXED if row["contexts"] else row["context"]


def at_k(rows: Iterable[Row], k: int) -> list[Row]:
    """The drafters' rows at ``k``; an adaptive drafter's rows stand for every k."""
    return [row for row in rows if row["k"] and (row["adaptive"] or row["k"] == k)]


def best_k(rows: Iterable[Row]) -> list[Row]:
    """In every cell, each drafter's row with the highest throughput multiplier."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (row["drafter"], row["batch"], context_of(row), row["temperature"])
        if row["k"] and (key not in best or row["throughput_multiplier"] > best[key]["throughput_multiplier"]):
            best[key] = row
    return list(best.values())


def common_k(rows: Sequence[Row], wanted: int) -> int:
    """``wanted`` if it was measured, or else the middle one of those that were."""
    ks = sorted({row["k"] for row in rows if row["k"] and not row["adaptive"]})
    return wanted if wanted in ks or not ks else ks[len(ks) // 2]


def find(rows: Iterable[Row], **values: Any) -> Row | None:
    """The first row with these values; ``context`` is the place in the grid."""
    place = values.pop("context", None)
    for row in rows:
        if (place is None or context_of(row) == place) and all(row[name] == value for name, value in values.items()):
            return row
    return None
