"""Files and lists: what goes in comes out, to its owner alone, within bounds."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
from pathlib import Path
from typing import Any

import pytest
from batch_lab import COMPLETIONS, answered, begin, ended, greedy, jsonl, lines, state, up, upload, with_batches
from conftest import Start

from steeple.errors import ConfigError, StorageError
from steeple.serve.batches.config import BatchStoreConfig
from steeple.serve.batches.contents import GROUP, PIECE, Files
from steeple.serve.batches.ledger import Asked, Ledger
from steeple.serve.batches.routes import larger_bodies
from steeple.serve.batches.store import Store

ANN, BOB = ({"Authorization": f"Bearer {key}"} for key in ("key-of-ann", "key-of-bob"))
FILE = {"file": ("a.jsonl", b"{}")}


@pytest.mark.parametrize("size", [1, PIECE, PIECE + 1, GROUP * PIECE, 2 * GROUP * PIECE + 77])
def test_what_goes_in_comes_out(start: Start, tmp_path: Path, size: int) -> None:
    data = bytes(i * 7 % 251 for i in range(size))

    async def run() -> None:
        async with up(with_batches(start, tmp_path / "db")) as client:
            file = await upload(client, data)
            assert (file["bytes"], file["purpose"], file["filename"]) == (size, "batch", "lines.jsonl")
            assert (file["object"], file["status"], file["expires_at"]) == ("file", "processed", None)
            assert (await client.get(f"/v1/files/{file['id']}")).json() == file
            answer = await client.get(f"/v1/files/{file['id']}/content")
            assert answer.content == data
            assert answer.headers["content-type"] == "application/octet-stream"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["content-disposition"].startswith("attachment")

    asyncio.run(run())


def test_pieces_are_cut_where_asked(tmp_path: Path) -> None:
    files = Files(Store(tmp_path / "db"))
    data = bytes(i * 31 % 256 for i in range(3 * PIECE + 5))
    writing = files.begin("", "name", "batch", 0)
    writing.add(data)
    writing.publish()
    for start, length in ((0, 1), (PIECE - 1, 2), (PIECE, PIECE), (5, 2 * PIECE), (3 * PIECE, 5)):
        assert files.cut(writing.number, start, length) == data[start : start + length]


def test_a_name_is_a_label(start: Start, tmp_path: Path) -> None:
    name = "../../etc/passwd" + "x" * 300

    async def run() -> None:
        async with up(with_batches(start, tmp_path / "db")) as client:
            answer = await client.post("/v1/files", files={"file": (name, b"x")}, data={"purpose": "batch"})
            file = answer.json()
            assert file["filename"] == name[:255]
            assert "etc" not in (await client.get(f"/v1/files/{file['id']}/content")).headers["content-disposition"]

    asyncio.run(run())
    assert [path.name for path in tmp_path.iterdir()] == ["db"]


@pytest.mark.parametrize(
    ("files", "data", "param"),
    [
        (None, {"purpose": "batch"}, "file"),
        ({"file": ("a", b"")}, {"purpose": "batch"}, "file"),
        (FILE, {"purpose": "fine-tune"}, "purpose"),
        (FILE, {}, "purpose"),
        (FILE, {"purpose": "batch", "path": "x"}, "path"),
        ({"purpose": ("a", b"batch")}, {"file": "x"}, None),
        (FILE, {"purpose": ["batch", "batch"]}, "purpose"),
        (FILE, {"purpose": "batch", "expires_after[anchor]": "now"}, "expires_after[anchor]"),
        (FILE, {"purpose": "batch", "expires_after[anchor]": "created_at"}, "expires_after[seconds]"),
        (
            FILE,
            {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "60"},
            "expires_after[seconds]",
        ),
    ],
)
def test_a_wrong_form_is_refused(start: Start, tmp_path: Path, files: Any, data: Any, param: str | None) -> None:
    server = with_batches(start, tmp_path / "db")

    async def run() -> None:
        async with up(server) as client:
            answer = await client.post("/v1/files", files=files, data=data)
            assert answer.status_code == 400
            told = answer.json()["error"]["param"]
            assert told == param if param else told in ("file", "purpose")
            assert (await client.get("/v1/files")).json()["data"] == []

    asyncio.run(run())


KINDS = [
    b"multipart/form-data",
    b"multipart/form-data; boundary=",
    b"multipart/form-data; boundary=b",
    b"multipart/form-data; boundary=b; charset=punycode",
    b"application/x-www-form-urlencoded",
    b"application/json",
    b"text/plain; charset=\xff",
    b"",
]
FORMS = [
    b"",
    b"\x00\xff" * 50,
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="\xff\x00"\r\n\r\nx\r\n--b--\r\n',
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbat',
    b'--b\r\nContent-Disposition: form-data; name="\xff\x00--"\r\n\r\nx\xff--\r\n--b--\r\n',
    b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
    b"--b\r\n\r\n\r\n--b--\r\n",
]


def test_what_is_no_form_is_refused(start: Start, tmp_path: Path) -> None:
    server = with_batches(start, tmp_path / "db")

    async def run() -> None:
        async with up(server) as client:
            for kind in KINDS:
                for form in FORMS:
                    answer = await client.post("/v1/files", content=form, headers={"Content-Type": kind})
                    assert answer.status_code == 400, (kind, form)
                    assert answer.json()["error"]["message"]

    asyncio.run(run())


def test_bounds(start: Start, tmp_path: Path) -> None:
    server = with_batches(start, tmp_path / "db", max_file_bytes=100, max_stored_bytes=150)

    async def run() -> None:
        async with up(server) as client:
            for size, status, code in ((101, 413, None), (100, 200, None), (51, 413, "storage_full"), (50, 200, None)):
                files = {"file": ("a", b"x" * size)}
                answer = await client.post("/v1/files", files=files, data={"purpose": "batch"})
                assert answer.status_code == status
                if status != 200:
                    assert answer.json()["error"]["code"] == code
            for file in (await client.get("/v1/files")).json()["data"]:
                assert (await client.delete(f"/v1/files/{file['id']}")).json()["deleted"] is True

    asyncio.run(run())


def test_too_many_unfinished_batches_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    files, ledger = Files(store), Ledger(store)
    for tenant in ("ann", "bob"):
        writing = files.begin(tenant, "name", "batch", 0)
        writing.add(b"x")
        writing.publish()
        file = files.get(tenant, writing.id, 1)
        assert file is not None
        made = [ledger.create(tenant, Asked(endpoint=COMPLETIONS, file=file), 2, 0) for _ in range(3)]
        assert [batch is None for batch in made] == [False, False, True]
        ledger.fail(made[0].number, [], 0)
        assert ledger.create(tenant, Asked(endpoint=COMPLETIONS, file=file), 2, 0) is not None


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input_file_id": "file-x"}, "input_file_id"),
        ({"input_file_id": "file-" + "0" * 24}, "input_file_id"),
        ({"input_file_id": "../db"}, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "48h"}, "completion_window"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
        ({"priority": 1}, "priority"),
    ],
)
def test_a_wrong_batch_is_refused(start: Start, tmp_path: Path, change: Any, param: str) -> None:
    server = with_batches(start, tmp_path / "db")

    async def run() -> None:
        async with up(server) as client:
            file = await upload(client, jsonl([greedy("a", "x")]))
            body = {"input_file_id": file["id"], "endpoint": COMPLETIONS, "completion_window": "24h", **change}
            answer = await client.post("/v1/batches", json=body)
            assert answer.status_code == (404 if param == "input_file_id" else 400)
            assert answer.json()["error"]["param"] == param
            assert (await client.get("/v1/batches")).json()["data"] == []

    asyncio.run(run())


def test_nobody_sees_what_is_anothers(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEEPLE_API_KEYS", "key-of-ann,key-of-bob")
    server = with_batches(start, tmp_path / "db")

    async def run() -> None:
        async with up(server) as client:
            assert (await client.get("/v1/files")).status_code == 401
            client.headers.update(ANN)
            batch = await ended(client, (await begin(client, jsonl([greedy("a", "x")])))["id"])
            input_file, output = batch["input_file_id"], batch["output_file_id"]
            paths = [f"/v1/files/{id}{tail}" for id in (input_file, output) for tail in ("", "/content")]
            own = [(await client.get(path)).status_code for path in paths]
            assert own == [200] * 4
            client.headers.update(BOB)
            for path in [*paths, f"/v1/batches/{batch['id']}"]:
                answer = await client.get(path)
                unknown = await client.get(path.replace(path.split("/")[3], "file-" + "0" * 24))
                assert answer.status_code == unknown.status_code == 404
            assert (await client.delete(f"/v1/files/{input_file}")).status_code == 404
            assert (await client.post(f"/v1/batches/{batch['id']}/cancel")).status_code == 404
            for path in ("/v1/files", "/v1/batches"):
                assert (await client.get(path)).json()["data"] == []
            assert (await client.get("/v1/files", params={"after": input_file})).status_code == 400
            body = {"input_file_id": input_file, "endpoint": COMPLETIONS, "completion_window": "24h"}
            assert (await client.post("/v1/batches", json=body)).status_code == 404
            client.headers.update(ANN)
            assert (await client.get(paths[0])).status_code == 200

    asyncio.run(run())


def test_lists_have_pages(start: Start, tmp_path: Path) -> None:
    server = with_batches(start, tmp_path / "db")

    async def pages(client: Any, path: str, **query: Any) -> list[str]:
        found: list[str] = []
        while True:
            page = (await client.get(path, params=query)).json()
            assert len(page["data"]) <= 2
            found += [entry["id"] for entry in page["data"]]
            assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
            if not page["has_more"]:
                return found
            query["after"] = found[-1]

    async def run() -> None:
        async with up(server) as client:
            batches = [(await begin(client, jsonl([greedy("a", "x")])))["id"] for _ in range(5)]
            for id in batches:
                await ended(client, id)
            assert await pages(client, "/v1/batches", limit=2) == batches[::-1]
            oldest = await pages(client, "/v1/files", limit=2, order="asc")
            assert len(oldest) == 10
            assert await pages(client, "/v1/files", limit=2) == oldest[::-1]
            inputs = [(await state(client, id))["input_file_id"] for id in batches]
            assert await pages(client, "/v1/files", limit=2, order="asc", purpose="batch") == inputs
            for query in ({"limit": 0}, {"limit": 10**9}, {"after": "x"}, {"after": "batch_" + "0" * 24}):
                for path in ("/v1/files", "/v1/batches"):
                    answer = await client.get(path, params=query)
                    assert answer.status_code == 400
                    assert answer.json()["error"]["param"] in query

    asyncio.run(run())


def test_a_deleted_input_is_read_to_its_end(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "db"

    async def run() -> None:
        async with up(with_batches(start, path, batch_in_flight=1)) as client:
            batch = await begin(client, jsonl(greedy(f"r{i}", "x", 30) for i in range(5)))
            await answered(client, batch["id"], 1)
            assert (await client.delete(f"/v1/files/{batch['input_file_id']}")).status_code == 200
            assert (await client.get(f"/v1/files/{batch['input_file_id']}")).status_code == 404
            batch = await ended(client, batch["id"])
            assert batch["request_counts"] == {"total": 5, "completed": 5, "failed": 0}
            assert len(await lines(client, batch["output_file_id"])) == 5

    asyncio.run(run())
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT COUNT(*) FROM files").fetchone() == (1,)  # the output
        assert db.execute("SELECT COUNT(*) FROM pieces").fetchone() == (1,)
        assert db.execute("SELECT COUNT(*) FROM tasks").fetchone() == (0,)
    db.close()


def test_files_expire(tmp_path: Path) -> None:
    files = Files(Store(tmp_path / "db"))
    kept = []
    for keep in (None, 3600):
        writing = files.begin("", "name", "batch", 100, keep)
        writing.add(b"x")
        writing.publish()
        kept.append(writing.id)
    assert [file.id for file in files.page("", None, None, 10, 3699, newest=False)] == kept
    assert [file.id for file in files.page("", None, None, 10, 3700, newest=False)] == kept[:1]
    assert files.get("", kept[1], 3700) is None
    files.sweep(3700)
    assert files.held("") == 1
    assert files.get("", kept[1], 0) is None


def test_a_half_written_file_is_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    files = Files(store)
    writing = files.begin("", "name", "batch", 0)
    writing.add(bytes(2 * GROUP * PIECE))
    assert files.get("", writing.id, 0) is None
    assert store.read("SELECT COUNT(*) FROM pieces")[0][0] == 2 * GROUP
    files.recover()
    assert store.read("SELECT COUNT(*) FROM pieces")[0][0] == 0


def test_a_database_has_one_server(tmp_path: Path) -> None:
    path = tmp_path / "db"
    store = Store(path)
    with pytest.raises(StorageError, match="another server"):
        Store(path)
    store.close()
    Store(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_commit_is_on_the_disk(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    assert store.read("PRAGMA synchronous")[0][0] == 2  # FULL
    assert store.read("PRAGMA journal_mode")[0][0] == "wal"


def test_what_is_no_database_of_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"a text, not a database\n" * 100)
    with pytest.raises(StorageError, match="not a database"):
        Store(tmp_path / "text")
    with sqlite3.connect(tmp_path / "other") as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    with pytest.raises(StorageError, match="version 0"):
        Store(tmp_path / "other")
    with pytest.raises(StorageError, match="cannot be opened"):
        Store(tmp_path / "no" / "folder")


def test_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_batch_lines"):
        BatchStoreConfig(max_batch_lines=0)
    assert larger_bodies(BatchStoreConfig()) == {}
    assert larger_bodies(BatchStoreConfig(batch_db=tmp_path / "db", max_file_bytes=10**9))["/v1/files"] > 10**9


def test_without_a_path_there_are_no_batches(start: Start) -> None:
    assert start(drafter="none").get("/v1/batches").status_code == 404
