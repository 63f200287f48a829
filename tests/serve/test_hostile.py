"""What strangers try: slow connections, many of them, other people's web pages, odd bytes, and whether secrets get into the log."""

import io
import json
import logging
import resource
import socket
import time
from contextlib import ExitStack, suppress

import pytest

from herd import log as herd_log
from herd.chat import Text
from herd.errors import HerdError, ResourceError
from herd.serve import protocol
from herd.serve.config import ServeConfig
from tests.serve.conftest import Live
from tests.serve.echo import Echo, Script, words

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n"
SECRET = "the prompt that nobody may read"


def connected(served: Live) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=5)


def ended(connection: socket.socket) -> bool:
    """Whether a reply of /health has come."""
    read = b""
    while not read.endswith(b"}"):
        read += connection.recv(4096)
    return read.startswith(b"HTTP/1.1 200 OK")


def test_a_head_that_does_not_come(serve, monkeypatch: pytest.MonkeyPatch):
    """From the first request of a connection, from a second, and with nothing sent at all."""
    monkeypatch.setattr(protocol, "HEAD_S", 0.4)
    served = serve(Echo())
    whole = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    with connected(served) as silent, connected(served) as slow, connected(served) as second:
        second.sendall(whole)
        assert ended(second)
        time.sleep(0.5)  # idle between requests is no sin
        second.sendall(whole)
        assert ended(second)
        second.sendall(b"GET /health HT")
        slow_ended = False
        for byte in HEAD[:40]:
            try:
                slow.sendall(bytes([byte]))
            except OSError:
                slow_ended = True
                break
            time.sleep(0.05)
        assert slow_ended
        for connection in (silent, second):
            with suppress(ConnectionResetError):
                assert connection.recv(4096) == b""
    assert served.chat().status_code == 200


def test_a_body_that_does_not_come(serve):
    served = serve(Echo(), ServeConfig(port=0, body_s=0.3, max_requests=1, drain_s=1))
    with connected(served) as slow:
        slow.sendall(HEAD + b"\r\n{")
        time.sleep(0.1)
        assert served.chat().status_code == 503  # it has the one place
        assert b"408 " in slow.recv(4096)
    assert served.chat().status_code == 200


def test_a_reply_that_takes_too_long(serve):
    script = Script([Text(text="half"), 60.0, *words("never")])
    served = serve(script, ServeConfig(port=0, reply_s=0.3, drain_s=1))
    reply = served.chat()
    assert reply.status_code == 504 and reply.headers["x-should-retry"] == "false"
    assert reply.json()["error"]["code"] == "timeout" and "0.3 s" in reply.json()["error"]["message"]
    assert script.closed.wait(5)  # and its work has stopped
    script.closed.clear()
    lines = served.chat(stream=True).text.split("\n\n")
    assert '"half"' in lines[1] and '"timeout"' in lines[-2] and lines[-1] == ""
    assert script.closed.wait(5)
    body = {"model": "echo", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}
    assert served.http.post("/v1/messages", json=body).json()["error"]["type"] == "timeout_error"


def test_bytes_that_are_no_request(served: Live):
    with connected(served) as odd:
        odd.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nsp ace: 1\r\n\r\n")
        read = b"".join(iter(lambda: odd.recv(4096), b""))  # and then it hangs up
    head, _, body = read.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n") and b"content-type: application/json" in head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "first", [b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-type: text/plain\r\n", b"GET /health HTTP/1.1\r\nhost: x\r\n"]
)
def test_odd_bytes_after_a_reply(served: Live, caplog: pytest.LogCaptureFixture, first: bytes):
    """The reply has come before the body, which then makes no sense: there is nothing more to say."""
    with connected(served) as odd:
        odd.sendall(first + b"transfer-encoding: chunked\r\n\r\n")
        assert odd.recv(4096).startswith(b"HTTP/1.1 ")
        odd.sendall(b"ZZ\r\n")
        with suppress(ConnectionResetError):
            assert not b"".join(iter(lambda: odd.recv(4096), b"")).startswith(b"HTTP")
    assert served.chat().status_code == 200
    assert not [record for record in caplog.records if record.exc_info]


def test_an_upgrade_that_there_is_not(served: Live, caplog: pytest.LogCaptureFixture):
    reply = served.http.get("/health", headers={"connection": "upgrade", "upgrade": "websocket"})
    assert reply.status_code == 200 and not caplog.records


def test_a_thousand_idle_connections(serve):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 3000:
        pytest.skip("the system gives no process so many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 3000), hard))
    served = serve(Echo())
    with ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(connected(served))
        assert [served.chat().status_code for _ in range(5)] == [200] * 5


def test_pages_of_others_are_kept_out(serve):
    served = serve(Echo())
    origin = {"origin": "https://evil.example"}
    preflight = {**origin, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    for reply in (served.http.options("/v1/chat/completions", headers=preflight), served.http.get("/v1/models", headers=origin)):
        assert not [name for name in reply.headers if name.startswith("access-control")]
    assert served.http.options("/v1/chat/completions", headers=preflight).status_code == 405


def test_pages_that_are_let_in(serve):
    served = serve(Echo(), ServeConfig(port=0, allow_origin=("https://mine.example",), api_key="a key of mine", drain_s=1))
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    reply = served.http.options("/v1/chat/completions", headers={"origin": "https://mine.example", **ask})
    assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == "https://mine.example"
    assert served.http.options("/v1/chat/completions", headers={"origin": "https://evil.example", **ask}).status_code == 400
    refused = served.http.get("/v1/models", headers={"origin": "https://mine.example"})  # a page must be able to read why
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://mine.example"
    for origin, status in (("https://mine.example", 200), ("https://evil.example", 403)):
        headers = {"origin": origin, "authorization": "Bearer a key of mine"}
        reply = served.http.post("/v1/files", files={"file": ("a", b"x")}, data={"purpose": "batch"}, headers=headers)
        assert reply.status_code == status


def test_control_characters_reach_no_terminal(monkeypatch: pytest.MonkeyPatch):
    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    before = (herd_log.log.handlers[:], herd_log.log.level, herd_log.log.propagate)
    try:
        herd_log.show_logs()
        herd_log.log.info("a model called %s", "\x1b[2J\x1b]0;x\x07\rnot\x9bhere é")
    finally:
        herd_log.log.handlers[:], herd_log.log.level, herd_log.log.propagate = before
    assert shown.getvalue() == "a model called \\x1b[2J\\x1b]0;x\\x07\\x0dnot\\x9bhere é\n"


@pytest.mark.parametrize("error", [ResourceError("no memory\nforged line"), RuntimeError("a bug"), HerdError("no")])
def test_what_is_said_stays_out_of_the_log(serve, caplog: pytest.LogCaptureFixture, error: Exception):
    caplog.set_level(logging.INFO)
    served = serve(Script([Text(text="it answered"), error]), ServeConfig(port=0, api_key="the key of the house", drain_s=1))
    served.http.headers["authorization"] = "Bearer the key of the house"
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{SECRET}"}}
    for stream in (False, True):
        served.chat(SECRET, stream=stream)
    served.chat([image])
    served.chat(SECRET, temperature=9, unknown=SECRET)
    served.http.post("/v1/chat/completions", content=SECRET, headers={"content-type": "application/json"})
    served.http.get(f"/{SECRET}", headers={"authorization": f"Bearer {SECRET}", "x-request-id": SECRET})
    text = caplog.text
    assert "failed" in text
    for secret in (SECRET, "it answered", "the key of the house"):
        assert secret not in text
    assert all("\n" not in record.getMessage() for record in caplog.records)
