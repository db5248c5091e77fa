"""What the routes of files and batches share: answers, lists with a cursor, and words for what is not there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from steeple.serve.errors import ApiError, encoded, wrong

ID = re.compile(r"(file-|batch_)[0-9a-f]{24}")
TAG = "OpenAI batches"
LEAST_SECONDS, MOST_SECONDS = 3600, 30 * 24 * 3600  # life of a file, as OpenAI has it


def shown(value: Any) -> Response:
    """JSON in ASCII: names and metadata may hold half a surrogate pair."""
    return Response(encoded(value), media_type="application/json")


def is_id(text: str) -> bool:
    """Whether it looks like one of ours; nothing else is looked up."""
    return ID.fullmatch(text) is not None


def no_such(kind: str, id: str, param: str = "id") -> ApiError:
    """The answer to an id that is not there, or somebody else's: the two look alike."""
    return ApiError(404, f"there is no {kind} {id[:60]!a}.", param=param, code="not_found")


def check_limit(limit: int, most: int) -> None:
    """``ApiError`` 400 unless a page may have so many entries."""
    if not 1 <= limit <= most:
        raise wrong("limit", f"limit is out of range; give a value from 1 to {most}.")


def check_seconds(param: str, seconds: int) -> int:
    """``ApiError`` 400 unless a file may live so long."""
    if not LEAST_SECONDS <= seconds <= MOST_SECONDS:
        raise wrong(param, f"{param} is out of range; give {LEAST_SECONDS} to {MOST_SECONDS} seconds.")
    return seconds


def listed(found: Sequence[dict[str, Any]], limit: int) -> Response:
    """A page of at most ``limit`` entries; ``found`` may have one more, which says that there are more."""
    data = found[:limit]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return shown({"object": "list", "data": list(data), **ends, "has_more": len(found) > limit})
