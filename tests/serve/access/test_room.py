"""A server that has enough to do says so at once, answers probes, and loses nothing."""

import asyncio
import threading

import httpx2
import openai
import pytest

from herd.errors import BusyError
from herd.serve.access.room import Room
from herd.serve.config import ServeConfig
from tests.serve.echo import Echo, Script, words


def test_places_come_back():
    now = 0.0
    room = Room(2, clock=lambda: now)
    with room.place(), room.place():
        now = 80.0
        with pytest.raises(BusyError, match="busy with 2 requests, its limit") as caught, room.place():
            pass
        assert caught.value.retry_after_s == 1.0
    with pytest.raises(ZeroDivisionError), room.place():
        1 / 0  # noqa: B018
    assert room.taken == 0
    with room.place(), room.place(), pytest.raises(BusyError) as caught, room.place():
        pass
    assert 10 < caught.value.retry_after_s <= 60  # requests took long


def test_a_full_server_says_so_at_once(serve):
    held = Script([60.0])
    served = serve(held, ServeConfig(port=0, max_requests=1, drain_s=1))
    thread = threading.Thread(target=lambda: served.chat(stream=True))
    thread.start()
    assert held.started.wait(5)
    for path in ("/v1/chat/completions", "/v1/messages"):
        reply = served.http.post(path, content=b"not even read")
        assert (reply.status_code, reply.headers["retry-after"], reply.headers["x-should-retry"]) == (503, "1", "true")
    assert reply.json()["error"]["type"] == "overloaded_error"
    for path in ("/health", "/ready", "/metrics", "/v1/models", "/"):
        assert served.http.get(path).status_code == 200
    served.server.should_exit = True
    thread.join(10)


def test_many_at_once_lose_nothing(serve):
    """Sixty clients for eight places; who is refused asks again, and in the end each has his own reply."""
    served = serve(Echo(word_s=0.01), ServeConfig(port=0, max_requests=8, drain_s=1))

    async def ask(http: httpx2.AsyncClient, i: int) -> int:
        body = {"model": "echo", "messages": [{"role": "user", "content": f"{i} and {i}"}]}
        for refusals in range(1000):
            reply = await http.post("/v1/chat/completions", json=body)
            if reply.status_code == 200:
                assert reply.json()["choices"][0]["message"]["content"] == f"{i} and {i}"
                return refusals
            assert reply.status_code == 503 and reply.json()["error"]["code"] == "server_busy"
            await asyncio.sleep(0.1)
        raise AssertionError("never answered")

    async def run() -> list[int]:
        async with httpx2.AsyncClient(base_url=served.url, timeout=30, limits=httpx2.Limits(max_connections=60)) as http:
            return await asyncio.gather(*(ask(http, i) for i in range(60)))

    assert sum(asyncio.run(run())) > 0
    assert served.chat().status_code == 200


def test_openais_client_asks_again(serve):
    held = Script([0.3, *words("done")])
    served = serve(held, ServeConfig(port=0, max_requests=1, drain_s=1))
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=2) as client:
        thread = threading.Thread(target=served.chat)
        thread.start()
        assert held.started.wait(5)
        reply = client.chat.completions.with_raw_response.create(model="echo", messages=[{"role": "user", "content": "x"}])
        assert reply.retries_taken == 1 and reply.parse().choices[0].message.content == "done"
        thread.join()
