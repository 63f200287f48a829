"""The app around the routes, and the server around the app: ids, limits, ports, signals."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading

import httpx2
import pytest

from herd.errors import ResourceError, UsageError
from herd.serve.app import bind
from herd.serve.config import ServeConfig
from tests.processes import Forks
from tests.serve.conftest import Live
from tests.serve.echo import Echo, Script


def test_server_needs_no_torch():
    code = "import sys, herd.serve.app; sys.exit([m for m in ('torch', 'herd.engine', 'herd.model') if m in sys.modules] or 0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_request_id(served: Live):
    assert re.fullmatch("[0-9a-f]{32}", served.http.get("/health").headers["x-request-id"])
    assert served.http.get("/health", headers={"x-request-id": "mine-1.2_3"}).headers["x-request-id"] == "mine-1.2_3"
    for strange in ("a b", "x" * 129, "<script>"):
        assert served.http.get("/nowhere", headers={"x-request-id": strange}).headers["x-request-id"] != strange


def test_health(serve):
    healthy = True
    served = serve(Echo(), is_healthy=lambda: healthy)
    reply = served.http.get("/health")
    assert (reply.status_code, reply.json()) == (200, {"status": "ok"})
    healthy = False
    reply = served.http.get("/health")
    assert (reply.status_code, reply.json()) == (503, {"status": "failed"})


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "/v1/chat/completion", 404, "there is no /v1/chat/completion. Hint: did you mean '/v1/chat/completions'?"),
        ("POST", "/chat/completions", 404, "did you mean '/v1/chat/completions'?"),
        ("GET", "/health/", 404, "did you mean '/health'?"),
        ("GET", "/zzzz", 404, "there are: "),
        ("GET", "/docs", 404, "there is no /docs"),
        ("GET", "/v1/chat/completions", 405, "/v1/chat/completions does not take GET. Hint: it takes POST"),
    ],
)
def test_no_such_route(served: Live, method: str, path: str, status: int, message: str):
    reply = served.http.request(method, path)
    error = reply.json()["error"]
    assert reply.status_code == status and message in error["message"] and error["type"] == "invalid_request_error"
    assert reply.headers["x-request-id"]
    assert reply.headers.get("allow") == ("POST" if status == 405 else None)


def test_content_type(served: Live):
    """curl's default, and all that a web page may post to another site without asking, is refused."""
    for kind in ("application/x-www-form-urlencoded", "text/plain", ""):
        reply = served.http.post("/v1/chat/completions", content=b"{}", headers={"content-type": kind})
        assert reply.status_code == 415
        assert "content-type: application/json" in reply.json()["error"]["message"]


def test_body_too_large(served: Live):
    """Counted as it comes: a body in pieces announces no length."""
    pieces = (b" " * 10_000 for _ in range(100))
    for content in (b" " * 100_001, pieces):
        reply = served.http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
        assert reply.status_code == 413
        assert "larger than 100,000 bytes" in reply.json()["error"]["message"]
    assert served.chat("x" * 99_000).status_code == 200


def test_client_that_goes_away_as_it_asks(served: Live, caplog):
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"
        )
    assert served.chat().status_code == 200
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


def test_port_in_use():
    with bind(ServeConfig(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(ResourceError, match=f"port {port} on 127.0.0.1 is in use") as caught:
            bind(ServeConfig(port=port))
    assert "--port" in caught.value.hint and caught.value.exit_code == 1
    with bind(ServeConfig(port=port)) as again:  # free once more
        assert again.getsockname()[1] == port


def test_connections_send_at_once():
    with bind(ServeConfig(port=0)) as listener, socket.create_connection(listener.getsockname()), listener.accept()[0] as connection:
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_host_that_is_not_here():
    with pytest.raises(ResourceError, match=r"cannot listen on 192\.0\.2\.1 port 8000"):
        bind(ServeConfig(host="192.0.2.1"))


@pytest.mark.parametrize("choice", [{"port": -1}, {"port": 65536}, {"max_body_bytes": 0}, {"ping_s": 0}, {"drain_s": 0}])
def test_config_out_of_range(choice: dict[str, int]):
    with pytest.raises(UsageError) as caught:
        ServeConfig(**choice)
    assert caught.value.param in choice


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_server_in_good_order(forks: Forks, stop: signal.Signals):
    """A short reply is finished, a long one is told, and the process goes on after `run`."""
    with (
        forks.run("tests.serve.echo:serve_echo", 0.05) as server,
        httpx2.Client(base_url=server.url, timeout=10) as http,
        stream(http, "short " * 10) as short,
        stream(http, "long " * 1000) as long,
    ):
        lines = [short.iter_lines(), long.iter_lines()]
        assert all("assistant" in next(line) for line in lines)
        server.send_signal(stop)
        assert [line for line in lines[0] if line][-1] == "data: [DONE]"
        last = json.loads([line for line in lines[1] if line][-1][6:])
        assert last["error"]["message"] == "the server is stopping. Hint: send the request again"
        assert server.wait(10) == 0
        assert server.out.endswith("\nstopped\n") and "Traceback" not in server.err


def stream(http: httpx2.Client, text: str):
    body = {"model": "echo", "messages": [{"role": "user", "content": text}], "stream": True}
    return http.stream("POST", "/v1/chat/completions", json=body)


def test_stopping_server_tells_a_client_that_waits(serve):
    backend = Script([60.0])
    served = serve(backend)

    def stop() -> None:
        assert backend.started.wait(5)
        served.server.should_exit = True

    threading.Thread(target=stop).start()
    reply = served.chat()
    assert (reply.status_code, reply.json()["error"]["type"]) == (503, "server_error")
    assert backend.closed.is_set()
