"""One scope for every reply: what happens in it when the work ends, fails, or has nobody left to work for."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from herd.errors import ResourceError
from herd.serve.choices import Told, side_by_side
from herd.serve.config import ServeConfig
from herd.serve.connection import while_connected
from herd.serve.errors import ReplyTooLate
from herd.serve.metrics import Metrics
from herd.serve.replies import chunks
from herd.serve.sse import EventStream
from tests.serve.echo import Script, words
from tests.serve.loops import alone, goes

REPLY = {"id": "chatcmpl-1", "created": 1, "model": "echo"}


async def stays() -> dict[str, str]:
    await asyncio.sleep(60)
    return {"type": "http.disconnect"}


class Work:
    """Something long whose clean-up takes a moment."""

    is_clean = False

    async def run(self) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            self.is_clean = True


def test_result_and_failure_pass_through():
    async def run() -> None:
        assert await while_connected(stays, asyncio.sleep(0, "result")) == "result"
        with pytest.raises(ZeroDivisionError):
            await while_connected(stays, divide())

    async def divide() -> float:
        return 1 / 0

    alone(run())


def test_client_goes_away():
    async def run() -> None:
        work = Work()
        with pytest.raises(ClientDisconnect):
            await while_connected(goes, work.run())
        assert work.is_clean

    alone(run())


def test_time_is_over():
    async def run() -> None:
        work = Work()
        with pytest.raises(ReplyTooLate, match=r"longer than 0.05 s"):
            await while_connected(stays, work.run(), 0.05)
        assert work.is_clean

    alone(run())


def test_server_stops():
    async def run() -> None:
        work = Work()
        request = asyncio.create_task(while_connected(stays, work.run()))
        await asyncio.sleep(0.05)
        request.cancel()
        with pytest.raises(ResourceError, match="the server is stopping"):
            await request
        assert work.is_clean

    alone(run())


def lines(backends: list[Script], *, with_usage: bool) -> AsyncGenerator[bytes, None]:
    told = Told("echo", Metrics(dict))
    replies = told.read(side_by_side([backend.chat(None) for backend in backends]))
    return chunks(replies, REPLY, told, count=len(backends), with_usage=with_usage, with_timings=False)


@pytest.mark.parametrize("count", [1, 3])
def test_client_goes_away_while_a_line_is_written(count: int):
    """The backend is not at work then, and is still closed, by the task that read from it."""

    async def run() -> None:
        backends = [Script([*words(*["one"] * 50)]) for _ in range(count)]

        async def stuck(_: object) -> None:
            await asyncio.sleep(60)

        with pytest.raises(ClientDisconnect):
            await EventStream(lines(backends, with_usage=False), ServeConfig())({}, goes, stuck)
        assert all(backend.closed.is_set() for backend in backends)

    alone(run())


def test_a_failure_that_nobody_reads_holds_nobody_up():
    async def run() -> None:
        backend = Script([*words("one")[:1], 0.05, ResourceError("the disk is gone")])
        sent: list[bytes] = []

        async def full(message: dict[str, Any]) -> None:
            sent.append(message.get("body", b""))
            if b"the disk is gone" in sent[-1]:
                await asyncio.sleep(60)

        scope = {"path": "", "state": {"request_id": "1"}}
        with pytest.raises(ClientDisconnect):
            await EventStream(lines([backend], with_usage=False), ServeConfig(ping_s=0.1))(scope, stays, full)
        assert b"the disk is gone" in sent[-1]

    alone(run())


def test_stream_leaves_nothing_behind():
    async def run() -> None:
        sent: list[dict[str, object]] = []

        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        await EventStream(lines([Script(words("one"))], with_usage=True), ServeConfig())({}, stays, send)
        assert [message["type"] for message in sent] == ["http.response.start"] + ["http.response.body"] * 6
        assert [message["more_body"] for message in sent[1:]] == [True] * 5 + [False]

    alone(run())
