"""What a server of the default model takes: memory, which two of them share, and the time to its first token. Read from /proc."""

import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from herd.checkpoint.store import home
from herd.engine.local import Model
from tests.processes import serving

pytestmark = [pytest.mark.weights, pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")]

KV_GIB = 0.05


@dataclass
class Server:
    """A running `herd serve`."""

    process: subprocess.Popen[bytes]
    url: str
    seconds: float  # from its start to the first token of its first reply

    def sizes(self, only: str = "") -> dict[str, int]:
        """Bytes by kind ("Rss", "Pss", ...) of its mappings, or of those whose file's path ends with `only`."""
        found: dict[str, int] = {}
        is_wanted = False
        for line in Path(f"/proc/{self.process.pid}/smaps").read_text().splitlines():
            head, *rest = line.split()
            if not head.endswith(":"):
                is_wanted = line.endswith(only)
            elif is_wanted and rest[-1] == "kB":
                found[head[:-1]] = found.get(head[:-1], 0) + int(rest[0]) * 1024
        return found


def ask(url: str, max_tokens: int) -> float:
    """Seconds that a reply takes."""
    body = {"model": "cria", "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": max_tokens}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    start = time.perf_counter()
    with urllib.request.urlopen(request, timeout=60) as response:
        assert json.load(response)["usage"]["completion_tokens"] <= max_tokens
    return time.perf_counter() - start


@pytest.fixture(scope="module")
def servers(cria: Model) -> Iterator[list[Server]]:
    """Two servers, one started after the other, which have each answered."""
    del cria  # it is here, so that the servers need not fetch it
    running: list[Server] = []
    with ExitStack() as stack:
        for _ in range(2):
            start = time.perf_counter()
            process, url = stack.enter_context(serving("cria", "--kv-gib", str(KV_GIB)))
            ask(url, 1)
            running.append(Server(process, url, time.perf_counter() - start))
            ask(url, 200)
        yield running


def test_a_server_takes_the_models_file_and_little_more(servers: list[Server]) -> None:
    """Resident: the file, the room for keys and values, and 300 MB for Python, torch and everything else."""
    file = home() / "models" / "cria" / "model.safetensors"
    for server in servers:
        assert server.sizes()["Rss"] <= file.stat().st_size + KV_GIB * 2**30 + 300e6


def test_two_servers_share_the_weights(servers: list[Server]) -> None:
    """Both have nearly all of the file mapped, each page counts as half for each, and no page was copied."""
    for server in servers:
        weights = server.sizes("/models/cria/model.safetensors")
        assert weights["Rss"] > 0.9 * (home() / "models" / "cria" / "model.safetensors").stat().st_size
        assert weights["Pss"] <= 0.55 * weights["Rss"]
        assert weights["Private_Dirty"] == 0


def test_the_first_token_comes_soon(servers: list[Server]) -> None:
    """Five seconds from the start of the process, and well under one once it is up; the best of a few on a busy machine."""
    assert min(server.seconds for server in servers) < 5
    assert min(ask(server.url, 1) for server in servers for _ in range(3)) < 1
