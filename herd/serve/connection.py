"""One request's connection: its id, its body, and its end.

Whoever waits for a reply may go away, and what computes that reply must then stop: a sequence that nobody reads holds pages and steps
that others need. Streamed or not, every reply is computed inside `while_connected`, which is the one place that knows.
"""

import asyncio
import re
import time
import uuid
from collections.abc import Coroutine
from contextlib import nullcontext
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from herd.errors import ResourceError
from herd.log import log
from herd.serve.access.limits import Meter
from herd.serve.access.room import Room
from herd.serve.errors import ReplyTooLate, RequestError, error_reply, shown
from herd.serve.metrics import Metrics
from herd.serve.wire import usage_error

T = TypeVar("T")
Form = TypeVar("Form", bound=BaseModel)

_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class Door:
    """The outermost layer of the app: every reply carries an `x-request-id` and is counted, and every failure becomes a reply.

    The client's own id is kept if it is short and plain, since it goes into the log. Routes find it at `request.state.request_id`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, room: Room) -> None:
        self.app, self.metrics, self.room = app, metrics, room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = sent if _SANE_ID.fullmatch(sent) else uuid.uuid4().hex.encode()
        state = scope.setdefault("state", {})
        state["request_id"] = request_id.decode()
        status, begun = "gone", time.perf_counter()

        async def signed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
                limits = state["meter"].headers() if state.get("meter") else {}
                more = [(name.encode(), value.encode()) for name, value in limits.items()]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id), *more]
            await send(message)

        self.metrics.in_flight.inc()
        try:
            # only what is posted is work; probes, metrics and the page answer however much there is
            with self.room.place() if scope["method"] == "POST" else nullcontext():
                await self.app(scope, receive, signed)
        except ClientDisconnect:
            status = "gone"
            log.info("request %s: the client went away", request_id.decode())
        except Exception as error:
            if status != "gone":  # too late for words: let the HTTP server break off the connection
                raise
            await error_reply(shown(error, request_id.decode()), scope["path"])(scope, receive, signed)
        finally:
            if state.get("meter"):
                state["meter"].close()
            self.metrics.in_flight.dec()
            self.metrics.finished(scope, status, time.perf_counter() - begun)


def caller(request: Request) -> tuple[str, ...]:
    """Whose request it is, as words that keep callers' prefixes apart; none where the server asks for no key."""
    found: tuple[str, ...] = getattr(request.state, "caller", ())
    return found


def is_background(request: Request) -> bool:
    """Whether nobody waits for the reply: it comes from a batch."""
    return getattr(request.state, "background", False)


def check_origin(request: Request) -> None:
    """Raises `RequestError` when a page of another site sends it. For routes whose requests are such that a browser lets any page send
    them to a server on its user's own machine without asking that server first: forms, and posts without a body. Browsers name the page's
    origin in every such request; other clients name none. Those of --allow-origin may.
    """
    origin, allowed = request.headers.get("origin"), request.app.state.config.allow_origin
    is_foreign = origin is not None and origin.partition("://")[2] != request.headers.get("host")
    if is_foreign and origin not in allowed and "*" not in allowed:
        hint = "send it from a program or from this server's own page, or let that origin in with --allow-origin"
        raise RequestError(403, f"a page of {origin or '':.100} may not send this", hint)


def meter(request: Request) -> Meter | None:
    """What the request uses up of its caller's limits; None where there are none."""
    found: Meter | None = getattr(request.state, "meter", None)
    return found


async def read_body(request: Request, form: type[Form], max_bytes: int) -> Form:
    """The body as `form`. Raises `RequestError` when it is too large or not sent as JSON, `UsageError` when it does not fit the form,
    `RateLimited` when its caller has used up his tokens.

    The limit holds for the bytes that arrive, whatever was announced. Only `application/json` is read: a browser lets any web page post
    other types to a server on its user's own machine, but asks that server first for this one.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(415, f"content-type is {kind!r}; herd reads application/json", "send the header content-type: application/json")
    body, limit_s = bytearray(), request.app.state.config.body_s
    try:
        async with asyncio.timeout(limit_s):
            async for piece in request.stream():
                body += piece
                if len(body) > max_bytes:
                    problem = f"the body is larger than {max_bytes:,} bytes, the limit"
                    raise RequestError(413, problem, "send less, or raise --max-body-bytes")
    except TimeoutError:
        raise RequestError(408, f"the body did not come within {limit_s:g} s", "send it faster, or raise --body-s") from None
    try:
        found = form.model_validate_json(body)
    except ValidationError as error:
        raise usage_error(error) from None
    if limited := meter(request):
        limited.reserve(found)
    return found


async def reply_to(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await a reply that is not streamed. Raises as `while_connected` does."""
    return await while_connected(request.receive, work, None if is_background(request) else request.app.state.config.reply_s)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T], limit_s: float | None = None) -> T:
    """Await `work` in one task of its own; when the client goes away, the server stops or `limit_s` seconds are over, cancel it and wait
    until it has cleaned up.

    Raises `ClientDisconnect`, `ReplyTooLate`, or `ResourceError` when the server stops. The task is cancelled once, as plain asyncio does
    it; a scope of anyio would go on to cancel every await of the clean-up too.
    """
    task, watch = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if watch.done():
            raise ClientDisconnect
        raise ReplyTooLate(f"the reply took longer than {limit_s:g} s, the limit", "ask for less, or raise --reply-s")
    except asyncio.CancelledError:
        raise ResourceError("the server is stopping", "send the request again") from None
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.wait((task, watch))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
