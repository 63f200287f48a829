"""Whatever is sent: no reply is the server's failure, errors have their form, nothing stays behind, and the server answers as before.

FUZZ_N says how many bodies; `make fuzz` sends 100,000 to the app in this process and 5,000 to a real server with the tiny model, and the
suite a few hundred to each. A body has a number: `Bodies(...).case(number)` makes it again.
"""

import asyncio
import gc
import json
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from herd.chat import ChatEvent, ChatRequest, Done, Embedding, Text, TextRequest, Tokenized, Usage
from herd.engine.local import Local, load
from herd.serve.app import make_app
from herd.serve.config import ServeConfig
from tests.clock import until
from tests.engine.made import is_clean
from tests.serve.bodies import Bodies, forms
from tests.serve.conftest import live
from tests.serve.echo import Echo

NUMBER = int(os.environ.get("FUZZ_N", "400"))
LIMIT_S = 20.0  # of one request
LEAKS = ("Traceback", 'File "', "/herd/", "site-packages", "pydantic", "object at 0x")


class Parrot(Echo):
    """Echo with texts, and without a memory."""

    async def chat(self, request: ChatRequest) -> AsyncIterator[ChatEvent]:
        self.requests.clear()
        async for event in super().chat(request):
            yield event

    async def complete(self, request: TextRequest) -> AsyncIterator[ChatEvent]:
        yield Text(text="more")
        yield Done(reason="stop", usage=Usage(prompt_tokens=len(request.prompt), completion_tokens=1))

    async def tokenize(self, request: ChatRequest | TextRequest) -> Tokenized:
        return Tokenized(tokens=(1, 2), pieces=(b"a", b"\xff"), context_tokens=9)

    async def detokenize(self, model: str, tokens: tuple[int, ...]) -> str:
        return "text"

    def context_tokens(self, model: str) -> int | None:
        return 9

    async def embed(self, request: TextRequest) -> Embedding:
        return Embedding(vector=(0.6, 0.8), num_tokens=2)


def check(method: str, path: str, status: int, kind: str, body: bytes) -> None:
    """A reply is one, or an error in its form."""
    assert status < 500, body[:500]
    if method == "HEAD" or status == 204 or path.startswith(("/metrics", "/web", "/?")):
        return
    text = body.decode()  # UTF-8 that can be read
    if kind.startswith("text/event-stream"):
        assert text.endswith(("data: [DONE]\n\n", 'data: {"type":"message_stop"}\n\n')) or '"error"' in text, text[-300:]
        found = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    elif kind.startswith("application/json"):
        found = [json.loads(text)]
    else:
        return
    for error in [one["error"] for one in found if one.get("error")] if status == 200 else [found[0]["error"]]:
        is_anthropic = path.startswith("/v1/messages")
        assert error.keys() == ({"type", "message"} if is_anthropic else {"message", "type", "param", "code"})
        assert error["message"] and error["type"] and not any(leak in error["message"] for leak in LEAKS), error
        assert status == 200 or not is_anthropic or found[0]["type"] == "error"


@contextmanager
def said(number: int, case: tuple[Any, ...]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sys.stderr.write(f"\nbody {number}: {case[:3]} {case[3][:2000]!r}\n")
        raise


async def ask(app: FastAPI, case: tuple[str, str, list[tuple[bytes, bytes]], bytes]) -> tuple[int, str, bytes]:
    """What the app replies, without a network."""
    method, target, headers, data = case
    path, _, query = target.partition("?")
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
    }
    scope |= {"headers": headers, "scheme": "http", "server": ("x", 80), "client": ("x", 1), "root_path": "", "asgi": {"version": "3.0"}}
    pieces = [data[: len(data) // 2], data[len(data) // 2 :]]
    told: list[dict[str, Any]] = []
    stays = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
        await stays.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        told.append(message)

    await asyncio.wait_for(app(scope, receive, send), LIMIT_S)
    headers_back = dict(told[0]["headers"])
    assert b"x-request-id" in headers_back and not told[-1].get("more_body")
    return told[0]["status"], headers_back.get(b"content-type", b"").decode(), b"".join(one.get("body", b"") for one in told[1:])


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.filterwarnings("ignore")  # of what is in the bodies
def test_app():
    app = make_app(Parrot("echo"), ServeConfig(port=0))
    bodies = Bodies(forms(make_app(Parrot("echo"), ServeConfig(port=0))), "echo")
    statuses: Counter[int] = Counter()
    marks: list[tuple[int, int]] = []

    async def run() -> None:
        begun = time.monotonic()
        for number in range(NUMBER):
            case = bodies.case(number)
            with said(number, case):
                status, kind, body = await ask(app, case)
                check(case[0], case[1], status, kind, body)
            statuses[status] += 1
            if number % max(1, NUMBER // 20) == 0:
                gc.collect()
                marks.append((len(gc.get_objects()), resident()))
                if NUMBER > 10_000:
                    told = f"{number} bodies, {time.monotonic() - begun:.0f} s, {marks[-1][0]} objects, {marks[-1][1] >> 20} MiB"
                    sys.stderr.write(f"{told} {dict(statuses)}\n")
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
    assert statuses[200] > NUMBER / 20 and statuses[400] > NUMBER / 4, f"bodies are all wrong or all right: {statuses}"
    warm, last = marks[len(marks) // 2], marks[-1]
    assert last[0] < warm[0] * 1.001 + 200, f"objects stay: {marks}"
    if NUMBER > 10_000:
        assert last[1] < warm[1] * 1.02 + (4 << 20), f"memory stays: {marks}"


@pytest.mark.filterwarnings("ignore")
def test_engine():
    model = load("tiny", device="cpu", context_tokens=96)
    bodies = Bodies(forms(make_app(Local([model]), ServeConfig(port=0))), "tiny")
    greedy = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 12}
    statuses: Counter[int] = Counter()
    with live(Local([model]), ServeConfig(port=0, drain_s=1)) as served:

        def reply() -> str:
            return served.http.post("/v1/chat/completions", json=greedy).json()["choices"][0]["message"]["content"]

        before = reply()
        for number in range(1_000_000, 1_000_000 + max(NUMBER // 20, min(NUMBER, 200))):
            method, path, headers, data = case = bodies.case(number)
            with said(number, case):
                told = served.http.request(method, path, headers=headers, content=data, timeout=LIMIT_S)
                check(method, path, told.status_code, told.headers.get("content-type", ""), told.content)
                statuses[told.status_code] += 1
            if number % 500 == 0:
                assert reply() == before
        assert reply() == before
        engine = model.thread.engine
        assert until(lambda: engine.scheduler.is_idle and is_clean(engine)) and statuses[200] > 10, statuses
    assert model.unload()
