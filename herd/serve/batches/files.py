"""/v1/files: what callers upload for batches, and what batches leave.

The bytes of a file lie in the store's folder under a random id; what its user calls it is a word in the database and never a path. A file
is on the disk as a whole before its row is, and its row goes before it does, so that after a crash what has no row is swept away, but for
what a batch is about to leave. Nothing ever writes into a file that has a row.

Source: `openai.types.file_create_params`, `file_list_params` of openai 3.54.
"""

import os
import shutil
import time
from asyncio import to_thread
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from sqlite3 import Row
from typing import Annotated, Any, BinaryIO, ClassVar, Literal

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse
from pydantic import Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from herd.serve.config import ServeConfig
from herd.serve.connection import caller, check_origin
from herd.serve.errors import RequestError
from herd.serve.lists import OrderedPage, Page, list_object, read_query
from herd.serve.store import Store, owner
from herd.serve.wire import Wire, new_id, shown_value, usage_error

FILES_TABLE = """
CREATE TABLE IF NOT EXISTS files (
    place INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL, created_at INTEGER NOT NULL
)"""
BATCHES_TABLE = """
CREATE TABLE IF NOT EXISTS batches (
    place INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, status TEXT NOT NULL,
    input_file_id TEXT NOT NULL, output_id TEXT NOT NULL, error_id TEXT NOT NULL, told TEXT NOT NULL
)"""  # output_id, error_id: of the files that it will leave.  told: the batch as its owner sees it, as JSON
UNFINISHED = "status IN ('validating', 'in_progress', 'finalizing', 'cancelling')"
LEAST_BYTES = 4096  # that a file counts as, or empty ones would be free
MOST_NAME = 255  # characters of a file's name
FORM_BYTES = 64 << 10  # of an upload beside the file


class FileForm(Wire):
    """The fields of POST /v1/files, all but the file."""

    purpose: Literal["batch"]

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"expires_after[anchor]": (), "expires_after[seconds]": ()}


class FilePage(OrderedPage):
    limit: Annotated[int, Field(ge=1, le=10_000)] = 10_000
    purpose: str | None = None


class Files:
    """The files of one server."""

    def __init__(self, store: Store, config: ServeConfig) -> None:
        self.store, self.config = store, config
        self.folder = store.folder / "files"
        self.folder.mkdir(mode=0o700, exist_ok=True)
        known = {row["id"] for row in store.db.execute("SELECT id FROM files")}
        known |= {row[name] for row in store.db.execute(f"SELECT * FROM batches WHERE {UNFINISHED}") for name in ("output_id", "error_id")}
        for path in self.folder.iterdir():
            if path.name not in known:
                path.unlink()

    def path(self, file_id: str) -> Path:
        """Where the bytes of a file are whose id comes from the database, or has just been made."""
        return self.folder / file_id

    def row(self, file_id: str, who: tuple[str, ...]) -> Row:
        """A file that belongs to `who`. Raises `RequestError`, with the same words for other people's files as for none."""
        found: Row | None = self.store.db.execute("SELECT * FROM files WHERE id = ? AND owner = ?", (file_id, owner(who))).fetchone()
        if found is None:
            raise RequestError(404, f"there is no file {file_id[:80]!r}", "GET /v1/files lists yours")
        return found

    def check_room(self, more: int = 0) -> None:
        """Raises `RequestError` where the server keeps so much already that `more` bytes are too many."""
        (held,) = self.store.db.execute(f"SELECT coalesce(sum(max(bytes, {LEAST_BYTES})), 0) FROM files").fetchone()
        if held + max(more, LEAST_BYTES) > self.config.max_stored_bytes:
            limit = f"the server's limit is {self.config.max_stored_bytes:,} (--max-stored-bytes)"
            raise RequestError(413, f"the server keeps {held:,} bytes of files; {limit}", "delete files that you do not need")

    def add(self, file_id: str, who: str, filename: str, purpose: str) -> None:
        """Make known a file whose bytes are in place. who: as of `owner`."""
        self.store.db.execute(
            "INSERT INTO files (id, owner, filename, purpose, bytes, created_at) VALUES (?, ?, ?, ?, ?, ?)",
            (file_id, who, filename, purpose, self.path(file_id).stat().st_size, int(time.time())),
        )

    async def upload(self, request: Request) -> Row:
        """Take in the one file of a form. Raises `RequestError` and `UsageError`."""
        check_origin(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "multipart/form-data":
            raise RequestError(
                415, f"content-type is {kind!r}; files come as multipart/form-data", "send the file as a form's field 'file'"
            )
        self.check_room()
        parser = MultiPartParser(request.headers, self._limited(request), max_files=1, max_fields=8, max_part_size=1024)
        try:
            form = await parser.parse()
        except _TooLarge:
            limit = f"{self.config.max_file_bytes:,} bytes, the limit"
            raise RequestError(413, f"the file is larger than {limit}", "send it in parts, or raise --max-file-bytes") from None
        except MultiPartException as error:
            raise RequestError(
                400, f"the form cannot be read: {error.message}", "send multipart/form-data with 'file' and 'purpose'"
            ) from None
        try:
            fields = [(name, value) for name, value in form.multi_items() if not isinstance(value, UploadFile)]
            file = form.get("file")
            _check_form(fields, file)
            assert isinstance(file, UploadFile)
            name, file_id = _checked_name(file.filename or ""), new_id("file-")
            try:
                self.check_room(file.size or 0)
                await to_thread(_keep, file.file, self.path(file_id))
                self.check_room(file.size or 0)  # others may have come in meanwhile
                self.add(file_id, owner(caller(request)), name, "batch")
            except BaseException:
                self.path(file_id).unlink(missing_ok=True)
                raise
            return self.row(file_id, caller(request))
        finally:
            await form.close()

    async def _limited(self, request: Request) -> AsyncGenerator[bytes, None]:
        size = 0
        async for piece in request.stream():
            size += len(piece)
            if size > self.config.max_file_bytes + FORM_BYTES:
                raise _TooLarge("too large")
            yield piece

    def delete(self, row: Row) -> None:
        """For good. Raises `RequestError` where a batch still reads it."""
        reader = self.store.db.execute(f"SELECT id FROM batches WHERE input_file_id = ? AND {UNFINISHED}", (row["id"],)).fetchone()
        if reader is not None:
            raise RequestError(400, f"{row['id']} is read by {reader['id']}", "wait for the batch, or cancel it")
        self.store.db.execute("DELETE FROM files WHERE id = ?", (row["id"],))
        self.path(row["id"]).unlink(missing_ok=True)


class _TooLarge(MultiPartException):
    pass


def _check_form(fields: list[tuple[str, Any]], file: Any) -> None:
    names = [name for name, _ in fields]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RequestError(400, f"the form has the field {twice[:80]!r} twice", "send it once")
    if not isinstance(file, UploadFile):
        raise RequestError(400, "the form has no file in its field 'file'", "send the file there, with a filename")
    try:
        FileForm.model_validate({name: value for name, value in fields if name != "file"})
    except ValidationError as error:
        raise usage_error(error) from None


def _checked_name(name: str) -> str:
    if not 0 < len(name) <= MOST_NAME or not name.isprintable():
        hint = f"give it 1 to {MOST_NAME} characters that can be printed"
        raise RequestError(400, f"the file is called {shown_value(name)}", hint)
    return name


def _keep(source: BinaryIO, path: Path) -> None:
    """Copy an upload to where it stays, and let the disk have it."""
    with path.open("xb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
        sync(file, path)


def sync(file: BinaryIO, path: Path) -> None:
    """Return when the disk has a file and its name."""
    file.flush()
    os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def file_object(row: Row) -> dict[str, Any]:
    """A file as OpenAI tells it."""
    told = {name: row[name] for name in ("id", "bytes", "created_at", "filename", "purpose")}
    return {**told, "object": "file", "status": "processed", "expires_at": None, "status_details": None}


def listed(store: Store, table: str, who: tuple[str, ...], page: Page, where: str = "", values: tuple[Any, ...] = ()) -> list[Row]:
    """The rows of a page and, where there are more, one too many. where: further conditions, each with AND before it."""
    order = getattr(page, "order", "desc")
    if page.after is not None:
        last = store.db.execute(f"SELECT place FROM {table} WHERE id = ? AND owner = ?", (page.after, owner(who))).fetchone()
        if last is None:
            raise RequestError(400, f"after is {shown_value(page.after)}, which is none of yours", "give the id of the last one of a list")
        where, values = f"{where} AND place {'<' if order == 'desc' else '>'} ?", (*values, last["place"])
    query = f"SELECT * FROM {table} WHERE owner = ?{where} ORDER BY place {order} LIMIT ?"
    return store.db.execute(query, (owner(who), *values, page.limit + 1)).fetchall()


def add_files(app: FastAPI, files: Files) -> None:
    """The routes."""

    @app.post("/v1/files")
    async def upload(request: Request) -> dict[str, Any]:
        return file_object(await files.upload(request))

    @app.get("/v1/files")
    async def list_files(request: Request) -> dict[str, Any]:
        page = read_query(request, FilePage)
        where, values = (" AND purpose = ?", (page.purpose,)) if page.purpose is not None else ("", ())
        rows = listed(files.store, "files", caller(request), page, where, values)
        return list_object([file_object(row) for row in rows], page.limit)

    @app.get("/v1/files/{file_id}")
    async def one_file(request: Request, file_id: str) -> dict[str, Any]:
        return file_object(files.row(file_id, caller(request)))

    @app.delete("/v1/files/{file_id}")
    async def delete_file(request: Request, file_id: str) -> dict[str, Any]:
        row = files.row(file_id, caller(request))
        files.delete(row)
        return {"id": row["id"], "object": "file", "deleted": True}

    @app.get("/v1/files/{file_id}/content")
    async def content(request: Request, file_id: str) -> FileResponse:
        """Never shown by a browser, or a page that was uploaded would speak for this server."""
        row = files.row(file_id, caller(request))
        headers = {"content-disposition": "attachment", "x-content-type-options": "nosniff"}
        return FileResponse(files.path(row["id"]), media_type="application/octet-stream", headers=headers)
