"""Files and batches as a part of the application: their routes, and what runs with it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from steeple.errors import StorageError
from steeple.serve.batches.batch_routes import batch_routes
from steeple.serve.batches.config import BatchStoreConfig
from steeple.serve.batches.contents import Files
from steeple.serve.batches.file_routes import OVERHEAD, file_routes
from steeple.serve.batches.ledger import Ledger
from steeple.serve.batches.runner import Runner
from steeple.serve.batches.store import Desk, Store
from steeple.serve.errors import ApiError
from steeple.serve.service import Service


def add_batches(app: FastAPI, service: Service, config: BatchStoreConfig) -> None:
    """Give ``app`` the routes of files and batches; those that are unfinished go on when it starts up.

    Without a path in ``config`` there are no such routes. Raises ``StorageError`` if the database cannot be used.
    """
    if config.batch_db is None:
        return
    store = Store(config.batch_db)
    desk, files, ledger = Desk(store), Files(store), Ledger(store)
    runner = Runner(service, desk, files, ledger, config)
    app.include_router(file_routes(desk, files, runner, config))
    app.include_router(batch_routes(desk, files, ledger, runner, config))
    app.add_exception_handler(StorageError, _on_storage_error)
    inner = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(own: FastAPI) -> AsyncIterator[Any]:
        async with inner(own) as state:
            try:
                async with runner.running():
                    yield state
            finally:
                desk.close()

    app.router.lifespan_context = lifespan


def larger_bodies(config: BatchStoreConfig) -> dict[str, int]:
    """Most bytes of a body, by path, where it may be larger than other requests; for ``Bounds``."""
    return {} if config.batch_db is None else {"/v1/files": config.max_file_bytes + OVERHEAD}


async def _on_storage_error(_request: Request, error: Exception) -> Response:
    """The disk is full or gone. A path of this machine is not for clients."""
    del error
    return ApiError(503, "files and batches cannot be kept at the moment; try again later.", code="storage").response()
