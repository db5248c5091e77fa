"""The web application over an engine's loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException

from steeple import __version__
from steeple.serve.admin import admin_routes
from steeple.serve.auth import Keys
from steeple.serve.batches.routes import add_batches, larger_bodies
from steeple.serve.chat import chat_routes
from steeple.serve.completions import completion_routes
from steeple.serve.config import ServeConfig
from steeple.serve.errors import ApiError, on_api_error, on_http_error, on_invalid
from steeple.serve.loop import EngineLoop
from steeple.serve.middleware import Bounds, Gate, Watch
from steeple.serve.page import add_page
from steeple.serve.reports import report
from steeple.serve.service import Service

WORDS = "OpenAI's endpoints over lossless speculative decoding."


def create_app(loop: EngineLoop, config: ServeConfig) -> FastAPI:
    """The application. ``loop`` is started and closed by the caller; ``app.state.service`` is what routes share.

    Raises ``ConfigError`` if the API keys cannot be read, ``StorageError`` if the database of batches cannot be used.
    """
    service = Service(loop, config)
    keys = Keys.load(config.keys_file)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        reporter = asyncio.create_task(report(service, config.report_every)) if config.report_every else None
        yield
        if reporter is not None:
            reporter.cancel()

    app = FastAPI(
        title="Steeple", version=__version__, description=WORDS, docs_url=None, redoc_url=None, lifespan=lifespan
    )
    app.state.service = service
    for routes in (completion_routes, chat_routes, admin_routes):
        app.include_router(routes(service))
    add_page(app, service)
    add_batches(app, service, config.batches)
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http_error)
    # The last one added is the outermost.
    app.add_middleware(Bounds, most=config.max_body, larger=larger_bodies(config.batches))
    app.add_middleware(Gate, keys=keys)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Watch)
    return app
