"""/v1/batches: files of requests that are answered while nobody waits.

Each line goes the way that a request over HTTP goes, through the very function of its route, with the identity of who made the batch; only
there is no connection, and the engine computes it after everybody else. Several are under way at once, those of several batches in turn.

A batch is a row, the file that it reads, and two files that grow (`lines.py`). The row says how far it is, the files which lines are done,
and that is all there is: a server that starts goes on with every batch that has not ended.

Source: `openai.types.batch`, `batch_create_params` of openai 3.54.
"""

import asyncio
import json
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from sqlite3 import Row
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import Field

from herd.errors import UsageError
from herd.log import log
from herd.serve.batches.files import UNFINISHED, Files, listed
from herd.serve.batches.lines import Line, Results, Scan, read_line, scan
from herd.serve.config import ServeConfig
from herd.serve.connection import caller, check_origin, read_body
from herd.serve.errors import RequestError, error_object, shown
from herd.serve.lists import Page, list_object, read_query
from herd.serve.store import owner
from herd.serve.wire import Wire, new_id, shown_value

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")  # those of them that the server has
WINDOW_S = 24 * 3600
MOST_UNFINISHED = 100  # batches of one server
PAUSES_S = (1, 5, 15, 60, 60, 60)  # between tries of a line while the server has no room or is not well
AGAIN_S = 30  # before a batch whose files cannot be read or written is tried again


class BatchBody(Wire):
    """The body of POST /v1/batches."""

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: Annotated[dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = (
        None
    )

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"output_expires_after": ()}


@dataclass(eq=False, slots=True)
class Job:
    """A batch that has not ended."""

    id: str
    results: Results
    task: "asyncio.Task[None] | None" = None
    total: int = 0


class Batches:
    """The batches of one server."""

    def __init__(self, app: FastAPI, files: Files, config: ServeConfig, is_healthy: Callable[[], bool]) -> None:
        self.files, self.store, self.config = files, files.store, config
        self._app, self._is_healthy = app, is_healthy
        self._jobs: dict[str, Job] = {}
        self._places = asyncio.Semaphore(config.batch_width)  # handed out in the order in which batches ask
        self._is_stopping = False

    @property
    def routes(self) -> dict[str, Callable[[Request], Any]]:
        """What answers a line, by endpoint."""
        return {route.path: route.endpoint for route in self._app.routes if isinstance(route, APIRoute) and route.path in ENDPOINTS}

    def start(self) -> None:
        """Go on with all that have not ended."""
        for row in self.store.db.execute(f"SELECT * FROM batches WHERE {UNFINISHED} ORDER BY place").fetchall():
            self._begin(row)

    async def stop(self) -> None:
        """Let go of all lines under way; they are asked again when the server is there again."""
        self._is_stopping = True
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def create(self, body: BatchBody, who: tuple[str, ...]) -> Row:
        """A new one, which begins at once. Raises `UsageError`."""
        if body.endpoint not in self.routes:
            hint = f"there are: {', '.join(self.routes)}"
            raise UsageError(f"endpoint is {shown_value(body.endpoint)}, which no batch may ask", hint, param="endpoint")
        file = self.files.row(body.input_file_id, who)
        if file["purpose"] != "batch":
            raise UsageError(f"the purpose of {file['id']} is {file['purpose']!r}", "upload it with 'batch'", param="input_file_id")
        self.files.check_room()
        if len(self._jobs) >= MOST_UNFINISHED:
            raise RequestError(429, f"{MOST_UNFINISHED} batches have not ended, the limit", "wait for some, or cancel them")
        now, batch_id = int(time.time()), new_id("batch_")
        told = {
            "id": batch_id,
            "object": "batch",
            "endpoint": body.endpoint,
            "input_file_id": file["id"],
            "completion_window": body.completion_window,
            "status": "validating",
            "created_at": now,
            "expires_at": now + WINDOW_S,
            "metadata": body.metadata,
            **dict.fromkeys(("errors", "output_file_id", "error_file_id", "in_progress_at", "finalizing_at", "completed_at")),
            **dict.fromkeys(("failed_at", "expired_at", "cancelling_at", "cancelled_at")),
            **_progress(0, [0, 0], {"input": 0, "cached": 0, "output": 0}),
        }
        self.store.db.execute(
            "INSERT INTO batches (id, owner, status, input_file_id, output_id, error_id, told) VALUES (?, ?, 'validating', ?, ?, ?, ?)",
            (batch_id, owner(who), file["id"], *(new_id("file-") for _ in range(2)), json.dumps(told)),
        )
        row = self.row(batch_id, who)
        self._begin(row)
        return row

    def row(self, batch_id: str, who: tuple[str, ...]) -> Row:
        """A batch that belongs to `who`. Raises `RequestError`, with the same words for other people's as for none."""
        found: Row | None = self.store.db.execute("SELECT * FROM batches WHERE id = ? AND owner = ?", (batch_id, owner(who))).fetchone()
        if found is None:
            raise RequestError(404, f"there is no batch {batch_id[:80]!r}", "GET /v1/batches lists yours")
        return found

    def told(self, row: Row) -> dict[str, Any]:
        """A batch as its owner sees it, at this moment."""
        told: dict[str, Any] = json.loads(row["told"])
        job = self._jobs.get(row["id"])
        return told if job is None else {**told, **_progress(job.total, job.results.counts, job.results.usage)}

    def cancel(self, row: Row) -> None:
        """End it: lines under way are let go. Raises `RequestError` for one that has ended or is about to."""
        if row["status"] == "cancelling":
            return
        if row["status"] not in ("validating", "in_progress"):
            raise RequestError(400, f"{row['id']} is {row['status']}", "only a batch that is validating or in_progress can be cancelled")
        self._set(row["id"], "cancelling")
        task = self._jobs[row["id"]].task
        assert task is not None
        task.cancel()

    def _begin(self, row: Row) -> None:
        job = Job(row["id"], Results(row["id"], self.files.path(row["output_id"]), self.files.path(row["error_id"])))
        job.total = json.loads(row["told"])["request_counts"]["total"]
        self._jobs[job.id] = job
        job.task = asyncio.create_task(self._run(job))

    def _set(self, batch_id: str, status: str, **more: Any) -> None:
        """Take note that it has come to `status` just now."""
        told = json.loads(self._row_of(batch_id)["told"]) | {"status": status, f"{status}_at": int(time.time()), **more}
        self.store.db.execute("UPDATE batches SET status = ?, told = ? WHERE id = ?", (status, json.dumps(told), batch_id))

    def _row_of(self, batch_id: str) -> Row:
        row: Row = self.store.db.execute("SELECT * FROM batches WHERE id = ?", (batch_id,)).fetchone()
        return row

    async def _run(self, job: Job) -> None:
        """To its end, whatever comes between, but the end of the server."""
        pause_s = 0
        while job.id in self._jobs:
            try:
                await asyncio.sleep(pause_s)
                pause_s = 0
                await self._go_on(job)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if self._is_stopping or task is None:
                    raise
                task.uncancel()  # its row says so, and the next round ends it
            except Exception as error:
                log.error("batch %s cannot go on, and is tried again in %d s", job.id, AGAIN_S, exc_info=error)
                pause_s = AGAIN_S

    async def _go_on(self, job: Job) -> None:
        row = self._row_of(job.id)
        path, is_new = self.files.path(row["input_file_id"]), row["status"] == "validating"
        limits = (self.config.max_batch_lines, self.config.max_body_bytes) if is_new else (sys.maxsize, path.stat().st_size)
        found = await asyncio.to_thread(scan, path, json.loads(row["told"])["endpoint"], *limits)
        await asyncio.to_thread(job.results.read)
        if row["status"] == "cancelling":
            await self._end(job, row, found, "cancelled")
        elif found.errors:
            self._set(job.id, "failed", errors={"object": "list", "data": found.errors})
            del self._jobs[job.id]
        else:
            job.total = len(found.numbers)
            if is_new:
                self._set(job.id, "in_progress", **_progress(job.total, [0, 0], job.results.usage))
            await self._finish(job, row, found)

    async def _finish(self, job: Job, row: Row, found: Scan) -> None:
        """Ask what has not been asked, until all is answered or the time is over."""
        try:
            async with (
                asyncio.timeout(max(0.0, json.loads(row["told"])["expires_at"] - time.time())) as window,
                asyncio.TaskGroup() as group,
            ):
                for number, offset in zip(found.numbers, found.offsets, strict=True):
                    if number not in job.results.done:
                        await self._places.acquire()
                        # not in the task: one that is cancelled before it begins runs none of its code
                        group.create_task(self._line(job, row, number, offset)).add_done_callback(lambda _: self._places.release())
        except TimeoutError:
            if not window.expired():
                raise
            await self._end(job, row, found, "expired")
            return
        self._set(job.id, "finalizing")
        await self._end(job, row, found, "completed")

    async def _line(self, job: Job, row: Row, number: int, offset: int) -> None:
        line = await asyncio.to_thread(read_line, self.files.path(row["input_file_id"]), offset)
        who, request_id = tuple(json.loads(row["owner"])), uuid.uuid4().hex
        pauses = iter(PAUSES_S)
        while True:
            status, body = await self._answer(line, who, request_id)
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # what it got is why it was let go, and no answer
                raise asyncio.CancelledError
            if status >= 500 and not self._is_healthy():
                while not self._is_healthy():  # until somebody starts the server anew
                    await asyncio.sleep(1)
                continue
            pause_s = next(pauses, None) if status in (429, 503) else None
            if pause_s is None:
                break
            await asyncio.sleep(pause_s)
        response = {"status_code": status, "request_id": request_id, "body": body}
        job.results.add([job.results.entry(number, line.custom_id, response, None)], are_errors=status >= 400)

    async def _answer(self, line: Line, who: tuple[str, ...], request_id: str) -> tuple[int, Any]:
        """Status and body of the reply, as HTTP would bring them."""
        try:
            if line.body.get("stream") is True:
                raise UsageError("stream is true, and a batch has nobody to stream to", "leave stream out", param="stream")
            reply = await self.routes[line.url](_request(self._app, line, who, request_id))
            response = reply if isinstance(reply, Response) else JSONResponse(reply)
            return response.status_code, json.loads(bytes(response.body))
        except Exception as error:
            found = shown(error, request_id)
            return found.http_status, error_object(found)

    async def _end(self, job: Job, row: Row, found: Scan, status: str) -> None:
        """Hand over the files. Lines that were not answered are told as errors, so that each is in one of the files."""
        results = job.results
        if status != "completed" and not found.errors:
            error = {"code": f"batch_{status}", "message": f"the batch was {status} before this request was answered"}
            left = [(number, offset) for number, offset in zip(found.numbers, found.offsets, strict=True) if number not in results.done]
            path = self.files.path(row["input_file_id"])

            def tell() -> None:
                for start in range(0, len(left), 1000):
                    lines = [(number, read_line(path, offset).custom_id) for number, offset in left[start : start + 1000]]
                    results.add([results.entry(number, custom_id, None, error) for number, custom_id in lines], are_errors=True)

            await asyncio.to_thread(tell)
        ids = [row[name] if count else None for name, count in zip(("output_id", "error_id"), results.counts, strict=True)]
        with self.store.together():
            for file_id, kind in zip(ids, ("output", "error"), strict=True):
                if file_id is not None:
                    self.files.add(file_id, row["owner"], f"{job.id}_{kind}.jsonl", "batch_output")
            told = _progress(job.total, results.counts, results.usage)
            self._set(job.id, status, output_file_id=ids[0], error_file_id=ids[1], **told)
        del self._jobs[job.id]


def _request(app: FastAPI, line: Line, who: tuple[str, ...], request_id: str) -> Request:
    """A line as the request that its route knows, from a client that never goes away."""
    unread = [json.dumps(line.body, ensure_ascii=False).encode()]

    async def receive() -> dict[str, Any]:
        if not unread:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": unread.pop(), "more_body": False}

    scope = {
        "type": "http",
        "app": app,
        "method": "POST",
        "path": line.url,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "state": {"caller": who, "request_id": request_id, "background": True},
    }
    return Request(scope, receive)


def _progress(total: int, counts: list[int], usage: Mapping[str, int]) -> dict[str, Any]:
    """The fields of a batch that change with every line. counts: replies, errors."""
    used = {
        "input_tokens": usage["input"],
        "input_tokens_details": {"cached_tokens": usage["cached"]},
        "output_tokens": usage["output"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["input"] + usage["output"],
    }
    return {"request_counts": {"total": total, "completed": counts[0], "failed": counts[1]}, "usage": used}


def add_batches(app: FastAPI, batches: Batches, config: ServeConfig) -> None:
    """The routes."""

    @app.post("/v1/batches")
    async def create(request: Request) -> dict[str, Any]:
        body = await read_body(request, BatchBody, config.max_body_bytes)
        return batches.told(batches.create(body, caller(request)))

    @app.get("/v1/batches")
    async def list_batches(request: Request) -> dict[str, Any]:
        page = read_query(request, Page)
        rows = listed(batches.store, "batches", caller(request), page)
        return list_object([batches.told(row) for row in rows], page.limit)

    @app.get("/v1/batches/{batch_id}")
    async def one_batch(request: Request, batch_id: str) -> dict[str, Any]:
        return batches.told(batches.row(batch_id, caller(request)))

    @app.post("/v1/batches/{batch_id}/cancel")
    async def cancel(request: Request, batch_id: str) -> dict[str, Any]:
        check_origin(request)
        batches.cancel(batches.row(batch_id, caller(request)))
        return batches.told(batches.row(batch_id, caller(request)))
