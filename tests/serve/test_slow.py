"""Clients that are slow or do nothing: others are served meanwhile, and what is held for them is bounded.

IDLE says how many idle connections there are; `IDLE=1000 pytest tests/serve/test_slow.py` is the larger form.
"""

import json
import os
import resource
import socket
import time
from contextlib import ExitStack

import pytest

from herd.engine.local import Local, load
from herd.serve.config import ServeConfig
from tests.clock import until
from tests.engine.made import is_clean
from tests.serve.conftest import Live, live

IDLE = int(os.environ.get("IDLE", "200"))
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
NORMAL_S = 2.0  # within which a server that computes nothing answers, on a busy machine


class Links:
    """Connections to a server."""

    def __init__(self, served: Live) -> None:
        self.served, self.stack = served, ExitStack()

    def __enter__(self) -> "Links":
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def one(self, sent: bytes = b"", room: int = 0) -> socket.socket:
        """A new one. room: bytes that its reader has for what it does not read."""
        link = self.stack.enter_context(socket.socket())
        if room:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        link.connect(("127.0.0.1", int(self.served.url.rpartition(":")[2])))
        link.sendall(sent)
        return link


def request(**body: object) -> bytes:
    data = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **body}).encode()
    return HEAD.format(len(data)).encode() + data


def answers(served: Live) -> float:
    """Seconds that a short reply takes, the longest of three."""
    took = []
    for _ in range(3):
        begun = time.perf_counter()
        assert served.chat("one two").json()["choices"][0]["message"]["content"] == "one two"
        took.append(time.perf_counter() - begun)
    return max(took)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat/comp", request()[:-9]], ids=["silent", "half a head", "half a body"])
def test_many_that_do_nothing(served: Live, sent: bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2 * IDLE + 500)), hard))
    try:
        with Links(served) as links:
            for _ in range(IDLE):
                links.one(sent)
            assert answers(served) < NORMAL_S
        assert until(lambda: not served.server.server_state.connections or len(served.server.server_state.connections) < 3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_readers_that_stop_hold_no_page_and_nobody_up():
    """A reply that nobody reads is computed to its end: its pages are free for others, and what waits is bounded by the reply's length."""
    model = load("tiny", device="cpu", context_tokens=512, max_sequences=4)
    with live(Local([model]), ServeConfig(port=0, drain_s=1)) as served, Links(served) as links:
        [listener] = served.server.servers[0].sockets
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # which connections inherit: the kernel takes little on either side
        for _ in range(5):
            links.one(request(stream=True, max_tokens=80, ignore_eos=True, logprobs=True, top_logprobs=20), room=1)
        engine = model.thread.engine
        assert until(lambda: engine.stats().generated_tokens > 0)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        assert served.http.post("/v1/chat/completions", json=body, timeout=60).status_code == 200
        assert until(lambda: engine.scheduler.is_idle and is_clean(engine))
        assert "herd_http_requests_in_flight 6.0" in served.http.get("/metrics").text  # this one, and five that are not written out
        links.stack.close()
        assert until(lambda: "herd_http_requests_in_flight 1.0" in served.http.get("/metrics").text)
    assert model.unload()
