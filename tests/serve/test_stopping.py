"""Real processes: what a signal does to replies under way, and that two servers on one machine do not meet."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

import herd.cli.serve as verb
from herd.engine.local import Model, load
from herd.serve.config import ServeConfig
from tests.processes import Fork, Forks

HERD = "herd.cli.main:main"


def serve_slowly(step_s: float, drain_s: int) -> int:
    """`herd serve tiny`, whose words take their time, or whose steps do not end."""

    def slow(name: str, **choices: Any) -> Model:
        model = load(name, **choices)
        runner = model.thread.engine.runner
        see = runner.see
        runner.see = lambda plan: (time.sleep(step_s), see(plan))  # type: ignore[method-assign, assignment, func-returns-value]
        return model

    verb.load = slow  # type: ignore[attr-defined]
    return verb.run(verb.Options(models=("tiny",), serve=ServeConfig(port=0, drain_s=drain_s)))


@contextmanager
def slow(forks: Forks, home: Path, *, step_s: float, drain_s: int) -> Iterator[tuple[Fork, httpx2.Client]]:
    """Such a server in a process, and a client of it."""
    with (
        forks.run("tests.serve.test_stopping:serve_slowly", step_s, drain_s, HERD_HOME=str(home)) as server,
        httpx2.Client(base_url=server.url, timeout=30) as http,
    ):
        yield server, http


def stream(http: httpx2.Client, num_tokens: int):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hey"}], "stream": True, "max_tokens": num_tokens, "ignore_eos": True}
    return http.stream("POST", "/v1/chat/completions", json=body)


def rest(lines: Iterator[str]) -> list[str]:
    return [line[6:] for line in lines if line]


def test_a_reply_that_can_end_does(forks: Forks, tmp_path: Path):
    with slow(forks, tmp_path, step_s=0.02, drain_s=20) as (server, http):
        with stream(http, 40) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            with pytest.raises(httpx2.ConnectError), httpx2.Client(base_url=http.base_url) as late:
                late.get("/health")
            assert rest(lines)[-1] == "[DONE]"
        assert server.wait(30) == 0
        assert "Traceback" not in server.err


@pytest.mark.parametrize("step_s", [0.1, 1000])
def test_a_reply_that_cannot_end_is_told(forks: Forks, tmp_path: Path, step_s: float):
    """Also of an engine whose step never ends."""
    with slow(forks, tmp_path, step_s=step_s, drain_s=1) as (server, http):
        if step_s > 100:
            body = {"model": "tiny", "messages": [{"role": "user", "content": "hey"}]}
            with pytest.raises(httpx2.ReadTimeout):
                http.post("/v1/chat/completions", json=body, timeout=0.5)
            server.send_signal(signal.SIGTERM)
        else:
            with stream(http, 900) as reply:
                lines = reply.iter_lines()
                next(lines)
                server.send_signal(signal.SIGTERM)
                assert json.loads(rest(lines)[-1])["error"]["message"].startswith("the server is stopping")
        assert server.wait(30) == 0
        assert "Traceback" not in server.err


def test_a_second_signal_waits_no_longer(forks: Forks, tmp_path: Path):
    with slow(forks, tmp_path, step_s=0.1, drain_s=300) as (server, http):
        with stream(http, 900) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            time.sleep(1)  # two that come at once are one
            assert server.poll() is None
            server.send_signal(signal.SIGTERM)
            assert "the server is stopping" in rest(lines)[-1]
        assert server.wait(30) in (0, 1)


def test_two_servers_on_one_machine(forks: Forks, tmp_path: Path):
    """Each has its port and its folder; who wants that of another is told, and the other goes on."""
    command = ["serve", "tiny", "--port", "0"]
    folder = [*command, "--data-folder", str(tmp_path / "data")]
    home = {"HERD_HOME": str(tmp_path)}
    with forks.run(HERD, folder, **home) as one, forks.run(HERD, command, **home) as other:
        assert one.url != other.url
        with forks.run(HERD, folder, **home) as failed:
            assert (failed.wait(60), failed.err.splitlines()) == (
                1,
                [f"error: another server keeps its data in {tmp_path / 'data'}", "hint: give another --data-folder"],
            )
        for server in (one, other):
            reply = httpx2.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 2}, timeout=30)
            assert reply.status_code == 200
