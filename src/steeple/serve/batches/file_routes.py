"""``/v1/files``: upload, list, look, read, delete. A client's names are labels here and never paths."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from steeple.errors import did_you_mean
from steeple.serve.auth import tenant_of
from steeple.serve.batches.config import BatchStoreConfig
from steeple.serve.batches.contents import GROUP, INPUT, PIECE, Files, StoredFile, Writing
from steeple.serve.batches.paging import TAG, check_limit, check_seconds, is_id, listed, no_such, shown
from steeple.serve.batches.runner import Runner
from steeple.serve.batches.store import Desk
from steeple.serve.errors import ApiError, wrong
from steeple.serve.reply import HUNG_UP

FIELDS = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")
MOST_FILES, MOST_FIELD, MOST_FILENAME = 10_000, 4096, 255
OVERHEAD = 1 << 16  # bytes of a form around its file
FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": [INPUT]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer"},
                    },
                }
            }
        },
    }
}


def file_routes(desk: Desk, files: Files, runner: Runner, config: BatchStoreConfig) -> APIRouter:
    """All of them."""
    router = APIRouter()
    _changing_routes(router, desk, files, runner, config)
    _reading_routes(router, desk, files)
    return router


def _changing_routes(router: APIRouter, desk: Desk, files: Files, runner: Runner, config: BatchStoreConfig) -> None:
    @router.post("/v1/files", tags=[TAG], openapi_extra=FORM)
    async def upload(http: HttpRequest) -> Response:
        """Keep a file of requests."""
        try:
            async with http.form(max_files=1, max_fields=len(FIELDS), max_part_size=MOST_FIELD) as form:
                return shown((await _keep(desk, files, config, tenant_of(http), form)).as_json())
        except ClientDisconnect:
            return Response(status_code=HUNG_UP)
        except UnicodeError as error:
            raise ApiError(400, "the form is not in its charset; send it in UTF-8.") from error

    @router.delete("/v1/files/{id}", tags=[TAG])
    async def delete(http: HttpRequest, id: str) -> Response:
        """Delete a file. A batch that reads it goes on."""
        if not (is_id(id) and await desk(files.delete, tenant_of(http), id)):
            raise no_such("file", id)
        await runner.sweep()
        return shown({"id": id, "object": "file", "deleted": True})


def _reading_routes(router: APIRouter, desk: Desk, files: Files) -> None:
    async def known(http: HttpRequest, id: str) -> StoredFile | None:
        return await desk(files.get, tenant_of(http), id, time.time()) if is_id(id) else None

    @router.get("/v1/files", tags=[TAG])
    async def page(
        http: HttpRequest,
        purpose: str | None = None,
        limit: int = MOST_FILES,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """The files of this key."""
        check_limit(limit, MOST_FILES)
        cursor = None if after is None else await known(http, after)
        if after is not None and cursor is None:
            raise wrong("after", "after is no id of a file.")
        kind = None if purpose is None else purpose.encode("utf-8", "replace").decode()
        number = None if cursor is None else cursor.number
        found = await desk(files.page, tenant_of(http), kind, number, limit + 1, time.time(), newest=order == "desc")
        return listed([file.as_json() for file in found], limit)

    @router.get("/v1/files/{id}", tags=[TAG])
    async def look(http: HttpRequest, id: str) -> Response:
        """What is known of a file."""
        file = await known(http, id)
        if file is None:
            raise no_such("file", id)
        return shown(file.as_json())

    @router.get("/v1/files/{id}/content", tags=[TAG])
    async def content(http: HttpRequest, id: str) -> Response:
        """The bytes of a file."""
        file = await known(http, id)
        if file is None:
            raise no_such("file", id)
        headers = {
            "Content-Length": str(file.bytes),
            "Content-Disposition": f'attachment; filename="{file.id}.jsonl"',
            "X-Content-Type-Options": "nosniff",
        }
        return StreamingResponse(_bytes(desk, files, file), 200, headers, "application/octet-stream")


async def _bytes(desk: Desk, files: Files, file: StoredFile) -> AsyncIterator[bytes]:
    for place in range(0, -(-file.bytes // PIECE), GROUP):
        yield await desk(files.pieces, file.number, place, GROUP)


async def _keep(desk: Desk, files: Files, config: BatchStoreConfig, tenant: str, form: FormData) -> StoredFile:
    """Store the file of a form. ``ApiError`` if the form is wrong, or there is no room."""
    upload, keep_seconds = _checked(form)
    size = upload.size or 0
    if size > config.max_file_bytes:
        raise ApiError(413, f"the file is larger than {config.max_file_bytes} bytes; split it.", param="file")
    if not size:
        raise wrong("file", "the file is empty.")
    if await desk(files.held, tenant) + size > config.max_stored_bytes:
        message = f"all files together would be larger than {config.max_stored_bytes} bytes; delete some."
        raise ApiError(413, message, param="file", code="storage_full")
    name = (upload.filename or "").encode("utf-8", "replace").decode()[:MOST_FILENAME]
    writing = await desk(files.begin, tenant, name, INPUT, int(time.time()), keep_seconds)
    try:
        await _copy(desk, upload, writing)
    except BaseException:
        await desk(files.drop, writing.number)
        raise
    stored = await desk(files.get, tenant, writing.id, 0.0)
    if stored is None:
        raise no_such("file", writing.id)
    return stored


async def _copy(desk: Desk, upload: UploadFile, writing: Writing) -> None:
    while data := await upload.read(GROUP * PIECE):
        await desk(writing.add, data)
    await desk(writing.publish)


def _checked(form: FormData) -> tuple[UploadFile, int | None]:
    """The file of a form and its life. ``ApiError`` 400 if a field is missing, unknown, or there twice."""
    fields: dict[str, str | UploadFile] = {}
    for key, value in form.multi_items():
        if key not in FIELDS:
            raise wrong(key[:60], f"{key[:60]!r} is no field of this form. {did_you_mean(key[:60], FIELDS)}")
        if key in fields:
            raise wrong(key, f"{key!r} is there twice; give it once.")
        if isinstance(value, UploadFile) != (key == "file"):
            raise wrong(key, f"{key!r} must be {'a file' if key == 'file' else 'text'}.")
        fields[key] = value
    upload, purpose = fields.get("file"), fields.get("purpose")
    if not isinstance(upload, UploadFile):
        raise wrong("file", "file is missing; send multipart/form-data with file and purpose.")
    if purpose != INPUT:
        raise wrong("purpose", f"purpose is not supported; give {INPUT!r}.")
    anchor, seconds = (fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return upload, None
    if anchor != "created_at":
        raise wrong("expires_after[anchor]", "expires_after[anchor] must be 'created_at'.")
    text = str(seconds)
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise wrong("expires_after[seconds]", "expires_after[seconds] is no whole number of seconds.")
    return upload, check_seconds("expires_after[seconds]", int(text))
