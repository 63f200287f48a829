"""A real server on a free port of this machine, in a thread, for the length of a test."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
import pytest

from herd.chat import Backend
from herd.engine.local import Local, Model
from herd.serve.app import Server, bind, make_app
from herd.serve.config import ServeConfig
from herd.serve.fetch import Fetcher
from tests.processes import Fork
from tests.serve.echo import Echo


@dataclass(frozen=True)
class Live:
    """A server under test and a client of it."""

    url: str
    http: httpx2.Client
    server: Server

    def chat(self, content: object = "hello there", **fields: object) -> httpx2.Response:
        """POST a chat completion of one user message; `fields` are added to the body, or stand in for what is there."""
        body = {"model": "echo", "messages": [{"role": "user", "content": content}], **fields}
        return self.http.post("/v1/chat/completions", json=body)


class Attentive(Server):
    """herd's server, which looks every few milliseconds whether it shall stop; uvicorn does every tenth of a second, which adds up."""

    async def main_loop(self) -> None:
        await self.on_tick(0)
        while not self.should_exit:
            await asyncio.sleep(0.005)


def client_of(served: Live | Fork, key: str = "none") -> openai.OpenAI:
    """OpenAI's, which asks once."""
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def refusal(reply: httpx2.Response) -> dict[str, Any]:
    """The error of a reply that must be a 400."""
    assert reply.status_code == 400, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    return error


@contextmanager
def live(
    backend: Backend,
    config: ServeConfig | None = None,
    is_healthy: Callable[[], bool] = lambda: True,
    states: Callable[[], Mapping[str, str]] = dict,
    stats: Callable[[], Mapping[str, Any]] = dict,
    fetcher: Fetcher | None = None,
) -> Iterator[Live]:
    config = config or ServeConfig(port=0, drain_s=1)
    listener = bind(config)
    urls: list[str] = []
    ready = threading.Event()
    app = make_app(backend, config, is_healthy=is_healthy, states=states, stats=stats, fetcher=fetcher)
    server = Attentive(app, config, lambda url: (urls.append(url), ready.set()))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    assert ready.wait(10), "the server did not start"
    try:
        with httpx2.Client(base_url=urls[0], timeout=10) as http:
            yield Live(urls[0], http, server)
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture
def serve() -> Iterator[Callable[..., Live]]:
    """Start a server over a backend; it stops with the test."""
    with ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(live(*args, **kwargs))


@pytest.fixture(scope="module")
def echo() -> Echo:
    return Echo("echo", "second-model")


@pytest.fixture(scope="module")
def served(echo: Echo) -> Iterator[Live]:
    """A server over `echo`, one for all tests of a file."""
    with live(echo, ServeConfig(port=0, max_body_bytes=100_000)) as running:
        yield running


@pytest.fixture(scope="module")
def engine(tiny: Model) -> Iterator[Live]:
    """A server over the tiny model, one for all tests of a file."""
    with live(Local([tiny])) as running:
        yield running


@pytest.fixture(scope="module")
def tiny_client(engine: Live) -> Iterator[openai.OpenAI]:
    with client_of(engine) as client:
        yield client
