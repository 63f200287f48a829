"""Real processes: what a signal does to replies under way, and that two servers on one machine do not meet."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

ROOT = Path(__file__).parents[2]

# `herd serve tiny`, whose words take their time, or whose steps do not end
SLOW = """
import sys, time
import herd.cli.serve as verb
from herd.engine.local import load
from herd.serve.config import ServeConfig

def slow(name, **choices):
    model = load(name, **choices)
    runner = model.thread.engine.runner
    see = runner.see
    runner.see = lambda plan: (time.sleep({step_s}), see(plan))
    return model

verb.load = slow
sys.exit(verb.run(verb.Options(models=("tiny",), serve=ServeConfig(port=0, drain_s={drain_s}))))
"""


@contextmanager
def process(*command: str, home: Path | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running server and its address."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} | ({"HERD_HOME": str(home)} if home else {})
    running = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith("herd serves"):
                yield running, line.split(" at ")[1].split("/v1")[0]
                return
        raise AssertionError(running.stderr.read() if running.stderr else "")
    finally:
        running.kill()
        running.communicate()


@contextmanager
def slow(home: Path, *, step_s: float, drain_s: int) -> Iterator[tuple[subprocess.Popen[str], httpx2.Client]]:
    code = SLOW.format(step_s=step_s, drain_s=drain_s)
    with process("-c", code, home=home) as (running, url), httpx2.Client(base_url=url, timeout=30) as http:
        yield running, http


def stream(http: httpx2.Client, num_tokens: int):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hey"}], "stream": True, "max_tokens": num_tokens, "ignore_eos": True}
    return http.stream("POST", "/v1/chat/completions", json=body)


def rest(lines: Iterator[str]) -> list[str]:
    return [line[6:] for line in lines if line]


def test_a_reply_that_can_end_does(tmp_path: Path):
    with (
        process("-c", SLOW.format(step_s=0.02, drain_s=20), home=tmp_path) as (server, url),
        httpx2.Client(base_url=url, timeout=30) as http,
    ):
        with stream(http, 40) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            with pytest.raises(httpx2.ConnectError), httpx2.Client(base_url=http.base_url) as late:
                late.get("/health")
            assert rest(lines)[-1] == "[DONE]"
        assert server.wait(30) == 0
        assert server.stderr is not None and "Traceback" not in server.stderr.read()


@pytest.mark.parametrize("step_s", [0.1, 1000])
def test_a_reply_that_cannot_end_is_told(tmp_path: Path, step_s: float):
    """Also of an engine whose step never ends."""
    with (
        process("-c", SLOW.format(step_s=step_s, drain_s=1), home=tmp_path) as (server, url),
        httpx2.Client(base_url=url, timeout=30) as http,
    ):
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
        assert server.stderr is not None and "Traceback" not in server.stderr.read()


def test_a_second_signal_waits_no_longer(tmp_path: Path):
    with (
        process("-c", SLOW.format(step_s=0.1, drain_s=300), home=tmp_path) as (server, url),
        httpx2.Client(base_url=url, timeout=30) as http,
    ):
        with stream(http, 900) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            time.sleep(1)  # two that come at once are one
            assert server.poll() is None
            server.send_signal(signal.SIGTERM)
            assert "the server is stopping" in rest(lines)[-1]
        assert server.wait(30) in (0, 1)


@pytest.mark.slow
def test_two_servers_on_one_machine(tmp_path: Path):
    """Each has its port and its folder; who wants that of another is told, and the other goes on."""
    herd = ("-m", "herd.cli.main", "serve", "tiny", "--port", "0")
    folder = ("--data-folder", str(tmp_path / "data"))
    with process(*herd, *folder, home=tmp_path) as (_, one), process(*herd, home=tmp_path) as (_, other):
        assert one != other
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HERD_HOME": str(tmp_path)}
        failed = subprocess.run([sys.executable, *herd, *folder], env=environment, capture_output=True, text=True, timeout=60)
        assert (failed.returncode, failed.stderr.splitlines()) == (
            1,
            [f"error: another server keeps its data in {tmp_path / 'data'}", "hint: give another --data-folder"],
        )
        for url in (one, other):
            reply = httpx2.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 2}, timeout=30)
            assert reply.status_code == 200
