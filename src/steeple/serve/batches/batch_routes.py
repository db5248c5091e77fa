"""``/v1/batches``: create, list, look, cancel."""

from __future__ import annotations

import time
from typing import Annotated, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import StringConstraints
from starlette.responses import Response

from steeple.jobs.batch_api import CHAT, COMPLETIONS
from steeple.serve.auth import tenant_of
from steeple.serve.batches.config import BatchStoreConfig
from steeple.serve.batches.contents import INPUT, Files
from steeple.serve.batches.ledger import CANCELLED, CANCELLING, WINDOW, Asked, Batch, Ledger
from steeple.serve.batches.paging import TAG, check_limit, check_seconds, is_id, listed, no_such, shown
from steeple.serve.batches.runner import Runner
from steeple.serve.batches.store import Desk
from steeple.serve.errors import ApiError, wrong
from steeple.serve.schemas import Strict

MOST_BATCHES, USUAL_BATCHES, MOST_PAIRS = 100, 20, 16
Key = Annotated[str, StringConstraints(max_length=64)]
Value = Annotated[str, StringConstraints(max_length=512)]


class ExpiresAfter(Strict):
    """The life of the files that come out."""

    anchor: Literal["created_at"]
    seconds: int


class CreateBatch(Strict):
    """Body of ``POST /v1/batches``."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[Key, Value] | None = None
    output_expires_after: ExpiresAfter | None = None

    def check(self) -> int | None:
        """The life of the files that come out. ``ApiError`` 400 for what cannot be honoured."""
        if self.endpoint not in (CHAT, COMPLETIONS):
            raise wrong("endpoint", f"endpoint is not supported; give {CHAT!r} or {COMPLETIONS!r}.")
        if self.completion_window != WINDOW:
            raise wrong("completion_window", f"completion_window must be {WINDOW!r}.")
        if self.metadata is not None and len(self.metadata) > MOST_PAIRS:
            raise wrong("metadata", f"metadata has more than {MOST_PAIRS} entries.")
        after = self.output_expires_after
        return None if after is None else check_seconds("output_expires_after.seconds", after.seconds)


def batch_routes(desk: Desk, files: Files, ledger: Ledger, runner: Runner, config: BatchStoreConfig) -> APIRouter:
    """All of them."""
    router = APIRouter()

    @router.post("/v1/batches", tags=[TAG])
    async def create(http: HttpRequest, body: CreateBatch) -> Response:
        """Answer all requests of a file, in the background."""
        keep, tenant, id = body.check(), tenant_of(http), body.input_file_id
        file = await desk(files.get, tenant, id, time.time()) if is_id(id) else None
        if file is None:
            raise no_such("file", id, "input_file_id")
        if file.purpose != INPUT:
            raise wrong("input_file_id", f"the file's purpose is {file.purpose!r}; give one of {INPUT!r}.")
        asked = Asked(endpoint=body.endpoint, file=file, metadata=body.metadata, keep_seconds=keep)
        batch = await desk(ledger.create, tenant, asked, config.max_open_batches, int(time.time()))
        if batch is None:
            message = f"{config.max_open_batches} batches are unfinished; wait until one ends, or cancel one."
            raise ApiError(429, message, code="too_many_batches")
        runner.begin(batch)
        return shown(batch.as_json())

    @router.get("/v1/batches", tags=[TAG])
    async def page(http: HttpRequest, limit: int = USUAL_BATCHES, after: str | None = None) -> Response:
        """The batches of this key, the newest first."""
        check_limit(limit, MOST_BATCHES)
        tenant = tenant_of(http)
        cursor = await desk(ledger.get, tenant, after) if after is not None and is_id(after) else None
        if after is not None and cursor is None:
            raise wrong("after", "after is no id of a batch.")
        found = await desk(ledger.page, tenant, None if cursor is None else cursor.number, limit + 1)
        return listed([batch.as_json() for batch in found], limit)

    @router.get("/v1/batches/{id}", tags=[TAG])
    async def look(http: HttpRequest, id: str) -> Response:
        """How a batch stands."""
        batch = await desk(ledger.get, tenant_of(http), id) if is_id(id) else None
        return shown(_known(batch, id).as_json())

    @router.post("/v1/batches/{id}/cancel", tags=[TAG])
    async def cancel(http: HttpRequest, id: str) -> Response:
        """Run no more of a batch. What is answered stays."""
        now = int(time.time())
        batch = _known(await desk(ledger.cancel, tenant_of(http), id, now) if is_id(id) else None, id)
        if batch.status not in (CANCELLING, CANCELLED):
            raise ApiError(409, f"a batch that is {batch.status!r} cannot be cancelled.", code="conflict")
        runner.cancel(batch)
        return shown(batch.as_json())

    return router


def _known(batch: Batch | None, id: str) -> Batch:
    if batch is None:
        raise no_such("batch", id)
    return batch
